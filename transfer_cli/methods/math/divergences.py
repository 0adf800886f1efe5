"""Divergences between two samples, source `(N, D)` and target `(M, D)`: scalars, differentiable in both, in float32 at least.

    mmd          squared maximum mean discrepancy, several Gaussian kernels, unbiased      `math/mmd.py`
    coral        ‖C_s - C_t‖²_F / (4 D²) of the covariances                                (Sun & Saenko, ECCV workshops 2016)
    kl           KL(N_s ‖ N_t) of the Gaussians with the samples' moments
                 ½ [tr(C_t⁻¹ C_s) + (μ_t - μ_s)ᵀ C_t⁻¹ (μ_t - μ_s) - D + log |C_t| / |C_s|]
    knn_kl       KL(P_s ‖ P_t) of any densities, by distances to k-th neighbours           (Wang, Kulkarni & Verdú 2009)
                 D / N Σ_i log ν_k(s_i) / ρ_k(s_i) + log M / (N - 1)
    wasserstein  W_1, exact in one dimension; else its mean over directions (sliced)       (Bonneel et al. 2015)
                 ∫ |F_s⁻¹(q) - F_t⁻¹(q)| dq
    renyi        D_α(N_s ‖ N_t) of the same Gaussians, 0 < α < 1                           (Gil, Alajaji & Linder 2013)
                 α/2 (μ_s - μ_t)ᵀ C⁻¹ (μ_s - μ_t) - log(|C| / (|C_s|^(1-α) |C_t|^α)) / (2 (α - 1)),    C = α C_t + (1 - α) C_s

Gaussians need covariances that can be inverted: `shrinkage` δ takes (1 - δ) C + δ tr(C)/D I in their place, without which a batch
of fewer samples than dimensions has none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfer_cli.methods.math.mmd import mmd as mmd_of_layers
from transfer_cli.methods.math.precision import in_full_precision

SMALLEST = 1e-12  # of variances and squared distances


def mmd(source: Tensor, target: Tensor) -> Tensor:
    return mmd_of_layers([(source, target)])


@in_full_precision
def coral(source: Tensor, target: Tensor) -> Tensor:
    return (covariance(source) - covariance(target)).square().sum() / (4 * source.shape[1] ** 2)


@in_full_precision
def kl(source: Tensor, target: Tensor, shrinkage: float = 0.0) -> Tensor:
    apart = target.mean(0) - source.mean(0)
    of_source, of_target = _root(source, shrinkage), _root(target, shrinkage)
    both = torch.linalg.solve_triangular(of_target, torch.cat([of_source, apart[:, None]], 1), upper=False)
    return 0.5 * (both.square().sum() - source.shape[1]) + _half_logdet(of_target) - _half_logdet(of_source)


@in_full_precision
def renyi(source: Tensor, target: Tensor, alpha: float = 0.5, shrinkage: float = 0.0) -> Tensor:
    apart = source.mean(0) - target.mean(0)
    covariances = [_shrunk(covariance(x), shrinkage) for x in (source, target)]
    root = _cholesky(alpha * covariances[1] + (1 - alpha) * covariances[0])
    away = torch.linalg.solve_triangular(root, apart[:, None], upper=False).square().sum()
    halves = [_half_logdet(_cholesky(c)) for c in covariances]
    return 0.5 * alpha * away + (_half_logdet(root) - (1 - alpha) * halves[0] - alpha * halves[1]) / (1 - alpha)


@in_full_precision
def knn_kl(source: Tensor, target: Tensor, k: int = 3) -> Tensor:
    """Consistent, but slow to become right in many dimensions; may be below zero. Of small batches k is
    all that there are."""
    n, width = source.shape
    k = min(k, n - 1, len(target))
    inside, across = (_squares(source, other) for other in (source, target))
    ratio = _smallest(across, k).log() - _smallest(inside, k + 1).log()  # each is its own first neighbour
    return 0.5 * width * ratio.mean() + math.log(len(target) / (n - 1))


@in_full_precision
def wasserstein(source: Tensor, target: Tensor, directions: Tensor | None = None, number: int = 64) -> Tensor:
    """`directions` `(D, P)` of unit length; else `number` of them are drawn, and in one dimension none is needed."""
    if source.shape[1] == 1:
        return wasserstein_1d(source, target).mean()
    if directions is None:
        directions = torch.nn.functional.normalize(source.new_empty(source.shape[1], number).normal_(), dim=0)
    return wasserstein_1d(source @ directions, target @ directions).mean()


def wasserstein_1d(source: Tensor, target: Tensor) -> Tensor:
    """W_1 of each column: `(N, P)` and `(M, P)` to `(P,)`."""
    n, m = len(source), len(target)
    # Quantile functions are constant between multiples of 1/N and of 1/M; in units of 1/(N M) those are whole numbers.
    ends = torch.cat(
        [torch.arange(1, n + 1, device=source.device) * m, torch.arange(1, m + 1, device=source.device) * n]
    )
    ends = ends.sort().values  # a step that both share is there twice, the second time of no length
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    gaps = source.sort(0).values[(starts // m).clamp_max(n - 1)] - target.sort(0).values[(starts // n).clamp_max(m - 1)]
    return ((ends - starts).to(source) / (n * m)) @ gaps.abs()


def covariance(x: Tensor) -> Tensor:
    """Unbiased, `(B, D)` to `(D, D)`."""
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _shrunk(c: Tensor, shrinkage: float) -> Tensor:
    level = c.diagonal().mean()
    identity = torch.eye(len(c), dtype=c.dtype, device=c.device)
    return (1 - shrinkage) * c + (shrinkage * level + SMALLEST) * identity


def _root(x: Tensor, shrinkage: float) -> Tensor:
    return _cholesky(_shrunk(covariance(x), shrinkage))


def _cholesky(c: Tensor) -> Tensor:
    return torch.linalg.cholesky_ex(c).L  # which does not wait for the device to hear whether it succeeded


def _half_logdet(root: Tensor) -> Tensor:
    return root.diagonal().log().sum()


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """`‖a_i - b_j‖²` by differences: small distances count, and as differences of large numbers they would be noise."""
    return (a[:, None] - b).square().sum(2)


def _smallest(squares: Tensor, k: int) -> Tensor:
    """The k-th of each row."""
    return squares.topk(k, dim=1, largest=False).values[:, -1].clamp_min(SMALLEST)
