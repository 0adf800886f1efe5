"""`transfer reproduce`: tables as files, misses, cells that are not run twice, and the published figures on a subset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Outcome

from transfer_cli.commands.reproduce import load_table
from transfer_cli.config.folders import names_in, packaged_folder
from transfer_cli.config.hydra_glue import composed
from transfer_cli.errors import TransferError
from transfer_cli.report.published import Cell, parse, render, verdict
from transfer_cli.report.published import Outcome as Table

Transfer = Callable[..., Outcome]

SMALL = {
    "title": "moons",
    "protocol": ["source=two_moons", "target=two_moons", "backbone=identity", "threads=1", "device=cpu", "selection=last"],
    "columns": {"0°": [], "90°": ["target.angle=90"]},
    "rows": {"1-NN": {"method": "no_adaptation", "overrides": ["method=no_adaptation", "head=knn"], "published": [100.0, 50.0]}},
    "tolerance": 5,
}  # fmt: skip


@pytest.fixture
def own_table(tmp_path: Path) -> Callable[[dict[str, object]], None]:
    def write(content: dict[str, object]) -> None:
        (tmp_path / "conf" / "table").mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / "table" / "mine.yaml").write_text(yaml.safe_dump(content, allow_unicode=True))

    return write


@pytest.mark.parametrize("name", names_in("table", [packaged_folder()]))
def test_every_packaged_table_is_whole(name: str) -> None:
    """Its overrides compose, and it has a citation and says what it needs."""
    table = load_table(name)
    assert table.citation and table.needs
    first, columns = table.rows[0], list(table.columns)
    for row, column in [*((row, columns[0]) for row in table.rows), *((first, column) for column in columns[1:3])]:
        composed(table.overrides(row, column)[-1])


def test_a_table_of_ones_own_runs_and_is_found_again(
    transfer: Transfer, own_table: Callable[..., None], tmp_path: Path
) -> None:
    own_table(SMALL)
    missed = transfer("reproduce", "mine")
    assert missed.code == 1, missed.err
    assert "1 of 2 cells within their tolerance" in missed.out
    assert "1-NN, 90°: off by more than its tolerance" in missed.out
    row = next(line for line in missed.out.splitlines() if line.startswith("1-NN"))
    assert row.split()[2] == "100.0" and row.split()[3].endswith("*")
    for form in ("md", "csv", "html"):
        assert "1-NN" in (tmp_path / "outputs" / "tables" / f"mine.{form}").read_text()
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("result.json")}
    assert len(results) == 2
    again = transfer("reproduce", "mine", "--columns", "0°")
    assert again.code == 0 and "1 of 1 cells" in again.out
    assert results == {path: path.stat().st_mtime_ns for path in (tmp_path / "outputs").rglob("result.json")}


def test_cells_without_a_figure_are_not_run_where_the_table_says_so(
    transfer: Transfer, own_table: Callable[..., None], tmp_path: Path
) -> None:
    row = {**SMALL["rows"]["1-NN"], "published": [100.0, None]}  # type: ignore[index]
    own_table({**SMALL, "rows": {"1-NN": row}, "skip_unpublished": True})
    outcome = transfer("reproduce", "mine")
    assert outcome.code == 0 and "1 of 1 cells" in outcome.out, outcome.err
    assert len(list((tmp_path / "outputs").rglob("result.json"))) == 1


def test_a_cell_that_fails_is_a_miss_with_its_reason(transfer: Transfer, own_table: Callable[..., None]) -> None:
    own_table({**SMALL, "columns": {"a": ["target.nois=1"], "b": []}})
    outcome = transfer("reproduce", "mine")
    assert outcome.code == 1 and "1-NN, a: there is no key 'target.nois'" in outcome.out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["office_caltech_surfs"], "there is no table 'office_caltech_surfs'. Did you mean 'office_caltech_surf"),
        (["two_moons", "--methods", "dan"], "table two_moons has no method 'dan'. Did you mean 'dann'?"),
        (["two_moons", "--columns", "36°"], "table two_moons has no column '36°'. It has 35°."),
    ],
)
def test_bad_input_is_one_line(transfer: Transfer, arguments: list[str], said: str) -> None:
    outcome = transfer("reproduce", *arguments)
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colums": {}}, "there is no key 'colums'. Did you mean 'columns'?"),
        ({"columns": {}}, "'columns' must hold at least one name"),
        ({"rows": {"x": {"published": [1.0]}}}, "1 published figures for 2 columns"),
        ({"rows": {"x": {"cells": {"1°": []}}}}, "a column of 'cells' must be one of 0°, 90°"),
        ({"compare": "about"}, "compare must be one of within, at_least"),
    ],
)
def test_mistakes_in_a_table_are_told(change: dict[str, object], said: str) -> None:
    with pytest.raises(TransferError) as caught:
        parse("mine", {**SMALL, **change})
    assert said in str(caught.value)


def outcome_of(ours: float, **changes: object) -> Table:
    content = {**SMALL, "columns": {"a": []}, "rows": {"r": {"published": [50.0], "tolerance": 0.5}}, **changes}
    found = Table(parse("t", content))
    found.cells["r", "a"] = Cell(selected=ours, oracle=ours + 3, runs=1, samples=100)
    return found


@pytest.mark.parametrize(
    ("ours", "changes", "misses"),
    [
        (50.4, {}, False),
        (51.0, {}, False),  # one sample of a hundred
        (51.2, {}, True),
        (48.8, {}, True),
        (60.0, {"compare": "at_least"}, False),
        (48.8, {"compare": "at_least"}, True),
        (48.8, {"figure": "oracle"}, True),  # 51.8
        (47.5, {"figure": "oracle"}, False),
        (90.0, {"rows": {"r": {"published": [50.0], "counts": False}}}, False),
    ],
)
def test_what_counts_as_a_miss(ours: float, changes: dict[str, object], misses: bool) -> None:
    assert bool(outcome_of(ours, **changes).missed()) is misses


def test_the_forms_of_a_table(tmp_path: Path) -> None:
    found = outcome_of(60.0, figure="oracle", title="A & B")
    assert "A &amp; B" in render(found, "html") and "class=miss" in render(found, "html")
    assert render(found, "md").count("| r | ours | 63.0* |") == 1
    assert "without target labels" in render(found, "text") and "60.0" in render(found, "text")
    assert render(found, "csv").splitlines()[1] == "r,ours,63.0,63.0"
    assert verdict(found) == ["0 of 1 cells within their tolerance", "r, a: off by more than its tolerance"]


@pytest.mark.data
def test_published_figures_on_a_subset(transfer: Transfer, data_root: Path) -> None:
    """Every row of the table, on the two small pairs and a larger one; the whole table is `make slow`'s."""
    outcome = transfer(
        "reproduce", "office_caltech_surf", "--columns", "W→D,D→W", "--data-root", str(data_root), "--set", "threads=1"
    )
    assert outcome.code == 0, outcome.out
    assert "18 of 18 cells within their tolerance" in outcome.out


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("table", ["office_caltech_surf", "office_caltech_surf_20"])
def test_published_tables_in_full(transfer: Transfer, data_root: Path, table: str) -> None:
    outcome = transfer("reproduce", table, "--data-root", str(data_root), "--set", "threads=1")
    assert outcome.code == 0, outcome.out


def test_the_adversary_turns_the_moons_back(transfer: Transfer) -> None:
    """The two-moons table in full: DANN and a plain network over five seeds, both in their published ranges."""
    outcome = transfer("reproduce", "two_moons", "--set", "threads=1", "--set", "device=cpu")
    assert outcome.code == 0 and "2 of 2 cells within their tolerance" in outcome.out, outcome.out
