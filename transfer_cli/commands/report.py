"""`transfer report [PATHS...] [--select NAME] [--validators] [--format ... | --html]`: every run below the paths as one table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from transfer_cli.errors import TransferError, check_choice
from transfer_cli.report.formats import as_csv, as_markdown, as_text
from transfer_cli.report.html.maps import MAPS
from transfer_cli.report.latex import as_latex
from transfer_cli.report.ranking import rank_validators
from transfer_cli.report.ranking_formats import RANKING_FORMATS
from transfer_cli.report.runs import DEFAULT_FOLDER, Record, collect
from transfer_cli.report.structured import as_json
from transfer_cli.report.tables import Table, aggregate

DEFAULT_HTML = DEFAULT_FOLDER.parent / "report.html"
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
    parser.add_argument(
        "--html",
        nargs="?",
        type=Path,
        const=DEFAULT_HTML,
        metavar="FILE|FOLDER",
        help="instead: a page to look at, with sorting, filters and a page for each run; one file if the name ends in .html "
        f"(default: {DEFAULT_HTML}), else a folder, in which only pages of runs that changed are written again",
    )
    parser.add_argument(
        "--map", default="pca", metavar="NAME", help=f"of features, for --html: {', '.join(MAPS)} (default: pca)"
    )
    arguments = parser.parse_args(argv)
    check_choice(arguments.map, MAPS, "--map")
    check_choice(arguments.format, FORMATS, "--format")
    if arguments.validators and arguments.select and arguments.html is None:
        raise TransferError("--validators compares all of them: leave out --select.")
    records = collect(arguments.paths)
    if arguments.html is not None:
        return _html(records, arguments)
    if arguments.validators:
        print(RANKING_FORMATS[arguments.format](rank_validators(records)), end="")
    else:
        print(FORMATS[arguments.format](aggregate(records, arguments.select), records), end="")
    return 0


def _html(records: Sequence[Record], arguments: argparse.Namespace) -> int:
    from transfer_cli.report.html.write import is_file, write_html

    if arguments.html.is_dir() == is_file(arguments.html) and arguments.html.exists():
        raise TransferError(
            f"--html {arguments.html}: a name ending in .html is that of a file, any other of a folder."
        )
    rankings = rank_validators(records) if arguments.validators else []
    made = write_html(aggregate(records, arguments.select), records, arguments.html, arguments.map, rankings)
    page = arguments.html if is_file(arguments.html) else arguments.html / "index.html"
    print(f"{page}  {len(records):,} run{'s' * (len(records) != 1)}, the pages of {made:,} made now")
    return 0
