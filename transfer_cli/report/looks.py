"""The evaluations of a run while it trained: every validator's score beside the figures on the target test set, from metrics.jsonl.

They tell which checkpoint another validator would have chosen, and what it would have scored, without training again; only
the weights of the checkpoint that the run's own selection chose were kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer_cli.report.runs import Run
from transfer_cli.run_folder import HEADLINE, RunFolder

ORACLE, LAST = "oracle", "last"
SPLITS = ("validators", "target_test")


@dataclass(frozen=True)
class Look:
    """`figure` as tables show it (accuracy in percent, or RMSE); `quality`: higher is better."""

    step: int
    scores: Mapping[str, float]
    figures: Mapping[str, float]
    figure: float
    quality: float


def read_looks(run: Run) -> list[Look]:
    """Those that a checkpoint was chosen from, in their order; one, of the kept weights, where metrics.jsonl is gone."""
    found: dict[tuple[str, int], dict[str, Mapping[str, float]]] = {}
    for event in _events(RunFolder(run.path).metrics):
        found.setdefault((event["phase"], event["step"]), {})[event["split"]] = event["values"]
    whole = [(step, e) for (_, step), e in found.items() if set(SPLITS) <= e.keys()]
    looks = [_look(run.kind, step, *(e[split] for split in SPLITS)) for step, e in whole[-run.candidates :]]
    return looks or [_look(run.kind, run.step, run.scores, run.figures)]


def _look(kind: str, step: int, scores: Mapping[str, float], figures: Mapping[str, float]) -> Look:
    figure = figures[HEADLINE[kind]]
    return Look(step, scores, figures, 100 * figure if kind == "classification" else figure, quality(kind, figures))


def quality(kind: str, figures: Mapping[str, float]) -> float:
    """The headline figure with higher for better: accuracy in percent, or minus the RMSE."""
    figure = figures[HEADLINE[kind]]
    return 100 * figure if kind == "classification" else -figure


def score_of(look: Look, name: str) -> float:
    """nan where the look has no such score; `last` scores nothing and takes the newest."""
    if name == LAST:
        return 0.0
    return look.quality if name == ORACLE else look.scores.get(name, math.nan)


def choose(looks: Sequence[Look], name: str) -> Look | None:
    """The one that the validator prefers, the newest of equals; None where none has its score."""
    scored = [look for look in looks if not math.isnan(score_of(look, name))]
    return max(reversed(scored), key=lambda look: score_of(look, name), default=None)


def _events(path: Path) -> list[dict[str, Any]]:
    """Those of evaluations. A line that was cut off is left out."""
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return []
    events = []
    for line in text.splitlines():
        if any(f'"split": "{split}"' in line for split in SPLITS):  # the many of training need no parsing
            try:
                events.append(json.loads(line))
            except ValueError:
                continue
    return events
