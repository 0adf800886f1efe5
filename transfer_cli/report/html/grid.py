"""The tables of the first page and what to know besides, as HTML that reads without JavaScript. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from transfer_cli.report.formats import TITLE, UNKEPT, WORSE, WORSE_LABEL_FREE, best_line, caption, remarks
from transfer_cli.report.negative import Verdict, verdicts
from transfer_cli.report.ranking import Ranking
from transfer_cli.report.ranking_formats import HEADER, cells, notes, title
from transfer_cli.report.runs import Record
from transfer_cli.report.tables import Cell, Missing, Pair, Row, Table

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
        line = [_row_head(row)]
        for j, pair in enumerate(table.pairs):
            line.append(_cell(table, row, pair, found.get((row, pair)), index, f"{number}.{i}.{j}"))
        line += _summaries(table, row)
        kind = " ".join(["bound"] * row.bound + ["oracle"] * row.oracle)
        rows.append(f'<tr class="{kind}">{"".join(line)}</tr>')
    told = "".join(f" {_sentence(line)}." for line in (TITLE[table.kind], *caption(table), *best_line(table, "bold")))
    return (
        f"<section><h2>{escape(table.kind.capitalize())}</h2>"
        f'<p class="caption">{escape(told)} <span class="faint">{escape(" ".join(table.common))}</span></p>'
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
    unkept = f" {UNKEPT}" if any(not run.kept for run in cell.runs) else ""
    return escape(f"{cell.mean:.{digits}f}{std} ({len(cell.runs)}){signs}{unkept}")


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


def remarks_section(tables: Sequence[Table], records: Sequence[Record]) -> str:
    """What a reader of the tables must know besides; long lists are folded."""
    told, lists = [], []
    for heading, lines in remarks(tables, records):
        if lines:
            items = "".join(f"<li>{escape(line)}</li>" for line in lines)
            lists.append(
                f'<details><summary>{escape(_sentence(heading))} ({len(lines)})</summary><ul class="small">{items}</ul></details>'
            )
        else:
            told.append(f"<li>{escape(_sentence(heading))}.</li>")
    return (f'<ul class="faint small notes">{"".join(told)}</ul>' if told else "") + "".join(lists)


def ranking_section(ranking: Ranking) -> str:
    """How close each validator's choices come to the oracle's."""
    head, *more = (f'<th scope="col"{" class=n" if i else ""}>{escape(text)}</th>' for i, text in enumerate(HEADER))
    rows = []
    for ranked in ranking.ranked:
        name, *values = cells(ranked)
        shown = "".join(f'<td class="n">{escape(value)}</td>' for value in values)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    told = "".join(f" {escape(_sentence(note))}." for note in notes(ranking))
    table = f"<thead><tr>{head}{''.join(more)}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return (
        f'<section><h2>Validators, {escape(ranking.kind)}</h2><p class="caption">{escape(_sentence(title(ranking)))}.{told}</p>'
        f'<div class="scroll"><table>{table}</table></div></section>'
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
