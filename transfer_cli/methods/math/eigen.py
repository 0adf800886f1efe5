"""Eigenvectors of symmetric matrices, float64, with signs that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.linalg import eigh
from torch import Tensor

RANK_TOLERANCE = 1e-12  # eigenvalues below this share of the largest are rounding


def top_eigenvectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues `(k,)`, descending, and their eigenvectors `(D, k)`."""
    n = len(matrix)
    if matrix.device.type == "cpu" and k < n:  # LAPACK finds a part for a part of the price
        values, vectors = map(torch.from_numpy, eigh(matrix.numpy(), subset_by_index=[n - k, n - 1]))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:k], fix_signs(vectors.flip(1)[:, :k])


def range_of(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(r,)`, descending, and eigenvectors `(D, r)` of the part of a positive semi-definite matrix that is not zero."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    kept = values > RANK_TOLERANCE * values[0].clamp_min(torch.finfo(values.dtype).tiny)
    return values[kept], fix_signs(vectors[:, kept])


def matrix_function(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`V f(Λ) Vᵀ` of a symmetric matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * function(values)) @ vectors.T


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns whose largest component is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
