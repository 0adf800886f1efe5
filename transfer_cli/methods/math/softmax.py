"""Multinomial logistic regression with any Gaussian prior, solved to its optimum in float64.

    f(W) = Σ_i w_i CE(W x_i, y_i) + ½ ⟨W - M, P (W - M)⟩        W, M (K, D)

    newton      each step with the factorised Hessian
    newton_cg   each step by conjugate gradients on Hessian-vector products (Nocedal & Wright 2006, algorithm 7.1)
    lbfgs       limited-memory BFGS (ibid., algorithm 7.5)

The latter two know what Böhning's bound of the Hessian, ½ (I - 11ᵀ/K) ⊗ Σ w x xᵀ (Böhning, AISM 1992), makes of a class's block:
B = ½ (1 - 1/K) Σ w x xᵀ and the prior's. `newton_cg` is preconditioned by B, and `lbfgs` seeks V = W L of B = L Lᵀ (whitening),
where all directions are nearly alike. One factor of size D serves all classes. All three end where no component of the gradient
exceeds a tolerance. docs/optimisation.md compares them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from transfer_cli.errors import TransferError

Times = Callable[[Tensor], Tensor]  # of `(K, D)`
Solver = Literal["auto", "newton", "newton_cg", "lbfgs"]
DENSE = 1000  # unknowns K · D, up to which the Hessian is formed
SMALL = 20_000  # N K · D, up to which Newton's method, which ends far below the tolerance, is done in some milliseconds


@dataclass(frozen=True)
class Precision:
    """P as `diagonal` `(K, D)`, plus `A ⊗ B` of `kron` = A `(K, K)`, B `(D, D)`, plus `full` `(K D, K D)`, rows of W in turn."""

    diagonal: Tensor
    kron: tuple[Tensor, Tensor] | None = None
    full: Tensor | None = None

    def __call__(self, v: Tensor) -> Tensor:
        out = self.diagonal * v
        if self.kron is not None:
            out = out + self.kron[0] @ v @ self.kron[1]
        if self.full is not None:
            out = out + (self.full @ v.flatten()).view_as(v)
        return out

    def dense(self) -> Tensor:
        out = torch.diag(self.diagonal.flatten())
        if self.kron is not None:
            out = out + torch.kron(*self.kron)
        return out if self.full is None else out + self.full

    def shared(self) -> Tensor:
        """A matrix `(D, D)` that stands for the block of each class."""
        classes, width = self.diagonal.shape
        out = torch.diag(self.diagonal.mean(0))
        if self.kron is not None:
            out = out + self.kron[0].diagonal().mean() * self.kron[1]
        if self.full is not None:
            out = out + torch.diag(self.full.diagonal().view(classes, width).mean(0))
        return out

    def diagonals(self) -> Tensor:
        """Of each class's block, `(K, D)`."""
        out = self.diagonal
        if self.kron is not None:
            out = out + torch.outer(self.kron[0].diagonal(), self.kron[1].diagonal())
        return out if self.full is None else out + self.full.diagonal().view_as(self.diagonal)

    def scaled(self, factor: float) -> Precision:
        kron = None if self.kron is None else (factor * self.kron[0], self.kron[1])
        return Precision(factor * self.diagonal, kron, None if self.full is None else factor * self.full)

    def plus(self, diagonal: Tensor) -> Precision:
        return replace(self, diagonal=self.diagonal + diagonal)


@dataclass(frozen=True)
class Softmax:
    """The problem: `x` `(N, D)`, a column of ones among it if there is to be a bias; `y` `(N,)`; `weights` `(N,)`."""

    x: Tensor
    y: Tensor
    weights: Tensor
    mean: Tensor
    precision: Precision

    def value(self, w: Tensor) -> float:
        log_probs = F.log_softmax(self.x @ w.T, 1)
        away = w - self.mean
        return float(
            -(self.weights * log_probs.gather(1, self.y[:, None])[:, 0]).sum()
            + 0.5 * (away * self.precision(away)).sum()
        )

    def gradient(self, w: Tensor, probs: Tensor) -> Tensor:
        residual = self.weights[:, None] * (probs - F.one_hot(self.y, len(w)))
        return residual.T @ self.x + self.precision(w - self.mean)

    def curvature(self, probs: Tensor, v: Tensor) -> Tensor:
        """The Hessian at weights of these probabilities, times v `(K, D)`."""
        along = self.x @ v.T
        along = self.weights[:, None] * probs * (along - (probs * along).sum(1, keepdim=True))
        return along.T @ self.x + self.precision(v)

    def hessian(self, w: Tensor) -> Tensor:
        """`(K D, K D)`."""
        return data_hessian(self.x, self.weights, (self.x @ w.T).softmax(1)) + self.precision.dense()

    def minimise(
        self, start: Tensor | None = None, tolerance: float = 1e-6, steps: int = 100, solver: Solver = "auto"
    ) -> Tensor:
        """W `(K, D)` at which no component of the gradient exceeds `tolerance`.

        Args:
            steps: at most, of Newton's method.
            solver: `auto` takes `newton` for few samples and unknowns, and `lbfgs` otherwise.

        Raises:
            TransferError: it is not reached.
        """
        w = self.mean.clone() if start is None else start
        if solver == "auto":
            few = w.numel() <= DENSE and w.numel() * len(self.x) <= SMALL
            solver = "newton" if few else "lbfgs"
        if solver == "lbfgs":
            w, reached = self._whitened(w, tolerance)
            if reached:
                return w
            solver = "newton_cg"  # which rounding stops later
        value = self.value(w)
        solve = self._dense_step if solver == "newton" else self._conjugate_step
        for _ in range(steps):
            probs = (self.x @ w.T).softmax(1)
            gradient = self.gradient(w, probs)
            if float(gradient.abs().max()) <= tolerance:
                return w
            step = solve(w, probs, gradient)
            slope, length = float((gradient * step).sum()), 1.0
            # The slack is what rounding leaves of a decrease near the optimum.
            while self.value(w + length * step) > value + 1e-4 * length * slope + 1e-13 * abs(value) and length > 1e-10:
                length /= 2
            w = w + length * step
            value = self.value(w)
        raise TransferError(
            f"logistic regression has not converged in {steps} steps of Newton's method: more l2 helps."
        )

    def _whitened(self, start: Tensor, tolerance: float) -> tuple[Tensor, bool]:
        """The last W of L-BFGS on V = W L, and whether its gradient is within the tolerance."""
        half, inverse, inverse_t = self._whitening()
        own = (
            F.one_hot(self.y, len(start)) * self.weights[:, None]
        ).T.contiguous()  # (K, N): products are fastest this way round
        last = start

        def value_and_gradient(flat: Any) -> tuple[float, Any]:
            nonlocal last
            last = inverse(torch.from_numpy(flat).to(start).view_as(start))
            away = last - self.mean
            pull = self.precision(away)
            log_probs = F.log_softmax(last @ self.x.T, 0)
            value = -(own * log_probs).sum() + 0.5 * (away * pull).sum()
            gradient = log_probs.exp_().mul_(self.weights).sub_(own) @ self.x + pull
            if float(gradient.abs().max()) <= tolerance:
                raise _Reached
            return float(value), inverse_t(gradient).flatten().cpu().numpy()

        options = {"maxiter": 2000, "maxfun": 4000, "gtol": 0.0, "ftol": 0.0, "maxcor": 20}
        try:
            first = half(start).flatten().cpu().numpy()
            found = minimize(value_and_gradient, first, jac=True, method="L-BFGS-B", options=options)
        except _Reached:
            return last, True
        return inverse(torch.from_numpy(found.x).to(start).view_as(start)), False

    def _dense_step(self, w: Tensor, probs: Tensor, gradient: Tensor) -> Tensor:
        # A bias without prior may be shifted for all classes alike: the Hessian is singular along that.
        hessian = _strengthened(data_hessian(self.x, self.weights, probs) + self.precision.dense(), 1e-10)
        half, failed = torch.linalg.cholesky_ex(hessian)
        if failed:  # hardly any curvature is left where all samples are classified with certainty
            half = torch.linalg.cholesky(_strengthened(hessian, 1e-6))
        return -torch.cholesky_solve(gradient.flatten()[:, None], half).view_as(w)

    def _conjugate_step(self, w: Tensor, probs: Tensor, gradient: Tensor) -> Tensor:
        half = torch.linalg.cholesky(self._bound())
        norm = float(gradient.norm())
        step, residual = torch.zeros_like(w), gradient.clone()
        z = torch.cholesky_solve(residual.T, half).T
        direction, rz = -z, float((residual * z).sum())
        for _ in range(w.numel()):
            along = self.curvature(probs, direction)
            rate = rz / float((direction * along).sum())
            step, residual = step + rate * direction, residual + rate * along
            if float(residual.norm()) <= min(0.5, norm**0.5) * norm:
                break
            z = torch.cholesky_solve(residual.T, half).T
            last, rz = rz, float((residual * z).sum())
            direction = -z + rz / last * direction
        return step

    def _bound(self) -> Tensor:
        """B `(D, D)`."""
        outer = (self.x * self.weights[:, None]).T @ self.x
        return _strengthened(0.5 * (1 - 1 / len(self.mean)) * outer + self.precision.shared(), 1e-10)

    def _whitening(self) -> tuple[Times, Times, Times]:
        """Products with L, its inverse and that one's transpose, `(D, D)`; or with diagonals of each class's own where the
        samples span too little for more."""
        samples, width = self.x.shape
        if samples <= width:
            scales = 0.5 * (1 - 1 / len(self.mean)) * (self.weights @ self.x.square()) + self.precision.diagonals()
            half = (scales + 1e-16 * scales.mean(1, keepdim=True)).sqrt()
            inverse = 1 / half
            return half.mul, inverse.mul, inverse.mul
        half = torch.linalg.cholesky(self._bound())
        inverse = torch.linalg.solve_triangular(half, torch.eye(width).to(half), upper=False)
        return lambda v: v @ half, lambda v: v @ inverse, lambda v: v @ inverse.T


class _Reached(Exception):
    """The gradient is within the tolerance."""


def _strengthened(matrix: Tensor, share: float) -> Tensor:
    """A positive semi-definite matrix with its diagonal raised by a share, which serves rows of any scale."""
    diagonal = matrix.diagonal()
    return matrix + torch.diag(share * diagonal + 1e-16 * diagonal.mean())


def data_hessian(x: Tensor, weights: Tensor, probs: Tensor) -> Tensor:
    """Of `Σ w CE`, `(K D, K D)`: `Σ_i w_i (diag p_i - p_i p_iᵀ) ⊗ x_i x_iᵀ`."""
    (_, width), classes = x.shape, probs.shape[1]
    blocks = torch.zeros(classes, width, classes, width, dtype=x.dtype, device=x.device)
    for a in range(classes):
        for b in range(a, classes):
            factor = weights * probs[:, a] * ((1.0 if a == b else 0.0) - probs[:, b])
            blocks[a, :, b] = blocks[b, :, a] = (x * factor[:, None]).T @ x
    return blocks.view(classes * width, classes * width)
