"""Adaptive feature norm (Xu, Li, Yang & Lin, ICCV 2019).

    stepwise  min_{F,C}  CE(C(F(x_s)), y_s) + λ Σ_{D in {s,t}} mean_{x in D} (‖F(x)‖₀ + Δr - ‖F(x)‖)²        ‖.‖₀: held fixed
    hard      min_{F,C}  CE(C(F(x_s)), y_s) + λ Σ_{D in {s,t}} (mean_{x in D} ‖F(x)‖ - R)²

Features of the target tend to have smaller norms than those of the source, and small norms go with errors: both domains' are
enlarged, by a step each time or towards a common radius. `weight` is λ, `step` is Δr, `radius` is R. The stepwise loss itself
is constant (its gradient is not), so look at the norms that are logged. The paper adds a bottleneck of 1,000 units with
dropout, which is the configuration's to add here.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class AFN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(
        self,
        context: Context,
        *,
        variant: Literal["stepwise", "hard"] = "stepwise",
        weight: float = 0.05,
        step: float = 1.0,
        radius: float = 25.0,
    ) -> None:
        super().__init__(context)
        self.variant, self.weight, self.step, self.radius = variant, weight, step, radius

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        of_source, of_target = norms(source.features), norms(target.features)
        penalty = self.penalty(of_source) + self.penalty(of_target)
        return Losses(
            {"supervised": supervised, "norm": self.weight * penalty},
            {"source_norm": of_source.mean().detach(), "target_norm": of_target.mean().detach()},
        )

    def penalty(self, norm: Tensor) -> Tensor:
        """Of one domain's norms `(B,)`, 0-dim."""
        if self.variant == "hard":
            return (norm.mean() - self.radius).square()
        return (norm.detach() + self.step - norm).square().mean()


@in_full_precision
def norms(features: Tensor) -> Tensor:
    """`(B, D)` to `(B,)`."""
    return torch.linalg.vector_norm(features, dim=1)
