"""What readers of tables share: which rows are a domain, and what its labels are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from transfer_cli.data.domain import Kind, Place, as_labels
from transfer_cli.data.readers.files import Domains, below_root, fill_domain, require
from transfer_cli.data.readers.tabular import Rows, in_order, is_condition, parse_condition, plain_text
from transfer_cli.errors import TransferError, check_choice

Missing = Literal["error", "drop", "mean"]
Column = str | int
FEWEST = 3  # rows of a domain: one to train on, one to test on, one to validate


def table_name(path: str, domain: str | int | None) -> str:
    """For people: `uci/wine-{domain}.csv.gz` -> `wine-red`, `lab.csv` with domain 7 -> `lab_7`."""
    name = PurePath(path).name.removesuffix(".gz")
    stem = name.rpartition(".")[0] or name
    if "{domain}" in stem:
        return stem.replace("{domain}", str(domain))
    return stem if domain is None else f"{stem}_{domain}"


def find(place: Place, text: str, name: str) -> Path:
    """The file that a path names, or the one that a path with `*` does.

    Raises:
        TransferError: none is there, or several.
    """
    path = below_root(place, text, name)
    found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
    if len(found) > 1:
        raise TransferError(f"{name}: {path} stands for several files: {', '.join(p.name for p in found[:4])}.")
    return require(found[0] if found else path, name)


@dataclass(frozen=True)
class Choice:
    """A domain: its own file (`{domain}` in the path), the rows with a value in `column`, or those that fulfil a condition.

    `domains` has the names there are; in a mapping each stands for how the path spells it, for a value of `column`, or for a
    condition such as `age>=28`. A condition may stand for a name.
    """

    name: str
    path: str
    domain: str | int | None
    domains: Domains
    column: Column | None = None

    def __post_init__(self) -> None:
        if self.domain is not None and "/" in str(self.domain):
            raise TransferError(
                f"{self.name}: domain={self.domain} names a folder: give it a name without / in domains."
            )

    @property
    def _text(self) -> str | None:
        return None if self.domain is None else plain_text(self.domain)

    @property
    def by_file(self) -> bool:
        return "{domain}" in self.path

    def files(self, place: Place, every: bool = False) -> list[Path]:
        """The domain's file, and with `every` those of the others after it.

        Raises:
            TransferError: one is missing, or the domain is none of `domains`.
        """
        if not self.by_file:
            return [find(place, self.path, self.name)]
        names = [self._text, *(n for n in (self.domains or []) if every and n != self._text)]
        return [find(place, fill_domain(self.path, name, self.domains), self.name) for name in names]

    def _stands_for(self, name: str) -> str:
        """What a name, or a value or condition in its place, means in the table."""
        meaning = self.domains[name] if isinstance(self.domains, Mapping) and name in self.domains else name
        if is_condition(meaning):
            return meaning
        if self.column is not None and (self.domains is None or name in self.domains):
            return f"{self.column}=={meaning}"
        if self.domains is None:
            raise TransferError(
                f"{self.name}: domain={name} needs domain_column=COLUMN whose value it is, or be a condition such as "
                "'age>=28', or fill {domain} in the path."
            )
        check_choice(name, self.domains, "domain")
        raise TransferError(
            f"{self.name}: domains must say what '{name}' is: a condition, or a value of domain_column."
        )

    def rows(self, rows: Rows) -> np.ndarray:
        """`(N,)` bool: which belong to the domain."""
        if self.by_file or self._text is None:
            return np.ones(len(rows), bool)
        condition = self._stands_for(self._text)
        if self.column is not None and condition.startswith(f"{self.column}=="):  # a position is no condition's column
            value = condition.removeprefix(f"{self.column}==")
            texts = rows.texts(rows.name(self.column))
            found = np.array([text == plain_text(value) for text in texts])
            if not found.any():
                check_choice(plain_text(value), in_order({text for text in texts if text is not None}), "domain")
            return found
        found = rows.where(condition)
        if not found.any():
            raise TransferError(f"{self.name}: no row of {rows.path} fulfils '{condition}'.")
        return found

    def own_columns(self, rows: Rows) -> set[str]:
        """Those that are one value in a domain: no input. One that a threshold cuts stays."""
        if self.by_file or self._text is None:
            return set()
        own = set() if self.column is None else {rows.name(self.column)}
        meanings = {self._text, *(self.domains or [])}
        parts = [part for name in meanings if is_condition(m := self._stands_for(name)) for part in parse_condition(m)]
        return own | {rows.name(column) for column, relation, _ in parts if relation == "==" and column in rows.names}


@dataclass(frozen=True)
class Labels:
    """What of a table is to be predicted: numbers of the columns `target`, or classes.

    `classes` gives each class a condition (`disease: target>0`); without it, each value of the column is a class.
    `scale` multiplies regression targets.
    """

    target: Column | Sequence[Column]
    kind: Kind
    classes: Mapping[str, str] | None = None
    scale: float = 1.0

    def columns(self, rows: Rows) -> list[str]:
        several = [self.target] if isinstance(self.target, str | int) else list(self.target)
        if self.kind == "classification" and len(several) != 1:
            raise TransferError("kind=classification takes one target column.")
        return [rows.name(column) for column in several]

    def known(self, rows: Rows) -> np.ndarray:
        """`(N,)` bool: rows with every label."""
        known = np.ones(len(rows), bool)
        for column in self.columns(rows):
            known &= [not rows.is_missing(cell) for cell in rows.cells(column)]
        return known

    def read(self, parts: Sequence[Rows], name: str) -> tuple[tuple[str, ...], list[Tensor]]:
        """Class names (none in regression), and for each part class indices `(N,)` or targets `(N, T)` float32.

        Raises:
            TransferError: constant targets, a single class, or a row of no class.
        """
        if self.kind == "regression":
            return (), [self._numbers(rows, name, varies=i == 0) for i, rows in enumerate(parts)]
        if self.classes is not None:
            held = [np.stack([rows.where(c) for c in self.classes.values()]) for rows in parts]
            for rows, found in zip(parts, held, strict=True):
                wrong = np.flatnonzero(found.sum(0) != 1)
                if len(wrong):
                    raise TransferError(
                        f"{rows.path} line {rows.lines[wrong[0]]} fulfils none or several of `classes`."
                    )
            present = [bool(found.any()) for found in held[0]]
            names = [n for n, there in zip(self.classes, present, strict=True) if there]
            numbers = np.cumsum(present) - 1
            values = [numbers[found.argmax(0)] for found in held]
        else:
            texts = [[t or "" for t in rows.texts(self.columns(rows)[0])] for rows in parts]
            names = in_order(set(texts[0]))
            extra = in_order({t for column in texts for t in column} - set(names))
            if extra:
                raise TransferError(f"{parts[-1].path}: class {extra[0]} does not occur in {parts[0].path.name}.")
            place = {text: i for i, text in enumerate(names)}
            values = [np.array([place[text] for text in column]) for column in texts]
        if len(names) < 2:
            raise TransferError(f"{name}: all {len(parts[0])} rows are of one class, {names[0]}.")
        return tuple(names), [as_labels(each) for each in values]

    def _numbers(self, rows: Rows, name: str, varies: bool) -> Tensor:
        columns = self.columns(rows)
        values = as_float32(self.scale * np.stack([rows.numbers(column) for column in columns], 1), columns, rows)
        for column, each in zip(columns, values.T, strict=True):
            if varies and (each == each[0]).all():
                raise TransferError(
                    f"{name}: target '{column}' is {each[0]:g} in all {len(each)} rows (as float32): nothing to predict."
                )
        return torch.from_numpy(values)


def as_float32(values: np.ndarray, columns: Sequence[str], rows: Rows) -> np.ndarray:
    """Raises:
    TransferError: a value that is infinite there."""
    with np.errstate(over="ignore"):
        small = values.astype(np.float32)
    bad = np.argwhere(~np.isfinite(small))
    if len(bad):
        i, j = bad[0]
        raise TransferError(
            f"{rows.path} line {rows.lines[i]}, column '{columns[j]}': {values[i, j]:g} is too large for float32."
        )
    return small


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the first axis, missing values apart; 1 for what does not vary, or only by rounding."""
    known = np.isfinite(values)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, values, 0).sum(0) / count
    deviation = np.sqrt(np.square(np.where(known, values - mean, 0)).sum(0) / count)
    return mean, np.where(deviation > 1e-9 * np.abs(mean), deviation, 1)


def check_enough(name: str, rows: Rows) -> None:
    if len(rows) < FEWEST:
        raise TransferError(f"{name}: {len(rows)} rows are too few; {FEWEST} at least.")
