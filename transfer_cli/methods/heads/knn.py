"""k nearest neighbours, Euclidean (Cover & Hart 1967).

Classes have probability `(n_c + 1/K) / (k + 1)`, n_c of the k neighbours being of class c: frequencies, smoothed so that none
is zero. Regression predicts the neighbours' mean; its variance is the mean squared error of leaving each training sample out.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.heads.base import Head

BLOCK = 2**20  # distances held at once, in the processor's cache, unless that leaves blocks of few rows
ROWS = 64
LEFT_OUT = 2000  # at most as many samples estimate the variance


class KNN(Head):
    takes_weights: ClassVar[bool] = False

    def __init__(self, kind: str, outputs: int, *, k: int = 1) -> None:
        super().__init__(kind, outputs)
        if k < 1:
            raise TransferError(f"head.k is a number of neighbours, at least 1; not {k}.")
        self.k = k

    def fit(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        if len(x) < self.k:
            raise TransferError(f"head.k={self.k} neighbours, but only {len(x)} labelled samples.")
        self.fitted.put(x=x.double(), y=y)
        if self.kind == "regression":
            step = -(-len(x) // LEFT_OUT)
            others = nearest(x[::step].double(), x.double(), min(self.k + 1, len(x)))[:, 1:]
            error = y[::step].double() - y[others].double().mean(1)
            self.fitted.put(variance=error.square().mean(0))

    def predict(self, x: Tensor) -> Prediction:
        found = self.fitted.y[nearest(x.double(), self.fitted.x, self.k)]
        if self.kind == "regression":
            mean = found.double().mean(1).float()
            return Prediction(mean=mean, variance=self.fitted.variance.float().expand_as(mean))
        counts = F.one_hot(found, self.outputs).sum(1).double()
        # of classes with equally many neighbours the nearest one's counts as a hair more
        counts.scatter_add_(1, found[:, :1], torch.full_like(counts[:, :1], 1e-6 * (self.k > 1)))
        return Prediction.from_probs((counts + 1 / self.outputs) / (counts.sum(1, keepdim=True) + 1))


def nearest(x: Tensor, among: Tensor, k: int) -> Tensor:
    """Indices `(N, k)` of the rows of `among` `(M, D)` nearest to each row of `x` `(N, D)`, nearest first."""
    norms, rows = among.square().sum(1), max(ROWS, BLOCK // len(among))
    held, found = x.new_empty(min(rows, len(x)), len(among)), []
    for block in x.split(rows):
        squares = torch.addmm(norms, block, among.T, alpha=-2.0, out=held[: len(block)])
        found.append(squares.min(1, keepdim=True).indices if k == 1 else squares.topk(k, dim=1, largest=False).indices)
    return torch.cat(found)
