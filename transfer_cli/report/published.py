"""A published table against ours: which figures, which differences, which misses. Standard library only.

A table is a YAML file (`conf/table/NAME.yaml`):

    protocol: [overrides of every cell]
    repeat: [[seed=0], [seed=1]]                 # each cell's figure is the mean over these; one run where left out
    columns: {NAME: [overrides]}
    rows:
      NAME: {method: NAME for --methods, overrides: [...], cells: {COLUMN: [overrides]}, published: [a figure a column, or null],
             tolerance: points, counts: false}   # counts: false shows a row without holding ours to it
    compare: within | at_least                   # at_least: only a figure below published - tolerance is a miss
    figure: selected | oracle                    # of the chosen checkpoint, or the best by target labels
    tolerance: points                            # or one sample of the target test set, whichever is larger
    skip_unpublished: true                       # cells without a published figure are not run
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transfer_cli.errors import TransferError, check_choice, suggest

KEYS = {
    "title", "citation", "needs", "note", "slow", "protocol", "repeat", "columns", "rows", "compare", "figure", "tolerance",
    "skip_unpublished",
}  # fmt: skip
ROW_KEYS = {"method", "overrides", "cells", "published", "tolerance", "counts", "repeat"}


@dataclass(frozen=True)
class Row:
    name: str
    method: str
    overrides: tuple[str, ...]
    cells: Mapping[str, tuple[str, ...]]  # further overrides, by column
    published: Mapping[str, float | None]
    tolerance: float
    counts: bool
    repeat: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class PublishedTable:
    name: str
    title: str
    citation: str
    needs: str
    note: str
    protocol: tuple[str, ...]
    columns: Mapping[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    compare: str
    figure: str
    skip_unpublished: bool = False

    def to_run(self, row: Row, column: str) -> bool:
        return not (self.skip_unpublished and row.published.get(column) is None)

    def overrides(self, row: Row, column: str) -> list[list[str]]:
        """Of each run of a cell, in the order in which they take effect."""
        common = [*self.protocol, *self.columns[column], *row.overrides, *row.cells.get(column, ())]
        return [[*common, *repeat] for repeat in row.repeat]


@dataclass(frozen=True)
class Cell:
    """Ours, in percent: the mean over `runs` of the chosen checkpoint's accuracy, and of the best by target labels; `error` where a
    run failed. `samples`: size of the target test set."""

    selected: float = math.nan
    oracle: float = math.nan
    std: float = math.nan
    runs: int = 0
    samples: int = 0
    error: str | None = None


@dataclass
class Outcome:
    table: PublishedTable
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def ours(self, row: Row, column: str) -> float:
        cell = self.cells.get((row.name, column), Cell())
        return cell.oracle if self.table.figure == "oracle" else cell.selected

    def difference(self, row: Row, column: str) -> float | None:
        """Ours minus the published figure; None where there is none to compare with."""
        published = row.published.get(column)
        return None if published is None or (row.name, column) not in self.cells else self.ours(row, column) - published

    def misses(self, row: Row, column: str) -> bool:
        """Whether the cell is off by more than the tolerance, or failed."""
        cell, difference = self.cells.get((row.name, column)), self.difference(row, column)
        if cell is None or (difference is None and cell.error is None):
            return False
        if cell.error is not None or difference is None or math.isnan(difference):
            return True
        allowed = max(row.tolerance, 100 / max(1, cell.samples)) + 0.05 + 1e-9  # published figures are rounded
        return difference < -allowed if self.table.compare == "at_least" else abs(difference) > allowed

    def missed(self) -> list[tuple[Row, str]]:
        """The cells that count and miss."""
        return [(row, c) for row in self.table.rows if row.counts for c in self.table.columns if self.misses(row, c)]


def parse(name: str, content: Any) -> PublishedTable:
    """Raises:
    TransferError: a key that a table does not have, or figures that do not fit its columns."""
    if not isinstance(content, Mapping):
        raise TransferError(f"table {name}: the file must hold keys and values.")
    _check(name, content, KEYS)
    for key in ("columns", "rows"):
        if not isinstance(content.get(key), Mapping) or not content[key]:
            raise TransferError(f"table {name}: '{key}' must hold at least one name.")
    columns = {str(column): tuple(map(str, overrides or ())) for column, overrides in content["columns"].items()}
    repeat = _repeats(content.get("repeat"))
    rows = []
    for row, entry in content["rows"].items():
        where = f"{name}, row {row}"
        _check(where, entry, ROW_KEYS)
        published = entry.get("published") or [None] * len(columns)
        if len(published) != len(columns):
            raise TransferError(f"table {where}: {len(published)} published figures for {len(columns)} columns.")
        cells = {str(column): tuple(map(str, overrides)) for column, overrides in (entry.get("cells") or {}).items()}
        for column in cells:
            check_choice(column, columns, f"table {where}: a column of 'cells'")
        rows.append(
            Row(
                str(row),
                str(entry.get("method", row)),
                tuple(map(str, entry.get("overrides") or ())),
                cells,
                dict(zip(columns, published, strict=True)),
                float(entry.get("tolerance", content.get("tolerance", 0.5))),
                bool(entry.get("counts", True)),
                _repeats(entry["repeat"]) if "repeat" in entry else repeat,
            )
        )
    return PublishedTable(
        name,
        str(content.get("title", name)),
        str(content.get("citation", "")),
        str(content.get("needs", "")),
        str(content.get("note", "")),
        tuple(map(str, content.get("protocol") or ())),
        columns,
        tuple(rows),
        check_choice(content.get("compare", "within"), ("within", "at_least"), f"table {name}: compare"),
        check_choice(content.get("figure", "selected"), ("selected", "oracle"), f"table {name}: figure"),
        bool(content.get("skip_unpublished", False)),
    )


def _repeats(entries: Any) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(map(str, entry)) for entry in entries or [[]])


def _check(where: str, content: Mapping[str, Any], known: set[str]) -> None:
    for key in content:
        if key not in known:
            raise TransferError(f"table {where}: there is no key '{key}'.{suggest(key, known)}")


def lines(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each row of the table ours, published and the difference, and the mean over the columns."""
    table = outcome.table
    header = ["", "", *table.columns, "mean"]
    rows = []
    for row in table.rows:
        if not any((row.name, column) in outcome.cells for column in table.columns):
            continue
        name = row.name if row.counts else f"{row.name} (shown, not held)"
        ours = [_number(outcome.ours(row, c)) + ("*" if outcome.misses(row, c) else "") for c in table.columns]
        rows.append([name, "ours", *ours, _mean([outcome.ours(row, c) for c in table.columns])])
        if table.figure == "oracle":
            selected = [
                outcome.cells[row.name, c].selected if (row.name, c) in outcome.cells else math.nan
                for c in table.columns
            ]
            rows.append(["", "without target labels", *map(_number, selected), _mean(selected)])
        spreads = [
            outcome.cells[row.name, c].std if (row.name, c) in outcome.cells else math.nan for c in table.columns
        ]
        if not all(map(math.isnan, spreads)):
            rows.append(["", "± (runs)", *map(_number, spreads), ""])
        published = [row.published[c] for c in table.columns]
        if any(p is not None for p in published):
            rows.append(["", "published", *[_number(p) for p in published], _mean(published)])
            differences = [outcome.difference(row, c) for c in table.columns]
            rows.append(
                ["", "difference", *[_number(d, sign=True) for d in differences], _mean(differences, sign=True)]
            )
    return header, rows


def verdict(outcome: Outcome) -> list[str]:
    """What the table amounts to, in words, and the errors of cells that failed."""
    counted = [
        (r, c) for r in outcome.table.rows if r.counts for c in outcome.table.columns if (r.name, c) in outcome.cells
    ]
    compared = [(r, c) for r, c in counted if r.published[c] is not None]
    missed = outcome.missed()
    words = [
        f"{len(compared) - len([m for m in missed if m in compared])} of {len(compared)} cells within their tolerance"
    ]
    words += [
        f"{row.name}, {column}: {outcome.cells[row.name, column].error or 'off by more than its tolerance'}"
        for row, column in missed
    ]
    return words


def render(outcome: Outcome, form: str) -> str:
    """The table as `text`, `md`, `csv` or `html`."""
    header, rows = lines(outcome)
    table = outcome.table
    if form == "csv":
        return "".join(",".join(_csv(value.rstrip("*")) for value in row) + "\n" for row in [header, *rows])
    caption = [table.title, table.citation, "accuracy in percent; * outside the tolerance"]
    if table.note:
        caption.append(table.note)
    if form == "md":
        body = ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]]
        return (
            "\n\n".join(caption)
            + "\n\n"
            + "\n".join(body)
            + "\n\n"
            + "\n".join(f"- {v}" for v in verdict(outcome))
            + "\n"
        )
    if form == "html":
        return _html(caption, header, rows, verdict(outcome))
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    text = [
        "  ".join(f"{v:<{w}}" if i < 2 else f"{v:>{w}}" for i, (v, w) in enumerate(zip(row, widths, strict=True)))
        for row in [header, *rows]
    ]
    return "\n".join([*caption, "", *(line.rstrip() for line in text), "", *verdict(outcome)]) + "\n"


def _html(caption: Sequence[str], header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=miss' if v.endswith('*') else ''}>{html.escape(v)}</{tag}>" for v in row)

    style = (
        ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem}"
        "div{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.2rem .6rem;text-align:right;white-space:nowrap}td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}"
        "td:first-child{white-space:normal;max-width:12rem}"
        "tr.first td{border-top:1px solid #8886}.miss{color:#c40000;font-weight:600}"
        "@media(prefers-color-scheme:dark){.miss{color:#ff8a80}}"
    )
    body = "".join(f"<tr{' class=first' if row[0] else ''}>{cells(row, 'td')}</tr>\n" for row in rows)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(caption[0])}</title><style>{style}</style>\n<h1>{html.escape(caption[0])}</h1>\n"
        + "".join(f"<p>{html.escape(line)}</p>\n" for line in caption[1:])
        + f"<div><table>\n<tr>{cells(header, 'th')}</tr>\n{body}</table></div>\n<ul>"
        + "".join(f"<li>{html.escape(word)}</li>" for word in words)
        + "</ul>\n</html>\n"
    )


def _number(value: float | None, sign: bool = False) -> str:
    if value is None or math.isnan(value):
        return "-"
    rounded = round(value, 1) or 0.0  # no minus zero
    return f"{rounded:{'+' if sign and rounded else ''}.1f}"


def _mean(values: Sequence[float | None], sign: bool = False) -> str:
    known = [v for v in values if v is not None and not math.isnan(v)]
    return _number(math.fsum(known) / len(known), sign) if known and len(known) == len(values) else "-"


def _csv(value: str) -> str:
    return f'"{value}"' if "," in value or '"' in value else value
