"""Self-ensembling: a mean teacher across domains (French, Mackiewicz & Fisher, ICLR 2018; after Tarvainen & Valpola, NIPS 2017).

    min_θ  CE(f_θ(x_s), y_s) + w · 1/B Σ_t [max q_t ≥ τ] (1/K) ‖p_t - q_t‖² + b · m · Σ_k BCE(1/K, p̄_k)
    p = softmax f_θ(view 1 of x_t),   q = softmax f_θ'(view 2 of x_t),   θ' ← a θ' + (1 - a) θ

θ is the student, θ' the teacher, m the share of the batch that counts, p̄ the student's mean prediction: the last term keeps one
class from taking all. `weight` is w, `threshold` τ, `class_balance` b (the authors' code multiplies it by w too), `decay` a. The
teacher predicts; it has seen target batches alone, and its BatchNorm statistics are theirs. The student predicts source samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.selftraining.confidence import check_threshold
from transfer_cli.methods.teacher import Teacher


class MeanTeacher(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 3.0,
        threshold: float = 0.968,
        decay: float = 0.99,
        class_balance: float = 0.005,
    ) -> None:
        super().__init__(context)
        check_threshold(threshold)
        if not 0 <= decay < 1:
            raise ValueError(f"decay is from 0 to below 1, not {decay}")
        self.weight, self.threshold, self.decay, self.class_balance = weight, threshold, decay, class_balance
        self.teacher = Teacher(self.network)

    def phases(self) -> list[Gradient]:
        return [
            Gradient(
                "adapt",
                [Update(self.losses, [Moves.of(self.network)])],
                views={"target": ("weak", "weak")},
                on_start=lambda: self.teacher.copy(self.network),
                after_step=lambda progress: self.teacher.follow(self.network, self.decay, buffers=False),
            )
        ]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        first, second = batch.views["target"]
        source, target = self.network.both(batch.source.x, first)
        student = target.logits.float().softmax(1)
        teacher = self.teacher(second).logits.float().softmax(1)
        used = (teacher.amax(1) >= self.threshold).float()
        terms = {
            "supervised": self.network.supervised(source.logits, batch.source.y),
            "consistency": self.weight * (used * (student - teacher).square().mean(1)).mean(),
        }
        if self.class_balance:
            terms["class_balance"] = self.class_balance * used.mean() * imbalance(student)
        return Losses(terms, {"used": used.mean()})

    def features(self, x: Any) -> Tensor:
        return self.teacher(x).features

    def predict(self, x: Any) -> Prediction:
        return Prediction.from_logits(self.teacher(x).logits)


def imbalance(probs: Tensor) -> Tensor:
    """Binary cross-entropy, summed over classes, of the mean prediction of `(B, K)` to the uniform one."""
    mean, share = probs.mean(0).clamp(1e-6, 1 - 1e-6), 1 / probs.shape[1]
    return -(share * mean.log() + (1 - share) * torch.log1p(-mean)).sum()
