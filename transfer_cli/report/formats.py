"""The table of many runs as text, Markdown or CSV. Standard library only."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from transfer_cli.report.negative import LABEL_FREE, Verdict, verdicts
from transfer_cli.report.runs import SEEDS, Record
from transfer_cli.report.tables import Cell, Pair, Row, Table, mean_and_std

TITLE = {
    "classification": "accuracy on the target test set, %: mean ± standard deviation (runs)",
    "regression": "RMSE on the target test set: mean ± standard deviation (runs)",
}
CSV_METRIC = {"classification": "accuracy_percent", "regression": "rmse"}
SETS = ("conformal sets or intervals: the share held, %, and their mean size", "conformal_coverage", "conformal_size")
MORE: dict[str, list[tuple[str, ...]]] = {  # further tables of a kind: title, and the figures of a cell
    "classification": [("NLL and ECE on the target test set", "nll", "ece"), SETS],
    "regression": [
        ("CRPS on the target test set: mean ± standard deviation (runs)", "crps"),
        (
            "coverage of 95 % intervals, %, and their mean width, without which it says nothing",
            "coverage_95",
            "width_95",
        ),
        SETS,
    ],
}
WORSE, WORSE_LABEL_FREE = "↓", f"↓{LABEL_FREE}"
MEANING = {
    WORSE: "by this figure: negative transfer",
    WORSE_LABEL_FREE: f"by {LABEL_FREE}, without target labels: negative transfer, or only less sure predictions",
}


def as_text(tables: Sequence[Table], records: Sequence[Record]) -> str:
    parts = [_text_table(table) for table in tables]
    for title, lines in _remarks(tables, records):
        parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def as_markdown(tables: Sequence[Table], records: Sequence[Record]) -> str:
    parts = [_markdown_table(table) for table in tables]
    for title, lines in _remarks(tables, records):
        parts.append("\n".join([f"{title}:", "", *(f"- {line}" for line in lines)]) if lines else f"{title}.")
    return "\n\n".join(parts) + "\n"


def as_csv(tables: Sequence[Table], records: Sequence[Record]) -> str:
    """One line a cell, unrounded; what is not finished is left out."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        [
            "method",
            "settings",
            "oracle",
            "source",
            "target",
            "metric",
            "mean",
            "std",
            "runs",
            *(f"{key}s" for key in SEEDS),
            "baseline",
            "worse",
            f"{LABEL_FREE}_worse",
        ]
    )
    for table in tables:
        found = verdicts(table.cells)
        for row in table.rows:
            for pair in table.pairs:
                cell = table.cells.get((row, pair))
                if cell is not None:
                    std = "" if math.isnan(cell.std) else cell.std
                    seeds = [
                        " ".join(str(seed) for seed in each) for each in zip(*(r.seeds for r in cell.runs), strict=True)
                    ]
                    name = [row.method, " ".join(row.told), str(row.oracle).lower(), *pair]
                    worse = ["" if each is None else str(each).lower() for each in found.get((row, pair), [None] * 3)]
                    writer.writerow([*name, CSV_METRIC[table.kind], cell.mean, std, len(cell.runs), *seeds, *worse])
                    for metric in (name for _, *names in _further(table) for name in names):
                        values = _values(cell, metric)
                        if values:
                            mean, std = mean_and_std(values)
                            shown = "" if math.isnan(std) else std
                            writer.writerow([*name, metric, mean, shown, len(values), *seeds, "", "", ""])
    return file.getvalue()


FORMATS: dict[str, Callable[[Sequence[Table], Sequence[Record]], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
}


def _text_table(table: Table) -> str:
    found = verdicts(table.cells)
    grids = [_text_grid(table, lambda row, pair: _text(table, found, row, pair))]
    for title, write in _more(table):
        grids += ["", title, "", _text_grid(table, write)]
    return "\n".join([TITLE[table.kind], " ".join(table.common), "", *grids])


def _text_grid(table: Table, write: Callable[[Row, Pair], str]) -> str:
    columns = [["", "", *map(str, table.rows)]] + [
        [pair[0], "-> " + pair[1], *(write(row, pair) for row in table.rows)] for pair in table.pairs
    ]
    widths = [max(len(text) for text in column) for column in columns]
    return "\n".join(
        "   ".join(f"{t:{w}}" for t, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    )


def _markdown_table(table: Table) -> str:
    found = verdicts(table.cells)
    grids = [_markdown_grid(table, lambda row, pair: _text(table, found, row, pair))]
    for title, write in _more(table):
        grids += ["", f"{title}.", "", _markdown_grid(table, write)]
    return "\n".join([f"{TITLE[table.kind]}. {' '.join(f'`{text}`' for text in table.common)}", "", *grids])


def _markdown_grid(table: Table, write: Callable[[Row, Pair], str]) -> str:
    header = ["method", *(f"{source} -> {target}" for source, target in table.pairs)]
    lines = [header, ["---", *("---:" for _ in table.pairs)]]
    lines += [[str(row), *(write(row, pair) for pair in table.pairs)] for row in table.rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _more(table: Table) -> Iterator[tuple[str, Callable[[Row, Pair], str]]]:
    """Title and cells of the further tables whose figures some run has."""
    for title, *metrics in _further(table):
        yield title, partial(_figures, table, metrics)


def _further(table: Table) -> Iterator[tuple[str, ...]]:
    """Those of `MORE` whose figures some run has; scores of probabilities where some run was calibrated."""
    runs = [run for cell in table.cells.values() for run in cell.runs]
    calibrated = any(run.settings[""].get("calibration", "none") != "none" for run in runs)
    for title, *metrics in MORE[table.kind]:
        if ("ece" not in metrics or calibrated) and any(metric in run.figures for run in runs for metric in metrics):
            yield title, *metrics


def _figures(table: Table, metrics: Sequence[str], row: Row, pair: Pair) -> str:
    cell = table.cells.get((row, pair))
    written = [_figure(_values(cell, metric), metric) for metric in metrics] if cell is not None else ["-"]
    return ", ".join(written)


def _figure(values: Sequence[float], metric: str) -> str:
    if not values:
        return "-"
    mean, std = mean_and_std(values)
    if "coverage" in metric:
        return f"{100 * mean:.1f}"
    if metric in ("nll", "ece"):
        return f"{mean:.3f}"
    if metric == "conformal_size":
        return f"{mean:.3g}"
    if metric.startswith("width"):
        return f"{mean:.{_decimals(mean)}f}"
    digits = _decimals(mean)
    return f"{mean:.{digits}f}{'' if math.isnan(std) else f' ± {std:.{digits}f}'} ({len(values)})"


def _values(cell: Cell, metric: str) -> list[float]:
    return [run.figures[metric] for run in cell.runs if metric in run.figures]


def _text(table: Table, found: Mapping[tuple[Row, Pair], Verdict], row: Row, pair: Pair) -> str:
    cell, verdict = table.cells.get((row, pair)), found.get((row, pair))
    if cell is None:
        return "-"
    digits = 1 if table.kind == "classification" else _decimals(cell.mean)
    std = "" if math.isnan(cell.std) else f" ± {cell.std:.{digits}f}"
    signs = "".join(f" {sign}" for sign, worse in _signs(verdict).items() if worse)
    return f"{cell.mean:.{digits}f}{std} ({len(cell.runs)}){signs}"


def _signs(verdict: Verdict | None) -> dict[str, bool]:
    return {} if verdict is None else {WORSE: verdict.figure, WORSE_LABEL_FREE: bool(verdict.label_free)}


def _decimals(value: float) -> int:
    """Those that show four significant digits."""
    return min(8, max(0, 3 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else 1


def _remarks(tables: Sequence[Table], records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    """What a reader of the table must know besides."""
    failed = [f"{r.path}  {r.error or 'no reason was recorded'}" for r in records if r.state == "failed"]
    unfinished = [f"{r.path}  {r.state}" for r in records if r.state not in ("failed", "finished")]
    older = [str(path) for table in tables for path in table.older]
    found = [verdict for table in tables for verdict in verdicts(table.cells).values()]
    warned = [f"{r.path}  {text}" for r in records if r.run is not None for text in r.run.warnings]
    for sign, how in MEANING.items():
        worse = sorted({verdict.baseline for verdict in found if _signs(verdict)[sign]}, reverse=True)
        if worse:
            yield f"{sign} worse than {' or '.join(worse)} with the same settings, {how}", []
    if any(row.oracle for table in tables for row in table.rows):
        yield "(oracle): target test labels chose the checkpoint, so these are upper bounds, not results", []
    if warned:
        yield "training went wrong (docs/health.md)", warned
    if failed:
        yield "failed (retry_failed=true runs them again)", failed
    if unfinished:
        yield "unfinished (the same command goes on with an interrupted run)", unfinished
    if older:
        yield (
            "left out: the same settings and seeds have a newer run, of another version of a component or a file",
            older,
        )
