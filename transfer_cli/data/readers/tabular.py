"""Tables as files hold them: separated text (also .gz), spreadsheets, MATLAB files; and conditions on their columns."""

from __future__ import annotations

import csv
import gzip
import importlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from transfer_cli.data.readers.files import reading
from transfer_cli.errors import TransferError, suggest

Header = Literal["auto"] | bool
MISSING = ("", "?", "NA", "nan")
SEPARATORS = ("\t", ";", ",")  # tried in this order
SNIFFED = 20  # lines
CONDITION = re.compile(r"\s*(.+?)\s*(==|!=|<=|>=|<|>)\s*(.*?)\s*")
ORDERED = {"<": np.less, ">": np.greater, "<=": np.less_equal, ">=": np.greater_equal}


@dataclass(frozen=True)
class Rows:
    """The cells of one file by column, each a number or text, and the line (or row) of the file where each row stands."""

    path: Path
    names: tuple[str, ...]
    columns: tuple[Sequence[Any], ...]
    lines: tuple[int, ...]
    missing: frozenset[str]  # plain texts in lower case that stand for nothing

    def __len__(self) -> int:
        return len(self.lines)

    def take(self, indices: Sequence[int]) -> Rows:
        columns = tuple([column[i] for i in indices] for column in self.columns)
        return replace(self, columns=columns, lines=tuple(self.lines[i] for i in indices))

    def name(self, column: str | int) -> str:
        """That of a column, given by its name or position (from the end, if negative).

        Raises:
            TransferError: there is no such column.
        """
        if isinstance(column, str) and column in self.names:
            return column
        if isinstance(column, int) and -len(self.names) <= column < len(self.names):
            return self.names[column]
        known = ", ".join(self.names[:30]) + (", ..." if len(self.names) > 30 else "")
        raise TransferError(
            f"{self.path} has no column '{column}'.{suggest(str(column), self.names)} Its columns: {known}."
        )

    def cells(self, column: str) -> Sequence[Any]:
        return self.columns[self.names.index(column)]

    def is_missing(self, cell: Any) -> bool:
        return str(cell).strip().lower() in self.missing or plain_text(cell).lower() in self.missing

    def numbers(self, column: str) -> np.ndarray:
        """`(N,)` float64, nan where a cell is missing.

        Raises:
            TransferError: a cell that is no number; its line is named.
        """
        values = np.empty(len(self))
        for i, cell in enumerate(self.cells(column)):
            if self.is_missing(cell):
                values[i] = math.nan
                continue
            try:
                values[i] = as_number(cell)
            except ValueError:
                raise TransferError(
                    f"{self.path} line {self.lines[i]}, column '{column}': '{str(cell)[:40]}' is no number. List the column in "
                    "categorical or drop, or the text in missing_values."
                ) from None
        return values

    def texts(self, column: str) -> list[str | None]:
        """Numbers written one way (`1.0` as `1`), so that files agree; None where a cell is missing."""
        return [None if self.is_missing(cell) else plain_text(cell) for cell in self.cells(column)]

    def where(self, condition: str) -> np.ndarray:
        """`(N,)` bool: rows that fulfil conditions such as `age>=28`, `sex==1 & ward!=icu`. A missing cell fulfils none.

        Raises:
            TransferError: not of this form, an unknown column, or an order among texts.
        """
        held = np.ones(len(self), bool)
        for column, relation, value in parse_condition(condition):
            name = self.name(column)
            if relation in ORDERED:
                try:
                    bound = as_number(value)
                except ValueError:
                    raise TransferError(f"'{condition}': '{value}' is no number to compare {name} with.") from None
                with np.errstate(invalid="ignore"):
                    held &= ORDERED[relation](self.numbers(name), bound)
            else:
                wanted = plain_text(value)
                held &= [text is not None and (text == wanted) == (relation == "==") for text in self.texts(name)]
        return held


def parse_condition(condition: str) -> list[tuple[str, str, str]]:
    """Column, relation and value of each part of `column>=value & ...`.

    Raises:
        TransferError: not of this form.
    """
    parts = [CONDITION.fullmatch(part) for part in condition.split("&")]
    if not all(parts):
        raise TransferError(f"'{condition}' is no condition: write COLUMN==VALUE, with !=, <, <=, >, >= and & too.")
    return [(m[1], m[2], m[3].strip("'\"")) for m in parts if m]


def is_condition(text: str) -> bool:
    return CONDITION.fullmatch(text) is not None


def plain_text(cell: Any) -> str:
    """`3.0` and 3 as `3`, `0.10` as `0.1`; other text without the space around it."""
    try:
        number = as_number(cell)
    except ValueError:
        return str(cell).strip()
    return f"{number:.0f}" if number.is_integer() and abs(number) < 1e15 else repr(number)


def as_number(cell: Any) -> float:
    """Raises:
    ValueError: it is none; `1_000`, which Python would take for one, neither."""
    if isinstance(cell, str):
        if "_" in cell:
            raise ValueError(cell)
        return float(cell)
    if isinstance(cell, int | float | np.number):
        return float(cell)
    raise ValueError(cell)


def in_order(texts: set[str]) -> list[str]:
    """Sorted: as numbers, if all are."""
    try:
        return sorted(texts, key=float)
    except ValueError:
        return sorted(texts)


def read_rows(
    path: Path,
    *,
    header: Header = "auto",
    columns: Sequence[str] | None = None,
    separator: str | None = None,
    sheet: int | str = 0,
    missing: Sequence[str | int | float] = MISSING,
) -> Rows:
    """The table in a file. `columns` names them, where there is no header or another is wished.

    `header=auto` takes the first row for one where none of its cells is a number. Without names, positions are names.
    In `.mat`, every numeric matrix with the most rows is a column `x`, or columns `x_0`, `x_1`, ...; a cell array with a
    matrix a group counts as those stacked, and a column `group` numbers its cells from 0.

    Raises:
        TransferError: no table, rows of different length, or `columns` that do not fit.
    """
    values: list[Sequence[Any]]
    with reading(path):
        if path.suffix == ".mat":
            names, values = _matlab(path)
            lines = list(range(1, len(values[0]) + 1))
        else:
            lines, rows = _sheet(path, sheet) if path.suffix in (".xls", ".xlsx") else _text(path, separator)
            _check_lengths(path, lines, rows)
            written = _header(rows[0], header)
            names = written or [str(i) for i in range(len(rows[0]))]
            if written:
                lines, rows = lines[1:], rows[1:]
            values = list(zip(*rows, strict=True))
    if not lines:
        raise TransferError(f"{path} has no rows.")
    if columns is not None:
        if len(columns) != len(names):
            raise TransferError(f"{path} has {len(names)} columns, and `columns` names {len(columns)}.")
        names = list(columns)
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise TransferError(f"{path} has two columns '{twice[0]}': give them other names with columns=[...].")
    nothing = frozenset({"nan", *(plain_text(text).lower() for text in missing)})  # not a number is never a value
    return Rows(path, tuple(names), tuple(values), tuple(lines), nothing)


def open_text(path: Path) -> Any:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", newline="")


def _text(path: Path, separator: str | None) -> tuple[list[int], list[list[str]]]:
    """Line numbers and cells; blank lines are left out."""
    with open_text(path) as file:
        lines = file.read().splitlines()
    filled = [line for line in lines[: SNIFFED * 10] if line.strip()][:SNIFFED]
    if not filled:
        raise TransferError(f"{path} is empty.")
    separator = _separator(filled) if separator is None else separator
    if separator in ("whitespace", " "):
        numbered = [(i, line.split()) for i, line in enumerate(lines, 1)]
    elif len(separator) != 1:
        raise TransferError(f"separator must be one character or `whitespace`, not '{separator}'.")
    else:  # the reader knows quotes, and so cells of several lines
        rows = csv.reader([line + "\n" for line in lines], delimiter=separator, skipinitialspace=True)
        numbered = [(rows.line_num, row) for row in rows]
    kept = [(i, row) for i, row in numbered if any(cell.strip() for cell in row)]
    return [i for i, _ in kept], [row for _, row in kept]


def _separator(lines: Sequence[str]) -> str:
    """The first that cuts all lines into as many cells, two or more; else white space."""
    for separator in SEPARATORS:
        widths = {len(row) for row in csv.reader(lines, delimiter=separator) if row}
        if len(widths) == 1 and widths != {1}:
            return separator
    inside = [separator for separator in SEPARATORS if separator in lines[0]]
    return inside[0] if inside else "whitespace"  # rows of different length are then named


def _sheet(path: Path, sheet: int | str) -> tuple[list[int], list[list[Any]]]:
    """Row numbers and cells of one sheet; empty rows are left out."""
    module = "xlrd" if path.suffix == ".xls" else "openpyxl"
    try:
        library = importlib.import_module(module)
    except ImportError as error:
        raise TransferError(
            f"{path}: {path.suffix} files need {module}: pip install 'transfer-cli[tables]', or save the table as CSV."
        ) from error
    rows: list[list[Any]]
    if module == "xlrd":
        book = library.open_workbook(path)
        names = book.sheet_names()
        page = book.sheet_by_name(_sheet_name(path, names, sheet))
        rows = [page.row_values(i) for i in range(page.nrows)]
    else:
        book = library.load_workbook(path, read_only=True, data_only=True)
        rows = [list(row) for row in book[_sheet_name(path, book.sheetnames, sheet)].iter_rows(values_only=True)]
        book.close()
    numbered = [(i, ["" if cell is None else cell for cell in row]) for i, row in enumerate(rows, 1)]
    kept = [(i, row) for i, row in numbered if any(str(cell).strip() for cell in row)]
    if not kept:
        raise TransferError(f"{path} has nothing on this sheet; it has: {', '.join(names_of(book))}.")
    width = max(len(row) for _, row in kept)
    return [i for i, _ in kept], [row + [""] * (width - len(row)) for _, row in kept]


def names_of(book: Any) -> list[str]:
    return list(book.sheet_names() if hasattr(book, "sheet_names") else book.sheetnames)


def _sheet_name(path: Path, names: Sequence[str], sheet: int | str) -> str:
    if isinstance(sheet, int) and 0 <= sheet < len(names):
        return names[sheet]
    if sheet in names:
        return str(sheet)
    raise TransferError(f"{path} has no sheet {sheet}; it has: {', '.join(names)}.")


def _matlab(path: Path) -> tuple[list[str], list[Sequence[Any]]]:
    from scipy.io import loadmat

    found: dict[str, np.ndarray] = {}
    for name, value in loadmat(path).items():
        value = value.toarray() if hasattr(value, "toarray") else value
        if name.startswith("__") or not isinstance(value, np.ndarray):
            continue
        if value.dtype == object and value.size and all(_is_matrix(cell) for cell in value.ravel()):
            cells = list(value.ravel())
            found.setdefault("group", np.repeat(np.arange(len(cells)), [len(cell) for cell in cells])[:, None])
            value = np.vstack(cells)
        if _is_matrix(value):
            found[name] = value
    most = max((len(value) for value in found.values()), default=0)
    names: list[str] = []
    columns: list[Sequence[Any]] = []
    for name, value in found.items():
        if len(value) == most:
            width = value.shape[1]
            names += [name] if width == 1 else [f"{name}_{i}" for i in range(width)]
            columns += value.astype(np.float64).T.tolist()
    if not columns:
        raise TransferError(f"{path} holds no numeric matrix.")
    return names, columns


def _is_matrix(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.dtype.kind in "fiub"


def _header(row: Sequence[Any], header: Header) -> list[str] | None:
    """The names that the first row holds, an empty one replaced by its position; None where it holds cells."""
    if header is False or (header == "auto" and any(_reads_as_number(cell) for cell in row)):
        return None
    return [str(cell).strip() or str(i) for i, cell in enumerate(row)]


def _reads_as_number(cell: Any) -> bool:
    try:
        as_number(cell)
    except ValueError:
        return False
    return True


def _check_lengths(path: Path, lines: Sequence[int], rows: Sequence[Sequence[Any]]) -> None:
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(rows[0]):
            raise TransferError(
                f"{path}: line {line} has {len(row)} cells, line {lines[0]} has {len(rows[0])}; separator=... states what is "
                "between them."
            )
