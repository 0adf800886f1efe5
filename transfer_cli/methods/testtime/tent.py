"""Tent: test-time entropy minimisation (Wang et al., ICLR 2021).

    source    min_{F,C}  CE(C(F(x_s)), y_s)
    adapt     min_{γ,β}  H(C(F(x_t)))         H the mean entropy of the predictions

γ and β are scale and shift of the BatchNorm layers, which normalise by the statistics of each target batch; all other weights
stay the source's. The paper adapts in one pass; here `adapt_steps` says how long, at `affine_lr` times the configured rate. Entropy
alone is least where one class takes all, so few steps are part of the method. The paper predicts each batch by its own
statistics; here predictions use running ones, in which the source's fade by 0.9 a step. Source samples are predicted by the same
network.
"""

from __future__ import annotations

from torch import nn

from transfer_cli.methods.base import Context
from transfer_cli.methods.domain_batchnorm import BATCHNORMS
from transfer_cli.methods.math.entropies import entropies
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.source_first import SourceFirst, refuse_domain_batchnorm


class Tent(SourceFirst):
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        affine_lr: float = 1.0,
        adapt_steps: int | None = 100,
        source_steps: int | None = None,
    ) -> None:
        refuse_domain_batchnorm(context)
        super().__init__(context, source_steps)
        self.affine_lr, self.adapt_steps = affine_lr, adapt_steps
        if not self.affine():
            raise ValueError(
                "finds no BatchNorm layer to move: take a backbone that has some and does not freeze them, or set bottleneck=256"
            )

    def affine(self) -> list[nn.Parameter]:
        layers = [m for m in self.network.modules() if isinstance(m, BATCHNORMS)]
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def phases(self) -> list[Gradient]:
        update = Update(self.losses, [Moves(self.affine(), lr_scale=self.affine_lr)])
        parts = ("target", "target_labelled")
        return [*self.source_phases(), Gradient("adapt", [update], self.adapt_steps, parts)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        return Losses({"entropy": entropies(self.network(batch.target).logits).mean()})
