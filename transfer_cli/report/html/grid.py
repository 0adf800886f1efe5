"""The tables of the first page and the remarks below them, as HTML that reads without JavaScript. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from transfer_cli.report.formats import TITLE, _remarks, _signs, _text
from transfer_cli.report.negative import verdicts
from transfer_cli.report.runs import Record
from transfer_cli.report.tables import Pair, Table


def table_section(number: int, table: Table, index: Mapping[Path, int]) -> str:
    found = verdicts(table.cells)
    heads = "".join(
        f'<th scope="col" class="n" data-pair="{escape(_pair(pair))}">{escape(pair[0])}<br>→ {escape(pair[1])}</th>'
        for pair in table.pairs
    )
    rows = []
    for i, row in enumerate(table.rows):
        cells = []
        for j, pair in enumerate(table.pairs):
            cell = table.cells.get((row, pair))
            if cell is None:
                cells.append(f'<td class="n" data-pair="{escape(_pair(pair))}">–</td>')
                continue
            text = escape(_text(table, found, row, pair))
            runs = " ".join(str(index[run.path]) for run in cell.runs)
            cells.append(
                f'<td class="n" data-pair="{escape(_pair(pair))}" data-value="{cell.mean}" data-runs="{runs}">'
                f'<a href="#cell/{number}.{i}.{j}">{text}</a></td>'
            )
        rows.append(f'<tr><th scope="row">{escape(str(row))}</th>{"".join(cells)}</tr>')
    return (
        f'<section><h2>{escape(table.kind.capitalize())}</h2>'
        f'<p class="caption">{escape(TITLE[table.kind])}. <span class="faint">{escape(" ".join(table.common))}</span></p>'
        f'<div class="scroll"><table class="results"><thead><tr><th scope="col" data-start="ascending">method</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _pair(pair: Pair) -> str:
    return " → ".join(pair)


def remarks(tables: Sequence[Table], records: Sequence[Record]) -> str:
    return ""
