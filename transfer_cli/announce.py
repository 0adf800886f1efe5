"""The lines that open a run: what is trained on what, and what was done to bring the domains together."""

from __future__ import annotations

import torch
from torch import nn

from transfer_cli.build import Components, Problem, pair_label
from transfer_cli.config.identity import method_label
from transfer_cli.config.schema import Config
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.methods.base import NetworkMethod

FAR = 1000.0  # from one, as the largest input of all


def opening_lines(
    config: Config, components: Components, problem: Problem, method: nn.Module, device: torch.device
) -> list[str]:
    parameters = sum(p.numel() for p in method.parameters())
    size = f"{parameters / 1e6:.1f} M" if parameters >= 5e4 else f"{parameters:,}"
    backbone, name = components["backbone"].name, method_label(components)
    lines = [f"{pair_label(components)}    {backbone} ({size} parameters)    {name}    seed {config.seed}    {device}"]
    task, heldout = problem.task, problem.heldout
    counts = []
    if task.source is not None:
        counts.append(f"{len(task.source):,} labelled source")
    counts.append(f"{len(task.target_unlabelled):,} unlabelled target")
    granted = [part for part in (task.target_labelled, task.target_calibration) if part is not None]
    if granted:
        kept = (
            "" if task.target_calibration is None else f" ({len(task.target_calibration):,} kept back for calibration)"
        )
        counts.append(f"{sum(map(len, granted)):,} target labels granted{kept}")
    counts.append(f"{len(heldout.target_test):,} target held out ({config.protocol})")
    space = task.label_space
    named = task.kind == "classification" and bool(space.source) and space.setting != "closed"
    if task.kind == "classification" and (not named or space.setting == "separate"):
        counts.append(str(space))
    lines.append(", ".join(counts))
    if named:
        lines += [f"classes: {space.overlap()}", *_not_made_for(space.setting, components)]
    return [*lines, *problem.notes, *_out_of_scale(problem, method)]


def _out_of_scale(problem: Problem, method: nn.Module) -> list[str]:
    """A word on vectors that a network, unlike what is standardised by the method, cannot learn from."""
    if not isinstance(method, NetworkMethod):
        return []
    parts = [problem.task.source, problem.task.target_unlabelled]
    inputs = [part.inputs for part in parts if part is not None]
    values = [i.values for i in inputs if isinstance(i, ArrayInputs) and i.spec.kind == "vector" and len(i)]
    if not values:
        return []
    largest = max(float(v.abs().max()) for v in values)
    if 1 / FAR < largest < FAR:
        return []
    return [
        f"inputs reach {largest:.1g}: networks learn from values of about one. A table's standardise=true brings them there."
    ]


def _not_made_for(setting: str, components: Components) -> list[str]:
    """A word on the methods that bring the domains together as if their classes were the same."""
    unexpected = {
        "partial": "does not expect classes that are only in the source: pada is made for that",
        "open": "does not expect classes that are only in the target, and predicts none as unknown: osbp is made for that",
    }
    chosen = [components[group] for group in ("method", "then") if group in components]
    return [
        f"{method.name} {unexpected[setting]}"
        for method in chosen
        if setting in unexpected
        and method.implementation.needs.target_inputs  # type: ignore[attr-defined]
        and setting not in method.implementation.label_spaces  # type: ignore[attr-defined]
    ]
