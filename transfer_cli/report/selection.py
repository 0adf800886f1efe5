"""The choice among a method's hyper-parameters on one pair by a validator's mean score over seeds. Standard library only.

The same validator chooses the checkpoint within each run first. Compared are points with the same seeds alone; what was left
out, and why, is told.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transfer_cli.errors import TransferError, suggest
from transfer_cli.report.looks import LAST, ORACLE, Look, choose, read_looks, score_of
from transfer_cli.report.runs import DATA, Record, Run

TUNED = ("method", "then", "optimizer")  # components whose keys are hyper-parameters
UNSCORED = "unscored"  # the state of a record that lacks the score which chooses

Settings = Mapping[str, Mapping[str, Any]]
Seeds = tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """One setting of the hyper-parameters that differ, as `key=value`, and its means over `seeds`; `note`: why it was not
    compared, or nothing."""

    settings: tuple[str, ...]
    seeds: tuple[Seeds, ...]
    score: float
    figure: float
    note: str = ""


@dataclass(frozen=True)
class Choice:
    """Of one method on one pair: the point with the best mean score by `select` among `compared`, and what was left out.

    `unkept`: folders of the chosen runs in which `select` prefers a checkpoint whose weights were not kept."""

    kind: str
    method: str
    pair: tuple[str, str]
    select: str
    chosen: Point
    compared: tuple[Point, ...]
    left_out: tuple[Point, ...]
    unkept: tuple[Path, ...]


@dataclass(frozen=True)
class Scored:
    """A run with its checkpoint chosen by the validator: `run` has that checkpoint's figures."""

    run: Run
    score: float
    quality: float


def select_points(records: Iterable[Record], name: str) -> tuple[list[Record], list[Choice]]:
    """The records with the chosen points alone, without their hyper-parameters among their settings, and the choices.
    Finished runs without the score stay as records of state `unscored`; the others stay too.

    Raises:
        TransferError: no run has a score of that name.
    """
    everything = list(records)
    if name == LAST:
        raise TransferError(f"--select {LAST}: the newest checkpoint has no score by which points compare.")
    finished = [r for r in everything if r.run is not None]
    scored = {r.path: rescored(r.run, read_looks(r.run), name) for r in finished if r.run is not None}
    if finished and not any(scored.values()):
        raise _unknown(name, [r.run for r in finished if r.run is not None])
    groups: dict[Any, list[tuple[Record, Scored]]] = defaultdict(list)
    revisited = any(own is not None and own.run.settings[""]["selection"] == name for own in scored.values())
    kept: list[Record] = []
    for record in everything:
        own, asked = scored.get(record.path), record.run or record.asked
        if own is not None:
            groups[group_key(own.run)].append((record, own))
        elif asked is not None:
            bare = {owner: dict(values) for owner, values in without_hyperparameters(asked).items()}
            if revisited:
                bare[""]["selection"] = name
            asked = replace(asked, settings=bare, oracle=name == ORACLE or (asked.oracle and not revisited))
            state = record.state if record.run is None else UNSCORED
            kept.append(replace(record, state=state, run=None, asked=asked))
        else:
            kept.append(record)
    choices = []
    for members in groups.values():
        choice, chosen = _choose_point(members, name)
        choices.append(choice)
        kept += [replace(r, run=replace(s.run, settings=without_hyperparameters(s.run))) for r, s in chosen]
    return kept, choices


def rescored(run: Run, looks: Sequence[Look], name: str) -> Scored | None:
    """The run as `name` would have chosen its checkpoint; None without such a score. A score that was computed afterwards is of
    the kept weights, which then stay."""
    look = choose(looks, name)
    settings = {owner: dict(values) for owner, values in run.settings.items()}
    if look is None:
        score = run.scores.get(name, math.nan)
        quality = run.figure if run.kind == "classification" else -run.figure
        return None if math.isnan(score) else Scored(run, score, quality)
    settings[""]["selection"] = name
    changed = replace(run, oracle=name == ORACLE, settings=settings)
    if look.step != run.step:
        changed = replace(
            changed, figure=look.figure, figures=look.figures, scores=look.scores, step=look.step, kept=False
        )
    quality = changed.figure if run.kind == "classification" else -changed.figure
    return Scored(changed, quality if name == ORACLE else score_of(look, name), quality)


def group_key(run: Run) -> Any:
    """What runs share whose hyper-parameters are compared."""
    bare = without_hyperparameters(run)
    return run.kind, run.method, run.pair, frozenset((owner, frozenset(v.items())) for owner, v in bare.items())


def point_key(run: Run) -> Any:
    return frozenset(hyperparameters(run).items())


def hyperparameters(run: Run) -> dict[str, Any]:
    """By dotted key, and the optimiser's name."""
    return {key: v for owner, values in run.settings.items() for key, v in values.items() if _is_tuned(owner, key, run)}


def without_hyperparameters(run: Run) -> Settings:
    bare: dict[str, dict[str, Any]] = {}
    for owner, values in run.settings.items():
        name = "optimizer" if owner.startswith("optimizer=") else owner
        bare[name] = {key: value for key, value in values.items() if not _is_tuned(owner, key, run)}
    return bare


def _is_tuned(owner: str, key: str, run: Run) -> bool:
    if owner in DATA:
        return False
    group, _, last = key.partition(".")
    if key == "optimizer" or (key == "optimizer.version"):
        return True
    return (group in TUNED and bool(last) and last != "version") or key in run.searched


def points_of(members: Iterable[tuple[Record, Scored]]) -> dict[Any, dict[Seeds, tuple[Record, Scored]]]:
    """By point and seeds; of runs that differ in their own selection alone, one whose weights were kept, or else the newest."""
    points: dict[Any, dict[Seeds, tuple[Record, Scored]]] = defaultdict(dict)
    for member in sorted(members, key=lambda m: (m[1].run.kept, m[1].run.time, m[1].run.path)):
        points[point_key(member[1].run)][member[1].run.seeds] = member
    return points


def common_seeds(points: Mapping[Any, Mapping[Seeds, Any]]) -> frozenset[Seeds]:
    """The seeds of the points with the most of them; of several such sets the more frequent."""
    counts = Counter(frozenset(by_seed) for by_seed in points.values())
    return min(counts, key=lambda seeds: (-len(seeds), -counts[seeds], sorted(seeds)))


def _choose_point(members: Sequence[tuple[Record, Scored]], name: str) -> tuple[Choice, list[tuple[Record, Scored]]]:
    points = points_of(members)
    seeds = common_seeds(points)
    values = [dict(key) for key in points]
    differing = sorted({k for one in values for k in one if len({other.get(k) for other in values}) > 1})
    compared: list[tuple[Point, list[tuple[Record, Scored]]]] = []
    left_out: list[Point] = []
    for key, by_seed in points.items():
        scored = [by_seed[s] for s in sorted(by_seed)]
        one = dict(key)
        point = Point(
            tuple(f"{k}={written(one[k])}" for k in differing if k in one and not k.endswith(".version")),
            tuple(sorted(by_seed)),
            math.fsum(s.score for _, s in scored) / len(scored),
            math.fsum(s.run.figure for _, s in scored) / len(scored),
        )
        if frozenset(by_seed) == seeds:
            compared.append((point, scored))
        else:
            left_out.append(replace(point, note=f"has seeds {_told(by_seed)}, not {_told(seeds)}"))
    chosen, runs = max(compared, key=lambda item: (item[0].score, item[0].settings))
    first = members[0][1].run
    choice = Choice(
        first.kind,
        first.method,
        first.pair,
        name,
        chosen,
        tuple(sorted((p for p, _ in compared), key=lambda p: -p.score)),
        tuple(sorted(left_out, key=lambda p: p.settings)),
        tuple(r.path for r, s in runs if not s.run.kept),
    )
    return choice, runs


def _told(seeds: Iterable[Seeds]) -> str:
    return " ".join(str(s[0]) if len(s) < 2 or s[1] == 0 else f"{s[0]}/{s[1]}" for s in sorted(seeds))


def written(value: Any) -> str:
    """A setting's value as on the command line."""
    if isinstance(value, tuple):
        return f"[{','.join(written(v) for v in value)}]"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")  # 1 and 1.0 are one setting
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _unknown(name: str, runs: Sequence[Run]) -> TransferError:
    names = sorted({key for run in runs for look in read_looks(run) for key in (*look.scores, *run.scores)})
    return TransferError(
        f"--select {name}: no run has such a score.{suggest(name, [*names, ORACLE])} There are {', '.join([*names, ORACLE])}."
    )
