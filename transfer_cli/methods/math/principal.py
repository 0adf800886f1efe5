"""Principal components, from the covariance or, where there are fewer samples than features, from the samples' Gram matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.eigen import (
    RANK_TOLERANCE,
    gram,
    range_of,
    scatter,
    top_eigenvectors,
    top_of_operator,
)


def principal_components(x: Tensor | Sequence[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal basis `(D, k)`, mean `(D,)`, and the components' variances `(k,)`, descending, followed by the sum of all others
    if there are any.

    Args:
        x: samples `(N, D)`, or several such tensors that count as one.

    Raises:
        TransferError: the samples span fewer than k dimensions.
    """
    parts = [x] if isinstance(x, Tensor) else list(x)
    n, width = sum(map(len, parts)), parts[0].shape[1]
    mean = torch.stack([part.sum(0) for part in parts]).sum(0) / n
    if n < width:
        centred = torch.cat(parts) - mean
        inner = gram(centred.T)
    else:
        inner = torch.stack([scatter(part, mean) for part in parts]).sum(0)
    if 1 <= k <= len(inner):
        values, vectors = top_eigenvectors(inner, k)
        if float(values[-1]) > RANK_TOLERANCE * float(values[0]):
            basis = centred.T @ vectors / values.sqrt() if n < width else vectors
            return basis, mean, _with_others(values, inner.trace()) / n
    rank = len(range_of(inner)[0])
    raise TransferError(
        f"{k} components are asked for, and {n} samples of {width} features span {rank} dimensions around their mean: "
        f"ask for between 1 and {rank}."
    )


def project(x: Tensor, mean: Tensor, basis: Tensor) -> Tensor:
    """`(X - 1 μᵀ) B` `(N, k)` of samples `(N, D)`, of which no centred copy is made."""
    return torch.addmm(-(mean @ basis)[:, None], basis.T, x.T).T  # a tall product is faster lying down


def kernel_components(kernel: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a kernel matrix `k(X, X)` `(N, N)`, whose components are `(k(x, X) - mean) basis`, with `(N, k)` and `(N,)`."""
    n, mean = len(kernel), kernel.mean(0)

    def centred(vectors: Tensor) -> Tensor:
        images = kernel @ (vectors - vectors.mean(0))
        return images - images.mean(0)

    if 1 <= k < n:
        values, vectors = top_of_operator(centred, kernel, k)
        if float(values[-1]) > RANK_TOLERANCE * float(values[0]):
            return vectors / values.sqrt(), mean, _with_others(values, kernel.trace() - n * mean.mean()) / n
    raise TransferError(
        f"{k} components are asked for, and the kernel of {n} samples spans fewer dimensions around its mean: ask for less."
    )


def _with_others(values: Tensor, total: Tensor) -> Tensor:
    others = total - values.sum()
    return torch.cat([values, others[None]]) if float(others) > RANK_TOLERANCE * float(total) else values
