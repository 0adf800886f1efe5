"""Correlation alignment (Sun, Feng & Saenko, AAAI 2016).

    A = C_s^(-1/2) C_t^(1/2),    C_s, C_t: covariances + `ridge` I;       source  (x - μ_s) A + μ_t,      target  x

The source is whitened and re-coloured as the target. With `form: bilinear` an SVM uses the published code's kernel instead:
`x_i A x_jᵀ` between source samples, and between a source and a target sample. A is not symmetric, so this is another
machine than a linear one on mapped samples, and it is the one behind the paper's figures.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.heads.svm import SVM
from transfer_cli.methods.math.eigen import matrix_function, scatter
from transfer_cli.methods.phases import FeatureTask


class CORAL(FeatureMethod):
    def __init__(self, context: Context, *, ridge: float = 1.0, form: Literal["map", "bilinear"] = "map") -> None:
        super().__init__(context)
        if ridge < 0:
            raise TransferError(f"method.ridge must not be negative; it is {ridge}.")
        if form == "bilinear" and not isinstance(self.head, SVM):
            raise TransferError("method.form=bilinear is a kernel: set head=svm head.kernel=linear.")
        self.ridge, self.form = ridge, form

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        self.fitted.put(
            alignment=alignment(source.x, target.x, self.ridge), mean_s=source.x.mean(0), mean_t=target.x.mean(0)
        )
        return {}

    def map_source(self, z: Tensor) -> Tensor:
        f = self.fitted
        return torch.addmm(f.mean_t - f.mean_s @ f.alignment, z, f.alignment)

    def fit_head(self, task: FeatureTask) -> None:
        if self.form == "map":
            super().fit_head(task)
            return
        if task.target_labelled is not None:
            raise TransferError("method.form=bilinear has no place for granted target labels: set method.form=map.")
        assert task.source is not None and task.source.y is not None and isinstance(self.head, SVM)
        x = task.source.x - self.fitted.mean_s
        self.head.fit_bilinear(x @ self.fitted.alignment, x, task.source.y)

    def map_target(self, z: Tensor) -> Tensor:
        return z - self.fitted.mean_t if self.form == "bilinear" else z


def alignment(source: Tensor, target: Tensor, ridge: float) -> Tensor:
    """`C_s^(-1/2) C_t^(1/2)` `(D, D)`; directions in which the source does not vary are left out of the inverse."""
    whiten = matrix_function(_covariance(source, ridge), _inverse_root)
    return whiten @ matrix_function(_covariance(target, ridge), lambda values: values.clamp_min(0).sqrt())


def _covariance(x: Tensor, ridge: float) -> Tensor:
    covariance = scatter(x, x.mean(0)) / max(1, len(x) - 1)
    covariance.diagonal().add_(ridge)
    return covariance


def _inverse_root(values: Tensor) -> Tensor:
    solid = values > 1e-10 * values.max()
    return values.where(solid, 1.0).rsqrt().where(solid, 0.0)
