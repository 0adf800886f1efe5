"""Co-Tuning: the source's head is kept and fine-tuned too (You, Kou, Long & Wang, NeurIPS 2020).

    min_{F,C_t,C_s}  CE(C_t(F(x_t)), y_t) + λ · CE(C_s(F(x_t)), p(y_s | y_t))

What a target class is in terms of the source's classes is found once, before anything moves, from the source's predictions
p_i = softmax(C_s(F(x_i)) / T) on the granted target samples:

    direct    p(y_s | y_t) = mean of p_i over the samples of class y_t
    reverse   p(y_t | y_s) by logistic regression of y_i on p_i, read at the corners;   p(y_s | y_t) ∝ p(y_t | y_s) · mean of p_i

`weight` is λ. `temperature` is T, the calibration of the source's head (above 1 for one that is too sure of itself; the paper fits
it on validation data of the source, which a method does not have), `l2` the logistic regression's. The source's classes may be
others (`label_space=separate`) or the same.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_cli.methods.base import Context, Outputs
from transfer_cli.methods.feature_method import share
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.math.logistic import fit_logistic
from transfer_cli.methods.phases import Batch, ClosedForm, FeatureTask, Moves, Phase


class CoTuning(FineTune):
    version = 4  # another solver of the reverse relationship
    kinds = ("classification",)
    needs_trained_start = True
    relation: Tensor

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        relationship: Literal["direct", "reverse"] = "reverse",
        temperature: float = 1.0,
        l2: float = 1e-3,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        if temperature <= 0:
            raise ValueError(f"temperature is above 0, not {temperature}")
        self.weight, self.relationship, self.temperature, self.l2 = weight, relationship, temperature, l2
        self.kept_head = nn.Linear(self.network.feature_dim, self.source_head.out_features)  # C_s; C_t may start as it
        self.register_buffer(
            "relation", torch.zeros(context.num_classes, self.source_head.out_features)
        )  # p(y_s | y_t)

    def preparation(self) -> list[Phase]:
        return [ClosedForm("relationship", self.relate, parts=("target_labelled",))]

    def relate(self, task: FeatureTask) -> None:
        assert task.target_labelled is not None and task.target_labelled.y is not None
        x, y = task.target_labelled.x, task.target_labelled.y
        self.kept_head.load_state_dict(self.source_head.state_dict())
        with torch.no_grad():
            probs = (self.kept_head(x.to(self.kept_head.weight.dtype)).double() / self.temperature).softmax(1)
        find = direct_relationship if self.relationship == "direct" else reverse_relationship
        self.relation.copy_(find(probs, y, self.network.head.out_features, self.l2))

    def moves(self) -> list[Moves]:
        return [*super().moves(), Moves.of(self.kept_head)]

    def penalties(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        assert batch.target_labelled is not None
        logits = self.kept_head(outputs.features)
        return {"co_tuning": self.weight * F.cross_entropy(logits, self.relation[batch.target_labelled.y])}


def direct_relationship(probs: Tensor, y: Tensor, num_classes: int, l2: float = 0.0) -> Tensor:
    """p(y_s | y_t) `(K_t, K_s)` from the source's predictions `(N, K_s)`; that of a class without samples is the mean over all."""
    own = F.one_hot(y, num_classes).to(probs.dtype)
    counts = own.sum(0)[:, None]
    return torch.where(counts > 0, own.T @ probs / counts.clamp_min(1), probs.mean(0))


def reverse_relationship(probs: Tensor, y: Tensor, num_classes: int, l2: float) -> Tensor:
    """The same by Bayes' rule."""
    w, b = fit_logistic(probs, y, num_classes, l2, share(probs, None))
    target_given_source = (w + b[:, None]).softmax(0)  # (K_t, K_s): its input a corner, one source class for certain
    joint = target_given_source * probs.mean(0)
    return joint / joint.sum(1, keepdim=True)
