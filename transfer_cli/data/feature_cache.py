"""Features on disk, a folder for each (data split, backbone, way of extracting). Knows nothing of networks; never imports torch.

    <folder>/<key>/features.f32    (S, D) float32, a row a sample of the split; rows never asked for take no space
                   checks.u64      (S,) uint64: 0 where the row is not there yet, else its checksum
                   meta.json       what it is, in words; its date is that of the last use
                   lock            held, as a POSIX lock that dies with its process, by whoever writes

A row is written before its checksum, and no file is ever shortened or made anew in place: whoever has it mapped keeps
what was verified. So a process may be killed at any moment, and others may read, write or clear meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transfer_cli.errors import TransferError
from transfer_cli.run_folder import read_json, write_json

BLOCK = 4096  # rows that are verified at once
PAGE = 4096  # bytes: a file grows by these
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no power of it is zero modulo 2^64


class Entry:
    """One folder of the cache, for `size` rows of `width` values."""

    def __init__(self, path: Path, size: int, width: int) -> None:
        self.path, self.size, self.width = path, size, width
        self._features, self._checks, self._meta = path / "features.f32", path / "checks.u64", path / "meta.json"

    def read(self, rows: np.ndarray) -> np.ndarray | None:
        """All values `(S, D)`, mapped, if those of `rows` are there and whole; needs no lock."""
        opened = self._open()
        if opened is None or not _good(*opened, rows).all():
            return None
        with suppress(OSError):  # cleared this very moment: the map stays
            os.utime(self._meta)
        return opened[0]

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the entry, made if it is not there. `waiting` is called if another process holds it, which is then waited for.

        Raises:
            TransferError: the folder cannot be written.
        """
        with _told(self.path):
            file = self._lock(waiting)
        with file:
            yield

    def prepare(self, about: Mapping[str, Any]) -> bool:
        """Make the files where they are missing or have not the size they should; whether it was that. Under the lock."""
        sizes = {self._features: 4 * self.size * self.width, self._checks: 8 * self.size}
        with _told(self.path):
            found = {file: file.stat().st_size for file in sizes if file.exists()}
            if found != sizes:
                for file, length in sizes.items():
                    file.unlink(missing_ok=True)
                    with file.open("xb") as new:
                        new.truncate(length)
            if read_json(self._meta) is None:
                write_json(self._meta, {**about, "rows": self.size, "width": self.width, "created": _now()})
            os.utime(self._meta)
        return any(length != sizes[file] for file, length in found.items())

    def missing(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Which of the rows are not there and whole, bool `(N,)`, and how many of those are damaged. Under the lock."""
        values, checks = self._opened()
        missing = ~_good(values, checks, rows)
        return missing, int((checks[rows][missing] != 0).sum())

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Values `(N, D)` float32 of `rows` `(N,)`. Under the lock.

        Raises:
            TransferError: the disk is full.
        """
        with _told(self.path):
            # Through the file, not the map: a full disk is then an error, not a signal that ends the process. No fsync:
            # what a power cut tears, the checksums find.
            for file, content in ((self._features, values), (self._checks, checksums(values, rows)[:, None])):
                with file.open("r+b") as stream:
                    for run in _runs(rows):
                        stream.seek(int(rows[run.start]) * content[0].nbytes)
                        stream.write(content[run].data)

    def values(self) -> np.ndarray:
        """All values `(S, D)`, mapped. Under the lock."""
        return self._opened()[0]

    def _opened(self) -> tuple[np.ndarray, np.ndarray]:
        opened = self._open()
        assert opened is not None, "prepared, under the lock"
        return opened

    def _open(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Values `(S, D)` and checksums `(S,)`; None where the files are missing or have another size."""
        try:
            if self._features.stat().st_size != 4 * self.size * self.width:
                return None
            # Copy-on-write: torch wants a writable array, and nothing written ever reaches the file.
            values = np.memmap(self._features, np.float32, mode="c", shape=(self.size, self.width))
            checks = np.fromfile(self._checks, np.uint64)
        except (OSError, ValueError):
            return None
        return (np.asarray(values), checks) if len(checks) == self.size else None

    def _lock(self, waiting: Callable[[], None]) -> Any:
        told = False
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                file = open(self.path / "lock", "ab")  # noqa: SIM115
            except FileNotFoundError:  # cleared this very moment
                continue
            if not _take(file):
                if not told:
                    waiting()
                told = True
                fcntl.lockf(file, fcntl.LOCK_EX)
            if _is(file, self.path / "lock"):
                return file
            file.close()


@dataclass(frozen=True)
class Stored:
    """An entry as `transfer cache` shows it. `bytes`: those on the disk."""

    key: str
    meta: Mapping[str, Any]
    rows_there: int
    bytes: int
    last_used: float


class FeatureCache:
    """A folder of entries, kept below `limit` bytes: the longest unused go, but none that this run uses or another one writes."""

    def __init__(self, folder: Path, limit: int = 0) -> None:
        self.folder, self.limit = folder, limit
        self._used: set[str] = set()

    def entry(self, key: str, size: int, width: int) -> Entry:
        self._used.add(key)
        return Entry(self.folder / key, size, width)

    def make_room(self, entry: Entry, rows: int) -> bool:
        """Whether so many more rows of the entry fit, after clearing what may be cleared."""
        row = 4 * entry.width
        needed = min(entry.size * row, rows * (row + PAGE)) + 8 * entry.size + PAGE  # scattered rows take whole pages
        paths = sorted(self._paths(), key=_last_used)
        taken = {path: _bytes(path) for path in paths}
        total = sum(taken.values())
        for path in paths:
            if total + needed <= self.limit:
                break
            if path.name not in self._used and _remove(path):
                total -= taken[path]
        return total + needed <= self.limit

    def stored(self) -> list[Stored]:
        """Every entry, the last used first."""
        return [
            Stored(path.name, read_json(path / "meta.json") or {}, _rows_there(path), _bytes(path), _last_used(path))
            for path in sorted(self._paths(), key=_last_used, reverse=True)
        ]

    def clear(self, keys: Sequence[str]) -> list[str]:
        """Remove entries; the keys of those that stay because another process is writing them."""
        return [key for key in keys if not _remove(self.folder / key)]

    def _paths(self) -> list[Path]:
        try:
            paths = [path for path in self.folder.iterdir() if path.is_dir()]
        except OSError:
            return []
        for path in paths:
            if path.name.startswith("."):  # whoever was removing it was killed
                shutil.rmtree(path, ignore_errors=True)
        return [path for path in paths if not path.name.startswith(".")]


def checksums(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint64 `(N,)`, never 0: `sum_i g^(i+1) x_i + g^(D+1) row  mod 2^64` over the bits `x_i` of `values` `(N, D)` float32, g odd.

    Powers of g are invertible, so one changed value never goes unnoticed; the row's number tells misplaced rows.
    """
    powers = np.cumprod(np.full(values.shape[1] + 1, MULTIPLIER, np.uint64))
    sums = values.view(np.uint32).astype(np.uint64) @ powers[:-1] + rows.astype(np.uint64) * powers[-1]
    return np.where(sums == 0, np.uint64(1), sums)


def _good(values: np.ndarray, checks: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of the rows are there and have their checksum, bool `(N,)`."""
    wanted = checks[rows]
    good = wanted != 0
    for start in range(0, len(rows), BLOCK):
        there = start + np.flatnonzero(good[start : start + BLOCK])
        good[there] = checksums(values[rows[there]], rows[there]) == wanted[there]
    return good


def _runs(rows: np.ndarray) -> Iterator[slice]:
    """Slices of `rows` in which each is the one before plus one."""
    ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
    return (slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _remove(path: Path) -> bool:
    """Whether the entry is gone; one that a process is writing stays."""
    try:
        with open(path / "lock", "ab") as file:
            if not _take(file):
                return False
            gone = path.with_name(f".{path.name}.{os.getpid()}")
            os.rename(path, gone)  # at once: another process would begin to fill a folder that is half removed
            shutil.rmtree(gone, ignore_errors=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TransferError(f"cannot remove {path}: {error.strerror}.") from error
    return True


def _take(file: Any) -> bool:
    """Whether the lock was free; it is then held until the file is closed."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is(file: Any, path: Path) -> bool:
    try:
        return os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferError(
            f"cannot keep features in {path}: {error.strerror}. features.cache_gb=0 keeps them in memory."
        ) from error


def _bytes(path: Path) -> int:
    """What the folder's files take on the disk: less than their length where rows are missing."""
    total = 0
    with suppress(FileNotFoundError):  # cleared this very moment
        for file in path.iterdir():
            total += file.stat().st_blocks * 512
    return total


def _rows_there(path: Path) -> int:
    try:
        return int(np.count_nonzero(np.fromfile(path / "checks.u64", np.uint64)))
    except OSError:
        return 0


def _last_used(path: Path) -> float:
    for file in (path / "meta.json", path):
        with suppress(OSError):
            return file.stat().st_mtime
    return 0.0


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
