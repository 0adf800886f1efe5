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
from transfer_cli.report.tables import Pair, Row, Table
from transfer_cli.run_folder import HEADLINE, RunFolder, read_json


def describe(tables: Sequence[Table], records: Sequence[Record]) -> dict[str, Any]:
    """`runs`: an entry each, in the order of `records`; `base`: the commonest value of every key of the configurations, of which
    an entry's `config` tells what differs, None what is missing."""
    known = {record.path: record.run or record.asked for record in records}
    places = _places(tables)
    entries = [_entry(record, known[record.path], places.get(record.path)) for record in records]
    _name_apart(entries)
    _compare(entries, records)
    base = _commonest([entry["config"] for entry in entries])
    for index, entry in enumerate(entries):
        entry["index"] = index
        own = entry["config"]
        entry["config"] = {key: own.get(key) for key in base.keys() | own.keys() if own.get(key) != base.get(key)}
    return {"base": base, "runs": entries}


def _places(tables: Sequence[Table]) -> dict[Path, tuple[str, str, Row, Pair]]:
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


def _entry(record: Record, run: Run | None, place: tuple[str, str, Row, Pair] | None) -> dict[str, Any]:
    folder = RunFolder(record.path)
    manifest = read_json(folder.manifest) or {}
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
        "config": {} if run is None else _config(run),
    }
    if record.run is not None:
        result = read_json(folder.result) or {}
        entry["kind"], entry["figures"] = record.run.kind, {k: _number(v) for k, v in record.run.figures.items()}
        entry["figure"] = entry["figures"].get(HEADLINE[record.run.kind])
        entry["seconds"], entry["time"] = result.get("seconds", {}).get("fit"), record.run.time.replace("T", " ")[:16]
    if place is not None:
        entry["kind"], entry["cell"], row, pair = place
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


def _config(run: Run) -> dict[str, str]:
    """Its settings and seeds as `key: value`, written as on the command line."""
    pairs = dict(zip(SEEDS, run.seeds, strict=True))
    for owner in run.settings.values():
        pairs |= owner
    return {key: written(value) for key, value in pairs.items()}


def _commonest(configs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for config in configs:
        for key, value in config.items():
            counts[key][value] += 1
    return {key: found.most_common(1)[0][0] for key, found in sorted(counts.items())}


def _name_apart(entries: Sequence[dict[str, Any]]) -> None:
    """`id`: a name for files and links; folders of one name in two places get a part of their path's digest."""
    names = [re.sub(r"[^A-Za-z0-9_.+-]", "_", Path(entry["path"]).name) for entry in entries]
    often = Counter(name.lower() for name in names)  # some file systems tell no capitals
    for entry, name in zip(entries, names, strict=True):
        digest = hashlib.sha256(str(Path(entry["path"]).resolve()).encode()).hexdigest()[:8]
        entry["id"] = name if often[name.lower()] == 1 else f"{name}-{digest}"


def _compare(entries: Sequence[dict[str, Any]], records: Sequence[Record]) -> None:
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
            others = near.get((run.pair, run.seeds, run.kind), [])
            found = min(others, key=lambda other: (len(_differences(run, other)), str(other.path)), default=None)
            if found is not None:
                entry["compared"] = _told(_differences(run, found))
        if found is not None:
            entry["baseline"] = index[found.path]


def _differences(run: Run, other: Run) -> list[str]:
    """The keys that both have, with different values, but for the method's own."""
    ours, theirs = _config(run), _config(other)
    return sorted(
        k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k] and k.partition(".")[0] not in ("method", "then")
    )


def _told(keys: Sequence[str], most: int = 4) -> str:
    return (
        "" if not keys else ", ".join(keys[:most]) + (f" and {len(keys) - most} more keys" if len(keys) > most else "")
    )
