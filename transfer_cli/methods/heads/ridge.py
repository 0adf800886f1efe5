"""Ridge regression on standardised features; as a classifier, of the one-hot classes.

    min_{W,b}  ½ Σ_i w_i ‖W z_i + b - y_i‖² / Σ_i w_i + (l2 / 2) ‖W‖²        z = (x - μ) / σ

Class probabilities are `softmax(scores / T)`, the temperature T being the one under which the scores of the samples, each
left out of its own fit (exact for ridge: `e_i / (1 - h_ii)`), have the greatest likelihood.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.heads.base import Head, check_classes, mean_one
from transfer_cli.methods.math.logistic import fit_ridge, standardising
from transfer_cli.methods.math.temperature import fit_temperature


class Ridge(Head):
    def __init__(self, kind: str, outputs: int, *, l2: float = 1e-3) -> None:
        super().__init__(kind, outputs)
        self.l2 = l2

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        x, share = x.double(), mean_one(weights, x) / len(x)
        mean, scale = standardising(x)
        z = (x - mean) / scale
        if self.kind == "regression":
            w, b, variance = fit_ridge(z, y, self.l2, share)
            self.fitted.put(w=w / scale, b=b - w @ (mean / scale), variance=variance)
            return
        check_classes(y)
        one_hot = F.one_hot(y, self.outputs).double()
        w, b, _ = fit_ridge(z, one_hot, self.l2, share)
        scores = z @ w.T + b
        left_out = one_hot - (one_hot - scores) / (1 - self._leverage(z, share)).clamp_min(1e-8)[:, None]
        temperature = fit_temperature(left_out, y, share)
        self.fitted.put(w=w / scale / temperature, b=(b - w @ (mean / scale)) / temperature)

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
