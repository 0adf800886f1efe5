"""Importance weights: how many samples they leave."""

from __future__ import annotations

from torch import Tensor


def effective_share(weights: Tensor) -> float:
    """Kish's effective sample size `(Σ w)² / Σ w²` of weights `(N,)`, as a share of N: 1 for equal ones, 1/N for a single one."""
    return float(weights.sum().square() / weights.square().sum() / len(weights))
