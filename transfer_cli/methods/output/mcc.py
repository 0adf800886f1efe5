"""Minimum class confusion (Jin, Wang, Long & Wang, ECCV 2020).

    min_{F,C}  CE(C(F(x_s)), y_s) + μ · 1/K Σ_c Σ_{c' ≠ c} C̃_cc'
    Ŷ = softmax(C(F(x_t)) / T),    W_ii = B (1 + exp(-H(ŷ_i))) / Σ_j (1 + exp(-H(ŷ_j))),    C = Ŷᵀ W Ŷ
    C̃_cc' = C_cc' / Σ_c'' C_cc''

C̃ is how much of class c's probability the target samples give to c' as well; certain samples count more by W, which is held
fixed. `weight` is μ, `temperature` is T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.entropies import entropies
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class MCC(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(self, context: Context, *, weight: float = 1.0, temperature: float = 2.5) -> None:
        super().__init__(context)
        if temperature <= 0:
            raise ValueError(f"method.temperature must be positive; it is {temperature}.")
        self.weight, self.temperature = weight, temperature

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        confusion = class_confusion(target.logits, self.temperature)
        return Losses(
            {"supervised": supervised, "confusion": self.weight * confusion}, {"class_confusion": confusion.detach()}
        )


@in_full_precision
def class_confusion(logits: Tensor, temperature: float) -> Tensor:
    """Of logits `(B, K)`, 0-dim: from 0, every sample of one class, to 1 - 1/K, all classes alike."""
    logits = logits / temperature
    certainty = 1 + torch.exp(-entropies(logits.detach()))
    probs = logits.softmax(1)
    confusion = (probs * (len(probs) * certainty / certainty.sum())[:, None]).T @ probs
    shares = confusion / confusion.sum(1, keepdim=True).clamp_min(torch.finfo(confusion.dtype).tiny)
    return 1 - shares.diagonal().mean()
