"""Whole parts of the task as features, in order, without augmentation: what closed forms and refreshes look at."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from transfer_cli.data.batching import in_order
from transfer_cli.data.inputs import Inputs
from transfer_cli.loops.session import Session, task_parts
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Features, FeatureTask


def feature_task(session: Session, method: Method, parts: Sequence[str]) -> FeatureTask:
    """The wanted parts after the method's `features`, which it computes in evaluation mode."""
    method.eval()

    def features(part: Any) -> Features | None:
        if part is None:
            return None
        labels = part.labels.to(session.device) if hasattr(part, "labels") else None
        return Features(_extract(session, method, part.inputs), labels)

    return FeatureTask(**{name: features(part) for name, part in task_parts(session.task, parts).items()})


@torch.no_grad()
def _extract(session: Session, method: Method, inputs: Inputs) -> Tensor:
    """`(N, D)` float64 on the device."""
    trainer = session.trainer
    with closing(
        in_order(inputs, trainer.eval_batch_size, session.device, session.workers, trainer.channels_last)
    ) as batches:
        return torch.cat([method.features(x).double() for x in batches])
