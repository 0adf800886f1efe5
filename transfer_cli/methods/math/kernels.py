"""Covariance functions, differentiable in their log-parameters (Rasmussen & Williams 2006, chapter 4).

    rbf        s² exp(-r² / 2)                          r² = Σ_d (x_d - z_d)² / ℓ_d²
    matern12   s² exp(-r)
    matern32   s² (1 + √3 r) exp(-√3 r)
    matern52   s² (1 + √5 r + 5 r² / 3) exp(-√5 r)
    linear     Σ_d v_d x_d z_d / D

Parameters lie in one vector: log s², log ℓ (one, or one a dimension: `ard`), and log v where there is a linear part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["rbf", "matern12", "matern32", "matern52", "linear"]


@dataclass(frozen=True)
class Kernel:
    """`linear` adds a linear part to another form. `width`: D."""

    form: Form
    width: int
    ard: bool = False
    linear: bool = False

    @property
    def scales(self) -> int:
        return self.width if self.ard else 1

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.scales if self.form == "linear" else 1 + self.scales + self.linear

    def __call__(self, theta: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Parameters `(>= size,)`, of which the first count, and `(N, D)`, `(M, D)` to `(N, M)`."""
        return self.between(x, z)(theta)

    def between(self, x: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
        """The same as a function of the parameters; with one length-scale, distances are computed once for all of them."""
        if self.form == "linear":
            return lambda theta: (x * (theta[: self.scales].exp() / self.width)) @ z.T
        fixed = None if self.ard else squared_distance(x, z)

        def covariance(theta: Tensor) -> Tensor:
            scale = torch.exp(-theta[1 : 1 + self.scales])
            squared = squared_distance(x * scale, z * scale) if fixed is None else scale.square() * fixed
            found = theta[0].exp() * stationary(self.form, squared)
            return found + (theta[1 + self.scales].exp() / self.width) * (x @ z.T) if self.linear else found

        return covariance

    def diagonal(self, theta: Tensor, x: Tensor) -> Tensor:
        """`k(x, x)` `(N,)`."""
        if self.form == "linear":
            return (x.square() * (theta[: self.scales].exp() / self.width)).sum(1)
        found = theta[0].exp().expand(len(x))
        if self.linear:
            found = found + (theta[1 + self.scales].exp() / self.width) * x.square().sum(1)
        return found


def squared_distance(x: Tensor, z: Tensor) -> Tensor:
    """`(N, D)`, `(M, D)` to `(N, M)`; what rounding alone makes of equal points is zero."""
    norms = x.square().sum(1)[:, None] + z.square().sum(1)
    found = norms - 2 * x @ z.T
    return torch.where(found > 1e-14 * norms, found, 0.0)


def stationary(form: Form, squared: Tensor) -> Tensor:
    """The correlation at squared distances in length-scales; its derivatives are finite at zero too."""
    if form == "rbf":
        return torch.exp(-0.5 * squared)
    apart = squared > 0
    r = torch.where(apart, squared, 1.0).sqrt() * apart
    if form == "matern12":
        return torch.exp(-r)
    if form == "matern32":
        return (1 + math.sqrt(3) * r) * torch.exp(-math.sqrt(3) * r)
    return (1 + math.sqrt(5) * r + 5 / 3 * squared) * torch.exp(-math.sqrt(5) * r)
