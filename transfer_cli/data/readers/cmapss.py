"""Turbofan engines run to failure: cycles to go from one row a cycle (C-MAPSS; Saxena, Goebel, Simon & Eklund, PHM 2008).

Inputs are the 3 settings and 21 sensors of a cycle. The target is the remaining useful life in cycles, at most `cap`, since a
healthy engine shows nothing of its age (Heimes, PHM 2008). A test engine stops before its failure; its file `RUL_*.txt` has
the cycles it had left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from transfer_cli.data.domain import Domain, Part, Place, fingerprint_files
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.files import below_root
from transfer_cli.data.readers.roles import as_float32, moments
from transfer_cli.data.readers.tabular import Rows, read_rows
from transfer_cli.errors import TransferError

SUFFIXES = (".csv.gz", ".csv", ".txt")
CHANNELS = slice(2, 26)  # after the engine's number and the cycle; a column behind them is left out
THIRD = 3  # every third engine


class CMAPSS:
    """`(N, 24)` float32, one row a cycle; cycles to go `(N, 1)`.

    Args:
        path: the folder with `train_FD001.csv.gz`, `test_FD001.csv.gz`, `RUL_FD001.txt` (or .csv, or NASA's .txt).
        domain: FD001 to FD004. Without a training file, the published test engines are the domain: every third is tested on.
        cap: no target is more than this.
        standardise_by: the subset whose inputs (training file, else test file) have mean 0 and variance 1 then, so that domains
            have one unit; null leaves the sensors' own.
        test_cycles: rows to test on: all of an engine, or its last, as published scores have it.
    """

    def __init__(
        self,
        place: Place,
        *,
        path: str = "cmapss",
        domain: Literal["FD001", "FD002", "FD003", "FD004"] = "FD001",
        cap: float = 125.0,
        standardise_by: Literal["FD001", "FD002", "FD003", "FD004"] | None = "FD001",
        test_cycles: Literal["all", "last"] = "all",
    ) -> None:
        self.place, self.path, self.domain, self.cap, self.test_cycles = place, path, domain, cap, test_cycles
        self.standardise_by = standardise_by
        self.name = f"cmapss_{domain}"

    def fingerprint(self) -> str:
        train, test, left = self._files(self.domain)
        return fingerprint_files(
            {*filter(None, (train, test, left)), *([] if (unit := self._unit()) is None else [unit])}
        )

    def load(self) -> Domain:
        train, test, left = self._files(self.domain)
        tested = read_rows(test)
        ends = read_rows(left, header=False).numbers("0")
        engines, to_go = _life(tested)
        if len(ends) != len(np.unique(engines)):
            raise TransferError(f"{left} has {len(ends)} lives, {test} has {len(np.unique(engines))} engines.")
        to_go = to_go + ends[np.searchsorted(np.unique(engines), engines)]
        kept = np.ones(len(tested), bool) if self.test_cycles == "all" else _last(engines)
        if train is not None:
            learnt = read_rows(train)
            everything = self._part(learnt, _life(learnt)[1], np.ones(len(learnt), bool))
            return Domain(self.name, "regression", (), everything, self._part(tested, to_go, kept))
        held = engines % THIRD == 0
        note = (
            f"{self.name}: no training file; of its test engines, {len(np.unique(engines[held]))} are kept for testing"
        )
        parts = (self._part(tested, to_go, ~held), self._part(tested, to_go, held & kept))
        return Domain(self.name, "regression", (), *parts, notes=(note,))

    def _unit(self) -> Path | None:
        """The file whose moments are taken."""
        if self.standardise_by is None:
            return None
        train, test, _ = self._files(self.standardise_by)
        return train or test

    def _files(self, domain: str) -> tuple[Path | None, Path, Path]:
        folder = below_root(self.place, self.path, self.name)
        found = {
            kind: next((p for s in SUFFIXES if (p := folder / f"{kind}_{domain}{s}").is_file()), None)
            for kind in ("train", "test", "RUL")
        }
        for kind in ("test", "RUL"):
            if found[kind] is None:
                raise TransferError(
                    f"{self.name}: missing {folder / kind}_{domain}.txt (or .csv, .csv.gz); its YAML says where to get it."
                )
        return found["train"], found["test"], found["RUL"]  # type: ignore[return-value]

    def _part(self, rows: Rows, to_go: np.ndarray, kept: np.ndarray) -> Part:
        names = rows.names[CHANNELS]
        values = _channels(rows)
        if (unit := self._unit()) is not None:
            mean, scale = moments(values if unit == rows.path else _channels(read_rows(unit)))
            values = (values - mean) / scale
        x = as_float32(values, names, rows)
        engines, cycles = (rows.numbers(name).astype(int) for name in rows.names[:2])
        ids = tuple(f"{self.name}/{engines[i]}/{cycles[i]}" for i in np.flatnonzero(kept))
        target = np.minimum(to_go, self.cap)[kept].astype(np.float32)
        return Part(ArrayInputs(torch.from_numpy(x[kept])), torch.from_numpy(target)[:, None], ids)


def _channels(rows: Rows) -> np.ndarray:
    """`(N, 24)`"""
    return np.stack([rows.numbers(name) for name in rows.names[CHANNELS]], 1)


def _life(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Engine and cycles to the engine's last row, both `(N,)`."""
    if len(rows.names) < CHANNELS.stop:
        raise TransferError(f"{rows.path} has {len(rows.names)} columns; {CHANNELS.stop} are expected.")
    engines, cycles = (rows.numbers(name) for name in rows.names[:2])
    numbers, index = np.unique(engines, return_inverse=True)
    ends = np.zeros(len(numbers))
    np.maximum.at(ends, index, cycles)
    return engines, ends[index] - cycles


def _last(engines: np.ndarray) -> np.ndarray:
    """`(N,)` bool: the last row of each engine; rows are in the order of cycles."""
    return np.append(engines[1:] != engines[:-1], True)
