"""The table of many runs as JSON, with everything that the other formats round or leave out. Standard library only."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transfer_cli.report.formats import TITLE, best_line, caption, remarks
from transfer_cli.report.looks import ORACLE
from transfer_cli.report.negative import LABEL_FREE, verdicts
from transfer_cli.report.runs import SEEDS, Record, Run
from transfer_cli.report.selection import Choice, Point
from transfer_cli.report.tables import Best, Missing, Pair, Row, Table, mean_and_std
from transfer_cli.run_folder import HEADLINE


def as_json(tables: Sequence[Table], records: Sequence[Record]) -> str:
    content = {
        "tables": [_table(table) for table in tables],
        "remarks": [{"title": title, "lines": lines} for title, lines in remarks(tables, records)],
        "failed": [{"path": str(r.path), "error": r.error} for r in records if r.state == "failed"],
        "unfinished": [
            {"path": str(r.path), "state": r.state} for r in records if r.state not in ("failed", "finished")
        ],
    }
    return to_json(content)


def to_json(content: Any) -> str:
    return json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no nan or infinity: null stands for them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _table(table: Table) -> dict[str, Any]:
    found = verdicts(table.cells)
    cells = []
    for row in table.rows:
        for pair in table.pairs:
            cell, missing = table.cells.get((row, pair)), table.missing.get((row, pair), Missing())
            if cell is None and missing == Missing():
                continue
            one: dict[str, Any] = {**_place(table, row, pair), "mean": None, "std": None, "runs": []}
            if cell is not None:
                names = sorted({name for run in cell.runs for name in run.figures})
                figures = {name: [r.figures[name] for r in cell.runs if name in r.figures] for name in names}
                spread = {
                    n: dict(zip(("mean", "std", "n"), (*mean_and_std(v), len(v)), strict=True))
                    for n, v in figures.items()
                }
                one |= {"mean": cell.mean, "std": cell.std, "runs": [_run(run) for run in cell.runs], "figures": spread}
            verdict = found.get((row, pair))
            if verdict is not None:
                one["negative_transfer"] = {
                    "baseline": verdict.baseline,
                    "by_figure": verdict.figure,
                    f"by_{LABEL_FREE}": verdict.label_free,
                }
            one |= {what: [str(r.path) for r in of] for what, of in missing._asdict().items()}
            cells.append({**one, "best": table.supports(row, pair)})
    return {
        "kind": table.kind,
        "figure": HEADLINE[table.kind],
        "unit": "percent" if HEADLINE[table.kind] == "accuracy" else "the target's",
        "title": TITLE[table.kind],
        "common": table.common,
        "caption": [*caption(table), *best_line(table, "best")],
        "select": table.select,
        "uses_target_labels": table.select == ORACLE,
        "pairs": [list(pair) for pair in table.pairs],
        "rows": [_row(table, row) for row in table.rows],
        "cells": cells,
        "tests": [_best(table, best) for best in table.best],
        "choices": [_choice(choice) for choice in table.choices],
        "older": table.older,
    }


def _row(table: Table, row: Row) -> dict[str, Any]:
    return {
        "name": str(row),
        "method": row.method,
        "settings": row.told,
        "oracle": row.oracle,
        "bound": row.bound,
        "uses_target_labels": row.oracle,
        "average": table.average.get(row),
        "rank": table.rank.get(row),
    }


def _place(table: Table, row: Row, pair: Pair | None) -> dict[str, Any]:
    return {"row": table.rows.index(row), "pair": None if pair is None else table.pairs.index(pair)}


def _run(run: Run) -> dict[str, Any]:
    return {
        "path": run.path,
        **dict(zip(SEEDS, run.seeds, strict=True)),
        "figure": run.figure,
        "figures": run.figures,
        "validators": run.scores,
        "step": run.step,
        "weights_kept": run.kept,
        "warnings": run.warnings,
        "settings": {key: value for values in run.settings.values() for key, value in values.items()},
    }


def _best(table: Table, best: Best) -> dict[str, Any]:
    comparisons = [
        {
            "row": table.rows.index(c.row),
            "seeds": c.seeds,
            "difference": c.difference,
            "p": c.p,
            "p_holm": c.adjusted,
        }
        for c in best.comparisons
    ]
    return {**_place(table, best.row, best.pair), "supported": best.supported, "comparisons": comparisons}


def _choice(choice: Choice) -> dict[str, Any]:
    return {
        "method": choice.method,
        "source": choice.pair[0],
        "target": choice.pair[1],
        "select": choice.select,
        "uses_target_labels": choice.select == ORACLE,
        "chosen": _point(choice.chosen),
        "compared": [_point(point) for point in choice.compared],
        "left_out": [_point(point) for point in choice.left_out],
        "weights_not_kept": choice.unkept,
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "settings": point.settings,
        "seeds": [dict(zip(SEEDS, seeds, strict=True)) for seeds in point.seeds],
        "score": point.score,
        "figure": point.figure,
        **({"note": point.note} if point.note else {}),
    }
