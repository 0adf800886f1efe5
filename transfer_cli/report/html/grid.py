"""The tables of the first page and what to know besides, as HTML that reads without JavaScript. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from transfer_cli.report.formats import MEANING, TITLE, WORSE, WORSE_LABEL_FREE
from transfer_cli.report.negative import Verdict, verdicts
from transfer_cli.report.runs import Record
from transfer_cli.report.tables import LEVEL, Cell, Missing, Pair, Row, Table

NONE = Missing()


def table_section(number: int, table: Table, index: Mapping[Path, int]) -> str:
    """`number`: the table's; `index`: the place of a run in the list, by its path."""
    found = verdicts(table.cells)
    heads = ['<th scope="col" data-start="ascending">method</th>']
    start = "descending" if table.kind == "classification" else "ascending"
    for source, target in table.pairs:
        name = escape(f"{source} → {target}")
        heads.append(
            f'<th scope="col" class="n" data-pair="{name}" data-start="{start}">{escape(source)} → {escape(target)}</th>'
        )
    if table.average:
        heads.append(f'<th scope="col" class="n" data-start="{start}">average</th>')
    if table.rank:
        heads.append('<th scope="col" class="n" data-start="ascending">rank</th>')
    rows = []
    for i, row in enumerate(table.rows):
        cells = [_row_head(row)]
        for j, pair in enumerate(table.pairs):
            cells.append(_cell(table, row, pair, found.get((row, pair)), index, f"{number}.{i}.{j}"))
        cells += _summaries(table, row)
        kind = " ".join(["bound"] * row.bound + ["oracle"] * row.oracle)
        rows.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    caption = f"{TITLE[table.kind][:1].upper()}{TITLE[table.kind][1:]}."
    chosen = f" Hyper-parameters chosen by {escape(table.select)}." if table.select else ""
    return (
        f"<section><h2>{escape(table.kind.capitalize())}</h2>"
        f'<p class="caption">{escape(caption)}{chosen} <span class="faint">{escape(" ".join(table.common))}</span></p>'
        f'<div class="scroll"><table class="results" data-kind="{table.kind}" data-select="{escape(table.select or "")}">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _row_head(row: Row) -> str:
    marks = [mark for mark, on in (("bound", row.bound), ("oracle", row.oracle)) if on]
    shown = "".join(f' <span class="badge">{mark}</span>' for mark in marks)
    told = f"<small>{escape(' '.join(row.told))}</small>" if row.told else ""
    return f'<th scope="row">{escape(row.method)}{shown}{told}</th>'


def _cell(table: Table, row: Row, pair: Pair, verdict: Verdict | None, index: Mapping[Path, int], place: str) -> str:
    cell, missing = table.cells.get((row, pair)), table.missing.get((row, pair), NONE)
    paths = [run.path for run in cell.runs] if cell is not None else []
    paths += [record.path for records in missing for record in records]
    name = escape(" → ".join(pair))
    if not paths:
        return f'<td class="n" data-pair="{name}">–</td>'
    best = " best" if table.supports(row, pair) else ""
    value = f' data-value="{cell.mean!r}"' if cell is not None else ""
    text = [_text(table.kind, cell, verdict)] if cell is not None else []
    words = (("failed", missing.failed), ("unfinished", missing.unfinished), ("without the score", missing.unscored))
    text += [f"<small>{len(records)} {word}</small>" for word, records in words if records]
    runs = " ".join(str(index[path]) for path in paths if path in index)
    return f'<td class="n{best}" data-pair="{name}"{value} data-runs="{runs}"><a href="#cell/{place}">{"".join(text)}</a></td>'


def _text(kind: str, cell: Cell, verdict: Verdict | None) -> str:
    digits = 1 if kind == "classification" else _decimals(cell.mean)
    std = "" if math.isnan(cell.std) else f" ± {cell.std:.{digits}f}"
    signs = "" if verdict is None else f" {WORSE}" * verdict.figure + f" {WORSE_LABEL_FREE}" * bool(verdict.label_free)
    return escape(f"{cell.mean:.{digits}f}{std} ({len(cell.runs)}){signs}")


def _decimals(value: float) -> int:
    """Those that show four significant digits."""
    return min(8, max(0, 3 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else 1


def _summaries(table: Table, row: Row) -> Iterator[str]:
    for values, digits in ((table.average, 1), (table.rank, 2)):
        if values:
            value = values.get(row)
            best = " best" if values is table.average and table.supports(row, None) else ""
            yield (
                '<td class="n">–</td>'
                if value is None
                else f'<td class="n{best}" data-value="{value!r}">{value:.{digits}f}</td>'
            )


def remarks(tables: Sequence[Table], records: Sequence[Record]) -> str:
    """What the signs of the tables mean, and lists of runs that want attention."""
    rows = [row for table in tables for row in table.rows]
    found = [verdict for table in tables for verdict in verdicts(table.cells).values()]
    notes = []
    if any(best.supported for table in tables for best in table.best):
        notes.append(
            f"Bold: the best mean, and better than every other row by paired tests over seeds (Holm, p < {LEVEL})."
        )
    for sign, worse in ((WORSE, any(v.figure for v in found)), (WORSE_LABEL_FREE, any(v.label_free for v in found))):
        if worse:
            names = " or ".join(sorted({v.baseline for v in found}, reverse=True))
            notes.append(f"{sign}: worse than {names} with the same settings, {MEANING[sign]}.")
    if any(row.oracle for row in rows):
        notes.append("oracle: target test labels chose the checkpoint, so these are upper bounds, not results.")
    if any(row.bound for row in rows):
        notes.append("bound: trained with all target labels, what the others can reach at best.")
    attention = (
        (
            "Training went wrong",
            [(r.path, text) for r in records if r.run is not None for text in r.run.warnings],
        ),
        ("Failed", [(r.path, r.error or "no reason was recorded") for r in records if r.state == "failed"]),
        ("Unfinished", [(r.path, r.state) for r in records if r.state not in ("failed", "finished")]),
        (
            "Left out of the tables: the same settings and seeds have a newer run, of another version of a component",
            [(path, "") for table in tables for path in table.older],
        ),
    )
    lists = "".join(
        f'<details><summary>{escape(title)} ({len(lines)})</summary><ul class="small">'
        + "".join(f"<li><code>{escape(str(path))}</code> {escape(text)}</li>" for path, text in lines)
        + "</ul></details>"
        for title, lines in attention
        if lines
    )
    told = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (f'<ul class="faint small notes">{told}</ul>' if told else "") + lists
