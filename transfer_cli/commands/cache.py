"""`transfer cache [--clear] [KEY...]`: the features kept under the outputs; reads files alone, never imports torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from transfer_cli.data.feature_cache import FeatureCache, Stored
from transfer_cli.errors import TransferError, suggest


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="transfer cache",
        description="Features of frozen backbones that runs share: what is kept, how much of it, and when it was last used.",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="of the first column (default: all)")
    parser.add_argument("--clear", action="store_true", help="remove them, except those that a run is just writing")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="DIR", help="default: outputs")
    arguments = parser.parse_args(argv)

    cache = FeatureCache(arguments.outputs / "cache" / "features")
    stored = _chosen(cache.stored(), arguments.keys)
    if not arguments.clear:
        print("\n".join(_table(stored, cache.folder)))
        return 0
    busy = cache.clear([entry.key for entry in stored])
    removed = [entry for entry in stored if entry.key not in busy]
    print(f"{len(removed)} removed, {_megabytes(sum(entry.bytes for entry in removed))} MB")
    for key in busy:
        print(f"{key} stays: a run is writing it")
    return 0


def _chosen(stored: Sequence[Stored], keys: Sequence[str]) -> list[Stored]:
    known = [entry.key for entry in stored]
    for key in keys:
        if key not in known:
            raise TransferError(f"the cache has no entry '{key}'.{suggest(key, known)} transfer cache lists them.")
    return [entry for entry in stored if not keys or entry.key in keys]


def _table(stored: Sequence[Stored], folder: Path) -> list[str]:
    if not stored:
        return [f"nothing in {folder}"]
    rows = [("key", "data", "backbone", "rows", "MB", "last used"), *(_row(entry) for entry in stored)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 1, 2, 5)  # figures are aligned to the right
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return [*(line.rstrip() for line in lines), f"{_megabytes(sum(entry.bytes for entry in stored))} MB in {folder}"]


def _row(entry: Stored) -> tuple[str, ...]:
    words = [str(entry.meta.get(name, "?")) for name in ("data", "backbone")]
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
    rows = f"{entry.rows_there:,}/{entry.meta['rows']:,}" if "rows" in entry.meta else f"{entry.rows_there:,}/?"
    return entry.key, *words, rows, _megabytes(entry.bytes), used


def _megabytes(number: int) -> str:
    return f"{number / 2**20:,.1f}"
