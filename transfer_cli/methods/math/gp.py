"""Exact Gaussian processes (Rasmussen & Williams 2006, algorithm 2.1), dense and in float64.

    y = f(x) + ε,    f ~ GP(m, k),    ε_i ~ N(0, σ_i²)         K = k(X, X) + diag σ²,    r = y - m(X)
    -log p(y) = ½ rᵀ K⁻¹ r + ½ log |K| + ½ n log 2π
    f(x) | y ~ N(m(x) + k(x, X) K⁻¹ r,  k(x, x) - k(x, X) K⁻¹ k(X, x))

All of it is a Cholesky factor: there is no switch to iterative solvers at any size, and no tolerance to set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from transfer_cli.errors import TransferError

OfTheta = Callable[[Tensor], Tensor]  # hyperparameters to values; what does not depend on them is computed once


class Process(Protocol):
    """A prior over functions and its noise. Each method looks at inputs and returns a function of the hyperparameters."""

    def between(self, x: Tensor, z: Tensor) -> OfTheta:
        """Prior covariances `(N, M)`."""

    def diagonal(self, x: Tensor) -> OfTheta:
        """Prior variances `(N,)`."""

    def mean(self, x: Tensor) -> OfTheta:
        """Prior means `(N,)`."""

    def noise(self, x: Tensor) -> OfTheta:
        """Noise variances `(N,)`."""


JITTER = (0.0, 1e-10, 1e-8, 1e-6, 1e-4)  # shares of the mean variance


def cholesky(k: Tensor, what: str = "the covariance") -> Tensor:
    """The lower factor of a symmetric matrix `(N, N)`, with as little added to its diagonal as makes it positive definite.

    Raises:
        TransferError: none does.
    """
    scale = k.diagonal().mean()
    for jitter in JITTER:
        factor, info = torch.linalg.cholesky_ex(_plus_diagonal(k, jitter * scale) if jitter else k)
        if int(info) == 0:
            return factor
    reason = "it is not finite" if not bool(k.isfinite().all()) else "a larger noise (method.noise) may help"
    raise TransferError(f"{what} of {len(k):,} points is not positive definite, even with jitter: {reason}.")


class _Inverse(torch.autograd.Function):
    """`K⁻¹` that was found before; its derivative is `-K⁻¹ dK K⁻¹`."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return inverse.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return -inverse @ gradient @ inverse, None


class _NegativeLogDensity(torch.autograd.Function):
    """-log N(r; 0, K + diag σ²) with gradients ½ (K⁻¹ - α αᵀ), its diagonal, and α = K⁻¹ r: a third of the time of a
    derivative through Cholesky's algorithm, a sixth in the Hessian."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, noise: Tensor, r: Tensor) -> Tensor:
        factor = cholesky(_plus_diagonal(k, noise))
        inverse = torch.cholesky_inverse(factor)
        ctx.save_for_backward(k, noise, r, inverse)
        half = torch.linalg.solve_triangular(factor, r[:, None], upper=False)
        return 0.5 * (half.square().sum() + len(r) * math.log(2 * math.pi)) + factor.diagonal().log().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, noise, r, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            inverse = _Inverse.apply(k + torch.diag(noise), inverse)
        alpha = inverse @ r
        by_k = gradient * torch.addr(inverse, alpha, alpha, beta=0.5, alpha=-0.5)
        return by_k, by_k.diagonal(), gradient * alpha


def _plus_diagonal(k: Tensor, values: Tensor) -> Tensor:
    found = k.clone()
    found.diagonal().add_(values)
    return found


def negative_log_likelihood(process: Process, x: Tensor, y: Tensor) -> OfTheta:
    """Of outputs `(N,)` at `(N, D)`; a scalar, twice differentiable in the hyperparameters."""
    prior, mean, noise = process.between(x, x), process.mean(x), process.noise(x)
    return lambda theta: _NegativeLogDensity.apply(prior(theta), noise(theta), y - mean(theta))


class Moments(NamedTuple):
    """`mean` and `variance` of f, and the variance of the `noise`, all `(B,)`."""

    mean: Tensor
    variance: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Posterior:
    """f given data, at one vector of hyperparameters.

        mean(x) = m(x) + p(x)ᵀ w        cov(x, z) = k(x, z) - a(x)ᵀ a(z) + b(x)ᵀ b(z)        a = L⁻¹ k(anchors, x)

    Exact: the anchors are the data, p = a, and there is no b. Sparse (`sparse.py`): p = b = `inner`⁻¹ a.
    """

    process: Process
    theta: Tensor
    anchors: Tensor
    lower: Tensor
    weights: Tensor
    inner: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        """`(B,)`."""
        a, b = self._project(self.process.between(self.anchors, x)(self.theta))
        return self.process.mean(x)(self.theta) + (a if b is None else b).T @ self.weights

    def covariance(self, x: Tensor, z: Tensor) -> Tensor:
        """`(B, C)`."""
        (a_x, b_x), (a_z, b_z) = (self._project(self.process.between(self.anchors, v)(self.theta)) for v in (x, z))
        found = self.process.between(x, z)(self.theta) - a_x.T @ a_z
        return found if b_x is None or b_z is None else found + b_x.T @ b_z

    def variance(self, x: Tensor) -> Tensor:
        """`(B,)`, the diagonal of `covariance`."""
        projected = self._project(self.process.between(self.anchors, x)(self.theta))
        return _less(self.process.diagonal(x)(self.theta), *projected)

    def _project(self, cross: Tensor) -> tuple[Tensor, Tensor | None]:
        a = torch.linalg.solve_triangular(self.lower, cross, upper=False)
        return a, None if self.inner is None else torch.linalg.solve_triangular(self.inner, a, upper=False)


def _less(prior: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """Prior variances `(B,)` less what the data explain."""
    found = prior - a.square().sum(0)
    return (found if b is None else found + b.square().sum(0)).clamp_min(0)


def predict(posteriors: Sequence[Posterior], x: Tensor) -> list[Moments]:
    """At `(B, D)`, of one process and its data under several hyperparameters."""
    process, anchors = posteriors[0].process, posteriors[0].anchors
    between, diagonal = process.between(anchors, x), process.diagonal(x)
    mean, noise, found = process.mean(x), process.noise(x), []
    for p in posteriors:
        a, b = p._project(between(p.theta))
        centre = mean(p.theta) + (a if b is None else b).T @ p.weights
        found.append(Moments(centre, _less(diagonal(p.theta), a, b), noise(p.theta)))
    return found


def condition(process: Process, theta: Tensor, x: Tensor, y: Tensor) -> Posterior:
    """On outputs `(N,)` at `(N, D)`."""
    lower = cholesky(_plus_diagonal(process.between(x, x)(theta), process.noise(x)(theta)))
    residual = (y - process.mean(x)(theta))[:, None]
    return Posterior(process, theta, x, lower, torch.linalg.solve_triangular(lower, residual, upper=False)[:, 0])


def leave_one_out(posterior: Posterior, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance `(N,)` of each output given all the others: `y_i - α_i / [K⁻¹]_ii` and `1 / [K⁻¹]_ii`."""
    precision = torch.cholesky_inverse(posterior.lower)
    alpha = torch.linalg.solve_triangular(posterior.lower.T, posterior.weights[:, None], upper=True)[:, 0]
    return y - alpha / precision.diagonal(), 1 / precision.diagonal()


def mixture(parts: Sequence[Moments], weights: Tensor) -> Moments:
    """First two moments of a mixture of normal predictions, weights `(S,)` summing to one.

    The noise is the mean of the parts'; all else, the parts' disagreement included, more data would remove.
    """
    means, variances, noises = (torch.stack(column) for column in zip(*parts, strict=True))
    mean = weights @ means
    return Moments(mean, weights @ (variances + (means - mean).square()), weights @ noises)
