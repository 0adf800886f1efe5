"""Partial adversarial domain adaptation (Cao, Ma, Long & Wang, ECCV 2018): the target has some of the source's classes.

    min_{F,C} max_D  mean_s γ_y CE(C(F(x_s)), y) - λ(p) · w · ½ (mean_s γ_y BCE(D(F(x_s)), 1) + mean_t BCE(D(F(x_t)), 0))
    γ = m / max_k m_k        m = mean_t softmax(C(F(x_t)))        λ(p) = 2 / (1 + exp(-κ p)) - 1

DANN in which a source sample weighs as much as its class is predicted on the target's training set, so that classes which the
target lacks neither train C nor are aligned. γ is found anew every `refresh_every` steps (null: once a pass over the target).
`weight` is w, `gamma` the ramp's κ; the discriminator has `hidden` units a layer, `dropout`, and learns at `discriminator_lr`
times the configured rate. Logged: `effective_classes`, (Σ γ)² / Σ γ².
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator, domain_loss, reverse_gradient
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, FeatureTask, Gradient, Losses, Moves, Progress, Refresh, Update


class PADA(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)
    label_spaces = ("closed", "partial")
    class_weights: Tensor

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        gamma: float = 10.0,
        hidden: int = 512,
        dropout: float = 0.5,
        discriminator_lr: float = 10.0,
        refresh_every: int | None = None,
    ) -> None:
        super().__init__(context)
        self.weight, self.gamma, self.discriminator_lr = weight, gamma, discriminator_lr
        self.refresh_every = refresh_every
        self.discriminator = DomainDiscriminator(self.network.feature_dim, hidden, dropout=dropout)
        self.register_buffer("class_weights", torch.ones(context.num_classes))  # γ

    def phases(self) -> list[Gradient]:
        moves = [
            Moves.of(self.network),
            Moves.of(self.discriminator, lr_scale=self.discriminator_lr, player="discriminator"),
        ]
        refresh = Refresh(self.weigh_classes, ["target"], self.refresh_every)
        return [Gradient("adapt", [Update(self.losses, moves)], refresh=refresh)]

    @torch.no_grad()
    def weigh_classes(self, task: FeatureTask) -> None:
        assert task.target is not None
        head = self.network.head
        shares = head(task.target.x.to(head.weight.dtype)).softmax(1).mean(0)
        self.class_weights.copy_(shares / shares.max())

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        strength = self.weight * ramp(progress.p, self.gamma)
        domain, accuracy = domain_loss(
            self.discriminator(reverse_gradient(source.features, strength)),
            self.discriminator(reverse_gradient(target.features, strength)),
            source_weights=self.class_weights[batch.source.y],
        )
        each = F.cross_entropy(source.logits, batch.source.y, reduction="none")
        supervised = (self.class_weights[batch.source.y] * each).mean()
        spread = self.class_weights.sum().square() / self.class_weights.square().sum()
        return Losses(
            {"supervised": supervised, "domain": domain},
            {"discriminator_accuracy": accuracy, "effective_classes": spread},
        )
