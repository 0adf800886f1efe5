"""The projection that TCA and its kin solve for, in the features' dimension: no matrix of samples x samples.

    min_A  tr(Aᵀ K M K A) + λ ‖A‖²_F    subject to   Aᵀ K H K A = I                  K = X Xᵀ (samples in rows)

Its solutions are the k smallest of the generalised eigenproblem `(K M K + λ I) a = φ K H K a`. Every one lies in the range of X:
with `X = V S Uᵀ`, `a = V c` and `M = E Eᵀ`, of few columns, it becomes

    S Uᵀ Xᵀ H X U S c = (1/φ) (F Fᵀ + λ I) c            F = S Uᵀ Xᵀ E,   embedding  Z = K a = X U S c

of the size of the features' rank. `F` has few columns, so `(F Fᵀ + λ I)^(-1/2)` is known in closed form and what is left is the top
of an ordinary symmetric eigenproblem. With a kernel matrix K in place of its features the coefficients are a itself, and K is
only multiplied with. Eigenvectors have unit Euclidean length, as in the published code: the scale of each
embedding's axis depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.eigen import fix_signs, gram, range_of, top_eigenvectors, top_of_operator


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
        values, directions = range_of(gram(x))
        if not 1 <= k <= len(values):
            raise TransferError(f"method.components={k} must be between 1 and {len(values)}, the rank of the features.")
        sizes = values.sqrt()
        mean = directions.T @ x.mean(0)
        centred = torch.diag(values) - len(x) * torch.outer(mean, mean)
        return cls(directions, sizes, sizes[:, None] * centred * sizes)

    def inside(self, form: Tensor) -> Tensor:
        """`S Uᵀ (form) U S` `(r, r)` of a matrix `Xᵀ (...) X` `(D, D)`."""
        return self.sizes[:, None] * (self.directions.T @ form @ self.directions) * self.sizes

    def solve(
        self, contrast: Tensor, ridge: float, k: int, *, spread: Tensor | None = None, penalty: Tensor | None = None
    ) -> Tensor:
        """The map `(D, k)` from features to the embedding.

        Args:
            contrast: `Xᵀ E` `(D, m)`.
            ridge: λ.
            spread, penalty: `inside` forms of another constraint, and of a further term of the objective.
        """
        inner = self.spread if spread is None else spread
        f = self.sizes[:, None] * (self.directions.T @ contrast)
        if penalty is not None:
            return self._solve_dense(f @ f.T + penalty, inner, ridge, k)
        shrink = shrinking(f, ridge)
        _, vectors = top_eigenvectors(shrink(shrink(inner).T), k)
        vectors = shrink(vectors)
        vectors = vectors / vectors.norm(dim=0)
        return self.directions @ (self.sizes[:, None] * vectors)

    def _solve_dense(self, objective: Tensor, inner: Tensor, ridge: float, k: int) -> Tensor:
        root = torch.linalg.cholesky(objective + ridge * torch.eye(len(objective)).to(objective))
        half = torch.linalg.solve_triangular(root, inner, upper=False)
        _, vectors = top_eigenvectors(torch.linalg.solve_triangular(root, half.T, upper=False), k)
        vectors = torch.linalg.solve_triangular(root.T, vectors, upper=True)
        return self.directions @ (self.sizes[:, None] * fix_signs(vectors / vectors.norm(dim=0)))


@dataclass(frozen=True)
class KernelSpan:
    """The same for features `k(x, X)`: the kernel matrix K `(N, N)`, of which no other such matrix is made."""

    kernel: Tensor

    def solve(self, contrast: Tensor, ridge: float, k: int) -> Tensor:
        """The map `(N, k)` from features to the embedding, given `K E` `(N, m)`.

        Raises:
            TransferError: the kernel matrix has a rank below k."""
        n, shrink = len(self.kernel), shrinking(contrast, ridge)

        def inner(vectors: Tensor) -> Tensor:
            images = self.kernel @ shrink(vectors)
            return shrink(self.kernel @ (images - images.mean(0)))

        if 1 <= k <= n:
            values, vectors = top_of_operator(inner, contrast, k)
            if float(values[-1]) > torch.finfo(values.dtype).eps * float(values[0]):
                vectors = shrink(vectors)
                return vectors / vectors.norm(dim=0)
        raise TransferError(
            f"method.components={k} must be at least 1, and no more than the rank of the kernel of {n} samples."
        )


def shrinking(f: Tensor, ridge: float) -> Callable[[Tensor], Tensor]:
    """The product with `sqrt(λ) (F Fᵀ + λ I)^(-1/2)`, F `(N, m)` of few columns."""
    left, singular, _ = torch.linalg.svd(f, full_matrices=False)
    weighted = left * ((1 + singular.square() / ridge).rsqrt() - 1)
    return lambda columns: columns + weighted @ (left.T @ columns)


@dataclass(frozen=True)
class Contrast:
    """`Xᵀ E` `(D, m)` and the Gram matrix `EᵀE` `(m, m)` of an MMD matrix `E Eᵀ`; a column sums a coefficient times each
    sample, of one sign on the source and of the other on the target."""

    columns: Tensor
    gram: Tensor

    def normalised(self) -> Tensor:
        """The columns, with the MMD matrix divided by its Frobenius norm, `‖E Eᵀ‖_F = ‖EᵀE‖_F`."""
        return self.columns / self.gram.norm().sqrt()


def domain_contrast(source: Tensor, target: Tensor) -> Contrast:
    """Of `M_0 = e eᵀ`, `e_i = 1/n_s` on the source and `-1/n_t` on the target: the difference of the domains' means."""
    length = 1 / len(source) + 1 / len(target)
    return Contrast((source.mean(0) - target.mean(0))[:, None], source.new_full((1, 1), length))


def joint_contrast(
    source: Tensor,
    source_labels: Tensor,
    target: Tensor,
    target_labels: Tensor,
    num_classes: int,
    *,
    marginal: float,
    conditional: float = 1.0,
    by_prior: bool = False,
) -> Contrast:
    """Of `marginal M_0 + conditional Σ_c M_c`, `e_c = 1/n_sᶜ` on the source's samples of class c and `-1/n_tᶜ` on the target's.

    A class that one side lacks contributes nothing. `by_prior`: each side's coefficients of class c are multiplied by the root of
    that side's share of it.
    """
    (mean_s, n_s), (mean_t, n_t) = (
        class_means(x, y, num_classes) for x, y in ((source, source_labels), (target, target_labels))
    )
    there = ((n_s > 0) & (n_t > 0)).to(source.dtype) * conditional**0.5
    # a sample's coefficient in e_c is root / n_c on either side
    root_s, root_t = ((n / n.sum()).sqrt() if by_prior else torch.ones_like(n) for n in (n_s, n_t))
    by_class = (root_s[:, None] * mean_s - root_t[:, None] * mean_t) * there[:, None]
    lengths = there.square() * (root_s.square() / n_s.clamp_min(1) + root_t.square() / n_t.clamp_min(1))
    overlaps = marginal**0.5 * there * (root_s / len(source) + root_t / len(target))
    first = domain_contrast(source, target)
    gram = torch.diag(torch.cat([marginal * first.gram[0], lengths]))
    gram[0, 1:] = gram[1:, 0] = overlaps
    return Contrast(torch.cat([marginal**0.5 * first.columns, by_class.T], 1), gram)


def class_means(x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Means `(C, D)`, zero for an empty class, and counts `(C,)`."""
    counts = torch.bincount(y, minlength=num_classes).to(x.dtype)
    sums = torch.zeros(num_classes, x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, y, x)
    return sums / counts.clamp_min(1)[:, None], counts
