"""`transfer reproduce TABLE`: run every cell of a published table under its own protocol, and compare."""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from transfer_cli.config.folders import config_folders, names_in
from transfer_cli.errors import TransferError, suggest
from transfer_cli.report.published import Cell, Outcome, PublishedTable, Row, parse, render
from transfer_cli.run_folder import RunFolder, read_json

FORMS = ("md", "csv", "html")


def main(argv: list[str]) -> int:
    """0 where every cell that counts is within its tolerance, else 1."""
    parser = argparse.ArgumentParser(prog="transfer reproduce", description=__doc__)
    parser.add_argument("table", nargs="?", metavar="TABLE", help="conf/table/TABLE.yaml; without one, lists them")
    parser.add_argument("--methods", metavar="A,B", help="only the rows of these methods (or of these names)")
    parser.add_argument("--columns", metavar="A,B", help="only these columns")
    parser.add_argument("--data-root", metavar="DIR", help="where the data lie, if not in TRANSFER_DATA")
    parser.add_argument(
        "--outputs", metavar="DIR", default="outputs", help="where runs and the table go (default: outputs)"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="an override for every run, e.g. threads=2"
    )
    arguments = parser.parse_args(argv)
    if arguments.table is None:
        return _list_tables()
    table = load_table(arguments.table)
    rows = _chosen(table, arguments.methods)
    columns = _columns(table, arguments.columns)
    extra = [f"outputs={arguments.outputs}", *arguments.set]
    if arguments.data_root is not None:
        extra.append(f"data_root={arguments.data_root}")

    outcome = Outcome(table)
    todo = [(row, column) for row in rows for column in columns if table.to_run(row, column)]
    for row, column in _progress(todo, table.name):
        outcome.cells[row.name, column] = _cell([[*o, *extra] for o in table.overrides(row, column)])
    folder = Path(arguments.outputs) / "tables"
    folder.mkdir(parents=True, exist_ok=True)
    for form in FORMS:
        (folder / f"{table.name}.{form}").write_text(render(outcome, form))
    print(render(outcome, "text"), end="")
    print(f"{folder / table.name}.{{{','.join(FORMS)}}}")
    return 1 if outcome.missed() else 0


def load_table(name: str) -> PublishedTable:
    """Raises:
    TransferError: no table of that name, or one that cannot be read."""
    folders = config_folders()
    path = next((p for f in folders if (p := f / "table" / f"{name}.yaml").is_file()), None)
    if path is None:
        names = names_in("table", folders)
        raise TransferError(f"there is no table '{name}'.{suggest(name, names)} There are: {', '.join(names)}.")
    try:
        return parse(name, yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise TransferError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def _list_tables() -> int:
    from transfer_cli.commands import list as listing

    return listing.main(["table"])


def _chosen(table: PublishedTable, wanted: str | None) -> list[Row]:
    if wanted is None:
        return list(table.rows)
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        known = {row.method for row in table.rows} | {row.name for row in table.rows}
        if name not in known:
            raise TransferError(
                f"table {table.name} has no method '{name}'.{suggest(name, known)} It has {', '.join(sorted(known))}."
            )
    return [row for row in table.rows if row.method in names or row.name in names]


def _columns(table: PublishedTable, wanted: str | None) -> list[str]:
    if wanted is None:
        return list(table.columns)
    names = [name.strip().replace("->", "→") for name in wanted.split(",")]
    for name in names:
        if name not in table.columns:
            raise TransferError(f"table {table.name} has no column '{name}'. It has {', '.join(table.columns)}.")
    return names


def _progress(todo: Sequence[tuple[Row, str]], name: str) -> Any:
    from tqdm import tqdm

    if sys.stderr.isatty():
        return tqdm(todo, desc=name, leave=False)
    return _told(todo)


def _told(todo: Sequence[tuple[Row, str]]) -> Any:
    """Plain lines where there is no terminal: one a row."""
    last = None
    for row, column in todo:
        if row.name != last:
            print(f"{row.name} ...", file=sys.stderr, flush=True)
        last = row.name
        yield row, column


def _cell(runs: Sequence[Sequence[str]]) -> Cell:
    """The runs of one cell; those that finished before are found again."""
    from transfer_cli.config.compose import typed
    from transfer_cli.config.hydra_glue import composed
    from transfer_cli.experiment import run

    selected, oracle, samples = [], [], 0
    for overrides in runs:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                folder = run(typed(composed(overrides)), ["transfer", "run", *overrides])
        except TransferError as error:
            return Cell(error=str(error))
        result = read_json(folder.result)
        selected.append(100 * result["metrics"]["target_test"]["accuracy"])
        oracle.append(100 * result["selection"]["oracle"]["score"])
        samples = _test_samples(folder)
    spread = statistics.stdev(selected) if len(selected) > 1 else float("nan")
    return Cell(statistics.mean(selected), statistics.mean(oracle), spread, len(selected), samples)


def _test_samples(folder: RunFolder) -> int:
    import numpy as np

    with np.load(folder.predictions) as arrays:
        return len(arrays["target_test_labels"])
