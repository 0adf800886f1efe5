"""What methods that learn a distribution over networks share: training on all that is labelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from transfer_cli.methods.base import Context, Needs, Network, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Labelled, Losses, Moves, Progress, Update
from transfer_cli.methods.source_first import refuse_domain_batchnorm


class Supervised(NetworkMethod):
    """On the source, where its classes are the head's, and on granted target labels."""

    needs = Needs(any_labels=True)
    handles_target_labels = True
    label_spaces = ("closed", "partial", "separate")

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        refuse_domain_batchnorm(context)
        self.parts = ("source", "target_labelled") if context.source_labels_fit_head else ("target_labelled",)

    def train_phase(self, **options: Any) -> Gradient:
        update = Update(self.losses, [Moves.of(self.network)])
        return Gradient("train", [update], **{"parts": self.parts, **options})

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        return Losses(labelled_terms(batch, lambda x, y, domain: loss_of(self.network, x, y, domain)))


def labelled_parts(batch: Batch) -> list[tuple[Labelled, str]]:
    """With the domain that each is of."""
    parts = ((batch.source, "source"), (batch.target_labelled, "target"))
    return [(part, domain) for part, domain in parts if part is not None]


def labelled_terms(batch: Batch, loss: Callable[[Any, Tensor, str], Tensor]) -> dict[str, Tensor]:
    """`loss(x, y, domain)` of each labelled part of the batch."""
    names = {"source": "supervised", "target": "target_supervised"}
    return {names[domain]: loss(part.x, part.y, domain) for part, domain in labelled_parts(batch)}


def loss_of(network: Network, x: Any, y: Tensor, domain: str) -> Tensor:
    return network.supervised(network(x, domain).logits, y)
