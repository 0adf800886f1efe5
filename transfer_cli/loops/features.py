"""Whole parts of the task as features, in order, without augmentation: what closed forms and refreshes look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def features(part: Any, function: Callable[[Any], Tensor]) -> Features | None:
        if part is None:
            return None
        labels = part.labels.to(session.device) if hasattr(part, "labels") else None
        return Features(_extract(session, part.inputs, function), labels)

    wanted = task_parts(session.task, parts)
    return FeatureTask(
        features(wanted["source"], method.features_source),
        features(wanted["target"], method.features),
        features(wanted["target_labelled"], method.features),
    )


@torch.no_grad()
def _extract(session: Session, inputs: Inputs, function: Callable[[Any], Tensor]) -> Tensor:
    """`(N, D)` float64 on the device."""
    trainer = session.trainer
    with closing(
        in_order(inputs, trainer.eval_batch_size, session.device, session.workers, trainer.channels_last)
    ) as batches:
        return torch.cat([function(x).double() for x in batches])
