"""What the page of one run shows, as plain data, from the run's files and those of its baseline. NumPy is imported on use.

Figures are rounded to four digits, and what is not finite is None, as JSON has no word for it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer_cli.report.closing import verdict_lines
from transfer_cli.report.html.images import as_data_uri
from transfer_cli.report.html.maps import feature_map
from transfer_cli.report.paired import mcnemar
from transfer_cli.report.runs import damage
from transfer_cli.run_folder import RunFolder, read_json, read_object

if TYPE_CHECKING:
    import numpy as np

    Arrays = dict[str, np.ndarray]

BINS = 15  # of confidence, as in the ECE
MATRIX = 60  # classes beyond which a matrix is no longer read; the commonest confusions are always listed
CONFUSIONS = 15
SHOWN = 12  # images, or names of samples, of either kind of change
POINTS = 300  # of a scatter plot
CURVE = 60  # points of a smooth curve
OUTPUTS = 4  # of a regression
NORMAL_95 = 1.959964  # half-width of a Gaussian's 95 % interval, in standard deviations
NO_SPREAD = 1e-30  # a standard deviation that stands for zero, whatever the unit of the targets
LOG = 40  # last lines of the log of a run that is not finished


def details(folder: RunFolder, baseline: RunFolder | None, how: str = "pca") -> dict[str, Any]:
    """`baseline`: the run that this one is compared with; `how`: the map of features, of `maps.MAPS`."""
    manifest = read_object(folder.manifest)
    content: dict[str, Any] = {
        "manifest": {key: manifest.get(key) for key in ("git", "python", "platform", "host", "device_name", "threads")},
        "libraries": manifest.get("libraries", {}),
        **curves(folder),
    }
    result = read_json(folder.result)
    if damage(result):
        return content | {"log": _log(folder)}
    kept = (
        "metrics",
        "selection",
        "validators",
        "seconds",
        "steps",
        "parameters",
        "classes",
        "setting",
        "kind",
        "device",
    )
    content |= {key: _plain(result.get(key)) for key in kept}
    content["verdict"] = verdict_lines(result)
    for key in ("health", "calibration", "conformal", "fit"):
        if result.get(key):
            content[key] = _plain(result[key])
    own, other = _arrays(folder.predictions), _baseline_arrays(baseline.predictions) if baseline is not None else {}
    if own:
        compare = same_samples(own, other)
        content["comparable"] = compare if baseline is not None else None
        theirs = other if compare else {}
        content |= (
            _classification(own, theirs, folder) if result["kind"] == "classification" else _regression(own, theirs)
        )
    maps = {"after": feature_map(folder.features, how)}
    if baseline is not None:
        maps["before"] = _baseline_map(baseline.features, how)
    content["maps"] = {name: found for name, found in maps.items() if found is not None}
    return content


@lru_cache(maxsize=4)
def _baseline_arrays(path: Path) -> Arrays:
    """Many runs in a row have one baseline."""
    return _arrays(path)


@lru_cache(maxsize=4)
def _baseline_map(path: Path, how: str) -> dict[str, Any] | None:
    return feature_map(path, how)


def curves(folder: RunFolder) -> dict[str, Any]:
    """`curves`: split -> name -> [steps, values]; `phases`: name and last step, in order."""
    found: dict[str, dict[str, list[list[Any]]]] = defaultdict(dict)
    phases: dict[str, int] = {}
    try:
        lines = folder.metrics.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            event = json.loads(line)
            phase, step, split, named = (event[key] for key in ("phase", "step", "split", "values"))
        except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
            continue
        phases[phase] = step
        for name, value in named.items():
            steps, values = found[split].setdefault(name, [[], []])
            steps.append(step)
            values.append(rounded(value))
    return {"curves": found, "phases": list(phases.items())}


def same_samples(own: Arrays, other: Arrays) -> bool:
    """Whether both were tested on the same target samples, in the same order."""
    import numpy as np

    keys = ("target_test_ids", "target_test_labels")
    return all(key in own and key in other and np.array_equal(own[key], other[key]) for key in keys)


# Classification


def _classification(own: Arrays, base: Arrays, folder: RunFolder) -> dict[str, Any]:
    labels, probs = own["target_test_labels"].astype(int), own["target_test_probs"]
    guesses = probs.argmax(1)
    k = max(int(labels.max()) + 1, probs.shape[1], *([base["target_test_probs"].shape[1]] if base else []))
    matrices = {"target test": confusion(labels, guesses, k)}
    if "source_test_probs" in own:
        source = own["source_test_labels"].astype(int), own["source_test_probs"].argmax(1)
        matrices["source test"] = confusion(*source, max(k, int(source[0].max()) + 1))
    content: dict[str, Any] = {"samples": len(labels), "reliability": _reliabilities(own)}
    content["confused"] = _commonest(matrices["target test"])
    if base:
        before = base["target_test_probs"].argmax(1)
        matrices["target test, baseline"] = confusion(labels, before, k)
        content["changes"] = _changes(own, base, labels, before, guesses, folder)
    content["per_class"] = _per_class(matrices["target test"], matrices.get("target test, baseline"))
    content["matrices"] = {name: counts.tolist() for name, counts in matrices.items() if len(counts) <= MATRIX}
    return content


def confusion(labels: np.ndarray, guesses: np.ndarray, k: int) -> np.ndarray:
    """Counts `(K, K)`: rows are true classes, columns predicted ones."""
    import numpy as np

    return np.bincount(labels * k + guesses, minlength=k * k).reshape(k, k)


def _commonest(counts: np.ndarray) -> list[list[int]]:
    """True class, predicted class, samples; the most frequent mistakes first."""
    wrong = counts.copy()
    for i in range(len(wrong)):
        wrong[i, i] = 0
    order = (-wrong).ravel().argsort(kind="stable")[:CONFUSIONS]
    k = len(counts)
    return [[int(i // k), int(i % k), int(wrong.ravel()[i])] for i in order if wrong.ravel()[i]]


def _per_class(counts: np.ndarray, before: np.ndarray | None) -> list[list[Any]]:
    """Of each class that occurs: its index, samples, share found, and the share that the baseline found or None."""
    rows = []
    for i, n in enumerate(counts.sum(1).tolist()):
        if n:
            rows.append([i, n, rounded(counts[i, i] / n), None if before is None else rounded(before[i, i] / n)])
    return rows


def _reliabilities(arrays: Arrays) -> list[dict[str, Any]]:
    found = []
    for domain in ("target", "source"):
        for word, key in (("", "probs"), (", before calibration", "probs_before")):
            probs = arrays.get(f"{domain}_test_{key}")
            if probs is not None and len(probs):
                right = probs.argmax(1) == arrays[f"{domain}_test_labels"]
                found.append(
                    {"name": f"{domain} test{word}", "domain": domain, "before": bool(word)}
                    | reliability(probs.max(1).astype(float), right)
                )
    return found


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """`bins`: mean confidence, accuracy and share of the samples, of the bins that hold some (closed on the right); `ece`;
    `risk`: the share of samples kept, the surest first, and the share of errors among them; `aurc`: the mean of the latter."""
    import numpy as np

    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(index, minlength=BINS)
    full = count > 0
    middle = np.bincount(index, confidence, BINS)[full] / count[full]
    share = np.bincount(index, right, BINS)[full] / count[full]
    weight = count[full] / len(right)
    errors = np.cumsum(~right[np.argsort(-confidence, kind="stable")]) / np.arange(1, len(right) + 1)
    some = np.unique(np.linspace(min(len(right) - 1, len(right) // 50), len(right) - 1, CURVE).astype(int))
    return {
        "bins": _rows(middle, share, weight),
        "ece": rounded(float((np.abs(middle - share) * weight).sum())),
        "risk": _rows((some + 1) / len(right), errors[some]),
        "aurc": rounded(float(errors.mean())),
    }


def _changes(
    own: Arrays, base: Arrays, labels: np.ndarray, before: np.ndarray, after: np.ndarray, folder: RunFolder
) -> dict[str, Any]:
    """How many samples went from wrong to right and back, and some of each, with their images where those are kept."""
    was, now = before == labels, after == labels
    changed = {"gained": ~was & now, "lost": was & ~now}
    counts = {name: int(which.sum()) for name, which in changed.items()}
    p = mcnemar(counts["gained"], counts["lost"])
    counts |= {"both_right": int((was & now).sum()), "both_wrong": int((~was & ~now).sum())}
    images = example_images(folder, len(labels))
    probs, earlier = own["target_test_probs"], base["target_test_probs"]
    shown: dict[str, list[dict[str, Any]]] = {}
    for name, which in changed.items():
        rows = which.nonzero()[0].tolist()
        pictured = [i for i in rows if i in images] if images else rows
        shown[name] = [
            {
                "id": str(own["target_test_ids"][i]),
                "label": int(labels[i]),
                "before": [int(before[i]), rounded(float(earlier[i].max()))],
                "after": [int(after[i]), rounded(float(probs[i].max()))],
                **({"image": as_data_uri(images[i])} if i in images else {}),
            }
            for i in pictured[:SHOWN]
        ]
    return {"counts": counts, "p": rounded(p), "pictures": len(images), **shown}


def example_images(folder: RunFolder, samples: int) -> dict[int, np.ndarray]:
    """The kept images `(C, H, W)` uint8 of the target test set, by their row in predictions.npz."""
    arrays = _arrays(folder.examples, ("target_test", "target_test_index"))
    images = arrays.get("target_test")
    if images is None or images.ndim != 4 or str(images.dtype) != "uint8":
        return {}
    rows = arrays.get("target_test_index")
    numbers: Iterable[int] = range(len(images)) if rows is None else rows.tolist()
    return {row: image for row, image in zip(numbers, images, strict=True) if row < samples}


# Regression


def _regression(own: Arrays, base: Arrays) -> dict[str, Any]:
    import numpy as np

    labels, mean, sigma = _outputs(own)
    theirs = _outputs(base) if base else None
    outputs = []
    shown = np.unique(np.linspace(0, len(labels) - 1, min(POINTS, len(labels))).astype(int))
    for t in range(min(labels.shape[1], OUTPUTS)):
        true, guess, spread = labels[:, t], mean[:, t], sigma[:, t]
        order = np.argsort(true, kind="stable")[shown]  # spread evenly over the true values
        output: dict[str, Any] = {
            "points": _rows(true[order], guess[order], NORMAL_95 * spread[order]),
            "rmse": rounded(_rmse(true, guess)),
            "bias": rounded(float((true - guess).mean())),
            "width": rounded(2 * NORMAL_95 * float(spread.mean())),
            "plain_width": rounded(2 * NORMAL_95 * float(true.std())),
            "coverage": coverage(true, guess, spread),
        }
        if "target_test_lower" in own and np.isfinite(own["target_test_upper"]).all():
            lower, upper = (own[f"target_test_{end}"].reshape(len(labels), -1)[:, t] for end in ("lower", "upper"))
            inside = float(((lower <= true) & (true <= upper)).mean())
            output["conformal"] = [rounded(inside), rounded(float((upper - lower).mean()))]
        if theirs is not None:
            _, their_mean, their_sigma = theirs
            output["base_rmse"] = rounded(_rmse(true, their_mean[:, t]))
            output["base_coverage"] = coverage(true, their_mean[:, t], their_sigma[:, t])
            output["closer"] = rounded(float((np.abs(true - guess) < np.abs(true - their_mean[:, t])).mean()))
        outputs.append(output)
    return {"samples": len(labels), "outputs": outputs}


def _outputs(arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, means and standard deviations `(N, T)` of the target test set."""
    import numpy as np

    labels = arrays["target_test_labels"].astype(float)
    mean, variance = (arrays[f"target_test_{name}"].astype(float) for name in ("mean", "variance"))
    sigma = np.maximum(np.sqrt(variance), NO_SPREAD)
    return labels.reshape(len(labels), -1), mean.reshape(len(labels), -1), sigma.reshape(len(labels), -1)


def _rmse(true: np.ndarray, guess: np.ndarray) -> float:
    return float(((true - guess) ** 2).mean() ** 0.5)


def coverage(true: np.ndarray, guess: np.ndarray, sigma: np.ndarray) -> list[list[float | None]]:
    """Stated level of a central interval, and the share of the true values inside."""
    from statistics import NormalDist

    import numpy as np

    levels = np.array([*np.arange(0.05, 0.96, 0.05), 0.99])
    halves = [NormalDist().inv_cdf((1 + level) / 2) for level in levels.tolist()]
    z = np.sort(np.abs(true - guess) / sigma)
    return _rows(levels, np.searchsorted(z, halves, side="right") / len(z))


# Shared


def rounded(value: Any) -> float | None:
    """Four significant digits; None of what is not finite."""
    number = float(value)
    return float(f"{number:.4g}") if math.isfinite(number) else None


def _rows(*columns: np.ndarray) -> list[list[float | None]]:
    return [[rounded(value) for value in row] for row in zip(*(c.tolist() for c in columns), strict=True)]


def _plain(value: Any) -> Any:
    """As JSON has it: floats rounded or None."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _arrays(path: Path, names: Sequence[str] | None = None) -> Arrays:
    """Those of an .npz file; none where it is missing or damaged."""
    import zipfile

    import numpy as np

    try:
        with path.open("rb") as file, np.load(file) as arrays:
            return {name: arrays[name] for name in names or arrays.files if name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}


def _log(folder: RunFolder) -> list[str]:
    try:
        return folder.log.read_text(errors="replace").splitlines()[-LOG:]
    except OSError:
        return []
