"""The source's softmax head, and what of it a posterior that stands for the source must hold.

    W_s = argmin Σ CE(W z) + ½ ⟨W, P W⟩        H_s = Σ (diag p - p pᵀ) ⊗ z zᵀ at W_s

z are whitened source features with a one for the bias, P is `source_l2` times the number of samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.artefact import SourcePosterior
from transfer_cli.methods.bayes.summary import Summary
from transfer_cli.methods.math.softmax import DENSE, Precision, Softmax, data_hessian

BIAS = 1e-2  # precision of the bias: N(0, 10²)


@dataclass(frozen=True)
class SourceHead:
    """`counts` `(K,)`, `means` `(K, D)` and `whitening` L `(D, D)` with LLᵀ the covariance within classes; `mean` W_s
    `(K, D + 1)`; `factor` F `(K (D + 1), R)` with H_s = FFᵀ, or `(D + 1, R)` with H_s below ½ (I - 11ᵀ/K) ⊗ FFᵀ; `diagonal`
    that of H_s; `temperature` of the posterior. All float64."""

    settings: Mapping[str, Any]
    counts: Tensor
    means: Tensor
    whitening: Tensor
    mean: Tensor
    factor: Tensor
    diagonal: Tensor
    temperature: Tensor

    @classmethod
    def read(cls, posterior: SourcePosterior, context: Context) -> SourceHead:
        """With the classes in the order of the head's, where they are the same."""
        tensors = dict(posterior.tensors)
        if context.source_labels_fit_head and context.class_names:
            order = [posterior.classes.index(name) for name in context.class_names]
            factor = tensors["factor"]
            if len(factor) == tensors["mean"].numel():
                tensors["factor"] = factor.view(len(order), -1, factor.shape[1])[order].flatten(0, 1)
            for name in ("counts", "means", "mean", "diagonal"):
                tensors[name] = tensors[name][order]
        return cls(posterior.settings, **{f.name: tensors[f.name] for f in fields(cls) if f.name != "settings"})

    def to(self, device: torch.device) -> SourceHead:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return SourceHead(self.settings, **{name: tensor.to(device) for name, tensor in tensors.items()})

    def summary(self, device: torch.device) -> Summary:
        half = self.whitening.to(device)
        return Summary(self.counts.to(device), self.means.to(device), half @ half.T)

    def precision(self) -> Precision:
        none = torch.zeros_like(self.mean)
        square = self.factor @ self.factor.T
        if len(square) == self.mean.numel():
            return Precision(none, full=square)
        return Precision(none, kron=(bound_between(len(self.mean), self.mean), square))

    def check(self, **chosen: Any) -> None:
        """Raises:
        ValueError: the head of the posterior was found with other settings."""
        for key, value in chosen.items():
            if self.settings[key] != value:
                raise ValueError(f"prior was made with method.{key}={self.settings[key]}, not {value}: set the same")


def source_optimum(z: Tensor, y: Tensor, classes: int, l2: float) -> Tensor:
    """W_s `(K, D)` of whitened source features `(N, D)` and labels `(N,)`."""
    return source_problem(z, y, classes, l2).minimise()


def source_problem(z: Tensor, y: Tensor, classes: int, l2: float) -> Softmax:
    start = z.new_zeros(classes, z.shape[1])
    return Softmax(z, y, torch.ones_like(z[:, 0]), start, Precision(penalties(start, l2 * len(z))))


def source_curvature(z: Tensor, w: Tensor) -> Precision:
    """H_s; beyond `DENSE` unknowns Böhning's bound of it."""
    none = torch.zeros_like(w)
    if w.numel() <= DENSE:
        return Precision(none, full=data_hessian(z, torch.ones_like(z[:, 0]), (z @ w.T).softmax(1)))
    return Precision(none, kron=(bound_between(len(w), w), z.T @ z))


def diagonal_curvature(z: Tensor, w: Tensor) -> Tensor:
    """The diagonal of H_s, `(K, D)`."""
    probs = (z @ w.T).softmax(1)
    return (probs * (1 - probs)).T @ z.square()


def bound_between(classes: int, like: Tensor) -> Tensor:
    """½ (I - 11ᵀ/K), `(K, K)`."""
    return 0.5 * (torch.eye(classes, dtype=like.dtype, device=like.device) - 1 / classes)


def penalties(like: Tensor, lam: float) -> Tensor:
    """λ for every weight `(K, D)`, and the bias's own precision in the last column."""
    out = torch.full_like(like, lam)
    out[:, -1] = BIAS
    return out


def whitened(x: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    """`L⁻¹ (x - m)` of `(B, D)`, and a column of ones."""
    z = torch.linalg.solve_triangular(half, (x - centre).T, upper=False).T
    return torch.cat([z, torch.ones_like(z[:, :1])], 1)
