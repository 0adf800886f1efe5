"""Principal components, from the covariance or, where there are fewer samples than features, from the samples' Gram matrix."""

from __future__ import annotations

from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.eigen import range_of


def principal_components(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal basis `(D, k)`, mean `(D,)`, and the variances `(r,)` of all r components that are not zero, descending.

    Raises:
        TransferError: the samples span fewer than k dimensions.
    """
    mean = x.mean(0)
    centred = x - mean
    if len(x) < x.shape[1]:
        values, left = range_of(centred @ centred.T)
        basis = centred.T @ left / values.sqrt()
    else:
        values, basis = range_of(centred.T @ centred)
    if not 1 <= k <= len(values):
        raise TransferError(
            f"{k} components are asked for, and {len(x)} samples of {x.shape[1]} features span {len(values)} dimensions "
            f"around their mean: ask for between 1 and {len(values)}."
        )
    return basis[:, :k], mean, values / len(x)
