"""Methods that use the source to start from, and then the target alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class SourceFirst(NetworkMethod):
    """Supervised training on the source comes first, or another run's network (`source_model`) in its place; that run's
    source is then not needed. `smoothing`: of the source's labels.
    """

    needs = Needs(source_labels_or_model=True, target_inputs=True)

    def __init__(self, context: Context, source_steps: int | None = None, smoothing: float = 0.0) -> None:
        super().__init__(context)
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing is a share from 0 to below 1, not {smoothing}")
        self.starts_trained = context.source_model is not None
        self.source_steps, self.smoothing = source_steps, smoothing

    def source_phases(self, **options: Any) -> list[Gradient]:
        """The phase on the source, or none. `options`: of the phase, in place of the usual."""
        if self.starts_trained:
            return []
        update = Update(self.source_losses, [Moves.of(self.network)])
        return [Gradient("source", [update], **{"steps": self.source_steps, "parts": ("source",), **options})]

    def source_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        logits = self.network(batch.source.x, "source").logits
        if self.smoothing:
            return Losses({"supervised": F.cross_entropy(logits, batch.source.y, label_smoothing=self.smoothing)})
        return Losses({"supervised": self.network.supervised(logits, batch.source.y)})


def refuse_domain_batchnorm(context: Context) -> None:
    """Raises:
    ValueError: each domain is to have BatchNorm layers of its own, and the target's would never see the source's training."""
    if context.domain_batches == "domain_specific":
        raise ValueError("goes on with the source's BatchNorm layers: set trainer.domain_batches=separate")
