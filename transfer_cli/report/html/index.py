"""What the first page knows of every run: what the list, the filters and the comparison of two runs need. Standard library only."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer_cli.report.html.details import rounded
from transfer_cli.report.negative import TRAINED, baseline_runs
from transfer_cli.report.runs import SEEDS, Record, Run
from transfer_cli.report.selection import written
from transfer_cli.report.tables import Pair, Row, Table, aggregate
from transfer_cli.run_folder import HEADLINE, RunFolder, read_object


def describe(tables: Sequence[Table], records: Sequence[Record]) -> dict[str, Any]:
    """`runs`: an entry each, in the order of `records`; `settings`: every key and value that some configuration has, which an
    entry's `config` names by their numbers."""
    settings = Settings()
    places = _places(tables)
    # a choice of hyper-parameters shows few runs, without them: the list names all, and all alike
    named = _places(aggregate(records)) if any(table.select for table in tables) else places
    entries = []
    for index, record in enumerate(records):
        run = record.run or record.asked
        entries.append(_entry(record, run, places.get(record.path), named.get(record.path)))
        entries[-1] |= {"index": index, "config": [] if run is None else settings.numbers(run)}
    _name_apart(entries)
    _compare(entries, records, settings)
    return {"settings": settings.written, "runs": entries}


Where = tuple[str, str, Row, Pair]  # kind, cell, row and pair


class Settings:
    """Keys and values as on the command line, each once; runs have most of them in common."""

    def __init__(self) -> None:
        self.written: list[tuple[str, str]] = []
        self._known: dict[tuple[str, type, Any], int] = {}

    def numbers(self, run: Run) -> list[int]:
        pairs = dict(zip(SEEDS, run.seeds, strict=True))
        for owner in run.settings.values():
            pairs |= owner
        return [self._number(key, value) for key, value in pairs.items()]

    def _number(self, key: str, value: Any) -> int:
        known = (key, type(value), value)
        if known not in self._known:
            self._known[known] = len(self.written)
            self.written.append((key, written(value)))
        return self._known[known]


def _places(tables: Sequence[Table]) -> dict[Path, Where]:
    """Where the tables show a run: kind, cell, row and pair."""
    found = {}
    for i, table in enumerate(tables):
        rows, pairs = ({one: k for k, one in enumerate(of)} for of in (table.rows, table.pairs))
        for key in [*table.cells, *table.missing]:
            paths = [run.path for run in table.cells[key].runs] if key in table.cells else []
            paths += [record.path for records in table.missing.get(key, ()) for record in records]
            for path in paths:
                found[path] = (table.kind, f"{i}.{rows[key[0]]}.{pairs[key[1]]}", *key)
    return found


def _entry(record: Record, run: Run | None, place: Where | None, named: Where | None) -> dict[str, Any]:
    """`place`: in the tables that are shown; `named`: in one of all runs."""
    folder = RunFolder(record.path)
    manifest = read_object(folder.manifest)
    common: Mapping[str, Any] = run.settings[""] if run is not None else {}
    entry: dict[str, Any] = {
        "path": str(record.path),
        "state": record.state,
        "error": record.error,
        "kind": "",
        "method": run.method if run is not None else record.path.name,
        "told": "",
        "pair": list(run.pair) if run is not None else [record.path.parent.name],
        "backbone": str(common.get("backbone", "")),
        "setting": _setting(common),
        "seed": list(run.seeds) if run is not None else [None, 0],
        "figure": None,
        "figures": {},
        "warnings": list(run.warnings) if run is not None else [],
        "oracle": run is not None and run.oracle,
        "seconds": None,
        "time": "",
        "cell": None,
        "baseline": None,
        "compared": "",
        "command": shlex.join(manifest.get("command", [])),
    }
    if record.run is not None:
        result = read_object(folder.result)
        entry["kind"], entry["figures"] = record.run.kind, {k: _number(v) for k, v in record.run.figures.items()}
        entry["figure"] = entry["figures"].get(HEADLINE[record.run.kind])
        entry["seconds"], entry["time"] = result.get("seconds", {}).get("fit"), record.run.time.replace("T", " ")[:16]
    if place is not None:
        entry["kind"], entry["cell"], *_ = place
    if named is not None:
        entry["kind"], _, row, pair = named
        entry["told"], entry["pair"] = " ".join(row.told), list(pair)
    return entry


def _number(value: Any) -> float | None:
    return rounded(value) if isinstance(value, int | float) else None


def _setting(common: Mapping[str, Any]) -> str:
    if not common:
        return ""
    labels = common.get("target_labels")
    space = "" if common.get("label_space") == "closed" else f", {common.get('label_space')}"
    return f"{common.get('protocol')}, {labels} target labels{space}, chosen by {common.get('selection')}"


def _name_apart(entries: Sequence[dict[str, Any]]) -> None:
    """`id`: a name for files and links; folders of one name in two places get a part of their path's digest."""
    names = [re.sub(r"[^A-Za-z0-9_.+-]", "_", entry["path"].rpartition("/")[2]) for entry in entries]
    often = Counter(name.lower() for name in names)  # some file systems tell no capitals
    for entry, name in zip(entries, names, strict=True):
        if often[name.lower()] > 1:
            name += "-" + hashlib.sha256(str(Path(entry["path"]).resolve()).encode()).hexdigest()[:8]
        entry["id"] = name


def _compare(entries: Sequence[dict[str, Any]], records: Sequence[Record], settings: Settings) -> None:
    """`baseline`: the index of the run without transfer of the same setting and seeds; else of the `source_only` of the same pair
    and seeds whose settings differ least, and in what (`compared`)."""
    runs = [record.run for record in records if record.run is not None]
    index = {record.path: i for i, record in enumerate(records)}
    exact = baseline_runs(runs)
    near: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run.method == TRAINED:
            near[run.pair, run.seeds, run.kind].append(run)
    for run in runs:
        entry, found = entries[index[run.path]], exact.get(run.path)
        if found is None and run.method != TRAINED:
            others = {
                other.path: _differing(entry["config"], entries[index[other.path]]["config"], settings)
                for other in near.get((run.pair, run.seeds, run.kind), [])
            }
            if others:
                nearest = min(others, key=lambda path: (len(others[path]), path))
                entry["compared"], entry["baseline"] = _told(others[nearest]), index[nearest]
        elif found is not None:
            entry["baseline"] = index[found.path]


def _differing(ours: Sequence[int], theirs: Sequence[int], settings: Settings) -> list[str]:
    """The keys that both have, with different values, but for the method's own."""
    ours_alone, theirs_alone = (
        {settings.written[number][0] for number in set(these) - set(those)}
        for these, those in ((ours, theirs), (theirs, ours))
    )
    return sorted(key for key in ours_alone & theirs_alone if key.partition(".")[0] not in ("method", "then"))


def _told(keys: Sequence[str], most: int = 4) -> str:
    return (
        "" if not keys else ", ".join(keys[:most]) + (f" and {len(keys) - most} more keys" if len(keys) > most else "")
    )
