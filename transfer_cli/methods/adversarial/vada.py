"""Virtual adversarial domain adaptation (Shu, Bui, Narui & Ermon, ICLR 2018).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ_d · L_d + λ_s · L_v(x_s) + λ_t · (L_v(x_t) + H(C(F(x_t))))
    min_D      BCE(D(F(x)), domain)            L_d = BCE(D(F(x)), the other domain)

Decision boundaries keep away from samples: H, the conditional entropy, drives them out of dense regions of the target, and the
virtual adversarial loss L_v keeps predictions constant around each sample (`math/virtual_adversarial.py`). F and D play in turns,
as in the paper, not by gradient reversal. `domain_weight` is λ_d, `source_weight` λ_s, `target_weight` λ_t (1e-2, 0 or 1, and 1e-2
or 1e-1 in the paper). `radius` is the root mean square of a perturbation, so that one value serves inputs of any size: the paper's
Euclidean 3.5 on 32 x 32 x 3 values between -1 and 1 is 0.03 of their range. D has one layer of `hidden` units and learns at
`discriminator_lr` times the configured rate. The passes for L_v leave BatchNorm's running statistics alone. Sequences cannot be
perturbed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator, domain_loss
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.entropies import entropies
from transfer_cli.methods.math.virtual_adversarial import virtual_adversarial
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.running_statistics import keep_statistics


class VADA(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        domain_weight: float = 0.01,
        source_weight: float = 1.0,
        target_weight: float = 0.01,
        radius: float = 0.03,
        hidden: int = 100,
        discriminator_lr: float = 1.0,
    ) -> None:
        super().__init__(context)
        self.domain_weight, self.source_weight, self.target_weight = domain_weight, source_weight, target_weight
        self.radius, self.discriminator_lr = radius, discriminator_lr
        self.discriminator = DomainDiscriminator(self.network.feature_dim, hidden, hidden_layers=1)

    def phases(self) -> list[Gradient]:
        discriminator = Moves.of(self.discriminator, lr_scale=self.discriminator_lr, player="discriminator")
        updates = [Update(self.losses, [Moves.of(self.network)]), Update(self.discriminator_losses, [discriminator])]
        return [Gradient("adapt", updates)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        exchanged, _ = domain_loss(self.discriminator(target.features), self.discriminator(source.features))
        with keep_statistics(self.network):
            on_source, on_target = virtual_adversarial(self.logits, (batch.source.x, batch.target), self.radius)
        terms = {
            "supervised": self.network.supervised(source.logits, batch.source.y),
            "domain": self.domain_weight * exchanged,
            "source_smoothness": self.source_weight * on_source.mean(),
            "target_smoothness": self.target_weight * on_target.mean(),
            "target_entropy": self.target_weight * entropies(target.logits).mean(),
        }
        return Losses(terms)

    def discriminator_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        with torch.no_grad(), keep_statistics(self.network):
            source, target = self.network.both(batch.source.x, batch.target)
        loss, accuracy = domain_loss(self.discriminator(source.features), self.discriminator(target.features))
        return Losses({"discriminator": loss}, {"discriminator_accuracy": accuracy})

    def logits(self, source: Any, target: Any) -> list[Tensor]:
        return [outputs.logits for outputs in self.network.both(source, target)]
