r"""The table of many runs for a paper: LaTeX with booktabs, for any engine. Standard library only."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from transfer_cli.report.formats import BEST, TITLE, best_line, caption, columns, remarks
from transfer_cli.report.runs import Record
from transfer_cli.report.tables import Table

ESCAPED = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "°": r"$^{\circ}$",
    "↓": r"$\downarrow$",
    "→": r"$\to$",
    "²": r"$^{2}$",
}


def escape(text: str) -> str:
    """As plain text of LaTeX in ASCII: letters lose accents that have no place there, other signs become their code points."""
    return "".join(ESCAPED.get(c) or (c if c.isascii() else _plain(c)) for c in text.replace("->", "→"))


def _plain(character: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return escape(ascii_only) if ascii_only else f"U+{ord(character):04X}"


def as_latex(tables: Sequence[Table], records: Sequence[Record]) -> str:
    r"""Needs \usepackage{booktabs}. Captions explain the signs; what else stands beside the table is in comments."""
    parts = [comment(r"needs \usepackage{booktabs}"), *(_table(table, records) for table in tables)]
    for title, lines in remarks(tables, records):
        if lines:
            parts.append("\n".join(comment(line) for line in [title, *lines]))
    return "\n\n".join(parts) + "\n"


def comment(text: str) -> str:
    return "% " + "".join(c if c.isascii() else _plain(c) for c in " ".join(text.split()))


def _table(table: Table, records: Sequence[Record]) -> str:
    names, *others = columns(table, BEST)
    signs = [title for title, lines in remarks([table], records) if not lines]
    told = [f"{line[0].upper()}{line[1:]}." for line in [*caption(table), *best_line(table, "bold"), *signs]]
    common = ", ".join(f"\\texttt{{{escape(text)}}}" for text in table.common)
    header = [["", *(escape(column[line]) for column in others)] for line in (0, 1)]
    rows: list[list[str] | None] = []
    for row, name, *cells in zip(table.rows, names[2:], *(column[2:] for column in others), strict=True):
        if row.bound and rows and None not in rows:
            rows.append(None)  # a rule before the bounds
        rows.append([escape(name), *map(_cell, cells)])
    title = TITLE[table.kind]
    said = [escape(f"{title[0].upper()}{title[1:]}."), f"{common}.", *map(escape, told)]
    return tabular(" ".join(said), table.kind, header, rows)


def _cell(text: str) -> str:
    marked = text.endswith(f" {BEST}")
    written = escape(text.removesuffix(f" {BEST}"))
    return f"\\textbf{{{written}}}" if marked else written


def tabular(caption: str, label: str, header: Sequence[Sequence[str]], rows: Sequence[Sequence[str] | None]) -> str:
    """A table of escaped cells below the lines of its header, the first column to the left; None is a rule."""
    lines = [r"\midrule" if row is None else f"{' & '.join(row)} \\\\" for row in (*header, None, *rows)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering\small",
            f"\\caption{{{caption}}}",
            f"\\label{{tab:{label}}}",
            r"\medskip\footnotesize\setlength{\tabcolsep}{4pt}",
            f"\\begin{{tabular}}{{l{'r' * (len(header[0]) - 1)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )
