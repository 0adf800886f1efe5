"""Laplace's approximation of a posterior over a few hyperparameters with a normal prior (MacKay 1992).

    θ* = argmin L(θ),    L = -log p(y | θ) - log N(θ; μ, Σ)        p(θ | y) ≈ N(θ*, H⁻¹),    H = ∇² L(θ*)
    log p(y) ≈ -L(θ*) + ½ d log 2π - ½ log |H|

Priors are normalised, so evidences of different models may be compared. With Σ = C Cᵀ, Cᵀ H C is the identity and what the
likelihood adds; its eigenvalues are clipped at one, so that no direction is wider than in the prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from transfer_cli.errors import TransferError

OfTheta = Callable[[Tensor], Tensor]
FAILED = 1e20  # the value where there is none
STEP = 1e-4  # of finite differences
NEAR = 0.1  # of an optimum, in standard deviations of the prior: where its basin is no longer in doubt


@dataclass(frozen=True)
class Prior:
    """N(`mean`, `covariance`) on `(d,)`, and the box in which the optimum is sought; float64."""

    mean: Tensor
    covariance: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, float, float]], like: Tensor) -> Prior:
        """Independent parameters: mean, standard deviation and bounds of each."""
        mean, deviation, lower, upper = torch.tensor(rows, dtype=torch.float64, device=like.device).T
        return cls(mean, torch.diag(deviation.square()), lower, upper)

    @cached_property
    def root(self) -> Tensor:
        """C, of Σ = C Cᵀ."""
        return torch.linalg.cholesky(self.covariance)

    def whiten(self, theta: Tensor) -> Tensor:
        """`C⁻¹ (θ - μ)`."""
        return torch.linalg.solve_triangular(self.root, (theta - self.mean)[:, None], upper=False)[:, 0]

    def negative_log_density(self, theta: Tensor) -> Tensor:
        return 0.5 * (self.whiten(theta).square().sum() + len(theta) * math.log(2 * math.pi)) + self._log_root

    @cached_property
    def _log_root(self) -> Tensor:
        return self.root.diagonal().log().sum()


@dataclass(frozen=True)
class Laplace:
    """N(`mode`, `root` `root`ᵀ), and the log evidence."""

    prior: Prior
    mode: Tensor
    root: Tensor
    log_evidence: float

    @classmethod
    def at(cls, mode: Tensor, prior: Prior) -> Laplace:
        """All mass at the optimum; of no known evidence."""
        return cls(prior, mode, torch.zeros_like(prior.covariance), math.nan)

    @property
    def covariance(self) -> Tensor:
        return self.root @ self.root.T

    def draws(self, n: int) -> Tensor:
        """`(n, d)`, always the same ones, each second the mirror image of the one before; within the bounds."""
        if n == 1:
            return self.mode[None]
        draw = torch.Generator().manual_seed(0)
        half = torch.randn((n + 1) // 2, len(self.mode), generator=draw, dtype=torch.float64)
        noise = torch.stack([half, -half], 1).flatten(0, 1)[:n].to(self.mode)
        return (self.mode + noise @ self.root.T).clamp(self.prior.lower, self.prior.upper)


def laplace(
    negative_log_likelihood: OfTheta, prior: Prior, starts: Tensor, *, twice: bool = True, value: OfTheta | None = None
) -> Laplace:
    """`starts` `(S, d)`. `twice`: the likelihood is twice differentiable; otherwise its Hessian is of finite differences.
    `value`: the likelihood of the evidence, where the other is an estimate of it that costs less.

    Raises:
        TransferError: the likelihood has a value nowhere.
    """
    mode = maximum_a_posteriori(negative_log_likelihood, prior, starts)
    root = prior.root
    curvature = (hessian if twice else hessian_by_differences)(negative_log_likelihood, mode)
    inner = torch.eye(len(mode), dtype=mode.dtype, device=mode.device) + root.T @ curvature @ root
    values, vectors = torch.linalg.eigh(0.5 * (inner + inner.T))
    values = values.clamp_min(1)
    with torch.no_grad():
        loss = (value or negative_log_likelihood)(mode) + 0.5 * prior.whiten(mode).square().sum()
    # log |Σ| and (d / 2) log 2π of the prior's density cancel against those of the integral.
    evidence = -float(loss) - 0.5 * float(values.log().sum())
    return Laplace(prior, mode, (root @ vectors) * values.rsqrt(), evidence)


def maximum_a_posteriori(negative_log_likelihood: OfTheta, prior: Prior, starts: Tensor) -> Tensor:
    """The best of the optima from all `starts` `(S, d)`, by L-BFGS within the bounds. A search that comes near an optimum of an
    earlier one ends there.

    Raises:
        TransferError: the likelihood has a value nowhere.
    """
    scale, precision = prior.covariance.diagonal().sqrt(), torch.cholesky_inverse(prior.root)
    failure: list[TransferError] = []
    seen: list[float] = []

    def value_and_gradient(flat: Any) -> tuple[float, Any]:
        theta = (prior.mean + scale * torch.from_numpy(flat).to(scale)).requires_grad_()
        try:
            loss = negative_log_likelihood(theta)
            (gradient,) = torch.autograd.grad(loss, theta)
        except TransferError as error:
            failure[:] = [error]
            return failed()
        if not bool(loss.isfinite() & gradient.isfinite().all()):
            return failed()
        away = precision @ (theta.detach() - prior.mean)  # the prior's gradient; a graph of its own would cost more
        seen.append(float(loss.detach() + 0.5 * away @ (theta.detach() - prior.mean)))
        return seen[-1], ((gradient + away) * scale).cpu().numpy()

    def failed() -> tuple[float, Any]:
        """A little above the best, so that the line search comes back, and not by more than it must."""
        value = min(seen) + 0.1 * abs(min(seen)) + 1 if seen else FAILED
        return value, torch.zeros_like(scale).cpu().numpy()

    def stop_near_a_known_one(intermediate_result: Any) -> None:
        if any(abs(intermediate_result.x - one.x).max() < NEAR for one in found if one.fun < FAILED):
            raise StopIteration

    lower, upper = (((end - prior.mean) / scale).cpu().numpy() for end in (prior.lower, prior.upper))
    options = {"maxiter": 200, "gtol": 1e-5, "ftol": 1e-9}
    bounds = list(zip(lower, upper, strict=True))
    found: list[Any] = []
    for start in starts:
        seen.clear()
        first = ((start - prior.mean) / scale).cpu().numpy().clip(lower, upper)
        found.append(
            minimize(
                value_and_gradient,
                first,
                jac=True,
                method="L-BFGS-B",
                bounds=bounds,
                options=options,
                callback=stop_near_a_known_one,
            )
        )
    best = min(found, key=lambda result: result.fun)
    if best.fun >= FAILED:
        raise failure[0] if failure else TransferError("the likelihood of the Gaussian process is finite nowhere.")
    return prior.mean + scale * torch.from_numpy(best.x).to(scale)


def starts_of(prior: Prior, n: int = 3) -> Tensor:
    """`(n, d)`: the prior's mean, then draws from the prior and their mirror images, always the same."""
    draw = torch.Generator().manual_seed(1)
    half = torch.randn(n // 2, len(prior.mean), generator=draw, dtype=torch.float64).to(prior.mean)
    steps = torch.stack([half, -half], 1).flatten(0, 1) * prior.covariance.diagonal().sqrt()
    return (prior.mean + torch.cat([torch.zeros_like(prior.mean)[None], steps])).clamp(prior.lower, prior.upper)


def hessian(f: OfTheta, theta: Tensor) -> Tensor:
    """`(d, d)`, a row at a time: all at once would need d times the memory."""
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(theta), theta, create_graph=True)
    return torch.stack([torch.autograd.grad(g, theta, retain_graph=True)[0] for g in gradient])


def hessian_by_differences(f: OfTheta, theta: Tensor) -> Tensor:
    """`(d, d)`, central differences of the gradient."""

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(f(at), at)[0]

    steps = STEP * torch.eye(len(theta), dtype=theta.dtype, device=theta.device)
    rows = torch.stack([(gradient(theta + step) - gradient(theta - step)) / (2 * STEP) for step in steps])
    return 0.5 * (rows + rows.T)
