"""Empirical risk minimisation on what is labelled: the baseline that every adaptation method is measured against.

    min_{F,C}  CE(C(F(x_s)), y_s)         (regression: Gaussian negative log-likelihood)

Where target labels are granted, the loop adds the same term on them, so this is also joint supervised training.
"""

from __future__ import annotations

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class SourceOnly(NetworkMethod):
    needs = Needs(source_labels=True)

    def __init__(self, context: Context) -> None:
        if context.domain_batches == "domain_specific" and not context.has_target_labels:
            raise ValueError("trains no BatchNorm layers of the target: set trainer.domain_batches=separate")
        super().__init__(context)

    def phases(self) -> list[Gradient]:
        return [Gradient("train", [Update(self.losses, [Moves.of(self.network)])], parts=("source", "target_labelled"))]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        logits = self.network(batch.source.x, "source").logits
        return Losses({"supervised": self.network.supervised(logits, batch.source.y)})
