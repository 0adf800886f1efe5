"""A table as a task: csv and other separated text, spreadsheets, MATLAB files; columns are inputs, targets or neither."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from transfer_cli.data.domain import Domain, Kind, Part, Place, fingerprint_files
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.files import fill_domain
from transfer_cli.data.readers.roles import Choice, Labels, Missing, as_float32, check_enough, find, moments, table_name
from transfer_cli.data.readers.tabular import MISSING, Header, Rows, in_order, read_rows
from transfer_cli.errors import TransferError


class Table:
    """Inputs `(N, D)` float32; targets `(N, T)` float32, or classes.

    Args:
        path: the file, below the data root or absolute; `{domain}` in it stands for `domain`.
        domain: the rows or the file to take; null is the whole table.
        domains: the domains there are: names, or names and what they stand for: how the path spells them, a value of
            `domain_column`, or a condition such as `age>=28` (`==`, `!=`, `<`, `<=`, `>`, `>=`, joined by `&`).
        domain_column: the column whose value is the domain. It, and one that a domain holds at a value, is no input.
        test_path: a second file, with the published test split.
        header: whether the first row has names; `auto`: it has, if none of its cells is a number.
        columns: names in place of the header, or where there is none; without any, positions (from 0) are names.
        separator: one character, or `whitespace`; null finds tab, semicolon, comma or white space.
        sheet: of a spreadsheet, its name or position.
        target: the column or columns to predict, by name or position (-1: the last).
        kind: regression, or classification (classes are the values of the target, or `classes`).
        classes: name and condition of each class (`disease: target>0`).
        target_scale: factor of regression targets, to bring two domains to one unit.
        inputs: the input columns; null takes all that have no other part.
        drop: columns to leave out.
        categorical: columns to encode as one column a value, over all rows of all files, so that domains agree.
        standardise: bring numeric inputs to mean 0 and variance 1, over all rows of all files: one unit for all domains, which
            networks need. `categorical` and this look at inputs alone, and at the files of `domains`.
        missing: cells without a value: refuse, leave the row out, or put the mean of the column over this domain's
            training rows. A row without its target is left out, unless they are refused.
        missing_values: what such a cell holds, in any case.
    """

    def __init__(
        self,
        place: Place,
        *,
        path: str | None = None,
        domain: str | int | None = None,
        domains: list[str] | dict[str, str] | None = None,
        domain_column: str | int | None = None,
        test_path: str | None = None,
        header: Header = "auto",
        columns: list[str] | None = None,
        separator: str | None = None,
        sheet: int | str = 0,
        target: str | int | list[str | int] = -1,
        kind: Kind = "regression",
        classes: dict[str, str] | None = None,
        target_scale: float = 1.0,
        inputs: list[str | int] | None = None,
        drop: list[str | int] | None = None,
        categorical: list[str | int] | None = None,
        standardise: bool = False,
        missing: Missing = "error",
        missing_values: Sequence[str | int | float] = MISSING,
    ) -> None:
        if path is None:
            raise TransferError("table needs source.path=FILE or target.path=FILE, below data_root or absolute.")
        self.place, self.test_path, self.inputs = place, test_path, inputs
        self.name = table_name(path, domain)
        self.choice = Choice(self.name, path, domain, domains, domain_column)
        self.labels = Labels(target, kind, classes, target_scale)
        self.drop, self.categorical, self.standardise, self.missing = (
            drop or [],
            categorical or [],
            standardise,
            missing,
        )
        self.form = {"header": header, "columns": columns, "separator": separator, "sheet": sheet}
        self.missing_values = tuple(missing_values)

    def fingerprint(self) -> str:
        return fingerprint_files(self._files())

    def load(self) -> Domain:
        tables = [read_rows(path, **self.form, missing=self.missing_values) for path in self._files()]  # type: ignore[arg-type]
        for other in tables[1:]:
            if other.names != tables[0].names:
                raise TransferError(f"{other.path} and {tables[0].path} differ in their columns.")
        parts = tables[: 1 if self.test_path is None else 2]
        roles = self._roles(tables[0])
        notes: list[str] = []
        parts = [self._chosen(rows, roles, notes) for rows in parts]
        classes, labels = self.labels.read(parts, self.name)
        inputs = self._encoded(parts, tables, roles, notes)
        made = [
            Part(ArrayInputs(torch.from_numpy(x)), y, tuple(f"{rows.path.stem}/{line}" for line in rows.lines))
            for x, y, rows in zip(inputs, labels, parts, strict=True)
        ]
        return Domain(
            self.name, self.labels.kind, classes, made[0], made[1] if len(made) > 1 else None, notes=tuple(notes)
        )

    def _files(self) -> list[Path]:
        """The domain's, its test split's, and, where something is taken from them, those of the other domains."""
        own, *others = self.choice.files(self.place, every=bool(self.categorical) or self.standardise)
        if self.test_path is None:
            return [own, *others]
        text = self.test_path
        if "{domain}" in text:
            text = fill_domain(text, str(self.choice.domain), self.choice.domains)
        return [own, find(self.place, text, self.name), *others]

    def _roles(self, rows: Rows) -> list[str]:
        """The input columns.

        Raises:
            TransferError: a column that is not there, or none left.
        """
        taken = {*self.labels.columns(rows), *self.choice.own_columns(rows), *map(rows.name, self.drop)}
        wanted = rows.names if self.inputs is None else [rows.name(column) for column in self.inputs]
        both = [name for name in wanted if name in taken]
        if self.inputs is not None and both:
            raise TransferError(f"{self.name}: '{both[0]}' is among the inputs, and target, domain or dropped as well.")
        columns = [name for name in wanted if name not in taken]
        if not columns:
            raise TransferError(f"{self.name}: no column of {rows.path} is left as an input.")
        return columns

    def _chosen(self, rows: Rows, columns: Sequence[str], notes: list[str]) -> Rows:
        """The domain's rows that have what they need."""
        rows = rows.take(np.flatnonzero(self.choice.rows(rows)).tolist())
        gaps = {name: np.array([rows.is_missing(cell) for cell in rows.cells(name)], bool) for name in columns}
        gaps |= {name: ~self.labels.known(rows) for name in self.labels.columns(rows)}
        found = {name: int(gap.sum()) for name, gap in gaps.items() if gap.any()}
        if found and self.missing == "error":
            some = ", ".join(f"{name} ({n})" for name, n in list(found.items())[:6])
            raise TransferError(
                f"{self.name}: cells are missing in {some} of {len(rows)} rows: set missing=drop or mean, or drop columns."
            )
        needed = self.labels.columns(rows) if self.missing == "mean" else list(gaps)
        out = np.any([gaps[name] for name in needed], axis=0)
        if out.any():
            what = "target" if self.missing == "mean" else "cell"
            notes.append(f"{self.name}: {int(out.sum())} of {len(rows)} rows left out, a {what} is missing")
        rows = rows.take(np.flatnonzero(~out).tolist())
        check_enough(self.name, rows)
        return rows

    def _encoded(
        self, parts: Sequence[Rows], tables: Sequence[Rows], columns: Sequence[str], notes: list[str]
    ) -> list[np.ndarray]:
        """Inputs `(N, D)` of each part."""
        categorical = [tables[0].name(column) for column in self.categorical]
        blocks: list[list[np.ndarray]] = [[] for _ in parts]
        names: list[str] = []
        one_hot: list[str] = []
        filled: dict[str, int] = {}
        for name in columns:
            if name in categorical:
                values = in_order({text for rows in tables for text in rows.texts(name) if text is not None})
                one_hot.append(f"{name} ({len(values)})")
                read = [_one_hot(rows.texts(name), values) for rows in parts]
            else:
                values = [""]
                read = [rows.numbers(name)[:, None] for rows in parts]
                if self.standardise:
                    mean, scale = moments(np.concatenate([rows.numbers(name) for rows in tables]))
                    read = [(block - mean) / scale for block in read]
            gaps = [np.isnan(block[:, 0]) for block in read]
            if any(gap.any() for gap in gaps):
                if gaps[0].all():
                    raise TransferError(f"{self.name}: no row has a value of '{name}': add it to drop.")
                filled[name] = sum(int(gap.sum()) for gap in gaps)
                filling = np.nanmean(read[0], axis=0)
                read = [np.where(gap[:, None], filling, block) for gap, block in zip(gaps, read, strict=True)]
            names += [name] * len(values)
            for block, each in zip(blocks, read, strict=True):
                block.append(each)
        if one_hot:
            notes.append(f"{self.name}: one input a value of {', '.join(one_hot)}")
        if filled:
            some = ", ".join(f"{name} ({n})" for name, n in filled.items())
            notes.append(f"{self.name}: missing cells are the mean of their column over this domain: {some}")
        made = [as_float32(np.hstack(block), names, rows) for block, rows in zip(blocks, parts, strict=True)]
        merged = _merged(np.hstack(blocks[0]), made[0])
        if merged.any():
            some = ", ".join(f"{names[j]} ({merged[j]})" for j in np.flatnonzero(merged)[:6])
            notes.append(
                f"{self.name}: float32 cannot tell values apart in {some}: set standardise=true, or subtract an offset"
            )
        return made


def _merged(values: np.ndarray, small: np.ndarray) -> np.ndarray:
    """How many different values `(D,)` of a column are left, where these are fewer than half of what there were; else 0."""
    before, after = ([len(np.unique(column)) for column in table.T] for table in (values, small))
    return np.array([a if 2 * a < b else 0 for b, a in zip(before, after, strict=True)])


def _one_hot(texts: Sequence[str | None], values: Sequence[str]) -> np.ndarray:
    """`(N, V)`, nan in the rows of missing cells."""
    place = {value: i for i, value in enumerate(values)}
    encoded = np.zeros((len(texts), len(values)))
    for i, text in enumerate(texts):
        encoded[i] = np.nan if text is None else np.eye(len(values))[place[text]]
    return encoded
