"""Batch nuclear-norm maximisation (Cui et al., CVPR 2020).

    min_{F,C}  CE(C(F(x_s)), y_s) - λ ‖P‖_* / B        P = softmax(C(F(x_t))), (B, K)

The nuclear norm, the sum of singular values, is large where predictions are certain and fall on many classes. `weight` is λ.
Each step's singular value decomposition, of a small matrix, makes a GPU wait for its end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class BNM(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(self, context: Context, *, weight: float = 1.0) -> None:
        super().__init__(context)
        self.weight = weight

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        norm = nuclear_norm(target.logits)
        return Losses({"supervised": supervised, "nuclear": -self.weight * norm}, {"nuclear_norm": norm.detach()})


@in_full_precision
def nuclear_norm(logits: Tensor) -> Tensor:
    """`‖softmax(logits)‖_* / B` of `(B, K)`, 0-dim; at most sqrt(min(B, K) / B)."""
    probs = logits.softmax(1)
    finite = probs.isfinite().all()  # of others the decomposition raises, and the loop would not name step and term
    norm = torch.linalg.matrix_norm(torch.where(finite, probs, 0), "nuc")
    return torch.where(finite, norm, torch.nan) / len(logits)
