"""What many runs came to, as a table. Standard library only.

A cell of the table averages runs that differ in their seeds and in nothing else. A row is named by its method and,
where that is not enough, by the settings that tell it apart, written as on the command line. Rows that were trained with
all target labels bound what the others can reach: they stand last, and on no source for every pair of their target.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transfer_cli.report.paired import holm, paired_t, ranks
from transfer_cli.report.runs import DATA, Record, Run
from transfer_cli.report.selection import UNSCORED, Choice, select_points, written
from transfer_cli.run_folder import HEADLINE

# Told in every row as soon as they differ anywhere in the table; other settings where they differ within a pair.
MAIN_SETTINGS = ("backbone", "target_labels", "protocol", "label_space", "selection")
COMPARABLE = ("target_labels", "protocol", "label_space", "split.test", "subset.test", "subset.target_classes")
NO_SOURCE = "none"
BASELINES = ("source_only", "no_adaptation")
LEVEL = 0.05  # of the tests behind the best of a pair
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Row(NamedTuple):
    """`told`: the settings that tell it apart, as `key=value`; `oracle`: target labels chose its checkpoints; `bound`: it was
    trained with all target labels, and others were not."""

    method: str
    told: tuple[str, ...]
    oracle: bool
    bound: bool = False

    @property
    def honest(self) -> bool:
        return not (self.oracle or self.bound)

    def __str__(self) -> str:
        marks = ["(bound)"] * self.bound + ["(oracle)"] * self.oracle
        return " ".join([self.method, *marks, *self.told])


class Cell(NamedTuple):
    mean: float
    std: float  # of the sample; nan where there is one run
    runs: tuple[Run, ...]


class Missing(NamedTuple):
    """Records of a cell without a figure: failed, unfinished, and, under `--select`, without its score."""

    failed: tuple[Record, ...] = ()
    unfinished: tuple[Record, ...] = ()
    unscored: tuple[Record, ...] = ()


class Comparison(NamedTuple):
    """Of the best row with another, over the seeds that both have; `difference`: the best's mean minus the other's."""

    row: Row
    seeds: int
    difference: float
    p: float  # nan where there is no test
    adjusted: float  # by Holm


class Best(NamedTuple):
    """The row with the best mean among those that may be compared, `supported` where every comparison has adjusted p < `LEVEL`.

    `pair` is None for the average over pairs."""

    pair: Pair | None
    row: Row
    supported: bool
    comparisons: tuple[Comparison, ...]


Pair = tuple[str, str]


@dataclass(frozen=True)
class Table:
    """`common`: the main settings that all runs share, as `key=value`. `older`: runs left out because the same settings
    and seeds were run again since, with another version of a component.

    `cells`: those with a finished run; `missing`: those with others. `best`: by pair (and setting, where rows of several are in
    one table). `average` and `rank`, over the pairs, of rows that have them all; rank 1 is the best, among honest rows of one
    setting. `select`, `choices`: what chose among hyper-parameters, and how.
    """

    kind: str
    pairs: list[Pair]
    rows: list[Row]
    cells: Mapping[tuple[Row, Pair], Cell]
    common: list[str]
    older: list[Path]
    missing: Mapping[tuple[Row, Pair], Missing] = field(default_factory=dict)
    best: tuple[Best, ...] = ()
    average: Mapping[Row, float] = field(default_factory=dict)
    rank: Mapping[Row, float] = field(default_factory=dict)
    select: str | None = None
    choices: tuple[Choice, ...] = ()

    def supports(self, row: Row, pair: Pair | None) -> bool:
        """Whether the row is the best of a pair (None: on average) and a test supports it."""
        return any(best.supported and best.row == row and best.pair == pair for best in self.best)


def aggregate(records: Iterable[Record], select: str | None = None) -> list[Table]:
    """A table for each kind of task among the finished runs; with the hyper-parameters (and the checkpoints) that the
    validator `select` chooses.

    Raises:
        TransferError: no run has a score of that name.
    """
    kept, choices = _tell_pairs_apart(list(records)), list[Choice]()
    if select is not None:
        kept, choices = select_points(kept, select)
    by_kind = _grouped((Entry(r, r.run) for r in kept if r.run is not None), lambda entry: entry.run.kind)
    for record in kept:
        if record.asked is not None and by_kind:
            by_kind[_kind(record.asked, by_kind)].append(Entry(record, record.asked))
    return [
        _table(kind, by_kind[kind], select, tuple(c for c in choices if c.kind == kind)) for kind in sorted(by_kind)
    ]


class Entry(NamedTuple):
    """A record, and its run as the table sees it: finished, or asked for."""

    record: Record
    run: Run

    @property
    def finished(self) -> bool:
        return self.record.run is not None


def _kind(asked: Run, by_kind: Mapping[str, Sequence[Entry]]) -> str:
    """Its own; of an unfinished run, that of finished ones with the same target, else the most frequent."""
    same = {kind for kind, of in by_kind.items() if any(e.run.pair[1] == asked.pair[1] for e in of)}
    return asked.kind or min(same or by_kind, key=lambda kind: (-len(by_kind[kind]), kind))


def _table(kind: str, entries: Sequence[Entry], select: str | None, choices: tuple[Choice, ...]) -> Table:
    entries = _bounds_on_every_pair(_with_selections(entries))
    bounded = any(_unlimited(e.run) for e in entries) and not all(_unlimited(e.run) for e in entries)
    plain = [e.run for e in entries if not (bounded and _unlimited(e.run))]
    told, told_of_bounds = _told_settings(plain), _told_settings([e.run for e in entries]) if bounded else {}
    newest: dict[tuple[Row, Pair, tuple[int, ...]], Run] = {}
    missing: dict[tuple[Row, Pair], list[Record]] = defaultdict(list)
    for record, run in sorted(entries, key=lambda entry: (entry.run.time, entry.run.path)):
        bound = bounded and _unlimited(run)
        row = _row(run, told_of_bounds if bound else told, bound)
        if record.run is not None:
            newest[row, run.pair, run.seeds] = run
        else:
            missing[row, run.pair].append(record)
    groups = _grouped(sorted(newest), lambda key: (key[0], key[1]))
    cells = {key: _cell(tuple(newest[k] for k in keys)) for key, keys in groups.items()}
    kept = {run.path for run in newest.values()}
    pairs = sorted({entry.run.pair for entry in entries})
    average, rank, best = _compared(kind, pairs, cells)
    return Table(
        kind,
        pairs=pairs,
        rows=sorted({row for row, _ in [*cells, *missing]}, key=_order),
        cells=cells,
        common=_written(min(plain, key=lambda run: run.oracle).settings[""], set(MAIN_SETTINGS) - told[""]),
        older=list(dict.fromkeys(e.record.path for e in entries if e.finished and e.record.path not in kept)),
        missing={key: _missing(of) for key, of in missing.items()},
        best=best,
        average=average,
        rank=rank,
        select=select,
        choices=choices,
    )


def _missing(records: Sequence[Record]) -> Missing:
    failed, unscored = (tuple(r for r in records if r.state == state) for state in ("failed", UNSCORED))
    return Missing(failed, tuple(r for r in records if r not in failed + unscored), unscored)


def _unlimited(run: Run) -> bool:
    """Whether it was trained with all target labels."""
    return bool(run.settings[""].get("target_labels") == "all")


def _with_selections(entries: Sequence[Entry]) -> list[Entry]:
    """Where `auto` is what an unfinished run was to be chosen by: what it came to most often in the finished ones."""
    counts = Counter(e.run.settings[""].get("selection") for e in entries if e.finished and not e.run.oracle)
    usual = min(counts, key=lambda name: (-counts[name], str(name)), default="auto")
    found = []
    for record, run in entries:
        if run.settings[""].get("selection") == "auto":
            run = replace(run, settings={**run.settings, "": {**run.settings[""], "selection": usual}})
        found.append(Entry(record, run))
    return found


def _bounds_on_every_pair(entries: Sequence[Entry]) -> list[Entry]:
    """A run with all target labels and no source stands in every column with the same target data."""
    found = []
    for record, run in entries:
        pairs: list[Pair] = []
        if run.pair[0] == NO_SOURCE and _unlimited(run):
            same = (e.run for e in entries if e.run.pair[0] != NO_SOURCE)
            pairs = sorted({r.pair for r in same if r.settings["target"] == run.settings["target"]})
        found += [Entry(record, replace(run, pair=pair)) for pair in pairs or [run.pair]]
    return found


def _compared(
    kind: str, pairs: Sequence[Pair], cells: Mapping[tuple[Row, Pair], Cell]
) -> tuple[dict[Row, float], dict[Row, float], tuple[Best, ...]]:
    """Averages and ranks over the pairs, and the best rows: `Table`'s."""
    sign = 1 if HEADLINE[kind] == "accuracy" else -1
    best: list[Best] = []
    by_setting = _grouped(
        ((row, pair) for row, pair in cells if row.honest), lambda key: (key[1], _setting(cells[key]))
    )
    for (pair, _), keys in by_setting.items():
        best += _best(pair, {row: _by_seed([cells[row, pair]]) for row, _ in keys}, sign)
    whole = [row for row in {row: None for row, _ in cells} if len(pairs) > 1 and all((row, p) in cells for p in pairs)]
    average = {row: math.fsum(cells[row, pair].mean for pair in pairs) / len(pairs) for row in whole}
    rank: dict[Row, float] = {}
    honest = _grouped((r for r in whole if r.honest), lambda row: tuple(_setting(cells[row, pair]) for pair in pairs))
    for rows in honest.values():
        if len(rows) > 1:
            of_pair = [ranks([-sign * cells[row, pair].mean for row in rows]) for pair in pairs]
            rank |= {row: math.fsum(r[i] for r in of_pair) / len(pairs) for i, row in enumerate(rows)}
        if kind == "classification":
            best += _best(None, {row: _by_seed([cells[row, pair] for pair in pairs]) for row in rows}, sign)
    return average if kind == "classification" else {}, rank, tuple(best)  # errors in other units have no mean


def _setting(cell: Cell) -> tuple[Any, ...]:
    """What must be equal for figures to compare."""
    return tuple(cell.runs[0].settings[""].get(key) for key in COMPARABLE)


def _by_seed(cells: Sequence[Cell]) -> dict[tuple[int, ...], float]:
    """The mean over the cells, for the seeds that all of them have."""
    figures = [{run.seeds: run.figure for run in cell.runs} for cell in cells]
    seeds = set.intersection(*(set(of) for of in figures))
    return {s: math.fsum(of[s] for of in figures) / len(figures) for s in seeds}


def _best(pair: Pair | None, figures: Mapping[Row, Mapping[tuple[int, ...], float]], sign: int) -> list[Best]:
    """Of several rows the best by its mean, compared with each other; one without a figure for any seed forbids a mark."""
    if sum(map(bool, figures.values())) < 2:
        return []
    first = max(
        (r for r in figures if figures[r]), key=lambda r: sign * math.fsum(figures[r].values()) / len(figures[r])
    )
    others = [row for row in figures if row != first]
    differences = [
        [figures[first][s] - figures[r][s] for s in sorted(figures[first].keys() & figures[r])] for r in others
    ]
    p_values = [paired_t(each) for each in differences]
    comparisons = [
        Comparison(row, len(each), math.fsum(each) / len(each) if each else math.nan, p, adjusted)
        for row, each, p, adjusted in zip(others, differences, p_values, holm(p_values), strict=True)
    ]
    supported = all(c.adjusted < LEVEL and sign * c.difference > 0 for c in comparisons)
    return [Best(pair, first, supported, tuple(comparisons))]


def _cell(runs: tuple[Run, ...]) -> Cell:
    return Cell(*mean_and_std([run.figure for run in runs]), runs)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The standard deviation is the sample's; nan of one value."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else math.nan


def _tell_pairs_apart(records: Sequence[Record]) -> list[Record]:
    """Data of one name with other parameters (`path`, ...) make another pair: what differs enters the name."""
    runs = {i: run for i, record in enumerate(records) if (run := record.run or record.asked) is not None}
    told = list(records)
    for group in _grouped(runs, lambda i: runs[i].pair).values():
        differing = {side: _differing(runs[i].settings[side] for i in group) for side in DATA}
        for i in group:
            source, target = (
                " ".join([label, *_written(runs[i].settings[side], differing[side], side + ".")])
                for side, label in zip(DATA, runs[i].pair, strict=True)
            )
            named = replace(runs[i], pair=(source, target))
            told[i] = replace(told[i], run=named) if told[i].run is not None else replace(told[i], asked=named)
    return told


def _told_settings(runs: Sequence[Run]) -> dict[str, set[str]]:
    """By owner, the keys that rows must tell so that no two configurations of a pair share a cell."""
    told: dict[str, set[str]] = defaultdict(set)
    for group in _grouped(runs, lambda run: run.pair).values():
        for owner in {owner for run in group for owner in run.settings} - set(DATA):
            told[owner] |= _differing(run.settings[owner] for run in group if owner in run.settings)
    told[""] |= _differing({key: run.settings[""].get(key) for key in MAIN_SETTINGS} for run in runs)
    told[""] -= {"method", "selection"}  # a row begins with its method, and the oracle's are marked
    told[""] |= _differing({"selection": run.settings[""]["selection"]} for run in runs if not run.oracle)
    return told


def _differing(settings: Iterable[Mapping[str, Any]]) -> set[str]:
    several = list(settings)
    keys = {key for one in several for key in one}
    return {key for key in keys if len(_values(several, key)) > 1}


def _values(settings: Sequence[Mapping[str, Any]], key: str) -> set[Any]:
    """A setting's values; to lack one is a value too, but for the head: methods with their own have no choice of it to tell."""
    if key == "head" or key.startswith("head."):
        return {one[key] for one in settings if key in one}
    return {one.get(key) for one in settings}


def _row(run: Run, told: Mapping[str, set[str]], bound: bool) -> Row:
    marked = {"selection"} if run.oracle else set()
    marked |= {"target_labels"} if bound else set()
    told_settings = []
    for owner, settings in run.settings.items():
        if owner not in DATA:
            told_settings += _written(settings, told.get(owner, set()) - marked)
    return Row(run.method, tuple(told_settings), run.oracle, bound)


def _written(settings: Mapping[str, Any], keys: set[str], prefix: str = "") -> list[str]:
    """`key=value` as on the command line, without `prefix`; the main settings first."""
    main = [key for key in MAIN_SETTINGS if key in keys]
    ordered = [*main, *sorted(keys - set(main))]
    return [f"{key.removeprefix(prefix)}={written(settings[key])}" for key in ordered if key in settings]


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _order(row: Row) -> tuple[Any, ...]:
    """The baseline first, the oracle's choices after the honest ones, the bounds last; numbers by size."""
    baseline = BASELINES.index(row.method) if row.method in BASELINES else len(BASELINES)
    return (row.bound, baseline, row.method, row.oracle, [_natural(text) for text in row.told])


def _natural(text: str) -> tuple[str, float, str]:
    key, _, value = text.partition("=")
    try:
        return key, float(value), ""
    except ValueError:
        return key, math.inf, value
