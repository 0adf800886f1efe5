"""Strings as vectors: proteins, DNA, molecules, from a column of a table or from FASTA files.

    one_hot    φ(s)[i, a] = 1 if s_i = a                             for strings of one length
    spectrum   φ(s)[w] = number of times that w occurs in s,  |w| = k    (Leslie, Eskin & Noble, PSB 2002)

A linear kernel on the second is the spectrum kernel. The positions and letters of the first, and the words of the second, are those
that occur in any of the files (of every domain and of `vocabulary`), so that domains agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from transfer_cli.data.domain import Domain, Kind, Part, Place, fingerprint_files
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.files import domain_name, reading
from transfer_cli.data.readers.roles import Choice, Labels, check_enough, find, table_name
from transfer_cli.data.readers.tabular import Rows, open_text, read_rows
from transfer_cli.errors import TransferError

FASTA = re.compile(r"\.(fa|fasta|fna|faa)(\.gz)?$")
SMILES = re.compile(
    r"\[[^\[\]]*\]|Br|Cl|%\d\d|."
)  # an atom in brackets is one token, and so is a ring number of two digits
SEQUENCE, CLASS, MUTATIONS = "sequence", "class", "mutations"  # columns that FASTA files and `reference` bring
WIDEST = 100_000


class Sequences:
    """Inputs `(N, D)` float32; targets `(N, 1)` float32, or classes.

    Args:
        path: a table with a column of strings, or a FASTA file; a mapping names one FASTA file a class. `{domain}` in it stands
            for `domain`.
        domain, domains, domain_column: as those of `table`; a condition may also speak of `mutations` (see `reference`).
        sequence: the column of strings.
        target, kind, classes, target_scale: as those of `table`; rows without a target are left out, which is said.
        encoding: `one_hot` or `spectrum`.
        k: length of the words of `spectrum`, or a list of lengths.
        tokens: a letter is a character, or a token of SMILES (`Cl`, `[nH]`).
        vocabulary: further files (of another data set, with the same column) whose words count.
        reference: a string, or `first` for that of the first row: the column `mutations` then counts the letters that differ.
    """

    def __init__(
        self,
        place: Place,
        *,
        path: str | dict[str, str] | None = None,
        domain: str | int | None = None,
        domains: list[str] | dict[str, str] | None = None,
        domain_column: str | int | None = None,
        sequence: str | int = SEQUENCE,
        target: str | int = -1,
        kind: Kind = "regression",
        classes: dict[str, str] | None = None,
        target_scale: float = 1.0,
        encoding: Literal["one_hot", "spectrum"] = "spectrum",
        k: int | list[int] = 3,
        tokens: Literal["characters", "smiles"] = "characters",
        vocabulary: list[str] | None = None,
        reference: str | None = None,
    ) -> None:
        if path is None or not path:
            raise TransferError("sequences needs source.path=FILE or target.path=FILE, below data_root or absolute.")
        self.lengths = [k] if isinstance(k, int) else list(k)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError("k must be 1 at least.")
        self.place, self.sequence, self.encoding, self.tokens = place, sequence, encoding, tokens
        self.vocabulary, self.reference = vocabulary or [], reference
        self.by_class = dict(path) if isinstance(path, Mapping) else {}
        paths = list(self.by_class.values()) or [str(path)]
        classed = self.by_class and "{domain}" in paths[0] and domain is not None  # a file's name tells of a class too
        self.name = domain_name(paths[0], str(domain)) if classed else table_name(paths[0], domain)
        self.choices = [Choice(self.name, each, domain, domains, domain_column) for each in paths]
        if self.by_class:
            target, kind, classes = CLASS, "classification", None
        self.labels = Labels(target, kind, classes, target_scale)

    def fingerprint(self) -> str:
        return fingerprint_files({*sum(self._files(), []), *self._more()})

    def load(self) -> Domain:
        files = self._files()
        own = [self._with_mutations(self._read(group[0], i)) for i, group in enumerate(files)]
        others = [self._read(path, i) for i, group in enumerate(files) for path in group[1:]]
        words = [self._strings(rows) for rows in (*own, *others, *map(self._read, self._more()))]
        rows, notes = self._chosen(own)
        classes, (labels,) = self.labels.read([rows], self.name)
        strings = self._strings(rows)
        encode = one_hot if self.encoding == "one_hot" else spectrum
        values = encode(strings, [s for several in words for s in several], self.lengths, self.name)
        ids = tuple(f"{self.name}/{line}" for line in rows.lines)
        part = Part(ArrayInputs(torch.from_numpy(values)), labels, ids)
        return Domain(self.name, self.labels.kind, classes, part, notes=tuple(notes))

    def _files(self) -> list[list[Path]]:
        """For each class (or the one file) the domain's file, then those of other domains."""
        return [choice.files(self.place, every=True) for choice in self.choices]

    def _more(self) -> list[Path]:
        return [find(self.place, path, self.name) for path in self.vocabulary]

    def _read(self, path: Path, index: int = 0) -> Rows:
        if not FASTA.search(path.name):
            if self.by_class:
                raise TransferError(f"{path}: one file a class is for FASTA (.fa, .fasta, .fna, .faa, also .gz).")
            return read_rows(path)
        strings = list(_fasta(path))
        columns: tuple[Sequence[str], ...] = (strings,)
        if self.by_class:
            columns = (strings, [list(self.by_class)[index]] * len(strings))
        names = (SEQUENCE, CLASS)[: len(columns)]
        return Rows(path, names, columns, tuple(range(1, len(strings) + 1)), frozenset())

    def _with_mutations(self, rows: Rows) -> Rows:
        if self.reference is None:
            return rows
        strings = rows.cells(rows.name(self.sequence))
        reference = str(strings[0]) if self.reference == "first" else self.reference
        if any(len(str(s)) != len(reference) for s in strings):
            raise TransferError(
                f"{rows.path}: strings and the reference differ in length, so mutations cannot be counted."
            )
        counts = [sum(a != b for a, b in zip(str(s), reference, strict=True)) for s in strings]
        return replace(rows, names=(*rows.names, MUTATIONS), columns=(*rows.columns, counts))

    def _chosen(self, own: Sequence[Rows]) -> tuple[Rows, list[str]]:
        """The domain's rows that have a label, of all classes together."""
        kept, notes = [], []
        for rows, choice in zip(own, self.choices, strict=True):
            rows = rows.take(np.flatnonzero(choice.rows(rows)).tolist())
            known = self.labels.known(rows)
            if not known.all():
                notes.append(f"{self.name}: {int((~known).sum())} of {len(rows)} rows left out, a target is missing")
            kept.append(rows.take(np.flatnonzero(known).tolist()))
        columns = tuple([c for rows in kept for c in rows.columns[i]] for i in range(len(kept[0].columns)))
        together = replace(kept[0], columns=columns, lines=tuple(line for rows in kept for line in rows.lines))
        check_enough(self.name, together)
        return together, notes

    def _strings(self, rows: Rows) -> list[tuple[str, ...]]:
        """The letters of each string.

        Raises:
            TransferError: an empty string.
        """
        column = rows.name(self.sequence)
        strings = [str(cell).strip() for cell in rows.cells(column)]
        if "" in strings:
            raise TransferError(f"{rows.path} line {rows.lines[strings.index('')]}: the column '{column}' is empty.")
        return [tuple(SMILES.findall(s)) if self.tokens == "smiles" else tuple(s) for s in strings]


def _fasta(path: Path) -> Iterator[str]:
    """Sequences in upper case; a header begins with `>`."""
    strings: list[list[str]] = []
    with reading(path), open_text(path) as file:
        for line in file:
            if line.startswith(">"):
                strings.append([])
            elif line.strip():
                if not strings:
                    raise TransferError(f"{path} is not FASTA: its first line does not begin with '>'.")
                strings[-1].append(line.strip().upper())
    for i, lines in enumerate(strings, 1):
        if not lines:
            raise TransferError(f"{path}: sequence {i} is empty.")
        yield "".join(lines)


def one_hot(
    strings: Sequence[Sequence[str]], everything: Sequence[Sequence[str]], lengths: Sequence[int], name: str
) -> np.ndarray:
    """`(N, P·A)` float32: the P positions that vary in `everything`, with its A letters there.

    Raises:
        TransferError: strings of different length, or none that varies.
    """
    sizes = sorted({len(s) for s in everything})
    if len(sizes) > 1:
        raise TransferError(f"{name}: strings have {sizes[0]} to {sizes[-1]} letters: set encoding=spectrum.")
    table = np.array(everything, dtype=object)
    positions = [i for i, column in enumerate(table.T) if len(set(column)) > 1]
    if not positions:
        raise TransferError(f"{name}: all strings are equal.")
    letters = sorted({letter for i in positions for letter in table[:, i]})
    place = {letter: j for j, letter in enumerate(letters)}
    values = np.zeros((len(strings), len(positions), len(letters)), np.float32)
    for n, string in enumerate(strings):
        for p, i in enumerate(positions):
            values[n, p, place[string[i]]] = 1
    return values.reshape(len(strings), -1)


def spectrum(
    strings: Sequence[Sequence[str]], everything: Sequence[Sequence[str]], lengths: Sequence[int], name: str
) -> np.ndarray:
    """`(N, W)` float32: counts of the words of `lengths` letters that occur in `everything`, sorted.

    Raises:
        TransferError: no word, or too many.
    """
    found = sorted({word for string in everything for word in _words(string, lengths)}, key=lambda w: (len(w), w))
    if not 0 < len(found) <= WIDEST:
        raise TransferError(f"{name}: {len(found):,} different words of {list(lengths)} letters; set another k.")
    place = {word: j for j, word in enumerate(found)}
    values = np.zeros((len(strings), len(found)), np.float32)
    for n, string in enumerate(strings):
        for word, count in Counter(_words(string, lengths)).items():
            values[n, place[word]] = count
    return values


def _words(string: Sequence[str], lengths: Sequence[int]) -> Iterator[tuple[str, ...]]:
    for k in lengths:
        for i in range(len(string) - k + 1):
            yield tuple(string[i : i + k])
