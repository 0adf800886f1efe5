"""Batch nuclear norm (Cui et al., CVPR 2020): the sum of the singular values of predictions `(N, K)` on target inputs, over N.

High when each prediction is sure and the classes are all used, as `im`. It falls with N: compare runs on the same samples.
"""

from __future__ import annotations

import torch

from transfer_cli.evaluation.validators import View, needs, sampled


@needs("classification")
def bnm(view: View) -> float:
    probs = sampled(view.target.probs)
    return float(torch.linalg.svdvals(probs).sum()) / len(probs)
