"""Empirical risk minimisation on what is labelled: the baseline that every adaptation method is measured against.

    min_{F,C}  CE(C(F(x_s)), y_s)         (regression: Gaussian negative log-likelihood)

Where target labels are granted, the loop adds the same term on them, so this is also joint supervised training.
"""

from __future__ import annotations

from transfer_cli.methods.base import Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class SourceOnly(NetworkMethod):
    needs = Needs(source_labels=True)

    def phases(self) -> list[Gradient]:
        return [Gradient("train", [Update(self.losses, [Moves.of(self.network)])], parts=("source", "target_labelled"))]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        logits = self.network(batch.source.x).logits
        return Losses({"supervised": self.network.supervised(logits, batch.source.y)})
