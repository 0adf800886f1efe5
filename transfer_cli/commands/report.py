"""`transfer report [PATHS...] [--select NAME] [--validators] [--format ...]`: every run below the paths as one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from transfer_cli.errors import TransferError, check_choice
from transfer_cli.report.formats import as_csv, as_markdown, as_text
from transfer_cli.report.latex import as_latex
from transfer_cli.report.ranking import rank_validators
from transfer_cli.report.ranking_formats import RANKING_FORMATS
from transfer_cli.report.runs import DEFAULT_FOLDER, Record, collect
from transfer_cli.report.structured import as_json
from transfer_cli.report.tables import Table, aggregate

FORMATS: dict[str, Callable[[Sequence[Table], Sequence[Record]], str]] = {
    "text": as_text,
    "md": as_markdown,
    "csv": as_csv,
    "latex": as_latex,
    "json": as_json,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="transfer report",
        description="Mean and standard deviation over seeds of the figures on the target test set, a row for each "
        "method (and setting, where several were run), a column for each pair; then the runs that failed or did not finish.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help=f"a run's folder, or one of runs (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument("--format", default="text", metavar="FORMAT", help=f"{', '.join(FORMATS)} (default: text)")
    parser.add_argument(
        "--select",
        metavar="NAME",
        help="of each method on each pair only the hyper-parameters with the best mean score by this validator, which also "
        "chooses the checkpoints; oracle: by target labels, and marked so",
    )
    parser.add_argument(
        "--validators",
        action="store_true",
        help="instead: how close each validator's choices come to the oracle's, and how its scores correlate with the figures",
    )
    arguments = parser.parse_args(argv)
    check_choice(arguments.format, FORMATS, "--format")
    if arguments.validators and arguments.select:
        raise TransferError("--validators compares all of them: leave out --select.")
    records = collect(arguments.paths)
    if arguments.validators:
        print(RANKING_FORMATS[arguments.format](rank_validators(records)), end="")
    else:
        print(FORMATS[arguments.format](aggregate(records, arguments.select), records), end="")
    return 0
