"""Deep ensembles: networks that start apart and are trained side by side (Lakshminarayanan, Pritzel & Blundell, NIPS 2017).

    min_{θ_m}  CE(C_m(F_m(x)), y)   for m = 1..M        predict   (1/M) Σ_m p(y | x, θ_m)

M is `members`. They see the same batches and differ by where they start: backbone and head are initialised anew for each, or, where
the backbone's weights come from a file, the head alone. In regression each predicts a mean and a noise, and their mixture's
moments are reported. The paper's adversarial training is left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Network
from transfer_cli.methods.bayes.supervised import Supervised, labelled_terms, loss_of
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class Ensemble(Supervised):
    def __init__(self, context: Context, *, members: int = 5) -> None:
        super().__init__(context)
        if members < 1:
            raise ValueError("members is at least 1")
        if context.source_model is not None:
            raise ValueError("starts its members apart, and source_model is one start for all: leave that out")
        make = context.make_backbone
        if make is None:
            raise ValueError("starts its members apart, and can so be no second method: take it as the first")
        others = [Network(replace(context, backbone=make())) for _ in range(members - 1)]
        self.others = nn.ModuleList(others)

    def members(self) -> list[Any]:
        return [self.network, *self.others]

    def phases(self) -> list[Gradient]:
        updates = [
            Update(partial(self.member_losses, m), [Moves.of(network, player=f"member_{m + 1}")])
            for m, network in enumerate(self.members())
        ]
        return [Gradient("train", updates, parts=self.parts)]

    def member_losses(self, m: int, batch: Batch, progress: Progress) -> Losses:
        network = self.members()[m]
        return Losses(labelled_terms(batch, lambda x, y, domain: loss_of(network, x, y, domain)))

    def predict(self, x: Any) -> Prediction:
        return Prediction.mixture([network.predict(x) for network in self.members()])

    def predict_source(self, x: Any) -> Prediction:
        return Prediction.mixture([network.predict(x, "source") for network in self.members()])
