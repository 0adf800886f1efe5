"""Adversarial discriminative domain adaptation (Tzeng, Hoffman, Saenko & Darrell, CVPR 2017).

    source    min_{M_s,C}  CE(C(M_s(x_s)), y_s)
    adapt     min_D    -E_s log D(M_s(x_s)) - E_t log(1 - D(M_t(x_t)))
              min_M_t  -E_t log D(M_t(x_t))

The target encoder M_t starts as the source's, and learns to pass for it; M_s and the classifier C stay. M_s, its BatchNorm
statistics included, is kept aside for source samples; the network that goes on is M_t's, and granted target labels teach it too.
D has two layers of `hidden` units. `discriminator_lr` and `encoder_lr` are factors of the configured rate: in the second phase no
label holds M_t, and the paper lowers its rate there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator, domain_loss
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.source_first import SourceFirst, refuse_domain_batchnorm
from transfer_cli.methods.teacher import FrozenTeacher


class ADDA(SourceFirst):
    needs = Needs(source_labels=True, target_inputs=True)  # its second phase reads the source's inputs

    def __init__(
        self,
        context: Context,
        *,
        hidden: int = 500,
        discriminator_lr: float = 1.0,
        encoder_lr: float = 0.1,
        source_steps: int | None = None,
    ) -> None:
        refuse_domain_batchnorm(context)
        super().__init__(context, source_steps)
        self.discriminator_lr, self.encoder_lr = discriminator_lr, encoder_lr
        self.discriminator = DomainDiscriminator(self.network.feature_dim, hidden)
        self.source = FrozenTeacher(self.network)  # M_s and C

    def phases(self) -> list[Gradient]:
        encoder = Moves.of(self.network.backbone, self.network.bottleneck, lr_scale=self.encoder_lr)
        discriminator = Moves.of(self.discriminator, lr_scale=self.discriminator_lr, player="discriminator")
        # The encoder's comes first because the first update is the one that learns from granted labels.
        updates = [Update(self.encoder_losses, [encoder]), Update(self.discriminator_losses, [discriminator])]
        source = self.source_phases(predicts=False)  # source samples are predicted by the second phase's copy
        return [*source, Gradient("adapt", updates, on_start=lambda: self.source.copy(self.network))]

    def encoder_losses(self, batch: Batch, progress: Progress) -> Losses:
        logits = self.discriminator(self.network.features(batch.target))
        return Losses({"encoder": F.softplus(-logits).mean()})

    def discriminator_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        with torch.no_grad():
            target = self.network.features(batch.target)
        source = self.source(batch.source.x, "source").features
        domain, accuracy = domain_loss(self.discriminator(source), self.discriminator(target))
        return Losses({"domain": domain}, {"discriminator_accuracy": accuracy})

    def features_source(self, x: Any) -> Tensor:
        return self.source(x, "source").features

    def predict_source(self, x: Any) -> Prediction:
        return self.source.module.predict(x, "source")  # type: ignore[operator]
