"""The lines that open a run: what is trained on what, and what was done to bring the domains together."""

from __future__ import annotations

import torch
from torch import nn

from transfer_cli.build import Components, Problem, pair_label
from transfer_cli.config.identity import method_label
from transfer_cli.config.schema import Config


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
    if task.target_labelled is not None:
        counts.append(f"{len(task.target_labelled):,} target labels granted")
    counts.append(f"{len(heldout.target_test):,} target held out ({config.protocol})")
    if task.kind == "classification":
        counts.append(str(task.label_space))
    lines.append(", ".join(counts))
    return [*lines, *problem.notes]
