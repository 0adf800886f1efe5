"""One method after another on the same backbone: `method=simclr then=linear_probe`.

Only the backbone's weights pass on. Each method's phases are its own, granted target labels included; the second predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Phase


class Chain(Method):
    def __init__(self, first: Method, second: Method) -> None:
        super().__init__()
        self.first, self.second = first, second

    def phases(self) -> list[Phase]:
        first = [replace(phase, owner=self.first, predicts=False) for phase in self.first.phases()]
        return [*first, *(replace(phase, owner=self.second) for phase in self.second.phases())]

    def features(self, x: Any) -> Tensor:
        return self.second.features(x)

    def features_source(self, x: Any) -> Tensor:
        return self.second.features_source(x)

    def predict(self, x: Any) -> Prediction:
        return self.second.predict(x)

    def predict_source(self, x: Any) -> Prediction:
        return self.second.predict_source(x)

    def artefacts(self) -> Mapping[str, bytes]:
        return self.second.artefacts()

    def pictures(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        return self.second.pictures(source, target)
