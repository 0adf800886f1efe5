"""What nearly every run imports, and takes seconds: done once, in the process that the jobs are forked from.

Nothing here may start threads of torch or look for a GPU: neither survives the fork.
"""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot  # noqa: E402
import sklearn.linear_model  # noqa: E402
import torch._dynamo  # noqa: E402 - every optimizer imports it at its first step

import transfer_cli.experiment  # noqa: E402
import transfer_cli.launcher.job  # noqa: E402
import transfer_cli.loops.closed_form  # noqa: E402
import transfer_cli.loops.gradient  # noqa: E402
import transfer_cli.loops.optimizers  # noqa: E402, F401
