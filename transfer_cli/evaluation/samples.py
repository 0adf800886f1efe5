"""Which samples stand for all."""

from __future__ import annotations

import torch
from torch import Tensor


def evenly(n: int, wanted: int) -> Tensor:
    """At most `wanted` indices below `n`, evenly spread: data sets are often sorted by class."""
    return torch.linspace(0, n - 1, min(n, wanted), dtype=torch.float64).round().long()
