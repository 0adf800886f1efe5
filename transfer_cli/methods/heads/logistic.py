"""Multinomial logistic regression on standardised features, solved to its optimum by L-BFGS.

min_{W,b}  Σ_i w_i CE(W z_i + b, y_i) / Σ_i w_i + (l2 / 2) ‖W‖²        z = (x - μ) / σ
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.heads.base import Head, check_classes, mean_one
from transfer_cli.methods.math.logistic import fit_logistic, standardising


class Logistic(Head):
    kinds: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(self, kind: str, outputs: int, *, l2: float = 1e-3) -> None:
        super().__init__(kind, outputs)
        self.l2 = l2

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        check_classes(y)
        mean, scale = standardising(x)
        w, b = fit_logistic((x - mean) / scale, y, self.outputs, self.l2, mean_one(weights, x) / len(x))
        self.fitted.put(w=w / scale, b=b - w @ (mean / scale))

    def predict(self, x: Tensor) -> Prediction:
        return Prediction.from_logits(x.double() @ self.fitted.w.T + self.fitted.b)
