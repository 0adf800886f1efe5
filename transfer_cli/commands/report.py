"""`transfer report [PATHS...] [--format text|md|csv]`: every run below the paths as one table."""

from __future__ import annotations

import argparse
from pathlib import Path

from transfer_cli.errors import check_choice
from transfer_cli.report.formats import FORMATS
from transfer_cli.report.runs import DEFAULT_FOLDER, collect
from transfer_cli.report.tables import aggregate


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
    arguments = parser.parse_args(argv)
    render = FORMATS[check_choice(arguments.format, FORMATS, "--format")]
    records = collect(arguments.paths)
    print(render(aggregate(records), records), end="")
    return 0
