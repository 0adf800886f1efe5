"""FixMatch (Sohn et al., NeurIPS 2020) with the target as the unlabelled set, and two changes for domains that AdaMatch made
(Berthelot et al., ICLR 2022).

    min_{F,C}  CE(C(F(x_s)), y_s) + w · 1/B Σ_t [max q_t ≥ τ] CE(C(F(strong view of x_t)), argmax q_t)
    q_t = softmax(C(F(weak view of x_t)))

`weight` is w (λ_u), `threshold` τ. AdaMatch's: `distribution_alignment` multiplies q_t by E[p_s] / E[q_t] and normalises it,
where E is the mean over the batch and p_s the source's predictions, and so takes the classes' shares to be the source's;
`relative_threshold` makes the threshold τ · E[max p_s], since the network may be unsure of the source too. Both off is FixMatch.
`used` is the share of target samples that count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.selftraining.confidence import check_threshold, confident_cross_entropy


class FixMatch(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)
    uses_strong = True

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        threshold: float = 0.95,
        distribution_alignment: bool = False,
        relative_threshold: bool = False,
    ) -> None:
        super().__init__(context)
        check_threshold(threshold)
        self.weight, self.threshold = weight, threshold
        self.distribution_alignment, self.relative_threshold = distribution_alignment, relative_threshold

    def phases(self) -> list[Gradient]:
        update = Update(self.losses, [Moves.of(self.network)])
        return [Gradient("adapt", [update], views={"target": ("weak", "strong")})]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        weak, strong = batch.views["target"]
        with torch.no_grad():
            guess = self.network(weak).logits.float().softmax(1)
        source, target = self.network.both(batch.source.x, strong)
        known = source.logits.detach().float().softmax(1)
        if self.distribution_alignment:
            guess = align(guess, known)
        sure = known.amax(1).mean() if self.relative_threshold else 1.0
        pseudo, used = confident_cross_entropy(target.logits, guess, self.threshold * sure)
        supervised = self.network.supervised(source.logits, batch.source.y)
        return Losses({"supervised": supervised, "pseudo_label": self.weight * pseudo}, {"used": used})


def align(target: Tensor, source: Tensor) -> Tensor:
    """Target predictions `(B, K)` rescaled so that their mean leans to that of the source's `(B', K)`."""
    return F.normalize(target * source.mean(0) / target.mean(0).clamp_min(1e-6), p=1, dim=1)
