"""A linear head on frozen features: extracted once, solved to the optimum (L-BFGS, float64), no epochs of SGD.

    min_{W,b}  mean_s CE(W z + b, y) + mean_t CE(W z + b, y) + (l2 / 2) ‖W‖²        z = (F(x) - μ) / σ

The sums run over the labels at hand: the source's (where its classes are the head's) and the granted target ones;
`labels` restricts them. μ and σ are those of the samples used. In regression, ridge.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Fitted, Method, Needs
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.phases import ClosedForm, Features, FeatureTask


class LinearProbe(Method):
    needs = Needs(any_labels=True)
    handles_target_labels = True

    def __init__(
        self, context: Context, *, l2: float = 1e-3, labels: Literal["all", "source", "target"] = "all"
    ) -> None:
        super().__init__()
        self.backbone, self.kind, self.num_classes = context.backbone, context.kind, context.num_classes
        self.l2, self.labels = l2, labels
        self.use_source = context.source_labels_fit_head and labels != "target"
        if not self.use_source and (labels == "source" or not context.has_target_labels):
            raise TransferError("linear_probe finds no labels for its head: set target_labels=N, or method.labels=all.")
        self.fitted = Fitted()

    def phases(self) -> list[ClosedForm]:
        labelled = {"source": self.use_source, "target_labelled": self.labels != "source"}
        return [ClosedForm("probe", self.fit, parts=[name for name, used in labelled.items() if used])]

    def features(self, x: Any) -> Tensor:
        return self.backbone(x)

    def fit(self, task: FeatureTask) -> None:
        x, y, weights = joined([p for p in (task.source, task.target_labelled) if p is not None])
        mean, scale = x.mean(0), x.std(0, correction=0)
        scale = torch.where(scale > 1e-8, scale, 1.0)  # a constant feature stays one
        z = (x - mean) / scale
        if self.kind == "classification":
            w, b = fit_logistic(z, y, self.num_classes, self.l2, weights)
            self.fitted.put(w=w / scale, b=b - w @ (mean / scale))
        else:
            w, b, variance = fit_ridge(z, y, self.l2, weights)
            self.fitted.put(w=w / scale, b=b - w @ (mean / scale), variance=variance)

    def predict(self, x: Any) -> Prediction:
        outputs = self.features(x).double() @ self.fitted.w.T + self.fitted.b
        if self.kind == "classification":
            return Prediction.from_logits(outputs)
        return Prediction(mean=outputs.float(), variance=self.fitted.variance.float().expand_as(outputs))


def joined(parts: list[Features]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, labels and weights of several parts, each part weighing the same in all."""
    labels = [p.y for p in parts if p.y is not None]
    weights = [torch.full((len(p.x),), 1 / len(p.x), dtype=torch.float64, device=p.x.device) for p in parts]
    return torch.cat([p.x for p in parts]), torch.cat(labels), torch.cat(weights)
