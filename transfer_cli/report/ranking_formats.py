"""The ranking of validators as text, Markdown, CSV, LaTeX or JSON. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from transfer_cli.report.formats import csv_text, markdown_lines
from transfer_cli.report.latex import comment, escape, tabular
from transfer_cli.report.ranking import Means, Ranked, Ranking, mean
from transfer_cli.report.structured import to_json

UNIT = {"classification": "points of accuracy", "regression": "percent of the oracle's RMSE"}
PARTS = ("checkpoints", "points")
COLUMNS = ("regret", "rank correlation", "weighted")
HEADER = ["validator", *(f"{part}: {column}" for part in ("checkpoints", "settings") for column in COLUMNS)]
CSV_HEADER = ["kind", "validator", "over", "regret", "n", "spearman", "weighted_spearman", "n_correlations"]


def title(ranking: Ranking) -> str:
    return (
        f"validators, {ranking.kind}: mean regret against the choice by target labels, in {UNIT[ranking.kind]}, and mean "
        "Spearman correlation of score and figure (n): within runs over checkpoints, and over the settings of a method on a pair"
    )


def notes(ranking: Ranking) -> list[str]:
    """Where the means of two validators are not over the same runs, this is told."""
    counts = {len(r.checkpoints.regrets) for r in ranking.ranked if r.checkpoints.regrets}
    counts_of_points = {len(r.points.regrets) for r in ranking.ranked if r.points.regrets}
    if len(counts) > 1 or len(counts_of_points) > 1:
        return ["n differs: some validators have no score in some runs, so their means are of other runs"]
    return []


def cells(ranked: Ranked) -> list[str]:
    written = [ranked.name]
    for means in (ranked.checkpoints, ranked.points):
        written.append(_cell(means.regrets, 2))
        written += [_cell(values, 2, sign="+") for values in (means.correlations, means.weighted)]
    return written


def _cell(values: Sequence[float], digits: int, sign: str = "") -> str:
    return f"{mean(values):{sign}.{digits}f} ({len(values)})" if values else "-"


def as_text(rankings: Sequence[Ranking]) -> str:
    parts = []
    for ranking in rankings:
        lines = [HEADER, *(cells(ranked) for ranked in ranking.ranked)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["   ".join(f"{t:{w}}" for t, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        parts.append("\n".join([title(ranking), "", *rows, *("\n" + note for note in notes(ranking))]))
    return "\n\n".join(parts) + "\n"


def as_markdown(rankings: Sequence[Ranking]) -> str:
    parts = []
    for ranking in rankings:
        rule = ["---", *("---:" for _ in HEADER[1:])]
        grid = markdown_lines([HEADER, rule, *(cells(ranked) for ranked in ranking.ranked)])
        parts.append("\n\n".join([f"{title(ranking)}.", grid, *(f"{note}." for note in notes(ranking))]))
    return "\n\n".join(parts) + "\n"


def as_latex(rankings: Sequence[Ranking]) -> str:
    parts = [comment(r"needs \usepackage{booktabs}")]
    header = [[escape(text.partition(": ")[line]) for text in HEADER] for line in (0, 2)]
    for ranking in rankings:
        rows = [[escape(text) for text in cells(ranked)] for ranked in ranking.ranked]
        said = escape(". ".join([title(ranking), *notes(ranking)]) + ".")
        parts.append(tabular(said, f"validators-{ranking.kind}", header, rows))
    return "\n\n".join(parts) + "\n"


def as_csv(rankings: Sequence[Ranking]) -> str:
    lines = [
        {"kind": ranking.kind, "validator": ranked.name, "over": part, **_numbers(getattr(ranked, part))}
        for ranking in rankings
        for ranked in ranking.ranked
        for part in PARTS
        if getattr(ranked, part).regrets
    ]
    return csv_text(CSV_HEADER, lines)


def as_json(rankings: Sequence[Ranking]) -> str:
    return to_json(
        [
            {
                "kind": ranking.kind,
                "unit": UNIT[ranking.kind],
                "title": title(ranking),
                "notes": notes(ranking),
                "validators": [
                    {"name": r.name, **{part: _numbers(getattr(r, part)) for part in PARTS}} for r in ranking.ranked
                ],
            }
            for ranking in rankings
        ]
    )


def _numbers(means: Means) -> dict[str, float]:
    return {
        "regret": mean(means.regrets),
        "n": len(means.regrets),
        "spearman": mean(means.correlations),
        "weighted_spearman": mean([v for v in means.weighted if not math.isnan(v)]),
        "n_correlations": len(means.correlations),
    }


RANKING_FORMATS: dict[str, Callable[[Sequence[Ranking]], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
    "json": as_json,
}
