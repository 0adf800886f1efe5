"""The lines that end one run: its figures, where its checkpoint comes from, its folder. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transfer_cli.errors import TransferError
from transfer_cli.report.negative import warning_lines
from transfer_cli.report.runs import DEFAULT_FOLDER, damage, short
from transfer_cli.run_folder import HEADLINE

HELPS = 0.75  # the weight from which words are plain: odds of three to one, "positive" evidence (Kass & Raftery, 1995)


def result_lines(result: Mapping[str, Any] | None, path: Path) -> list[str]:
    """The lines that end a run: its figures, where its checkpoint comes from, its folder.

    Raises:
        TransferError: `result` is not what this version writes.
    """
    if (problem := damage(result)) or result is None:
        raise TransferError(f"{problem} in {path}: force=true runs it again.")
    figures = _classification_figures if result["kind"] == "classification" else _regression_figures
    metrics = {split: result["metrics"].get(split) for split in ("source_test", "target_test")}
    rows = {split: figures(values) for split, values in metrics.items() if values}
    names = rows["target_test"]
    widths = {name: max(5, len(name), *(len(row.get(name, "")) for row in rows.values())) for name in names}
    lines = ["             " + "".join(f"  {name:>{width}}" for name, width in widths.items())]
    for split, row in rows.items():
        lines.append(
            f"{split.replace('_', ' '):13}"
            + "".join(f"  {row.get(name, ''):>{width}}" for name, width in widths.items())
        )
    return [*lines, *verdict_lines(result), _checkpoint_line(result), *warning_lines(result, path), _folder_line(path)]


def verdict_lines(result: Mapping[str, Any]) -> list[str]:
    """In words, what was found of the source, of the calibration, of sets or intervals, and of strange samples."""
    return [
        *_transfer_lines(result.get("fit", {})),
        *_calibration_lines(result),
        *_set_lines(result),
        *_ood_lines(result),
    ]


def seed_lines(runs: Sequence[tuple[Mapping[str, Any] | None, Path]]) -> list[str]:
    """The lines that end several seeds of one experiment, by their results and folders: each one's figure, and their mean."""
    lines, values = [], []
    for result, path in runs:
        if result is None or damage(result):
            continue
        headline = HEADLINE[result["kind"]]
        values.append(result["metrics"]["target_test"][headline])
        lines.append(f"seed {result['seed']:<3} {_figure(headline, values[-1])}    {short(path)}")
    if len(values) < 2:
        return lines
    spread = _figure(headline, statistics.stdev(values))
    told = f"mean     {_figure(headline, statistics.mean(values))} ± {spread}    target test {headline}"
    return [*lines, f"{told}        next: transfer report"]


def _figure(headline: str, value: float) -> str:
    return _percent(value) if headline == "accuracy" else f"{value:.4g}"


def _classification_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    open_set = {"OS*": "os_star", "unknown": "unknown_accuracy", "HOS": "hos"}
    return {
        "accuracy": _percent(metrics["accuracy"]),
        "macro-F1": _percent(metrics["macro_f1"]),
        "NLL": f"{metrics['nll']:.3f}",
        "ECE": f"{metrics['ece']:.3f}",
        **{name: _percent(metrics[key]) for name, key in open_set.items() if key in metrics},
    }


def _regression_figures(metrics: Mapping[str, float]) -> dict[str, str]:
    return {
        "RMSE": f"{metrics['rmse']:.4g}",
        "R²": f"{metrics['r2']:.3f}",
        "NLL": f"{metrics['nll']:.3f}",
        "CRPS": f"{metrics['crps']:.4g}",
        "95 % coverage": _percent(metrics["coverage_95"]),
        **({"width": f"{metrics['width_95']:.4g}"} if "width_95" in metrics else {}),
        **({"epistemic": _percent(metrics["epistemic_share"])} if "epistemic_share" in metrics else {}),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _transfer_lines(fit: Mapping[str, float]) -> list[str]:
    """In words, what a method that weighs the source against no source has found; nothing of others."""
    weight = fit.get("transfer_weight")
    if weight is None:
        return []
    if weight >= HELPS:
        verdict = "the source helps"
    else:
        verdict = "it is not clear that the source helps" if weight > 1 - HELPS else "the source does not help"
    gain = f" (log evidence {fit['log_evidence_gain']:+.1f})" if "log_evidence_gain" in fit else ""
    return [f"transfer weight {weight:.2f}: {verdict}{gain}"]


def _calibration_lines(result: Mapping[str, Any]) -> list[str]:
    found = result.get("calibration")
    if not found:
        return []
    source = f" (the source's {found['temperature_source']:.3g})" if "temperature_source" in found else ""
    classes = result["kind"] == "classification"
    figure, name, factor = ("ECE", "ece", "temperature") if classes else ("NLL", "nll", "deviations times")
    before, after = (splits["target_test"][name] for splits in (found["before"], result["metrics"]))
    return [
        f"calibration {found['kind']} on {found['labels']:,} {found['domain']} labels: "
        f"{factor} {found['temperature']:.3g}{source}; {figure} on the target {before:.3f} -> {after:.3f}"
    ]


def _set_lines(result: Mapping[str, Any]) -> list[str]:
    found = result.get("conformal")
    if not found:
        return []
    metrics = result["metrics"]["target_test"]
    size = metrics.get("conformal_size", math.inf)
    what = f"sets of {size:.2f} classes" if result["kind"] == "classification" else f"intervals {size:.4g} wide"
    unbounded = metrics.get("conformal_unbounded", 0.0)
    what += f" ({_percent(unbounded)} of them without bounds)" if unbounded else ""
    labels, effective = found["labels"], found["effective_labels"]
    of = f"{labels:,}" if effective > 0.999 * labels else f"{labels:,} (effectively {effective:.0f})"
    lines = [
        f"conformal {found['kind']} at {_percent(found['level'])} on {of} {found['domain']} labels: {what} that hold "
        f"{_percent(metrics['conformal_coverage'])} of the target"
    ]
    if found["few"]:
        spread = math.sqrt(found["level"] * (1 - found["level"]) / effective)
        lines.append(
            f"warning: so few labels leave the coverage of these {'sets' if result['kind'] == 'classification' else 'intervals'} "
            f"uncertain by some {_percent(spread)}"
        )
    return lines


def _ood_lines(result: Mapping[str, Any]) -> list[str]:
    found = result["metrics"].get("ood")
    if not found:
        return []
    return [
        f"out of distribution: AUROC {_percent(found['auroc'])}, false positives at 95 % {_percent(found['fpr95'])}"
    ]


def _checkpoint_line(result: Mapping[str, Any]) -> str:
    selection, oracle = result["selection"], result["selection"]["oracle"]
    if selection["candidates"] == 1:
        what = f"step {selection['step']:,}" if selection["step"] else "the closed-form fit"
        return f"checkpoint: {what}, with nothing to choose from"
    step = f"checkpoint: step {selection['step']:,}"
    if selection["uses_target_labels"]:
        return f"{step}, chosen by {selection['validator']} with target labels: an upper bound, not a result"
    last = selection["validator"] == "last"
    how = "the last" if last else f"chosen by {selection['validator']} without target labels"
    headline = HEADLINE[result["kind"]]
    best = abs(oracle["score"])  # accuracy, or minus the RMSE
    if oracle["step"] == selection["step"] or math.isclose(
        best, result["metrics"]["target_test"][headline], rel_tol=1e-6
    ):
        return f"{step}, {how} (target labels would have found none better)"
    shown = _percent(best) if headline == "accuracy" else f"RMSE {best:.4g}"
    return f"{step}, {how} (the best by target labels would have been step {oracle['step']:,}, {shown})"


def _folder_line(path: Path) -> str:
    runs = path.parent.parent
    argument = "" if runs.resolve() == DEFAULT_FOLDER.resolve() else f" {short(runs)}"
    return f"{short(path)}        next: transfer report{argument}"
