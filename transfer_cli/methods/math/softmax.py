"""Multinomial logistic regression with any Gaussian prior, by Newton's method in float64.

    f(W) = Σ_i w_i CE(W x_i, y_i) + ½ ⟨W - M, P (W - M)⟩        W, M (K, D)

Up to `DENSE` unknowns the Hessian is factorised; beyond, each step is solved by conjugate gradients on Hessian-vector products
(Nocedal & Wright 2006, algorithm 7.1), preconditioned by Böhning's bound of the Hessian,
½ (I - 11ᵀ/K) ⊗ Σ w x xᵀ (Böhning, AISM 1992), of which one factor of size D serves all classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError

DENSE = 1000  # unknowns K · D


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

    def minimise(self, start: Tensor | None = None, tolerance: float = 1e-6, steps: int = 100) -> Tensor:
        """W `(K, D)` at which no component of the gradient exceeds `tolerance`.

        Raises:
            TransferError: it is not reached.
        """
        w = self.mean.clone() if start is None else start
        value = self.value(w)
        solve = self._dense_step if w.numel() <= DENSE else self._conjugate_step
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

    def _dense_step(self, w: Tensor, probs: Tensor, gradient: Tensor) -> Tensor:
        hessian = data_hessian(self.x, self.weights, probs) + self.precision.dense()
        hessian.diagonal().add_(
            1e-10 * hessian.diagonal().mean()
        )  # a bias without prior may be shifted for all classes alike
        return -torch.cholesky_solve(gradient.flatten()[:, None], torch.linalg.cholesky(hessian)).view_as(w)

    def _conjugate_step(self, w: Tensor, probs: Tensor, gradient: Tensor) -> Tensor:
        bound = 0.5 * (1 - 1 / len(w)) * (self.x * self.weights[:, None]).T @ self.x + self.precision.shared()
        bound.diagonal().add_(1e-10 * bound.diagonal().mean())
        half = torch.linalg.cholesky(bound)
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


def data_hessian(x: Tensor, weights: Tensor, probs: Tensor) -> Tensor:
    """Of `Σ w CE`, `(K D, K D)`: `Σ_i w_i (diag p_i - p_i p_iᵀ) ⊗ x_i x_iᵀ`."""
    (_, width), classes = x.shape, probs.shape[1]
    blocks = torch.zeros(classes, width, classes, width, dtype=x.dtype, device=x.device)
    for a in range(classes):
        for b in range(a, classes):
            factor = weights * probs[:, a] * ((1.0 if a == b else 0.0) - probs[:, b])
            blocks[a, :, b] = blocks[b, :, a] = (x * factor[:, None]).T @ x
    return blocks.view(classes * width, classes * width)
