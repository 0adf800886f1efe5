"""What many runs came to, as a table. Standard library only.

A cell of the table averages runs that differ in their seeds and in nothing else. A row is named by its method and,
where that is not enough, by the settings that tell it apart, written as on the command line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from transfer_cli.report.runs import DATA, Record, Run

# Told in every row as soon as they differ anywhere in the table; other settings where they differ within a pair.
MAIN_SETTINGS = ("backbone", "target_labels", "protocol", "label_space", "selection")
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


class Row(NamedTuple):
    """`told`: the settings that tell it apart, as `key=value`; `oracle`: target labels chose its checkpoints."""

    method: str
    told: tuple[str, ...]
    oracle: bool

    def __str__(self) -> str:
        return " ".join([self.method, *(["(oracle)"] if self.oracle else []), *self.told])


class Cell(NamedTuple):
    mean: float
    std: float  # of the sample; nan where there is one run
    runs: tuple[Run, ...]


Pair = tuple[str, str]


@dataclass(frozen=True)
class Table:
    """`common`: the main settings that all runs share, as `key=value`. `older`: runs left out because the same settings
    and seeds were run again since, with another version of a component."""

    kind: str
    pairs: list[Pair]
    rows: list[Row]
    cells: Mapping[tuple[Row, Pair], Cell]
    common: list[str]
    older: list[Path]


def aggregate(records: Iterable[Record]) -> list[Table]:
    """A table for each kind of task among the finished runs."""
    by_kind = _grouped((r.run for r in records if r.run is not None), lambda run: run.kind)
    return [_table(kind, _tell_pairs_apart(by_kind[kind])) for kind in sorted(by_kind)]


def _table(kind: str, runs: Sequence[Run]) -> Table:
    told = _told_settings(runs)
    newest: dict[tuple[Row, Pair, tuple[int, ...]], Run] = {}
    for run in sorted(runs, key=lambda run: (run.time, run.path)):
        newest[_row(run, told), run.pair, run.seeds] = run
    cells = _grouped(sorted(newest), lambda key: (key[0], key[1]))
    kept = {run.path for run in newest.values()}
    return Table(
        kind,
        pairs=sorted({run.pair for run in runs}),
        rows=sorted({row for row, _ in cells}, key=_order),
        cells={key: _cell(tuple(newest[k] for k in keys)) for key, keys in cells.items()},
        common=_written(min(runs, key=lambda run: run.oracle).settings[""], set(MAIN_SETTINGS) - told[""]),
        older=[run.path for run in runs if run.path not in kept],
    )


def _cell(runs: tuple[Run, ...]) -> Cell:
    return Cell(*mean_and_std([run.figure for run in runs]), runs)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The standard deviation is the sample's; nan of one value."""
    n = len(values)
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else math.nan


def _tell_pairs_apart(runs: Sequence[Run]) -> list[Run]:
    """Data of one name with other parameters (`path`, ...) make another pair: what differs enters the name."""
    named = []
    for group in _grouped(runs, lambda run: run.pair).values():
        differing = {side: _differing(run.settings[side] for run in group) for side in DATA}
        for run in group:
            source, target = (
                " ".join([label, *_written(run.settings[side], differing[side], side + ".")])
                for side, label in zip(DATA, run.pair, strict=True)
            )
            named.append(replace(run, pair=(source, target)))
    return named


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
    return {key for one in several for key in one if len(_values(several, key)) > 1}


def _values(settings: Sequence[Mapping[str, Any]], key: str) -> set[Any]:
    """A setting's values; to lack one is a value too, but for the head: methods with their own have no choice of it to tell."""
    if key == "head" or key.startswith("head."):
        return {one[key] for one in settings if key in one}
    return {one.get(key) for one in settings}


def _row(run: Run, told: Mapping[str, set[str]]) -> Row:
    written = []
    for owner, settings in run.settings.items():
        if owner not in DATA:
            written += _written(settings, told.get(owner, set()) - ({"selection"} if run.oracle else set()))
    return Row(run.method, tuple(written), run.oracle)


def _written(settings: Mapping[str, Any], keys: set[str], prefix: str = "") -> list[str]:
    """`key=value` as on the command line, without `prefix`; the main settings first."""
    main = [key for key in MAIN_SETTINGS if key in keys]
    ordered = [*main, *sorted(keys - set(main))]
    return [f"{key.removeprefix(prefix)}={_value(settings[key])}" for key in ordered if key in settings]


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(_value(v) for v in value)}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _order(row: Row) -> tuple[Any, ...]:
    """The baseline first, the oracle's choices after the honest ones, numbers by size."""
    return (row.method != "source_only", row.method, row.oracle, [_natural(text) for text in row.told])


def _natural(text: str) -> tuple[str, float, str]:
    key, _, value = text.partition("=")
    try:
        return key, float(value), ""
    except ValueError:
        return key, math.inf, value
