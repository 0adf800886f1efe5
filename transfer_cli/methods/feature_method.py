"""What methods on frozen features share: extract once, bring both domains to one space, fit a head there.

    z = preprocess(F(x))        head fitted on  (map_source(z_s), y_s)  and, where labels are granted,  (map_target(z_t), y_t)

A method says how the maps are found (`adapt`) and what they are; target samples, new ones too, are predicted from `map_target`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from transfer_cli.data.inputs import Extracted
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Method, Needs
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.phases import ClosedForm, Features, FeatureTask
from transfer_cli.methods.preprocessing import Preprocessing


class FeatureMethod(Method):
    needs: ClassVar[Needs] = Needs(source_labels=True, target_inputs=True)
    handles_target_labels = True
    uses_head: ClassVar[bool] = True
    frozen_backbone = True
    parts: ClassVar[tuple[str, ...]] = ("source", "target", "target_labelled")  # of the task that it reads
    head: Head  # not there where a method that brings none has a `learn` and a prediction of its own

    def __init__(self, context: Context, head: Head | None = None) -> None:
        super().__init__()
        self.backbone, self.kind, self.num_classes = context.backbone, context.kind, context.num_classes
        self.preprocessing = Preprocessing(context.features)
        if head is None and self.uses_head:
            assert context.make_head is not None
            head = context.make_head()
        if head is not None:
            self.head = head
        self.fitted = Fitted()
        self.weights: Tensor | None = None  # of the source samples, where `adapt` found any; only ratios matter

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        """Find what `map_source` and `map_target` need, into `fitted`; figures to be logged."""
        return {}

    def map_source(self, z: Tensor) -> Tensor:
        """Preprocessed source features `(B, D)`, float64, to the common space `(B, D')`."""
        return z

    def map_target(self, z: Tensor) -> Tensor:
        """The same for target features."""
        return z

    def phases(self) -> list[ClosedForm]:
        return [ClosedForm("fit", self.fit, parts=self.parts)]

    def fit(self, task: FeatureTask) -> dict[str, float]:
        parts = {"source": task.source, "target": task.target, "target_labelled": task.target_labelled}
        for name, part in parts.items():
            if part is not None:
                check_finite(part.x, name)
        target = task.target if task.target is not None else task.target_labelled
        report = self.preprocessing.fit(_values(task.source), _values(target))
        task = FeatureTask(
            *(None if part is None else replace(part, x=self._preprocess(part.x, name)) for name, part in parts.items())
        )
        self.weights = None
        return report | self.learn(task)

    def learn(self, task: FeatureTask) -> dict[str, float]:
        """On preprocessed features: the maps, then the head; figures to be logged."""
        report = self.adapt(task)
        self.fit_head(task)
        return report

    def fit_head(self, task: FeatureTask) -> None:
        """The head on all labels at hand, each domain weighing the same."""
        maps = ((task.source, self.map_source, self.weights), (task.target_labelled, self.map_target, None))
        found = [(map_(part.x), part.y, weights) for part, map_, weights in maps if part is not None]
        if self.weights is not None and not self.head.takes_weights:
            raise TransferError(
                f"{type(self).__name__} weighs the source samples, which head {type(self.head).__name__.lower()} cannot "
                "heed: set head=logistic, ridge or svm."
            )
        fit_jointly(self.head, [(x, y, weights) for x, y, weights in found if y is not None])

    def features(self, x: Any) -> Tensor:
        return x.values if isinstance(x, Extracted) else self.backbone(x)

    def predict(self, x: Any) -> Prediction:
        return self.head.predict(self.map_target(self._preprocess(self.features(x).double(), "target")))

    def predict_source(self, x: Any) -> Prediction:
        return self.head.predict(self.map_source(self._preprocess(self.features(x).double(), "source")))

    def _preprocess(self, x: Tensor, part: str) -> Tensor:
        return self.preprocessing(x, "source" if part == "source" else "target")


def fit_jointly(head: Head, parts: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    """A head on features, labels and weights of several parts, each part weighing the same in all."""
    x, y = torch.cat([x for x, _, _ in parts]), torch.cat([y for _, y, _ in parts])
    weighed = len(parts) > 1 or parts[0][2] is not None
    head.fit(x, y, torch.cat([share(x, weights) for x, _, weights in parts]) if weighed else None)


def share(x: Tensor, weights: Tensor | None) -> Tensor:
    """Weights `(N,)` float64 that sum to one; equal ones where there are none."""
    if weights is None:
        return torch.full((len(x),), 1 / len(x), dtype=torch.float64, device=x.device)
    return weights / weights.sum()


def check_finite(x: Tensor, name: str) -> None:
    """Raises:
    TransferError: values that are not numbers."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise TransferError(
            f"{bad} of {x.numel()} values in the {name.replace('_', ' ')} features are NaN or infinite."
        )


def both(task: FeatureTask) -> tuple[Features, Features]:
    """Source and target of a task that has them."""
    assert task.source is not None and task.target is not None
    return task.source, task.target


def _values(part: Features | None) -> Tensor | None:
    return None if part is None else part.x
