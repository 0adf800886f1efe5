"""Which samples are left out together."""

from __future__ import annotations

import torch
from torch import Tensor


def folds_of(y: Tensor, folds: int) -> Tensor | None:
    """The fold `(N,)` of each sample, the samples of a class dealt out in turn; None where no class has two."""
    counts = torch.bincount(y)
    if not len(y) or int(counts.max()) < 2:
        return None
    own = torch.nn.functional.one_hot(y)
    turn = (own.cumsum(0) * own).sum(1) - 1  # the how many-th of its class
    return turn % min(folds, int(counts.max()))
