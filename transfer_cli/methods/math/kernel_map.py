"""Kernels as explicit features: `φ(x) · φ(y) = k(x, y)`, so that a method written for a linear kernel serves them all.

Exact: from all training samples X, `φ(x) = k(x, X) V Λ^(-1/2)` with `k(X, X) = V Λ Vᵀ` (an n x n matrix, as the kernel needs it).
Nystroem (Williams & Seeger, NIPS 2001): the same from a random choice of training samples. Random features (Rahimi & Recht,
NIPS 2007), for the RBF kernel: `φ(x) = sqrt(2 / m) cos(x W + b)`, W Gaussian. The last two need memory n x m.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from transfer_cli.errors import TransferError
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.math.eigen import range_of

Kernel = Literal["linear", "rbf"]
Approximation = Literal["none", "nystroem", "random_features"]
LARGEST_EXACT = 20_000  # samples; their kernel matrix takes 3.2 GB
PAIRS = 1000  # samples whose distances give the median


class KernelMap(nn.Module):
    """`gamma` of `exp(-gamma ‖x - y‖²)`; None: one over the median squared distance of training samples."""

    def __init__(
        self,
        kernel: Kernel = "linear",
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
    ) -> None:
        super().__init__()
        if kernel == "linear" and approximate != "none":
            raise TransferError("a linear kernel is exact at any size: leave method.approximate=none.")
        self.kernel, self.gamma, self.approximate, self.landmarks = kernel, gamma, approximate, landmarks
        self.fitted = Fitted()

    @property
    def exact(self) -> bool:
        """Whether it needs a matrix of samples x samples."""
        return self.kernel != "linear" and self.approximate == "none"

    def fit(self, x: Tensor, seed: int = 0, whiten: bool = True) -> Tensor:
        """From training samples `(N, D)`; returns their features `(N, m)`.

        Without `whiten` an exact kernel's features stay `k(x, X)`, for methods that solve for coefficients of the samples.

        Raises:
            TransferError: too many samples for an exact kernel matrix.
        """
        if self.kernel == "linear":
            return x
        draw = torch.Generator().manual_seed(seed)
        self.fitted.put(gamma=torch.tensor(self.gamma or 1 / median_square(x, draw), dtype=x.dtype, device=x.device))
        if self.approximate == "random_features":
            directions = torch.randn(x.shape[1], self.landmarks, generator=draw, dtype=x.dtype).to(x.device)
            phases = 2 * math.pi * torch.rand(self.landmarks, generator=draw, dtype=x.dtype).to(x.device)
            self.fitted.put(directions=directions * (2 * self.fitted.gamma).sqrt(), phases=phases)
            return self(x)
        chosen = x
        if self.approximate == "nystroem":
            chosen = x[torch.randperm(len(x), generator=draw)[: self.landmarks].to(x.device)]
        elif len(x) > LARGEST_EXACT:
            raise TransferError(
                f"an exact kernel of {len(x)} samples needs {8e-9 * len(x) ** 2:.0f} GB: set method.approximate=nystroem "
                "or random_features."
            )
        self.fitted.put(centres=chosen)
        if whiten or not self.exact:
            values, vectors = range_of(rbf(chosen, chosen, self.fitted.gamma))
            self.fitted.put(whitening=vectors / values.sqrt())
        return self(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.kernel == "linear":
            return x
        f = self.fitted
        if self.approximate == "random_features":
            return math.sqrt(2 / self.landmarks) * torch.cos(x @ f.directions + f.phases)
        found = rbf(x, f.centres, f.gamma)
        return found @ f.whitening if hasattr(f, "whitening") else found


def rbf(a: Tensor, b: Tensor, gamma: Tensor | float) -> Tensor:
    """`exp(-gamma ‖a_i - b_j‖²)`, `(N, M)`."""
    return square_distances(a, b).mul_(-gamma).exp_()


def square_distances(a: Tensor, b: Tensor) -> Tensor:
    """`(N, M)` squared Euclidean distances, never negative."""
    squares = torch.addmm(b.square().sum(1), a, b.T, alpha=-2.0)
    return squares.add_(a.square().sum(1)[:, None]).clamp_min_(0)


def median_square(x: Tensor, draw: torch.Generator) -> float:
    """The median squared distance between some thousand samples."""
    some = x[torch.randperm(len(x), generator=draw)[:PAIRS].to(x.device)]
    squares = square_distances(some, some)
    rows, columns = torch.triu_indices(len(some), len(some), 1)
    median = float(squares[rows, columns].median()) if len(some) > 1 else 0.0
    if median == 0:
        raise TransferError("the features are constant: no kernel width fits them.")
    return median
