"""Optimal transport between Gaussians, in closed form (Dowson & Landau 1982; in domain adaptation Flamary, Lounici & Ferrari 2019).

    source  (x - μ_s) A + μ_t,      A = C_s^(-1/2) (C_s^(1/2) C_t C_s^(1/2))^(1/2) C_s^(-1/2),      target  x

the linear map of least mean squared displacement that takes `N(μ_s, C_s)` to `N(μ_t, C_t)`: symmetric and positive semi-definite,
with `A C_s A = C_t`. C: covariances + `ridge` I; directions in which the source does not vary are mapped to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.eigen import RANK_TOLERANCE, matrix_function, scatter
from transfer_cli.methods.phases import FeatureTask


class LinearOT(FeatureMethod):
    def __init__(self, context: Context, *, ridge: float = 1.0) -> None:
        super().__init__(context)
        if ridge < 0:
            raise TransferError(f"method.ridge must not be negative; it is {ridge}.")
        self.ridge = ridge

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        self.fitted.put(
            map=gaussian_map(covariance(source.x, self.ridge), covariance(target.x, self.ridge)),
            mean_s=source.x.mean(0),
            mean_t=target.x.mean(0),
        )
        return {}

    def map_source(self, z: Tensor) -> Tensor:
        f = self.fitted
        return torch.addmm(f.mean_t - f.mean_s @ f.map, z, f.map)


def gaussian_map(source: Tensor, target: Tensor) -> Tensor:
    """A `(D, D)` from two covariances."""
    values, vectors = torch.linalg.eigh(source)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    inverse = (vectors * _inverse_root(values)) @ vectors.T
    middle = matrix_function(root @ target @ root, lambda values: values.clamp_min(0).sqrt())
    return inverse @ middle @ inverse


def covariance(x: Tensor, ridge: float) -> Tensor:
    """Of samples `(N, D)`, plus `ridge` I."""
    found = scatter(x, x.mean(0)) / max(1, len(x) - 1)
    found.diagonal().add_(ridge)
    return found


def _inverse_root(values: Tensor) -> Tensor:
    solid = values > RANK_TOLERANCE * values.max()
    return values.where(solid, 1.0).rsqrt().where(solid, 0.0)
