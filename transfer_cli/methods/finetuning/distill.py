"""Distillation of the source's network into the target's (Hinton, Vinyals & Dean, NIPS workshop 2014).

    min_{F,C}  CE(f(x_t), y_t) + w · T² · 1/B Σ_i KL(softmax(g(x_i) / T) ‖ softmax(f(x_i) / T))

f is the network, which goes on from the source's training; g, the teacher, is a copy of it from then. The first term is over the
granted target labels, the second over unlabelled target samples: a few labels move the network, and elsewhere it still answers as
the source taught it. `weight` is w, `temperature` is T; T² keeps the two terms' gradients in proportion, whatever T.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, Outputs
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.phases import Batch
from transfer_cli.methods.teacher import FrozenTeacher


class Distill(FineTune):
    needs = Needs(source_labels_or_model=True, target_inputs=True, target_labels=True)
    kinds = ("classification",)
    parts = ("target", "target_labelled")
    needs_trained_start = True

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        temperature: float = 2.0,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        if temperature <= 0:
            raise ValueError(f"temperature is above 0, not {temperature}")
        self.weight, self.temperature = weight, temperature
        self.teacher = FrozenTeacher(self.network)

    def begin(self) -> None:
        self.teacher.copy(self.network)

    def penalties(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        student, teacher = self.network(batch.target).logits, self.teacher(batch.target).logits
        return {"distillation": self.weight * softened_divergence(teacher, student, self.temperature)}


def softened_divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`T² KL(softmax(teacher / T) ‖ softmax(student / T))` of logits `(B, K)`, mean over samples."""
    wanted, found = ((x.float() / temperature).log_softmax(1) for x in (teacher, student))
    return temperature**2 * F.kl_div(found, wanted, log_target=True, reduction="batchmean")
