"""Arrays with labels in one file: `.npz`, `.npy` or `.mat`; features, or images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from transfer_cli.data.domain import Domain, Kind, Part, Place, as_labels, fingerprint_files, numbered
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.files import below_root, domain_name, fill_domain, reading, require
from transfer_cli.errors import TransferError, suggest

INPUT_KEYS = ("x", "fts", "features", "feature", "fea", "data", "images", "inputs")
LABEL_KEYS = ("y", "labels", "label", "gnd", "targets", "target")
Step = Literal["row_sum", "l2", "zscore"]


class Arrays:
    """Features `(N, D)`, read as float32, or uint8 images `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)`.

    Args:
        path: the file, below the data root or absolute; `{domain}` in it stands for `domain`.
        domain, domains: the chosen domain, and those there are: names, or names and how the files spell them.
        test_path: a second file, with the published test split.
        inputs, labels: keys of the two arrays; null looks for the usual ones (x, fts, features, data, images, ... and
            y, labels, label, ...). For `.npy`, `labels` names a second file, in the same folder.
        kind: classification (labels of any type, sorted and numbered) or regression (targets (N,) or (N, T)).
        class_names: the classes in the order of the sorted labels; null writes the labels themselves.
        normalise: steps for features, in order: `row_sum` and `l2` scale each row to sum 1 or length 1, `zscore`
            centres each column and divides by its population standard deviation over the whole train part.
    """

    def __init__(
        self,
        place: Place,
        *,
        path: str | None = None,
        domain: str | None = None,
        domains: list[str] | dict[str, str] | None = None,
        test_path: str | None = None,
        inputs: str | None = None,
        labels: str | None = None,
        kind: Kind = "classification",
        class_names: list[str] | None = None,
        normalise: list[Step] | None = None,
    ) -> None:
        self.place = place
        self.name = domain_name(path, domain) if path else "arrays"
        paths = (path, test_path)
        self.paths = [fill_domain(p, domain, domains) if p and (p is path or "{domain}" in p) else p for p in paths]
        self.inputs = inputs
        self.labels = labels
        self.kind = kind
        self.class_names = class_names
        self.normalise = normalise or []

    def fingerprint(self) -> str:
        files = self._files()
        return fingerprint_files([*files, *(self._label_file(path) for path in files if path.suffix == ".npy")])

    def load(self) -> Domain:
        files = self._files()
        arrays = [self._read(path) for path in files]
        values = _normalised([inputs for inputs, _ in arrays], self.normalise, files[0])
        classes: tuple[str, ...] = ()
        targets = [labels for _, labels in arrays]
        if self.kind == "classification":
            classes, targets = self._numbered_classes(targets, files)
        parts = [
            Part(
                ArrayInputs(torch.from_numpy(inputs)),
                as_labels(labels) if classes else torch.from_numpy(labels),
                numbered(path.stem, len(inputs)),
            )
            for inputs, labels, path in zip(values, targets, files, strict=True)
        ]
        return Domain(self.name, self.kind, classes, parts[0], parts[1] if len(parts) > 1 else None)

    def _files(self) -> list[Path]:
        if self.paths[0] is None:
            raise TransferError("arrays needs source.path=FILE or target.path=FILE, below data_root or absolute.")
        return [require(below_root(self.place, path, self.name), self.name) for path in self.paths if path]

    def _label_file(self, path: Path) -> Path:
        if self.labels is None:
            raise TransferError(f"{path} holds one array: labels=FILE.npy names the file beside it with the labels.")
        return require(path.parent / self.labels, self.name)

    def _read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Inputs as they go into `ArrayInputs`, and labels `(N,)`, or targets `(N, T)` float32."""
        stored, labels = self._stored(path)
        inputs = _as_inputs(stored, path)
        n = len(inputs)
        if labels.shape in ((1, n), (n, 1)):
            labels = labels.reshape(n)
        if labels.ndim == 0 or len(labels) != n:
            raise TransferError(
                f"{path}: inputs {inputs.shape} and labels {labels.shape} do not fit: samples come first."
            )
        if self.kind == "regression":
            return inputs, _finite(labels.reshape(n, -1).astype(np.float32), "labels", path)
        if labels.ndim != 1:
            raise TransferError(f"{path}: labels of classes must be (N,), not {labels.shape}; or set kind=regression.")
        if labels.dtype.kind == "f":
            between = labels[_finite(labels, "labels", path) % 1 != 0]
            if len(between):
                raise TransferError(f"{path}: labels such as {between[0]} are no classes; set kind=regression.")
            labels = labels.astype(np.int64)
        return inputs, labels

    def _stored(self, path: Path) -> tuple[Any, np.ndarray]:
        """The two arrays as the file holds them."""
        with reading(path):
            if path.suffix == ".npz":
                with path.open("rb") as stream, np.load(stream) as file:  # NumPy leaves a broken file open
                    inputs, labels = self._keys(file.files, path)
                    return file[inputs], file[labels]
            if path.suffix == ".mat":
                from scipy.io import loadmat, whosmat

                inputs, labels = self._keys([name for name, _, _ in whosmat(path)], path)
                content = loadmat(path, variable_names=[inputs, labels])
                return content[inputs], content[labels]
            if path.suffix == ".npy":
                values = np.load(path)
                with reading(self._label_file(path)):
                    return values, np.load(self._label_file(path))
        raise TransferError(f"{path}: only .npz, .npy and .mat are read.")

    def _keys(self, present: Sequence[str], path: Path) -> tuple[str, str]:
        return (
            _key(present, self.inputs, INPUT_KEYS, "inputs", path),
            _key(present, self.labels, LABEL_KEYS, "labels", path),
        )

    def _numbered_classes(
        self, labels: Sequence[np.ndarray], files: Sequence[Path]
    ) -> tuple[tuple[str, ...], list[np.ndarray]]:
        """Class names, and each file's labels as indices of them."""
        values = np.unique(labels[0])
        for array, path in zip(labels[1:], files[1:], strict=True):
            unknown = np.setdiff1d(array, values)
            if len(unknown):
                raise TransferError(f"{path}: label {unknown[0]} does not occur in {files[0].name}.")
        names = tuple(self.class_names or map(str, values))
        if len(names) != len(values):
            raise TransferError(f"{files[0]}: {len(values)} different labels, but class_names has {len(names)}.")
        return names, [np.searchsorted(values, array) for array in labels]


def _key(present: Sequence[str], wanted: str | None, usual: Sequence[str], option: str, path: Path) -> str:
    """The key, of those `present`, of the array that `option` names, or of a usual one."""
    holds = f"it holds: {', '.join(present) or 'nothing'}."
    if wanted is not None:
        if wanted not in present:
            raise TransferError(f"{path} has no array '{wanted}' ({option});{suggest(wanted, present)} {holds}")
        return wanted
    found = [key for name in usual for key in present if key.lower() == name]
    if not found:
        raise TransferError(f"{path}: which array holds the {option}? Set {option}=KEY; {holds}")
    return found[0]


def _as_inputs(values: Any, path: Path) -> np.ndarray:
    """Images `(N, C, H, W)` uint8, or vectors `(N, D)` float32."""
    values = np.asarray(values.toarray() if hasattr(values, "toarray") else values)  # MATLAB's sparse matrices
    if values.ndim == 2 and values.dtype.kind in "fiub":
        with np.errstate(over="ignore"):  # becomes infinite, and is then counted
            return _finite(values.astype(np.float32), "inputs", path)
    if values.dtype == np.uint8 and values.ndim == 3:
        return np.ascontiguousarray(values[:, None])
    if values.dtype == np.uint8 and values.ndim == 4 and values.shape[1] in (1, 3):
        return np.ascontiguousarray(values)
    if values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] in (1, 3):
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    raise TransferError(
        f"{path}: inputs must be features (N, D) or uint8 images (N, H, W, C), not {values.dtype} {values.shape}."
    )


def _finite(values: np.ndarray, what: str, path: Path) -> np.ndarray:
    bad = int((~np.isfinite(values)).sum())
    if bad:
        raise TransferError(
            f"{path}: {bad} of {values.size} values in the {what} are NaN or infinite; fill them first."
        )
    return values


def _normalised(parts: Sequence[np.ndarray], steps: Sequence[Step], path: Path) -> list[np.ndarray]:
    """Float32 in and out, float64 between; the first part supplies the statistics of `zscore`."""
    if not steps:
        return list(parts)
    if parts[0].ndim != 2:
        raise TransferError(f"{path}: normalise={list(steps)} is for features; these are images.")
    values = [part.astype(np.float64) for part in parts]
    for step in steps:
        if step == "zscore":
            mean, deviation = values[0].mean(0), values[0].std(0)
            values = [(v - mean) / np.where(deviation > 0, deviation, 1) for v in values]
        else:
            sizes = [v.sum(1) if step == "row_sum" else np.linalg.norm(v, axis=1) for v in values]
            values = [v / np.where(s != 0, s, 1)[:, None] for v, s in zip(values, sizes, strict=True)]
    return [v.astype(np.float32) for v in values]
