"""A teacher: a copy of a module whose weights are a running average of the module's (Tarvainen & Valpola, NIPS 2017)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """Never trained by gradients; saved and restored with the method that holds it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def copy(self, student: nn.Module) -> None:
        """The student's weights as they are: for a phase's `on_start`, since earlier phases may have changed them."""
        self.module.load_state_dict(student.state_dict())

    @torch.no_grad()
    def follow(self, student: nn.Module, decay: float, buffers: bool = True) -> None:
        """`w ← decay · w + (1 - decay) · w_student`; buffers, BatchNorm statistics among them, are the student's, or, with
        `buffers=False`, the teacher's own, of the batches that it has seen.
        """
        own: list[Tensor] = list(self.module.parameters())
        new: list[Tensor] = list(student.parameters())
        torch._foreach_lerp_(own, new, 1 - decay)
        if buffers:
            for mine, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
                mine.copy_(theirs)


class FrozenTeacher(Teacher):
    """One that stays what it was copied from, and works in evaluation mode while the student trains."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:
        return super().train(False)
