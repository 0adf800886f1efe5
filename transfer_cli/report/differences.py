"""Two runs beside each other: what was set, what came out, whether samples tell them apart. NumPy on use, to read predictions."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer_cli.config.schema import OUTSIDE_IDENTITY
from transfer_cli.errors import TransferError
from transfer_cli.report.paired import mcnemar, paired_t
from transfer_cli.report.runs import Run, read_config, read_run
from transfer_cli.report.selection import written
from transfer_cli.run_folder import RunFolder, read_object

MACHINE = ("git", "transfer", "machinery", "python", "device", "device_name", "threads", "fingerprints", "libraries")


@dataclass(frozen=True)
class PerClass:
    """Recalls in percent, over the samples that both runs predict."""

    name: str
    samples: int
    first: float
    second: float


@dataclass(frozen=True)
class Samples:
    """Of the target test samples that both runs predict. Classification: how many the first and the second alone get right,
    McNemar's exact p-value, and each class; regression: a paired t-test of the squared errors."""

    common: int
    of_first: int
    of_second: int
    p: float
    only_first: int = 0
    only_second: int = 0
    classes: tuple[PerClass, ...] = ()


def finished_run(path: Path) -> Run:
    """Raises:
    TransferError: not a run's folder, or a run without a result."""
    if not RunFolder(path).status.is_file():
        raise TransferError(f"{path} is not a run's folder: it has no status.json. transfer report lists runs.")
    run = read_run(path)
    if run is None:
        raise TransferError(f"{path} is not finished, so it has no figures: transfer show tells its state.")
    return run


def config_differences(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """Key and values, of the keys that bear on results; `-` for one that a run does not have."""
    flat = [_flat(read_config(RunFolder(path).config)) for path in (first, second)]
    keys = [key for key in dict.fromkeys([*flat[0], *flat[1]]) if key not in OUTSIDE_IDENTITY and not _silent(key)]
    return [(key, *(one.get(key, "-") for one in flat)) for key in keys if flat[0].get(key) != flat[1].get(key)]  # type: ignore[misc]


def machine_differences(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """What the manifests tell apart: code, libraries, device, data."""
    manifests = [read_object(RunFolder(path).manifest) for path in (first, second)]
    flat = [_flat({key: m[key] for key in MACHINE if key in m}) for m in manifests]
    keys = dict.fromkeys([*flat[0], *flat[1]])
    return [(key, *(one.get(key, "-") for one in flat)) for key in keys if flat[0].get(key) != flat[1].get(key)]  # type: ignore[misc]


def _silent(key: str) -> bool:
    return key.endswith(".implementation") or ".search." in key


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}".removesuffix(".name")] = written(tuple(value) if isinstance(value, list) else value)
    return flat


def compare_samples(first: Run, second: Run) -> Samples | None:
    """None where they predict no sample in common, or samples of one name have other labels.

    Raises:
        TransferError: predictions.npz is missing or damaged.
    """
    import numpy as np

    ours, theirs = (_predictions(run.path) for run in (first, second))
    places = [{str(name): i for i, name in enumerate(of["ids"])} for of in (ours, theirs)]
    names = [name for name in places[0] if name in places[1]]
    a, b = (np.array([place[name] for name in names], dtype=int) for place in places)
    if not names or not np.array_equal(ours["labels"][a], theirs["labels"][b]):
        return None
    counts = (len(names), len(ours["ids"]), len(theirs["ids"]))
    if first.kind == "regression":
        errors = [
            np.square(of["mean"][i].astype(float) - of["labels"][i]).reshape(len(i), -1).mean(1)
            for of, i in ((ours, a), (theirs, b))
        ]
        return Samples(*counts, paired_t((errors[0] - errors[1]).tolist()))
    labels = ours["labels"][a]
    right = [of["probs"][i].argmax(1) == labels for of, i in ((ours, a), (theirs, b))]
    only_first, only_second = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    classes = [str(name) for name in read_object(RunFolder(first.path).result).get("classes", [])]
    per_class = []
    for index in np.unique(labels).tolist():
        own = labels == index
        name = classes[index] if index < len(classes) else str(index)
        per_class.append(PerClass(name, int(own.sum()), *(100 * float(r[own].mean()) for r in right)))
    return Samples(*counts, mcnemar(only_first, only_second), only_first, only_second, tuple(per_class))


def _predictions(path: Path) -> dict[str, Any]:
    """The arrays of the target test set, without their prefix."""
    import numpy as np

    try:
        with np.load(RunFolder(path).predictions) as arrays:
            prefix = "target_test_"
            return {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TransferError(f"{path}/predictions.npz is missing or damaged: {error}") from error


def figure_rows(first: Run, second: Run) -> list[tuple[str, float, float]]:
    """Each figure on the target test set that a run has, nan where the other has none; those of both first."""
    names = dict.fromkeys([*(n for n in first.figures if n in second.figures), *first.figures, *second.figures])
    return [(name, *(float(run.figures.get(name, math.nan)) for run in (first, second))) for name in names]  # type: ignore[misc]
