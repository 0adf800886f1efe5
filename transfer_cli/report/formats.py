"""The table of many runs as text, Markdown or CSV; what the other formats share. Standard library only."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from transfer_cli.report.looks import ORACLE
from transfer_cli.report.negative import LABEL_FREE, Verdict, verdicts
from transfer_cli.report.paired import FEWEST
from transfer_cli.report.runs import SEEDS, Record
from transfer_cli.report.selection import Choice, Point
from transfer_cli.report.tables import LEVEL, Cell, Missing, Pair, Row, Table, mean_and_std

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
BEST, UNKEPT = "*", "°"
TEST = (
    f"a paired t-test over common seeds against every other row of the same setting, two-sided, p < {LEVEL} after Holm's "
    f"adjustment, at least {FEWEST} seeds"
)
WORSE, WORSE_LABEL_FREE = "↓", f"↓{LABEL_FREE}"
MEANING = {
    WORSE: "by this figure: negative transfer",
    WORSE_LABEL_FREE: f"by {LABEL_FREE}, without target labels: negative transfer, or only less sure predictions",
}


def as_text(tables: Sequence[Table], records: Sequence[Record]) -> str:
    parts = [_text_table(table) for table in tables]
    for title, lines in remarks(tables, records):
        parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def as_markdown(tables: Sequence[Table], records: Sequence[Record]) -> str:
    parts = [_markdown_table(table) for table in tables]
    for title, lines in remarks(tables, records):
        parts.append("\n".join([f"{title}:", "", *(f"- {line}" for line in lines)]) if lines else f"{title}.")
    return "\n\n".join(parts) + "\n"


CSV_HEADER = [
    *("method", "settings", "oracle", "source", "target", "metric", "mean", "std", "runs"),
    *(f"{key}s" for key in SEEDS),
    *("baseline", "worse", f"{LABEL_FREE}_worse", "bound", "best", "failed", "unfinished", "unscored"),
]


def as_csv(tables: Sequence[Table], records: Sequence[Record]) -> str:
    """One line a cell and figure, unrounded, also of cells that have none yet; averages and ranks have no source and target."""
    lines = [dict(line) for table in tables for line in _csv_lines(table)]
    return csv_text(CSV_HEADER, lines)


def csv_text(header: Sequence[str], lines: Sequence[Mapping[str, object]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_csv_value(line.get(key)) for key in header] for line in lines)
    return file.getvalue()


def _csv_value(value: object) -> object:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def _csv_lines(table: Table) -> Iterator[dict[str, object]]:
    found, headline = verdicts(table.cells), CSV_METRIC[table.kind]
    for row in table.rows:
        name = {"method": row.method, "settings": " ".join(row.told), "oracle": row.oracle, "bound": row.bound}
        for pair in table.pairs:
            cell, missing = table.cells.get((row, pair)), table.missing.get((row, pair), Missing())
            if cell is None and missing == Missing():
                continue
            place = {**name, "source": pair[0], "target": pair[1]}
            counts = {key: len(of) for key, of in missing._asdict().items()}
            first = {**place, "metric": headline, "runs": 0, "best": table.supports(row, pair), **counts}
            if cell is None:
                yield first
                continue
            seeds = {f"{key}s": " ".join(str(run.seeds[i]) for run in cell.runs) for i, key in enumerate(SEEDS)}
            worse = dict(zip(("baseline", "worse", f"{LABEL_FREE}_worse"), found.get((row, pair), ()), strict=False))
            yield {**first, "mean": cell.mean, "std": cell.std, "runs": len(cell.runs), **seeds, **worse}
            for metric in (name for _, *names in _further(table) for name in names):
                values = _values(cell, metric)
                if values:
                    mean, std = mean_and_std(values)
                    yield {**place, "metric": metric, "mean": mean, "std": std, "runs": len(values), **seeds}
        for metric, of in ((f"average_{headline}", table.average), ("average_rank", table.rank)):
            if row in of:
                yield {**name, "metric": metric, "mean": of[row]}


def caption(table: Table) -> list[str]:
    """What a reader of the figures must know, in sentences without their full stops."""
    lines = []
    if table.select is not None:
        labels = "with target labels: upper bounds, not results" if table.select == ORACLE else "without target labels"
        lines.append(
            f"hyper-parameters, and checkpoints where each evaluation has its score, chosen by {table.select}, {labels}"
        )
    parts = ["average: over the pairs"] * bool(table.average)
    parts += ["rank: the mean over the pairs, 1 is best, among honest rows of one setting"] * bool(table.rank)
    if parts:
        lines.append(f"{'; '.join(parts)}; of rows that have every pair")
    return lines


def best_line(table: Table, mark: str) -> list[str]:
    """How the best are found, and marked with `mark`; nothing where there is nothing to compare."""
    if not table.best:
        return []
    if any(best.supported for best in table.best):
        return [f"{mark}: the best of its column, supported by {TEST}"]
    return [f"no best is marked: that takes {TEST}"]


def _text_table(table: Table) -> str:
    grids = [_text_grid(columns(table, BEST))]
    for title, write in _more(table):
        grids += ["", title, "", _text_grid(_columns(table, write))]
    told = [*caption(table), *best_line(table, BEST)]
    return "\n".join([TITLE[table.kind], " ".join(table.common), *told, "", *grids])


def columns(table: Table, best: str) -> list[list[str]]:
    """The table's columns, each with two lines of header; `best` ends the cell of a supported best."""
    found = verdicts(table.cells)

    def write(row: Row, pair: Pair) -> str:
        return _text(table, found, row, pair) + (f" {best}" if table.supports(row, pair) else "")

    everything = _columns(table, write)
    if table.average:
        shown = [f"{table.average[row]:.1f}" if row in table.average else "-" for row in table.rows]
        marks = [f" {best}" if table.supports(row, None) else "" for row in table.rows]
        everything.append(["", "average", *(text + mark for text, mark in zip(shown, marks, strict=True))])
    if table.rank:
        everything.append(["", "rank", *(f"{table.rank[r]:.2f}" if r in table.rank else "-" for r in table.rows)])
    return everything


def _columns(table: Table, write: Callable[[Row, Pair], str]) -> list[list[str]]:
    return [["", "", *map(str, table.rows)]] + [
        [pair[0], "-> " + pair[1], *(write(row, pair) for row in table.rows)] for pair in table.pairs
    ]


def _text_grid(columns: Sequence[Sequence[str]]) -> str:
    widths = [max(len(text) for text in column) for column in columns]
    return "\n".join(
        "   ".join(f"{t:{w}}" for t, w in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    )


def _markdown_table(table: Table) -> str:
    grids = [_markdown_grid(columns(table, BEST))]
    for title, write in _more(table):
        grids += ["", f"{title}.", "", _markdown_grid(_columns(table, write))]
    told = "".join(f" {line[0].upper()}{line[1:]}." for line in [*caption(table), *best_line(table, "bold")])
    return "\n".join([f"{TITLE[table.kind]}. {' '.join(f'`{text}`' for text in table.common)}{told}", "", *grids])


def _markdown_grid(columns: Sequence[Sequence[str]]) -> str:
    header = ["method", *(" ".join(filter(None, column[:2])) for column in columns[1:])]
    lines = [header, ["---", *("---:" for _ in header[1:])]]
    lines += [[name, *map(_bold, row)] for name, *row in zip(*(column[2:] for column in columns), strict=True)]
    return markdown_lines(lines)


def markdown_lines(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in lines)


def _bold(text: str) -> str:
    return f"**{text.removesuffix(f' {BEST}')}**" if text.endswith(f" {BEST}") else text


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
    counts = [f"{len(of)} {what}" for what, of in table.missing.get((row, pair), Missing())._asdict().items() if of]
    if cell is None:
        return ", ".join(counts) or "-"
    digits = 1 if table.kind == "classification" else _decimals(cell.mean)
    std = "" if math.isnan(cell.std) else f" ± {cell.std:.{digits}f}"
    signs = [sign for sign, worse in _signs(verdict).items() if worse]
    signs += [UNKEPT] * any(not run.kept for run in cell.runs)
    return " ".join([f"{cell.mean:.{digits}f}{std} ({len(cell.runs)})", *signs, *(f"+{text}" for text in counts)])


def _signs(verdict: Verdict | None) -> dict[str, bool]:
    return {} if verdict is None else {WORSE: verdict.figure, WORSE_LABEL_FREE: bool(verdict.label_free)}


def _decimals(value: float) -> int:
    """Those that show four significant digits."""
    return min(8, max(0, 3 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else 1


def remarks(tables: Sequence[Table], records: Sequence[Record]) -> Iterator[tuple[str, list[str]]]:
    """What a reader of the tables must know besides: titles, and lines to each."""
    failed = [f"{r.path}  {r.error or 'no reason was recorded'}" for r in records if r.state == "failed"]
    unfinished = [f"{r.path}  {r.state}" for r in records if r.state not in ("failed", "finished")]
    older = [str(path) for table in tables for path in table.older]
    found = [verdict for table in tables for verdict in verdicts(table.cells).values()]
    warned = [f"{r.path}  {text}" for r in records if r.run is not None for text in r.run.warnings]
    rows = [row for table in tables for row in table.rows]
    apart = ", hyper-parameters apart" if any(table.select for table in tables) else ""
    for sign, how in MEANING.items():
        worse = sorted({verdict.baseline for verdict in found if _signs(verdict)[sign]}, reverse=True)
        if worse:
            yield f"{sign} worse than {' or '.join(worse)} with the same settings{apart}, {how}", []
    if any(row.oracle for row in rows):
        what = "target test labels chose the checkpoint" + (
            " and the hyper-parameters" if any(table.select == ORACLE for table in tables) else ""
        )
        yield f"(oracle): {what}, so these are upper bounds, not results", []
    if any(row.bound for row in rows):
        yield "(bound): trained with the labels of all target training samples: what a transfer method could reach", []
    yield from _choice_remarks(tables)
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


def _choice_remarks(tables: Sequence[Table]) -> Iterator[tuple[str, list[str]]]:
    choices = [choice for table in tables for choice in table.choices]
    chosen = [choice_line(choice) for choice in choices if len(choice.compared) > 1]
    left_out = [f"{_where(c)} {' '.join(p.settings)}  {p.note}" for c in choices for p in c.left_out]
    unkept = [f"{_where(c)}: {len(c.unkept)} of {len(c.chosen.seeds)} runs" for c in choices if c.unkept]
    unscored = [str(r.path) for t in tables for missing in t.missing.values() for r in missing.unscored]
    if chosen:
        yield f"chosen by the best mean {choices[0].select} over seeds", chosen
    if left_out:
        yield "not compared, for want of the same seeds", left_out
    if unscored:
        yield f"without the score {next(t.select for t in tables if t.select)}, and so left out", unscored
    if unkept:
        yield (
            f"{UNKEPT} figures of another checkpoint than the run's own choice, whose weights were not kept",
            unkept,
        )


def choice_line(choice: Choice) -> str:
    point: Point = choice.chosen
    return (
        f"{_where(choice)}: {' '.join(point.settings) or 'the only setting'}  "
        f"({choice.select} {point.score:.4g}; of {len(choice.compared)} settings, {len(point.seeds)} "
        f"{'seed' if len(point.seeds) == 1 else 'seeds'})"
    )


def _where(choice: Choice) -> str:
    return f"{choice.method}, {choice.pair[0]} -> {choice.pair[1]}"
