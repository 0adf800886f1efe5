"""Symmetric matrices and their eigenvectors, float64, with signs that do not depend on the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

BLOCK = 2048  # samples centred at once
DENSE = 500  # up to this size a matrix is decomposed as a whole
RANK_TOLERANCE = 1e-12  # eigenvalues below this share of the largest are rounding


def gram(x: Tensor) -> Tensor:
    """`XᵀX` `(D, D)` of samples `(N, D)`."""
    if x.device.type == "cpu":  # numpy sees that it is symmetric, and does half the work
        return torch.from_numpy(x.numpy().T @ x.numpy())
    return x.T @ x


def scatter(x: Tensor, mean: Tensor) -> Tensor:
    """`(X - 1 μᵀ)ᵀ (X - 1 μᵀ)` `(D, D)` of samples `(N, D)`, of which no centred copy is made."""
    found, centred = x.new_zeros(x.shape[1], x.shape[1]), torch.empty_like(x[:BLOCK])
    for block in x.split(BLOCK):
        found += gram(torch.sub(block, mean, out=centred[: len(block)]))
    return found


def top_eigenvectors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues `(k,)`, descending, and their eigenvectors `(D, k)`."""
    n = len(matrix)
    if matrix.device.type == "cpu" and k < n:  # LAPACK finds a part for a part of the price
        values, vectors = map(torch.from_numpy, eigh(matrix.numpy(), subset_by_index=[n - k, n - 1]))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:k], fix_signs(vectors.flip(1)[:, :k])


def top_of_operator(multiply: Callable[[Tensor], Tensor], like: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same of a symmetric positive semi-definite matrix that is only ever multiplied with (Lanczos, to machine precision).

    Args:
        multiply: columns `(N, m)`, or a vector `(N,)`, to their products with the matrix.
        like: any tensor `(N, ...)` with its size, type and device.
    """
    n = len(like)
    if n > DENSE and k <= n // 10:

        def product(vector: Any) -> Any:
            return multiply(torch.from_numpy(vector).to(like)).cpu().numpy()

        start = np.random.default_rng(0).standard_normal(n)
        try:
            operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
            values, vectors = (torch.from_numpy(found).to(like) for found in eigsh(operator, k, which="LA", v0=start))
            return values.flip(0), fix_signs(vectors.flip(1))
        except ArpackError:  # eigenvalues that hardly differ, or too few that are not zero
            pass
    return top_eigenvectors(multiply(torch.eye(n).to(like)), k)


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
