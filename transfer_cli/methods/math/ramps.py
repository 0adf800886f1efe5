"""Weights as functions of progress `p` from 0 to 1."""

from __future__ import annotations

import math


def ramp(p: float, gamma: float = 10.0) -> float:
    """`2 / (1 + exp(-gamma p)) - 1`: 0 at the start, 0.46 at p = 0.1, towards 1 (Ganin et al., JMLR 2016, section 5.2.2)."""
    return 2 / (1 + math.exp(-gamma * p)) - 1


def gaussian_ramp(p: float, length: float = 1.0) -> float:
    """`exp(-5 (1 - p / length)²)` up to p = `length`, then 1 (Laine & Aila, ICLR 2017)."""
    return math.exp(-5 * max(0.0, 1 - p / length) ** 2) if length > 0 else 1.0
