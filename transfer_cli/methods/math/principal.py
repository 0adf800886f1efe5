"""Principal components, from the covariance or, where there are fewer samples than features, from the samples' Gram matrix."""

from __future__ import annotations

from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.eigen import RANK_TOLERANCE, gram, range_of, top_of_operator


def principal_components(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal basis `(D, k)`, mean `(D,)`, and the variances `(r,)` of all r components that are not zero, descending.

    Raises:
        TransferError: the samples span fewer than k dimensions.
    """
    mean = x.mean(0)
    centred = x - mean
    if len(x) < x.shape[1]:
        values, left = range_of(gram(centred.T))
        basis = centred.T @ left / values.sqrt()
    else:
        values, basis = range_of(gram(centred))
    if not 1 <= k <= len(values):
        raise TransferError(
            f"{k} components are asked for, and {len(x)} samples of {x.shape[1]} features span {len(values)} dimensions "
            f"around their mean: ask for between 1 and {len(values)}."
        )
    return basis[:, :k], mean, values / len(x)


def kernel_components(kernel: Tensor, k: int) -> tuple[Tensor, Tensor, float]:
    """The same from a kernel matrix `k(X, X)` `(N, N)`: `z = (k(x, X) - mean) basis`.

    Basis `(N, k)`, mean `(N,)`, and the share of the variance that k components have.

    Raises:
        TransferError: the samples span fewer than k dimensions.
    """
    n, mean = len(kernel), kernel.mean(0)

    def centred(vectors: Tensor) -> Tensor:
        images = kernel @ (vectors - vectors.mean(0))
        return images - images.mean(0)

    if 1 <= k < n:
        values, vectors = top_of_operator(centred, kernel, k)
        if float(values[-1]) > RANK_TOLERANCE * float(values[0]):
            return vectors / values.sqrt(), mean, float(values.sum() / (kernel.trace() - kernel.sum() / n))
    raise TransferError(
        f"{k} components are asked for: the kernel of {n} samples spans fewer dimensions around its mean."
    )
