"""A diagnosis as text: figures, a column a backbone, then the advice. Standard library only."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 120
SCORES = {"logme": "LogME", "h_score_shrunk": "H-score, shrunk", "h_score": "H-score", "leep": "LEEP", "nce": "NCE"}


def lines(found: Mapping[str, Any]) -> list[str]:
    """What `transfer diagnose` prints."""
    n = found["samples"]
    counts = [
        f"{n['source']:,} of {n['source_all']:,} labelled source samples",
        f"{n['target']:,} of {n['target_all']:,} unlabelled target samples",
    ]
    counts += [f"{n['granted']:,} target labels granted"] if n["granted"] else []
    out = [f"{found['source']} -> {found['target']}    {found['kind']}", ", ".join(counts)]
    if found.get("label_space"):
        out.append(f"classes: {found['label_space']['overlap']}")
    out += [*found["notes"], ""]
    out += [*_table(_rows(found["backbones"])), "", *_inputs(found["statistics"])]
    out += _labels(found)
    out += [
        "",
        *_duplicates(found["duplicates"], found["by_design"]),
        "",
        f"what this suggests, for {found['advised']}",
    ]
    for entry in found["advice"]:
        out += _wrapped(f"- {entry['says']}", "  ") + _wrapped(f"  [{entry['rests_on']}]", "   ")
    return [*out, "", f"{found['seconds']:.0f} s    {found['path']}"]


def _rows(backbones: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A heading and a row a figure; rows that no backbone has are left out."""
    readers: dict[str, Any] = {
        "features": lambda f: f"{f['width']:,}",
        "A-distance [95 %]": lambda f: _interval(f["a_distance"]),
        "MMD² (p)": lambda f: f"{f['mmd']['value']:.4f} ({f['mmd']['p']:.3f})",
        "  without means": lambda f: _less(f, "means"),
        "  without means, scales": lambda f: _less(f, "scales"),
        "  without covariance": lambda f: _less(f, "covariance"),
        "  with class shares": lambda f: _less(f, "class_shares"),
        "mean shift (chance)": lambda f: f"{f['moments']['mean_shift']:.2f} ({f['moments']['mean_shift_noise']:.2f})",
        "covariance (chance)": lambda f: (
            f"{f['moments']['covariance_distance']:.2f} ({f['moments']['covariance_noise']:.2f})"
        ),
        "CORAL distance": lambda f: f"{f['moments']['coral']:.2g}",
        "label shift [95 %]": lambda f: _interval(f["label_shift"], "distance"),
        "  condition": lambda f: _condition(f["label_shift"]),
        "source accuracy": lambda f: f"{100 * f['source_classifier']['accuracy']:.1f} %",
        **{name: lambda f, key=key: f"{f['transferability'][key]:.3f}" for key, name in SCORES.items()},
    }
    rows = [("", *backbones)]
    for name, read in readers.items():
        cells = [_cell(read, figures) for figures in backbones.values()]
        if any(cells):
            rows.append((name, *cells))
    return rows


def _cell(read: Any, figures: Mapping[str, Any]) -> str:
    try:
        return str(read(figures))
    except (KeyError, TypeError):  # a figure that this task or so few samples do not have
        return ""


def _interval(figure: Mapping[str, Any], key: str = "value") -> str:
    return f"{figure[key]:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _condition(figure: Mapping[str, Any]) -> str:
    return "infinite" if figure["condition"] is None else f"{figure['condition']:.1f}"


def _less(figures: Mapping[str, Any], key: str) -> str:
    return f"{-100 * figures['removed'][key]:+.0f} %"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        (
            row[0].ljust(widths[0]) + "".join(f"  {cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
        ).rstrip()
        for row in rows
    ]


def _inputs(statistics: Mapping[str, Any]) -> list[str]:
    out = []
    for side in ("source", "target"):
        known = statistics[side]
        if "mean" in known and statistics["kind"] == "image":
            values = zip(known["mean"], known["std"], strict=True)
            out.append(f"{side} channels, mean ± deviation: {', '.join(f'{m:.3f} ± {s:.3f}' for m, s in values)}")
        if "length" in known:
            out.append(f"{side} sequences: {known['length']:.1f} steps")
    if statistics["kind"] != "image":
        shown = [f"{d['column']} ({d['shift']:+.2f}, {_ratio(d['std_ratio'])})" for d in statistics["differences"]]
        out += _wrapped(
            f"columns that differ most (shift in deviations, ratio of deviations): {', '.join(shown)}", "  "
        )
    return out


def _ratio(value: float | None) -> str:
    return "constant in the source" if value is None else f"x {value:.2f}"


def _labels(found: Mapping[str, Any]) -> list[str]:
    labels, said = found.get("labels"), []
    if labels:
        said.append(
            f"source targets: mean {_numbers(labels['source_mean'])}, deviation {_numbers(labels['source_std'])}"
        )
    if labels and "granted_mean" in labels:
        said.append(
            f"granted ones: mean {_numbers(labels['granted_mean'])}, deviation {_numbers(labels['granted_std'])} "
            f"(Kolmogorov-Smirnov p {labels['p']:.3f})"
        )
    return said + [line for note in found["sentences"] for line in _wrapped(note, "  ")]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)


def _duplicates(pairs: Mapping[str, Any], by_design: Sequence[str]) -> list[str]:
    rows = [("duplicates", "compared", "exact", "near", "near within the first")]
    for name, counts in pairs.items():
        near = f"{counts['near']:,}" if "near" in counts else "-"
        own = "-" if counts.get("own_share") is None else f"{100 * counts['own_share']:.1f} %"
        rows.append((name, " x ".join(f"{n:,}" for n in counts["compared"]), f"{counts['exact']:,}", near, own))
    return [*_table(rows), *(f"{pair}: the same samples in the transductive protocol" for pair in by_design)]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
