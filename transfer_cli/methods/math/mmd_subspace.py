"""The projection that TCA and its kin solve for, in the features' dimension: no matrix of samples x samples.

    min_A  tr(Aᵀ K M K A) + λ ‖A‖²_F    subject to   Aᵀ K H K A = I                  K = X Xᵀ (samples in rows)

Its solutions are the k smallest of the generalised eigenproblem `(K M K + λ I) a = φ K H K a`. Every one lies in the range of X:
with `X = V S Uᵀ`, `a = V c` and `M = E Eᵀ`, of few columns, it becomes

    S Uᵀ Xᵀ H X U S c = (1/φ) (F Fᵀ + λ I) c            F = S Uᵀ Xᵀ E,   embedding  Z = K a = X U S c

of the size of the features' rank. `F` has few columns, so `(F Fᵀ + λ I)^(-1/2)` is known in closed form and what is left is the top
of an ordinary symmetric eigenproblem. Eigenvectors have unit Euclidean length, as in the published code: the scale of each
embedding's axis depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.eigen import range_of, top_eigenvectors


@dataclass(frozen=True)
class Span:
    """What the solutions need of X `(N, D)`: `XᵀX = U S² Uᵀ`, and the scatter that the constraint holds fixed."""

    directions: Tensor  # U, (D, r)
    sizes: Tensor  # S, (r,)
    spread: Tensor  # S Uᵀ Xᵀ H X U S, (r, r)

    @classmethod
    def of(cls, x: Tensor, k: int) -> Span:
        """Raises:
        TransferError: the samples span fewer than k dimensions."""
        values, directions = range_of(x.T @ x)
        if not 1 <= k <= len(values):
            raise TransferError(f"method.components={k} must be between 1 and {len(values)}, the rank of the features.")
        sizes = values.sqrt()
        mean = directions.T @ x.mean(0)
        centred = torch.diag(values) - len(x) * torch.outer(mean, mean)
        return cls(directions, sizes, sizes[:, None] * centred * sizes)

    def solve(self, contrast: Tensor, ridge: float, k: int, spread: Tensor | None = None) -> Tensor:
        """The map `(D, k)` from features to the embedding.

        Args:
            contrast: `Xᵀ E` `(D, m)`.
            ridge: λ.
            spread: `S Uᵀ (...) U S` where the constraint is another.
        """
        f = self.sizes[:, None] * (self.directions.T @ contrast)
        left, singular, _ = torch.linalg.svd(f, full_matrices=False)
        shrink = (1 + singular.square() / ridge).rsqrt() - 1  # (F Fᵀ + λ I)^(-1/2) sqrt(λ) = I + left shrink leftᵀ
        inner = self.spread if spread is None else spread
        inner = inner + (left * shrink) @ (left.T @ inner)
        inner = inner + (inner @ left * shrink) @ left.T
        _, vectors = top_eigenvectors(inner, k)
        vectors = vectors + (left * shrink) @ (left.T @ vectors)
        vectors = vectors / vectors.norm(dim=0)
        return self.directions @ (self.sizes[:, None] * vectors)


def domain_contrast(source: Tensor, target: Tensor) -> Tensor:
    """`Xᵀ e` `(D,)` of the MMD matrix `M0 = e eᵀ`: the difference of the domains' means."""
    return source.mean(0) - target.mean(0)


def class_contrasts(
    source: Tensor, source_labels: Tensor, target: Tensor, target_labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """`Xᵀ e_c` `(D, C)` of each class's MMD matrix, and the squared length `(C,)` of each e_c;
    zero for a class that one side lacks."""
    (mean_s, n_s), (mean_t, n_t) = (
        class_means(x, y, num_classes) for x, y in ((source, source_labels), (target, target_labels))
    )
    there = (n_s > 0) & (n_t > 0)
    lengths = torch.where(there, 1 / n_s.clamp_min(1) + 1 / n_t.clamp_min(1), 0.0)
    return ((mean_s - mean_t) * there[:, None]).T, lengths


def class_means(x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means `(C, D)`, zero for an empty class, and counts `(C,)`."""
    counts = torch.bincount(y, minlength=num_classes).to(x.dtype)
    sums = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, y, x)
    return sums / counts.clamp_min(1)[:, None], counts
