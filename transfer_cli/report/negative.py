"""Negative transfer: a method that does worse than its setting without transfer. Standard library only.

The baseline of a run differs from it in the method alone: `source_only` or, on frozen features, `no_adaptation` with the same head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transfer_cli.report.runs import Run, read_run, short
from transfer_cli.report.tables import Cell, Pair, Row
from transfer_cli.run_folder import HEADLINE

LABEL_FREE = "im"  # the score that compares without target labels: blind neither to unsure nor to collapsed predictions
FROZEN, TRAINED = "no_adaptation", "source_only"
OWN = ("method", "then", "strong")  # components of which the baseline has its own, or none


class Verdict(NamedTuple):
    """Whether a cell is worse than that of `baseline`: by the reported figure, and by the label-free score over the seeds
    that both have (None where there is nothing to compare)."""

    baseline: str
    figure: bool
    label_free: bool | None


def verdicts(cells: Mapping[tuple[Row, Pair], Cell]) -> dict[tuple[Row, Pair], Verdict]:
    """Of the cells that have a baseline."""
    known = {
        (cell.runs[0].method, _setting(cell.runs[0], cell.runs[0].method)): cell
        for cell in cells.values()
        if cell.runs[0].method in (FROZEN, TRAINED)
    }
    found = {}
    for key, cell in cells.items():
        run = cell.runs[0]
        baselines = [known.get((name, _setting(run, name))) for name in _baselines(run)]
        baseline = next((each for each in baselines if each is not None), None)
        if baseline is not None:
            found[key] = _compare(cell, baseline)
    return found


def _compare(cell: Cell, baseline: Cell) -> Verdict:
    higher_is_better = HEADLINE[cell.runs[0].kind] == "accuracy"
    ours, theirs = _scores(cell.runs), _scores(baseline.runs)
    shared = sorted(ours.keys() & theirs.keys())
    return Verdict(
        baseline.runs[0].method,
        cell.mean < baseline.mean if higher_is_better else cell.mean > baseline.mean,
        math.fsum(ours[seeds] - theirs[seeds] for seeds in shared) < 0 if shared else None,
    )


def warning_lines(result: Mapping[str, Any], path: Path) -> list[str]:
    """What the end of a run says where a finished baseline beside it has a higher label-free score; else nothing."""
    folders = {n: sorted(path.parent.glob(f"{n}-seed{result['seed']}-*")) for n in (FROZEN, TRAINED)}
    run = read_run(path) if any(folders.values()) else None
    if run is None or LABEL_FREE not in run.scores:
        return []
    for name in _baselines(run):
        for other in filter(None, map(read_run, folders[name])):
            if other.seeds == run.seeds and _setting(other, name) == _setting(run, name):
                ours, theirs = run.scores[LABEL_FREE], other.scores.get(LABEL_FREE, -math.inf)
                told = f"{LABEL_FREE} {ours:.3f} is below the {theirs:.3f} of {name} ({short(other.path)})"
                return [f"{told}: negative transfer, or only less sure predictions"] if ours < theirs else []
    return []


def _baselines(run: Run) -> list[str]:
    """The names of those that would do, the better first."""
    names = [FROZEN, TRAINED] if "head" in run.settings[""] else [TRAINED]
    return [] if run.method == names[0] else names


def _scores(runs: Iterable[Run]) -> dict[tuple[int, ...], float]:
    return {run.seeds: run.scores[LABEL_FREE] for run in runs if LABEL_FREE in run.scores}


def _setting(run: Run, baseline: str) -> tuple[object, ...]:
    """All that a run must have in common with that baseline, seeds apart."""
    own = (*OWN, "head") if baseline == TRAINED else OWN
    own_keys = {key for name in own for key in (name, f"{name}.version")}
    kept = {
        owner: frozenset((key, value) for key, value in values.items() if key not in own_keys)
        for owner, values in run.settings.items()
        if owner.partition("=")[0] not in own
    }
    return (run.kind, run.pair, frozenset(kept.items()))


def baseline_runs(runs: Iterable[Run]) -> dict[Path, Run]:
    """By the path of a run, that of the same setting and seeds without transfer, the newest if there are several; of those that
    have one."""
    several = sorted(runs, key=lambda run: (run.time, run.path))
    known = {
        (run.method, run.seeds, _setting(run, run.method)): run for run in several if run.method in (FROZEN, TRAINED)
    }
    found = {}
    for run in several:
        others = [known.get((name, run.seeds, _setting(run, name))) for name in _baselines(run)]
        baseline = next((other for other in others if other is not None), None)
        if baseline is not None:
            found[run.path] = baseline
    return found
