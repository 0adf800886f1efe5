"""Sparse Gaussian processes by inducing points: Titsias' collapsed bound (AISTATS 2009).

    log p(y) >= log N(r; 0, Q + diag σ²) - ½ Σ_i (k_ii - q_ii) / σ_i²        Q = k(X, Z) k(Z, Z)⁻¹ k(Z, X)

With k(Z, Z) = L Lᵀ, A = L⁻¹ k(Z, X) diag σ⁻¹ and B = I + A Aᵀ = M Mᵀ the data come in as sums over samples, taken block by
block and recomputed for the gradient, so that memory does not grow with N but by the inputs themselves. It is exact where Z = X.
"""

from __future__ import annotations

import math

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transfer_cli.methods.math.gp import OfTheta, Posterior, Process, cholesky

BLOCK = 4096  # samples at a time
JITTER = 1e-8  # share of the inducing points' variance: k(Z, Z) alone may be singular to the last digit


def inducing_points(x: Tensor, m: int) -> Tensor:
    """`(m, D)`: centres of k-means over `(N, D)`, or the distinct points themselves where they are no more than `m`."""
    distinct = x.unique(dim=0)
    if len(distinct) <= m:
        return distinct
    found = MiniBatchKMeans(m, batch_size=max(BLOCK, 2 * m), n_init=1, random_state=0).fit(x.cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).to(x)


class _Sums:
    """`A Aᵀ` `(M, M)`, `A r / σ` `(M,)` and `½ Σ (log 2π σ² + r² / σ² + k_ii / σ²)` as functions of θ and L."""

    def __init__(self, process: Process, z: Tensor, x: Tensor, y: Tensor) -> None:
        self.blocks = [
            (process.between(z, part), process.diagonal(part), process.mean(part), process.noise(part), values)
            for part, values in zip(x.split(BLOCK), y.split(BLOCK), strict=True)
        ]

    def __call__(self, theta: Tensor, lower: Tensor) -> tuple[Tensor, ...]:
        totals: tuple[Tensor, ...] | None = None
        for block in self.blocks:

            def of_block(theta: Tensor, lower: Tensor, block: tuple = block) -> tuple[Tensor, ...]:
                between, diagonal, mean, noise, values = block
                precision = 1 / noise(theta)
                a = torch.linalg.solve_triangular(lower, between(theta), upper=False) * precision.sqrt()
                r = (values - mean(theta)) * precision.sqrt()
                logs = math.log(2 * math.pi) - precision.log()
                return a @ a.T, a @ r, 0.5 * (logs + r.square() + diagonal(theta) * precision).sum()

            found = checkpoint(of_block, theta, lower, use_reentrant=False, preserve_rng_state=False)
            totals = found if totals is None else tuple(t + f for t, f in zip(totals, found, strict=True))
        assert totals is not None
        return totals


def negative_log_bound(process: Process, z: Tensor, x: Tensor, y: Tensor, times: float = 1.0) -> OfTheta:
    """Of outputs `(N,)` at `(N, D)`, with inducing points `(M, D)`; a scalar, differentiable in the hyperparameters.

    `times`: how many samples each of these stands for, where they are a random part of them.
    """
    sums, prior = _Sums(process, z, x, y), process.between(z, z)

    def bound(theta: Tensor) -> Tensor:
        gram, projected, rest = (times * total for total in sums(theta, _lower(prior(theta))))
        inner = _inner(gram)
        half = torch.linalg.solve_triangular(inner, projected[:, None], upper=False)
        return rest + inner.diagonal().log().sum() - 0.5 * (half.square().sum() + gram.diagonal().sum())

    return bound


def condition(process: Process, theta: Tensor, z: Tensor, x: Tensor, y: Tensor) -> Posterior:
    """The variational posterior given outputs `(N,)` at `(N, D)`."""
    lower = _lower(process.between(z, z)(theta))
    gram, projected, _ = _Sums(process, z, x, y)(theta, lower)
    inner = _inner(gram)
    weights = torch.linalg.solve_triangular(inner, projected[:, None], upper=False)[:, 0]
    return Posterior(process, theta, z, lower, weights, inner)


def _lower(prior: Tensor) -> Tensor:
    return cholesky(prior + torch.diag(JITTER * prior.diagonal()), "the inducing points' covariance")


def _inner(gram: Tensor) -> Tensor:
    return cholesky(gram + torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
