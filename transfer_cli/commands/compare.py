"""`transfer compare RUN_A RUN_B`: two finished runs beside each other."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from transfer_cli.errors import TransferError
from transfer_cli.report.differences import (
    Samples,
    compare_samples,
    config_differences,
    figure_rows,
    finished_run,
    machine_differences,
)
from transfer_cli.report.looks import ORACLE, choose, read_looks
from transfer_cli.report.runs import Run, short


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="transfer compare",
        description="What was set otherwise, figures on the target test set, a paired test on its samples (McNemar's exact "
        "test of who is right; in regression a t-test of squared errors), each class, and how training ended.",
    )
    parser.add_argument("first", type=Path, metavar="RUN_A", help="a run's folder")
    parser.add_argument("second", type=Path, metavar="RUN_B", help="another's")
    arguments = parser.parse_args(argv)
    first, second = finished_run(arguments.first), finished_run(arguments.second)
    if first.kind != second.kind:
        raise TransferError(f"a run of {first.kind} and one of {second.kind} have no figure in common.")
    print("\n\n".join("\n".join(part) for part in _parts(first, second)))
    return 0


def _parts(first: Run, second: Run) -> Iterator[list[str]]:
    yield [f"{letter}  {_name(run)}  {short(run.path)}" for letter, run in zip("AB", (first, second), strict=True)]
    differences = config_differences(first.path, second.path)
    yield grid([("settings", "A", "B"), *differences]) if differences else ["settings: the same"]
    if machines := machine_differences(first.path, second.path):
        yield grid([("code, machine and data", "A", "B"), *machines])
    rows = [(name, _number(a), _number(b), _signed(b - a)) for name, a, b in figure_rows(first, second)]
    yield grid([("target test", "A", "B", "B - A"), *rows])
    yield from _sample_parts(first, second)
    yield grid([("training", "A", "B"), *zip(TRAINING, _training(first), _training(second), strict=True)])


def _name(run: Run) -> str:
    mark = " (oracle)" if run.oracle else ""
    return f"{run.method}{mark}, {run.pair[0]} -> {run.pair[1]}, seed {run.seeds[0]}"


def _sample_parts(first: Run, second: Run) -> Iterator[list[str]]:
    found = compare_samples(first, second)
    if found is None:
        yield ["no paired test: the runs do not predict the same samples"]
        return
    of = f"{found.common:,} target test samples of both"
    if found.common < max(found.of_first, found.of_second):
        of += f" (A has {found.of_first:,}, B {found.of_second:,})"
    if first.kind == "regression":
        yield [f"{of}: paired t-test of their squared errors, two-sided p {_p(found.p)}"]
        return
    yield [
        f"{of}: only A is right on {found.only_first:,}, only B on {found.only_second:,}; "
        f"McNemar's exact test, two-sided p {_p(found.p)}",
        "(of these two networks on these samples: another seed is another network, see transfer report)",
    ]
    yield _classes(found)


def _classes(found: Samples) -> list[str]:
    """Recalls, the greatest gains of B first."""
    ordered = sorted(found.classes, key=lambda c: c.first - c.second)
    rows = [
        (c.name, str(c.samples), f"{c.first:.1f}", f"{c.second:.1f}", _signed(c.second - c.first, 1)) for c in ordered
    ]
    return grid([("right of each class, %", "samples", "A", "B", "B - A"), *rows])


TRAINING = ("evaluations", "kept checkpoint", "its figure, last figure", "best by target labels")


def _training(run: Run) -> list[str]:
    looks = read_looks(run)
    best = choose(looks, ORACLE)
    assert best is not None  # each look has a figure
    return [
        str(len(looks)),
        f"step {run.step:,}, by {run.settings['']['selection']}",
        f"{run.figure:.4g}, {looks[-1].figure:.4g} at step {looks[-1].step:,}",
        f"{best.figure:.4g} at step {best.step:,}",
    ]


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "   ".join(
            f"{t:{'<' if i == 0 else '>'}{w}}" for i, (t, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _signed(value: float, digits: int = 4) -> str:
    return "-" if math.isnan(value) else f"{value:+.{digits}f}"


def _p(p: float) -> str:
    return "(no test: the errors do not differ)" if math.isnan(p) else f"= {p:.2g}"
