"""What nearly every run imports, and takes seconds: done once, in the process that the jobs are forked from.

Nothing here may start threads of torch or look for a GPU: neither survives the fork.
"""

import importlib

import matplotlib

import transfer_cli.experiment  # noqa: F401

matplotlib.use("Agg")
for name in (
    "matplotlib.pyplot",
    "sklearn.linear_model",
    "torch._dynamo",  # every optimizer imports it at its first step
    "transfer_cli.launcher.job",
    "transfer_cli.loops.closed_form",
    "transfer_cli.loops.gradient",
    "transfer_cli.loops.optimizers",
):
    importlib.import_module(name)
