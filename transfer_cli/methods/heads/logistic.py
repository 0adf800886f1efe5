"""Multinomial logistic regression on standardised features, solved to its optimum (`methods/math/softmax.py`).

    min_{W,b}  Σ_i w_i CE(W z_i + b, y_i) / Σ_i w_i + (l2 / 2) ‖W‖²        z = (x - μ) / σ

`solver` is chosen by the problem's size (`auto`), or one of those that docs/optimisation.md compares: they find the same optimum.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.heads.base import Head, check_classes, mean_one
from transfer_cli.methods.math.logistic import fit_logistic, standardising
from transfer_cli.methods.math.softmax import Solver


class Logistic(Head):
    version: ClassVar[int] = 2  # another solver
    kinds: ClassVar[tuple[str, ...]] = ("classification",)

    def __init__(self, kind: str, outputs: int, *, l2: float = 1e-3, solver: Solver = "auto") -> None:
        super().__init__(kind, outputs)
        self.l2, self.solver = l2, solver

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        check_classes(y)
        mean, scale = standardising(x)
        share = mean_one(weights, x) / len(x)
        w, b = fit_logistic((x - mean) / scale, y, self.outputs, self.l2, share, solver=self.solver)
        self.fitted.put(w=w / scale, b=b - w @ (mean / scale))

    def predict(self, x: Tensor) -> Prediction:
        return Prediction.from_logits(x.double() @ self.fitted.w.T + self.fitted.b)
