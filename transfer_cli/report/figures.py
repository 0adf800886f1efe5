"""A run's figures, drawn from its files alone: learning curves, and predictions on the target test set. Never torch.

The same files give the same bytes. Matplotlib is imported on use and without pyplot, whose state is global.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from transfer_cli.run_folder import HEADLINE, RunFolder, read_json

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]  # steps, values
Curves = dict[str, dict[str, Curve]]  # split -> name -> curve

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")  # Okabe & Ito 2008
TARGET, CHOSEN, FAINT = "#d55e00", "#222222", "#888888"
DPI = 110
INCHES_A_CHARACTER = 0.08  # of a class name, generously
NAMED_CLASSES = 30  # beyond them neither names nor numbers fit
POINTS = 300  # with an interval each, for every output
OUTPUTS = 4
TILE = 0.5  # inches of an image and its gap
BINS = 15  # of confidence, as in the ECE
NORMAL_95 = 1.959964  # half-width of a Gaussian's 95 % interval, in standard deviations
NO_SPREAD = 1e-30  # a standard deviation that stands for zero, whatever the unit of the targets


def draw_figures(folder: RunFolder) -> None:
    """Write `figures/learning_curves.png` (where a curve has two points) and `figures/confusion_target_test.png`, or in
    regression `figures/predicted_target_test.png`; `figures/reliability.png`; `figures/translations.png` where the method
    made pictures."""
    import numpy as np

    result, (curves, phases) = read_json(folder.result), _read_events(folder)
    folder.figures.mkdir(exist_ok=True)
    if any(len(set(steps)) > 1 for split in curves.values() for steps, _ in split.values()):
        _save(_learning_curves(curves, phases, result), folder, "learning_curves.png")
    with np.load(folder.predictions) as arrays:
        splits: dict[str, dict[str, Any]] = {"target test": {}, "source test": {}}
        for key in arrays.files:
            domain, _, name = key.partition("_test_")
            splits[f"{domain} test"][name] = arrays[key]
    test = splits["target test"]
    if result["kind"] == "classification":
        _save(_confusion(test, result), folder, "confusion_target_test.png")
        _save(_reliability(splits, result), folder, "reliability.png")
    else:
        _save(_predicted(test, result), folder, "predicted_target_test.png")
        _save(_sharpness(test, result), folder, "reliability.png")
    if panels := _pictures(folder):
        _save(_translations(panels, result), folder, "translations.png")


def _read_events(folder: RunFolder) -> tuple[Curves, dict[str, int]]:
    """The curves, and the last step of each phase, in their order."""
    curves: Curves = defaultdict(dict)
    phases: dict[str, int] = {}
    if folder.metrics.exists():
        with folder.metrics.open() as file:
            for event in map(json.loads, file):
                phases[event["phase"]] = event["step"]
                for name, value in event["values"].items():
                    steps, values = curves[event["split"]].setdefault(name, ([], []))
                    steps.append(event["step"])
                    values.append(value)
    return curves, phases


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _save(figure: Figure, folder: RunFolder, name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a class name in a script that the font lacks
        # The canvas's own method draws once; Figure.savefig draws twice where there is a layout.
        FigureCanvasAgg(figure).print_png(folder.figures / name, metadata={"Software": None})


def _title(result: Mapping[str, Any]) -> str:
    return f"{result['source']} → {result['target']}    {result['method']}, {result['backbone']}, seed {result['seed']}"


def _learning_curves(curves: Curves, phases: Mapping[str, int], result: Mapping[str, Any]) -> Figure:
    panels = [panel for panel, split in PANELS.items() if curves.get(split)]
    figure = _figure(9, 0.6 + 2.2 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        panel(axis, curves[PANELS[panel]], result)
        axis.axvline(result["selection"]["step"], color=CHOSEN, linewidth=1, linestyle=(0, (4, 2)), zorder=1)
        for end in list(phases.values())[:-1]:
            axis.axvline(end, color=FAINT, linewidth=0.8, linestyle=":", zorder=1)
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.03))
    if len(phases) > 1:
        _name_phases(axes[0], phases)
    axes[-1].set_xlabel("step", fontsize=9)
    figure.suptitle(_title(result), fontsize=10, parse_math=False)
    return figure


def _name_phases(axis: Axes, phases: Mapping[str, int]) -> None:
    start = 0
    for name, end in phases.items():
        if end > start:
            middle = ((start + end) / 2, 1.01)
            axis.annotate(
                name, middle, xycoords=("data", "axes fraction"), fontsize=7.5, color=FAINT, ha="center", va="bottom"
            )
        start = end


def _lines(axis: Axes, curves: Mapping[str, Curve], **style: Any) -> None:
    for i, (name, (steps, values)) in enumerate(curves.items()):
        marker = "." if len(steps) < 30 else None
        axis.plot(
            steps,
            values,
            label=name.replace("_", " "),
            **{"color": COLOURS[i % len(COLOURS)], "linewidth": 1.3, "marker": marker, **style},
        )


def _train_panel(axis: Axes, curves: Mapping[str, Curve], result: Mapping[str, Any]) -> None:
    _lines(axis, curves)
    _log_scale(axis, curves)
    axis.set_ylabel("training", fontsize=9)


def _health_panel(axis: Axes, curves: Mapping[str, Curve], result: Mapping[str, Any]) -> None:
    _lines(axis, curves)
    _log_scale(axis, curves)
    axis.set_ylabel("health", fontsize=9)


def _log_scale(axis: Axes, curves: Mapping[str, Curve]) -> None:
    """Where the values are positive and of several orders of magnitude."""
    everything = [value for _, values in curves.values() for value in values]
    if min(everything) > 0 and max(everything) > 50 * min(everything):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")  # the default sets powers of ten as formulas, which takes long
        axis.yaxis.set_minor_formatter("")


def _diagnostics_panel(axis: Axes, curves: Mapping[str, Curve], result: Mapping[str, Any]) -> None:
    _lines(axis, curves)
    axis.set_ylabel("diagnostics", fontsize=9)


def _validator_panel(axis: Axes, curves: Mapping[str, Curve], result: Mapping[str, Any]) -> None:
    chooser = result["selection"]["validator"]
    others = {name: curve for name, curve in curves.items() if name != chooser}
    if chooser in curves:
        _lines(axis, {f"{chooser} (chooses)": curves[chooser]}, linewidth=2)
    for i, (name, curve) in enumerate(others.items()):
        _lines(axis, {name: curve}, color=COLOURS[(i + 1) % len(COLOURS)], alpha=0.6, linewidth=1)
    axis.set_ylabel("validators", fontsize=9)


def _target_panel(axis: Axes, curves: Mapping[str, Curve], result: Mapping[str, Any]) -> None:
    selection, headline = result["selection"], HEADLINE[result["kind"]]
    steps, values = curves[headline]
    scale, unit = (100, "accuracy, %") if headline == "accuracy" else (1, "RMSE")
    use = "used for selection" if selection["uses_target_labels"] else "not used for selection"
    _lines(axis, {f"target test\n({use})": (steps, [scale * v for v in values])}, color=TARGET, linewidth=1.6)
    at = dict(zip(steps, values, strict=True))  # where two phases meet in a step, the later one
    marks = {selection["oracle"]["step"]: ("best by target labels", "white")}
    also = "\n(best by target labels too)" if selection["step"] in marks else ""
    marks[selection["step"]] = (f"kept: step {selection['step']:,}{also}", TARGET)
    for step, (label, fill) in marks.items():
        if step in at:
            point = ([step], [scale * at[step]], "o")
            axis.plot(*point, markersize=7, markerfacecolor=fill, color=TARGET, label=label, zorder=4)
    axis.set_ylabel(unit, fontsize=9)


PANELS = {
    _train_panel: "train",
    _diagnostics_panel: "diagnostics",
    _health_panel: "health",
    _validator_panel: "validators",
    _target_panel: "target_test",
}


def _confusion(test: Mapping[str, np.ndarray], result: Mapping[str, Any]) -> Figure:
    import numpy as np

    labels, guesses = test["labels"].astype(int), test["probs"].argmax(1)
    names = [_shortened(str(name)) for name in result["classes"]]
    k = max(len(names), int(labels.max()) + 1, test["probs"].shape[1])
    counts = np.zeros((k, k))
    np.add.at(counts, (labels, guesses), 1)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)

    named = k <= NAMED_CLASSES
    side = min(max(3.2, 0.36 * k + 1.2), 10) if named else 7
    figure = _figure(side + 1.2, side + 0.6)
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.02)
    bar.set_label("share of the true class, %", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    if named:
        ticks = [*names, *(str(i) for i in range(len(names), k))]
        upright = INCHES_A_CHARACTER * max(map(len, ticks)) < side / k
        axis.set_xticks(range(k), ticks, fontsize=8, rotation=0 if upright else 90, parse_math=False)
        axis.set_yticks(range(k), ticks, fontsize=8, parse_math=False)
        _write_cells(axis, shares, fontsize=8 if k <= 12 else 6.5)
    else:
        axis.set_xticks([])
        axis.set_yticks([])
    axis.tick_params(length=0)
    axis.set_xlabel("predicted class" if named else f"predicted class ({k})", fontsize=9)
    axis.set_ylabel("true class" if named else f"true class ({k})", fontsize=9)
    caption = f"target test, {len(labels):,} samples, accuracy {100 * float((labels == guesses).mean()):.1f} %"
    axis.set_title(f"{_title(result)}\n{caption}", fontsize=9, parse_math=False)
    return figure


def _shortened(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _write_cells(axis: Axes, shares: np.ndarray, fontsize: float) -> None:
    """Whole percents; a cell below a half is left empty."""
    for (i, j), share in _cells(shares):
        if share >= 0.5:
            colour = "white" if share > 55 else "#333333"
            text = axis.text(j, i, f"{share:.0f}", ha="center", va="center", fontsize=fontsize, color=colour)
            text.set_in_layout(False)  # it lies inside the axes anyway, and the layout takes long over each


def _cells(shares: np.ndarray) -> Iterator[tuple[tuple[int, int], float]]:
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            yield (i, j), float(share)


def _predicted(test: Mapping[str, np.ndarray], result: Mapping[str, Any]) -> Figure:
    """For each of the first outputs a row: predicted mean against true value, residuals, and coverage of the intervals."""
    import numpy as np

    labels, mean, sigma = (_columns(a.astype(float)) for a in (test["labels"], test["mean"], np.sqrt(test["variance"])))
    outputs = min(labels.shape[1], OUTPUTS)
    figure = _figure(13.2, 0.6 + 4.2 * outputs)
    rows = figure.subplots(outputs, 3, squeeze=False)
    shown = np.unique(np.linspace(0, len(labels) - 1, min(POINTS, len(labels))).astype(int))
    for t, axes in enumerate(rows):
        true, guess, spread = labels[:, t], mean[:, t], np.maximum(sigma[:, t], NO_SPREAD)
        order = np.argsort(true, kind="stable")[shown]  # spread evenly over the true values
        _against_true(axes[0], true[order], guess[order], NORMAL_95 * spread[order])
        _residuals(axes[1], true[order], guess[order], NORMAL_95 * spread[order])
        _coverage(axes[2], true, guess, spread)
        rmse = float(np.sqrt(np.square(true - guess).mean()))
        name = f"output {t}: " if outputs > 1 else ""
        axes[0].set_title(f"{name}{len(true):,} samples, RMSE {rmse:.4g}", fontsize=8.5)
        for axis in axes:
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, place in zip(rows[0], ("upper left", "best", "upper left"), strict=True):
        axis.legend(fontsize=7.5, frameon=False, loc=place)
    figure.suptitle(f"{_title(result)}\ntarget test", fontsize=10, parse_math=False)
    return figure


def _against_true(axis: Axes, true: np.ndarray, guess: np.ndarray, half: np.ndarray) -> None:
    axis.errorbar(true, guess, half, fmt="none", ecolor=COLOURS[0], alpha=0.28, elinewidth=0.9, label="95 % interval")
    axis.plot(true, guess, ".", color=COLOURS[0], markersize=4, label="mean")
    ends = [float(min(true.min(), guess.min())), float(max(true.max(), guess.max()))]
    axis.plot(ends, ends, color=CHOSEN, linewidth=1, linestyle=(0, (4, 2)), label="predicted = true")
    axis.set_xlabel("true", fontsize=9)
    axis.set_ylabel("predicted", fontsize=9)


def _residuals(axis: Axes, true: np.ndarray, guess: np.ndarray, half: np.ndarray) -> None:
    axis.vlines(guess, -half, half, color=COLOURS[0], alpha=0.2, linewidth=0.9, label="95 % interval")
    axis.plot(guess, true - guess, ".", color=TARGET, markersize=4, label="true − predicted")
    axis.axhline(0, color=CHOSEN, linewidth=1, linestyle=(0, (4, 2)))
    axis.set_xlabel("predicted", fontsize=9)
    axis.set_ylabel("residual", fontsize=9)
    axis.set_title(f"mean residual {float((true - guess).mean()):.3g}", fontsize=8.5)


def _coverage(axis: Axes, true: np.ndarray, guess: np.ndarray, sigma: np.ndarray) -> None:
    """The share of values inside central intervals of every level; above the diagonal, intervals are wider than need be."""
    import numpy as np

    normal = NormalDist()
    levels = np.arange(1, 100) / 100
    halves = np.array([normal.inv_cdf((1 + level) / 2) for level in levels])
    z = np.sort(np.abs(true - guess) / sigma)
    covered = np.searchsorted(z, halves, side="right") / len(z)
    axis.plot([0, 100], [0, 100], color=CHOSEN, linewidth=1, linestyle=(0, (4, 2)), label="as stated")
    axis.plot(100 * levels, 100 * covered, color=COLOURS[0], linewidth=1.6, label="inside")
    for level in (50, 80, 95):
        axis.plot(level, 100 * covered[level - 1], "o", color=COLOURS[0], markersize=4.5)
    width, plain = 2 * NORMAL_95 * float(sigma.mean()), 2 * NORMAL_95 * float(true.std())
    axis.set_title(
        f"95 %: {100 * covered[94]:.1f} % inside, width {width:.3g} (of their mean alone {plain:.3g})", fontsize=8
    )
    axis.set_xlabel("stated level of the interval, %", fontsize=9)
    axis.set_ylabel("true values inside, %", fontsize=9)


def _reliability(splits: Mapping[str, Mapping[str, np.ndarray]], result: Mapping[str, Any]) -> Figure:
    """Accuracy against confidence in 15 bins, how often each confidence occurs, and the errors left when the least sure are
    left out."""
    import numpy as np

    figure = _figure(13.2, 4.4)
    axes = figure.subplots(1, 3)
    axes[0].plot([0, 1], [0, 1], color=CHOSEN, linewidth=1, linestyle=(0, (4, 2)), label="calibrated")
    for name, colour in (("target test", TARGET), ("source test", COLOURS[0])):
        split = splits[name]
        if not split:
            continue
        variants = (
            [("", "probs")] if "probs_before" not in split else [("", "probs"), (" before calibration", "probs_before")]
        )
        for word, key in variants:
            confidence, right = split[key].max(1).astype(float), split[key].argmax(1) == split["labels"]
            style = (0, (1, 1.5)) if word else "-"
            middle, share, ece = _bins(confidence, right)
            label = f"{name}{word}, ECE {ece:.3f}"
            axes[0].plot(middle, share, marker=".", color=colour, linestyle=style, linewidth=1.3, label=label)
            if word:
                continue
            axes[1].hist(confidence, bins=np.linspace(0, 1, BINS + 1), weights=np.full(len(right), 100 / len(right)),
                         histtype="step", color=colour, linewidth=1.3, label=name)  # fmt: skip
            errors = np.cumsum(~right[np.argsort(-confidence, kind="stable")]) / np.arange(1, len(right) + 1)
            kept = 100 * np.arange(1, len(right) + 1) / len(right)
            axes[2].plot(kept, 100 * errors, color=colour, linewidth=1.5, label=f"{name}, AURC {errors.mean():.3f}")
    for axis, x, y, place in (
        (axes[0], "confidence", "accuracy", "lower right"),
        (axes[1], "confidence", "samples, %", "upper left"),
        (axes[2], "samples kept, the surest first, %", "errors among them, %", "best"),
    ):
        _dress(axis, x, y, place)
    axes[2].set_ylim(bottom=0)
    figure.suptitle(_title(result), fontsize=10, parse_math=False)
    return figure


def _bins(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean confidence and accuracy of the bins that hold samples, closed on the right, and the ECE."""
    import numpy as np

    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(index, minlength=BINS)
    full = count > 0
    middle = np.bincount(index, confidence, BINS)[full] / count[full]
    share = np.bincount(index, right, BINS)[full] / count[full]
    return middle, share, float((np.abs(middle - share) * count[full]).sum() / len(right))


def _sharpness(test: Mapping[str, np.ndarray], result: Mapping[str, Any]) -> Figure:
    """For each of the first outputs a row: mean width of the intervals against the share they hold, and the error left when the
    least sure are left out."""
    import numpy as np

    labels, mean, sigma = (_columns(a.astype(float)) for a in (test["labels"], test["mean"], np.sqrt(test["variance"])))
    outputs = min(labels.shape[1], OUTPUTS)
    figure = _figure(8.8, 0.6 + 4.0 * outputs)
    halves = np.array([NormalDist().inv_cdf((1 + level) / 2) for level in np.arange(1, 100) / 100])
    for t, axes in enumerate(figure.subplots(outputs, 2, squeeze=False)):
        error, spread = np.abs(labels[:, t] - mean[:, t]), np.maximum(sigma[:, t], NO_SPREAD)
        plain = np.abs(labels[:, t] - labels[:, t].mean()) / max(labels[:, t].std(), NO_SPREAD)
        for name, z, scale, colour in (
            ("these", error / spread, spread.mean(), COLOURS[0]),
            ("of the labels' mean and deviation alone", plain, labels[:, t].std(), FAINT),
        ):
            covered = np.searchsorted(np.sort(z), halves, side="right") / len(z)
            axes[0].plot(100 * covered, 2 * halves * scale, color=colour, linewidth=1.5, label=name)
        if "lower" in test and np.isfinite(test["upper"]).all():
            inside = (test["lower"][:, t] <= labels[:, t]) & (labels[:, t] <= test["upper"][:, t])
            width = float((test["upper"] - test["lower"])[:, t].mean())
            level = f"conformal at {100 * result['conformal']['level']:.0f} %"
            axes[0].plot(100 * inside.mean(), width, "o", color=TARGET, label=level)
        order = np.argsort(spread, kind="stable")
        kept = np.arange(1, len(error) + 1)
        rmse = np.sqrt(np.cumsum(np.square(error[order])) / kept)
        axes[1].plot(100 * kept / len(error), rmse, color=COLOURS[0], linewidth=1.5, label="RMSE")
        name = f" of output {t}" if outputs > 1 else ""
        _dress(axes[0], "true values inside, %", f"mean width of the interval{name}", "upper left")
        _dress(axes[1], "samples kept, the surest first, %", f"RMSE among them{name}", "best")
        axes[1].set_ylim(bottom=0)
    figure.suptitle(f"{_title(result)}\ntarget test", fontsize=10, parse_math=False)
    return figure


def _dress(axis: Axes, x: str, y: str, legend: str) -> None:
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7.5, frameon=False, loc=legend)


def _columns(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


def _pictures(folder: RunFolder) -> dict[str, dict[str, np.ndarray]]:
    """Images `(N, C, H, W)` uint8 that the method made, by panel and row."""
    import numpy as np

    panels: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    if folder.examples.exists():
        with np.load(folder.examples) as arrays:
            for name in arrays.files:
                panel, slash, row = name.partition("/")
                if slash:
                    panels[panel][row] = arrays[name]
    return panels


def _translations(panels: Mapping[str, Mapping[str, np.ndarray]], result: Mapping[str, Any]) -> Figure:
    """A row for each name, a column for each sample; every pixel a square, however large the images are."""
    most = max(len(images) for rows in panels.values() for images in rows.values())
    figure = _figure(1.1 + TILE * most, 0.5 + sum(0.35 + TILE * len(rows) for rows in panels.values()))
    figure.suptitle(_title(result), fontsize=10, parse_math=False)
    heights = [len(rows) for rows in panels.values()]
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (panel, rows) in zip(axes, panels.items(), strict=True):
        mosaic, middles = _mosaic(list(rows.values()))
        axis.imshow(mosaic, interpolation="nearest")
        axis.set_title(panel, fontsize=9, loc="left", parse_math=False)
        axis.set_xticks([])
        axis.set_yticks(middles, list(rows), fontsize=8.5, parse_math=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    return figure


def _mosaic(rows: list[np.ndarray]) -> tuple[np.ndarray, list[float]]:
    """One RGB image of rows of images with white gaps, and the middle of each row."""
    import numpy as np

    n, _, height, width = rows[0].shape
    gap = max(1, width // 8)
    mosaic = np.full((len(rows) * (height + gap) - gap, n * (width + gap) - gap, 3), 255, np.uint8)
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            top, left = i * (height + gap), j * (width + gap)
            mosaic[top : top + height, left : left + width] = image.transpose(1, 2, 0)  # grey fills three channels
    return mosaic, [i * (height + gap) + (height - 1) / 2 for i in range(len(rows))]
