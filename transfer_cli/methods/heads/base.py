"""The contract of a head: a classifier or regressor that is fitted once, on features in float64. Config group `head`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.fitted import Fitted


class Head(nn.Module):
    """Constructor: `(kind, outputs, *, <keys of its YAML>)`: classification with `outputs` classes, or regression with
    `outputs` targets. What fitting finds lies in `fitted`."""

    version: ClassVar[int] = 1
    kinds: ClassVar[tuple[str, ...]] = ("classification", "regression")
    takes_weights: ClassVar[bool] = True  # whether importance weights of samples change its fit

    def __init__(self, kind: str, outputs: int) -> None:
        super().__init__()
        if kind not in self.kinds:
            other = "set head=ridge, knn or svm" if kind == "regression" else "choose another head"
            raise TransferError(f"head {type(self).__name__.lower()} does not do {kind}: {other}.")
        self.kind, self.outputs = kind, outputs
        self.fitted = Fitted()

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """`x` `(N, D)`; `y` `(N,)` class indices or `(N, T)` targets; `weights` `(N,)`, of which only ratios matter."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Prediction:
        """Features `(B, D)` to a distribution a sample."""
        raise NotImplementedError


def mean_one(weights: Tensor | None, x: Tensor) -> Tensor:
    """Weights `(N,)` float64 scaled to a mean of one; all one where there are none."""
    if weights is None:
        return torch.ones(len(x), dtype=torch.float64, device=x.device)
    return weights.double() * (len(x) / weights.double().sum())


def check_classes(y: Tensor) -> None:
    """Raises:
    TransferError: labels of fewer than two classes, between which nothing can be learnt."""
    if len(y.unique()) < 2:
        raise TransferError("the labelled samples are all of one class: a classifier needs two.")
