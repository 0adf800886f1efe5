"""Ridge regression on standardised features; as a classifier, of the one-hot classes.

    min_{W,b}  ½ Σ_i w_i ‖W z_i + b - y_i‖² / Σ_i w_i + (l2 / 2) ‖W‖²        z = (x - μ) / σ

Each sample left out of its own fit has the residual `e_i / (1 - h_ii)`, exactly (Hastie, Tibshirani & Friedman 2009, section
7.10), h being the matrix that takes labels to fitted values. In regression, the variance is the weighted mean of the squares of
these residuals: those of the fit itself would be too small by the degrees of freedom that it has used. Class probabilities are
`softmax(scores / T)`, the temperature T being the one under which left-out scores have the greatest likelihood.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.temperature import fit_temperature
from transfer_cli.methods.heads.base import Head, check_classes, mean_one
from transfer_cli.methods.math.logistic import fit_ridge, standardising


class Ridge(Head):
    version: ClassVar[int] = 2  # the variance is of left-out residuals

    def __init__(self, kind: str, outputs: int, *, l2: float = 1e-3) -> None:
        super().__init__(kind, outputs)
        self.l2 = l2

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        x, share = x.double(), mean_one(weights, x) / len(x)
        mean, scale = standardising(x)
        z = (x - mean) / scale
        classifies = self.kind == "classification"
        if classifies:
            check_classes(y)
        elif len(y) < 2:
            raise TransferError(
                "ridge regression has one labelled sample, which tells no variance: two or more are needed."
            )
        wanted = F.one_hot(y, self.outputs).double() if classifies else y.double()
        w, b = fit_ridge(z, wanted, self.l2, share)
        left_out = (wanted - z @ w.T - b) / (1 - self._leverage(z, share)).clamp_min(1e-8)[:, None]
        w, b = w / scale, b - w @ (mean / scale)
        if not classifies:
            self.fitted.put(w=w, b=b, variance=share @ left_out.square())
            return
        temperature = fit_temperature(wanted - left_out, y, share)
        self.fitted.put(w=w / temperature, b=b / temperature)

    def _leverage(self, z: Tensor, share: Tensor) -> Tensor:
        """`(N,)`: the diagonal of the matrix that takes labels to fitted values."""
        centred = z - share @ z
        gram = (centred * share[:, None]).T @ centred + self.l2 * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), centred.T, upper=False)
        return share * (1 + half.square().sum(0))

    def predict(self, x: Tensor) -> Prediction:
        outputs = x.double() @ self.fitted.w.T + self.fitted.b
        if self.kind == "classification":
            return Prediction.from_logits(outputs)
        return Prediction(mean=outputs.float(), variance=self.fitted.variance.float().expand_as(outputs))
