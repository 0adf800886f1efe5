"""Deep subdomain adaptation network (Zhu et al., IEEE TNNLS 32(4), 2021).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ(p) · 1/|M| Σ_{c in M} ‖Σ_i w_ic φ(f_i^s) - Σ_j v_jc φ(f_j^t)‖²
    λ(p) = w (2 / (1 + exp(-γ p)) - 1)        w_ic = y_ic / Σ_i y_ic,    v_jc = p_jc / Σ_j p_jc

the local maximum mean discrepancy: one a class, source samples counted by their labels y, target samples by their predicted
probabilities p, which are held fixed. M: the classes that some source sample of the batch has and that some target sample is
predicted to have; the others contribute nothing. `weight` is w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.mmd import class_mmd
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class DSAN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(self, context: Context, *, weight: float = 0.5, gamma: float = 10.0) -> None:
        super().__init__(context)
        self.weight, self.gamma, self.num_classes = weight, gamma, context.num_classes

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        labels = F.one_hot(batch.source.y, self.num_classes)
        probs = target.logits.detach().float().softmax(1)
        distances = class_mmd(source.features, target.features, labels, probs).diagonal()
        predicted = F.one_hot(probs.argmax(1), self.num_classes)
        present = labels.any(0) & predicted.any(0)
        distance = torch.where(present, distances, 0).sum() / present.sum().clamp_min(1)
        weight = self.weight * ramp(progress.p, self.gamma)
        return Losses(
            {"supervised": supervised, "local_mmd": weight * distance}, {"local_mmd_distance": distance.detach()}
        )
