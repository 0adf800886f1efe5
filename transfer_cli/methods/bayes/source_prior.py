"""Fine-tuning whose prior is the posterior of the source's backbone (Shwartz-Ziv et al., NeurIPS 2022).

    source     min_{F,C_s}  CE(C_s(F(x_s)), y_s), with SWAG's snapshots of the backbone's weights w from the share `start` on
    finetune   min_{F,C}  CE(C(F(x_t)), y_t) + (1/N) [½ (w - μ)ᵀ Σ⁻¹ (w - μ) + ½ ‖C‖² / `head_variance`]
               Σ = λ (½ D + Z Zᵀ / (2 (K - 1))) + ε I

N is the number of granted labels (in regression of all their targets, over which the loss is a mean),
`scale` λ and `epsilon` ε; μ, D and Z are SWAG's mean, variances and last K = `rank` deviations
(Maddox et al., NeurIPS 2019). The low-rank factor is scaled by √λ, and Σ⁻¹ is Woodbury's: nothing of the size of all weights
squared. Fine-tuning starts at μ. The penalty stands in for weight decay: `optimizer.weight_decay=0`. λ should bring the source's
variances to the size of what weights move by: SGD's own are small.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from transfer_cli.methods.base import Context, Needs, Outputs
from transfer_cli.methods.bayes.swag import check_snapshots, snapshot
from transfer_cli.methods.bayes.weight_moments import WeightMoments, assign, flat, mahalanobis, woodbury
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.phases import Batch, Gradient, Progress


class SourcePrior(FineTune):
    needs = Needs(source_of_any_classes=True, target_labels=True)
    needs_trained_start = True
    version = 2  # the prior's weight with several targets
    inverse: Tensor
    inner: Tensor

    def __init__(
        self,
        context: Context,
        *,
        scale: float = 1e4,
        epsilon: float = 0.1,
        head_variance: float = 1.0,
        start: float = 0.75,
        every: int = 10,
        rank: int = 20,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        check_snapshots(start, every, rank)
        if context.source_model is not None:
            raise ValueError("needs the source's own training, of which source_model has the end alone: leave that out")
        if min(scale, epsilon, head_variance) <= 0:
            raise ValueError("scale, epsilon and head_variance are positive")
        self.scale, self.epsilon, self.head_variance = scale, epsilon, head_variance
        self.start, self.every = start, every
        self.samples = context.labelled.get("target_labelled", 1) * self.network.averaged_outputs
        size = sum(p.numel() for p in self.weights())
        if not size:
            raise ValueError("is a prior for a backbone's weights, and this one has none that train")
        self.moments = WeightMoments(size, rank)
        self.register_buffer("inverse", torch.ones(size))
        self.register_buffer("inner", torch.eye(rank))

    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.network.backbone.parameters() if p.requires_grad]

    def source_phases(self) -> list[Gradient]:
        return [replace(phase, after_step=self.collect) for phase in super().source_phases()]

    def collect(self, progress: Progress) -> None:
        n = snapshot(progress, self.start, self.every)
        if n:
            self.moments.add(flat(self.weights()), n)

    def factor(self) -> Tensor:
        """`(K, P)`: √λ Z / √(2 (K - 1))."""
        return self.scale**0.5 * self.moments.factor()

    @torch.no_grad()
    def begin(self) -> None:
        diagonal = 0.5 * self.scale * self.moments.variance + self.epsilon
        inverse, inner = woodbury(diagonal, self.factor())
        self.inverse.copy_(inverse)
        self.inner.copy_(inner)
        assign(self.weights(), self.moments.mean)

    def penalties(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        away = flat(self.weights()) - self.moments.mean
        prior = mahalanobis(away, self.inverse, self.factor(), self.inner)
        head = flat(self.network.head.parameters()).square().sum() / self.head_variance
        return {"source_prior": 0.5 * prior / self.samples, "head_prior": 0.5 * head / self.samples}
