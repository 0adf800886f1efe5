"""How close the choices of each validator come to the oracle's, over many runs. Standard library only.

The regret is the best figure that target labels would have found minus that of the validator's choice: within a run over its
checkpoints; and over the hyper-parameter points of one method on one pair, where validator and oracle each choose the checkpoints
as well. In classification in points of accuracy; in regression in percent of the oracle's RMSE. The rank correlation is that of
scores and figures among the same candidates: Spearman's, and Spearman's with weights that look at the top
(`paired.top_weights`). Means are over the runs, or groups of points, in which they exist.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transfer_cli.errors import TransferError
from transfer_cli.report.looks import LAST, ORACLE, Look, choose, read_looks, score_of
from transfer_cli.report.paired import spearman, top_weights
from transfer_cli.report.runs import Record, Run
from transfer_cli.report.selection import Scored, common_seeds, group_key, points_of, rescored

RANDOM = "random"  # the mean over all candidates: what a blind choice comes to


@dataclass
class Means:
    """Of regrets and correlations, over runs or groups; a correlation needs three candidates that differ."""

    regrets: list[float] = field(default_factory=list)
    correlations: list[float] = field(default_factory=list)
    weighted: list[float] = field(default_factory=list)

    def add(self, regret: float, scores: Sequence[float], qualities: Sequence[float]) -> None:
        self.regrets.append(regret)
        if scores and not math.isnan(found := spearman(scores, qualities)):
            self.correlations.append(found)
            self.weighted.append(spearman(scores, qualities, top_weights))


@dataclass(frozen=True)
class Ranked:
    """A validator's figures: `checkpoints` over runs, `points` over groups of hyper-parameter points."""

    name: str
    checkpoints: Means
    points: Means

    def order(self) -> tuple[float, float, str]:
        return (mean(self.points.regrets, math.inf), mean(self.checkpoints.regrets, math.inf), self.name)


@dataclass(frozen=True)
class Ranking:
    kind: str
    ranked: list[Ranked]  # the closest to the oracle first


def mean(values: Sequence[float], otherwise: float = math.nan) -> float:
    return math.fsum(values) / len(values) if values else otherwise


def rank_validators(records: Iterable[Record]) -> list[Ranking]:
    """For each kind of task among the finished runs.

    Raises:
        TransferError: no run had more than one candidate, and no method more than one point.
    """
    by_kind: dict[str, list[tuple[Record, Run, list[Look]]]] = defaultdict(list)
    for record in records:
        if record.run is not None:
            by_kind[record.run.kind].append((record, record.run, read_looks(record.run)))
    rankings = [Ranking(kind, _ranked(kind, by_kind[kind])) for kind in sorted(by_kind)]
    rankings = [ranking for ranking in rankings if ranking.ranked]
    if not rankings:
        raise TransferError("no finished run had several checkpoints to choose from, and no method several settings.")
    return rankings


def _ranked(kind: str, runs: Sequence[tuple[Record, Run, list[Look]]]) -> list[Ranked]:
    names = sorted({name for _, run, looks in runs for one in (run.scores, *(k.scores for k in looks)) for name in one})
    found = [Ranked(name, _of_checkpoints(kind, runs, name), _of_points(kind, runs, name)) for name in names]
    found.append(Ranked(LAST, _of_checkpoints(kind, runs, LAST), Means()))
    found.append(Ranked(RANDOM, _of_checkpoints(kind, runs, RANDOM), _of_points(kind, runs, RANDOM)))
    return sorted((r for r in found if r.checkpoints.regrets or r.points.regrets), key=Ranked.order)


def regret(kind: str, best: float, chosen: float) -> float:
    """Of qualities (`looks.quality`): in points of accuracy, or in percent of the best RMSE."""
    return best - chosen if kind == "classification" else 100 * (best - chosen) / -best if best else math.nan


def _of_checkpoints(kind: str, runs: Sequence[tuple[Record, Run, list[Look]]], name: str) -> Means:
    means = Means()
    for _, _, looks in runs:
        if len(looks) < 2:
            continue
        qualities = [look.quality for look in looks]
        if name == RANDOM:
            means.add(regret(kind, max(qualities), mean(qualities)), [], [])
            continue
        scores = [score_of(look, name) for look in looks]
        chosen = choose(looks, name)
        if chosen is not None and not any(map(math.isnan, scores)):
            means.add(regret(kind, max(qualities), chosen.quality), [] if name == LAST else scores, qualities)
    return means


def _of_points(kind: str, runs: Sequence[tuple[Record, Run, list[Look]]], name: str) -> Means:
    means = Means()
    best = {record.path: max(look.quality for look in looks) for record, _, looks in runs}
    groups: dict[Any, list[tuple[Record, Scored]]] = defaultdict(list)
    for record, run, looks in runs:
        own = rescored(run, looks, ORACLE if name == RANDOM else name)
        if own is not None and name == RANDOM:
            own = replace(own, quality=mean([look.quality for look in looks]))
        if own is not None:
            groups[group_key(own.run)].append((record, own))
    for members in groups.values():
        points = points_of(members)
        seeds = common_seeds(points)
        compared = [list(by_seed.values()) for by_seed in points.values() if frozenset(by_seed) == seeds]
        if len(compared) > 1:
            qualities = [mean([s.quality for _, s in point]) for point in compared]
            reachable = max(mean([best[r.path] for r, _ in point]) for point in compared)
            if name == RANDOM:
                means.add(regret(kind, reachable, mean(qualities)), [], [])
                continue
            scores = [mean([s.score for _, s in point]) for point in compared]
            chosen = qualities[scores.index(max(scores))]
            means.add(regret(kind, reachable, chosen), scores, qualities)
    return means
