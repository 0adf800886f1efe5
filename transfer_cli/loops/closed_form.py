"""The closed-form loop: extract features once, fit once, in float64. Resumes by starting over, identically."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from transfer_cli.data.batching import in_order
from transfer_cli.data.inputs import Inputs
from transfer_cli.loops.session import Place, Session, task_parts
from transfer_cli.methods.phases import ClosedForm, Features, FeatureTask


def run_closed_form(phase: ClosedForm, session: Session, place: Place) -> None:
    session.console.start(phase.name, 0, 1)
    method = session.method
    method.eval()

    def features(part: Any) -> Features | None:
        if part is None:
            return None
        labels = part.labels.to(session.device) if hasattr(part, "labels") else None
        return Features(_extract(session, part.inputs), labels)

    figures = phase.fit(
        FeatureTask(**{name: features(part) for name, part in task_parts(session.task, phase.parts).items()})
    )
    if session.average is not None:
        session.average.module.load_state_dict(method.state_dict())
    if figures:
        session.metrics.write(step=place.steps_before, phase=phase.name, split="diagnostics", values=figures)
        told = "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items())
        session.console.say(f"{phase.name}: {told}")
    session.console.advance(1, figures or {})
    session.monitor.observe(session.evaluated, place.steps_before, phase.name, candidate=place.last)
    session.console.stop()


@torch.no_grad()
def _extract(session: Session, inputs: Inputs) -> Tensor:
    """`(N, D)` float64 on the device."""
    trainer = session.trainer
    with closing(
        in_order(inputs, trainer.eval_batch_size, session.device, session.workers, trainer.channels_last)
    ) as batches:
        return torch.cat([session.method.features(x).double() for x in batches])
