"""Pseudo-labels (Lee, ICML workshops 2013), for domains.

    min_{F,C}  CE(C(F(x_s)), y_s) + α(p) · 1/B Σ_t [max q_t ≥ τ] CE(C(F(x_t)), argmax q_t)        q = softmax(C(F(x_t)))
    α(p) = w · min(1, max(0, (p - p₁) / (p₂ - p₁)))

q is held fixed: a sample's own most probable class is its label. `weight` is w, `ramp_start` and `ramp_end` are p₁ and p₂, as
shares of training. The paper, on unlabelled samples of the same domain, has w 3 and keeps every sample (`threshold` τ 0); across
domains only the sure ones are kept. `used` is their share.
"""

from __future__ import annotations

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.selftraining.confidence import check_threshold, confident_cross_entropy


class PseudoLabel(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        threshold: float = 0.95,
        ramp_start: float = 0.1,
        ramp_end: float = 0.6,
    ) -> None:
        super().__init__(context)
        check_threshold(threshold)
        if not 0 <= ramp_start < ramp_end:
            raise ValueError(f"ramp_start and ramp_end are shares with 0 <= start < end, not {ramp_start}, {ramp_end}")
        self.weight, self.threshold = weight, threshold
        self.ramp_start, self.ramp_end = ramp_start, ramp_end

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def alpha(self, p: float) -> float:
        return self.weight * min(1.0, max(0.0, (p - self.ramp_start) / (self.ramp_end - self.ramp_start)))

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        pseudo, used = confident_cross_entropy(target.logits, target.logits.float().softmax(1), self.threshold)
        supervised = self.network.supervised(source.logits, batch.source.y)
        return Losses({"supervised": supervised, "pseudo_label": self.alpha(progress.p) * pseudo}, {"used": used})
