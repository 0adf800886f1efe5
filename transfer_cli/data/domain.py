"""A domain: one data set as its reader delivers it, before any split, grant or reconciliation."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from transfer_cli.data.inputs import Inputs
from transfer_cli.errors import TransferError

Kind = Literal["classification", "regression"]


@dataclass(frozen=True)
class Origin:
    """Where inputs come from: rows `(N,)` of one split of a data set, as many as `size` there. It says nothing of labels."""

    key: str  # a digest of the split's content and of the shape that its inputs were brought to
    name: str  # for people: `mnist train`
    rows: Tensor
    size: int

    def take(self, indices: Tensor) -> Origin:
        return replace(self, rows=self.rows[indices])


@dataclass(frozen=True)
class Part:
    """Samples with labels: class indices `(N,)` int64, or regression targets `(N, T)` float32; ids name samples for people."""

    inputs: Inputs
    labels: Tensor
    ids: tuple[str, ...]
    origin: Origin | None = None  # known where features are to be kept

    def __post_init__(self) -> None:
        if not len(self.inputs) == len(self.labels) == len(self.ids):
            raise TransferError(
                f"{len(self.inputs)} inputs, {len(self.labels)} labels and {len(self.ids)} ids do not fit."
            )

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor) -> Part:
        return Part(
            self.inputs.take(indices),
            self.labels[indices],
            tuple(self.ids[i] for i in indices.tolist()),
            None if self.origin is None else self.origin.take(indices),
        )


@dataclass(frozen=True)
class Domain:
    """`train` holds everything where the data set has no published test split (`test` is then None)."""

    name: str
    kind: Kind
    classes: tuple[str, ...]  # in the order of the label indices; empty in regression
    train: Part
    test: Part | None = None
    notes: tuple[str, ...] = ()  # what reading it left out or mended, for the run's first lines


def keep_classes(domain: Domain, names: Sequence[str] | None) -> Domain:
    """The samples of the named classes alone, labels counted anew in the domain's order; None keeps all.

    Raises:
        TransferError: a class is not among the domain's, or none is named.
    """
    if names is None:
        return domain
    unknown = [name for name in names if name not in domain.classes]
    if unknown or not names:
        known = f"{', '.join(domain.classes[:12])}{', ...' if len(domain.classes) > 12 else ''}" or "none (regression)"
        wrong = f"has no class {', '.join(unknown)}" if unknown else "needs at least one class"
        raise TransferError(f"{domain.name} {wrong}; its classes are {known}.")
    kept = [c for c, name in enumerate(domain.classes) if name in names]
    place = torch.full((len(domain.classes),), -1)
    place[kept] = torch.arange(len(kept))

    def of(part: Part) -> Part:
        part = part.take((place[part.labels] >= 0).nonzero()[:, 0])
        return replace(part, labels=place[part.labels])

    test = None if domain.test is None else of(domain.test)
    return replace(domain, classes=tuple(domain.classes[c] for c in kept), train=of(domain.train), test=test)


@dataclass(frozen=True)
class Place:
    """Where data may lie and whether it may be fetched. Nothing ever writes into `root` except a permitted download."""

    root: Path | None
    download: bool = False

    def require_root(self, name: str) -> Path:
        """The data root.

        Raises:
            TransferError: none is set.
        """
        if self.root is None:
            raise TransferError(
                f"{name} needs a data folder: set data_root=DIR or the environment variable TRANSFER_DATA."
            )
        return self.root


class Reader(Protocol):
    """One kind of data: `__init__(self, place: Place, *, <keys of its YAML>)`. Constructing is cheap and reads nothing."""

    def fingerprint(self) -> str:
        """Changes when the data change; cheaper than loading where it can be."""
        ...

    def load(self) -> Domain: ...


def numbered(prefix: str, n: int) -> tuple[str, ...]:
    """Sample ids `prefix/0 .. prefix/n-1`."""
    return tuple(f"{prefix}/{i}" for i in range(n))


def fingerprint_files(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents: for array files.

    Raises:
        TransferError: a file is missing.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        if not path.is_file():
            raise TransferError(f"missing file: {path}")
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint_values(*values: Any) -> str:
    """SHA-256 over the text of values: for generated data and for listings (relative path and size)."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def fingerprint_code(implementation: Any) -> str:
    """SHA-256 of the file that defines a class or function, so that a change to it leaves nothing stale; else its name."""
    try:
        file = inspect.getsourcefile(implementation)
    except TypeError:
        file = None
    return fingerprint_values(repr(implementation)) if file is None else fingerprint_files([Path(file)])


def as_labels(values: Any) -> Tensor:
    """Class indices as int64 `(N,)`."""
    return torch.as_tensor(values, dtype=torch.int64).reshape(-1)
