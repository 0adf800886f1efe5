"""Tables and strings: what is read, which rows and columns make a domain, encodings, bad cells; regression as a user sees it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome
from scipy.io import savemat
from scipy.stats import norm
from sklearn.datasets import load_diabetes, make_friedman1

from transfer_cli.config.identity import label
from transfer_cli.data.domain import Domain, Part, Place
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.friedman import FUNCTIONS
from transfer_cli.data.readers.sequences import SMILES
from transfer_cli.data.readers.tabular import in_order, parse_condition, plain_text, read_rows
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.metrics import regression
from transfer_cli.registry import component, keyword_schema

Transfer = Callable[..., Outcome]

DATASETS = Path(__file__).parents[1] / "conf" / "dataset"
MINE = ["table", "sequences", "diabetes", "friedman", "cmapss"]
PATIENTS = """\
age,ward,dose,result
41,north,0.5,1.0
52,south,1.5,2.5
63,north,2.5,4.0
74,east,0.5,3.0
35,south,2.0,0.5
26,north,1.0,2.0
"""


def node(name: str, **changes: Any) -> Any:
    return component("dataset", {**yaml.safe_load((DATASETS / f"{name}.yaml").read_text()), **changes})


def load(name: str, root: Path | None = None, **changes: Any) -> Domain:
    return node(name, **changes).build(Place(root, False)).load()


def refused(name: str, root: Path | None = None, **changes: Any) -> str:
    with pytest.raises(TransferError) as caught:
        load(name, root, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def values(part: Part) -> list[list[float]]:
    assert isinstance(part.inputs, ArrayInputs) and part.inputs.values.dtype == torch.float32
    return part.inputs.values.tolist()


def targets(domain: Domain) -> list[list[float]]:
    assert domain.train.labels.dtype == torch.float32 and domain.train.labels.ndim == 2
    return domain.train.labels.tolist()


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    (tmp_path / "patients.csv").write_text(PATIENTS)
    return tmp_path


def table(root: Path, text: str | None = None, **changes: Any) -> Domain:
    if text is not None:
        (root / "t.csv").write_text(text)
    return load("table", root, **{"path": "t.csv", **changes})


def refused_table(root: Path, text: str, **changes: Any) -> str:
    (root / "t.csv").write_text(text)
    return refused("table", root, **{"path": "t.csv", **changes})


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t", "  "])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_separated_text(tmp_path: Path, separator: str, header: bool, packed: bool) -> None:
    lines = [["a", "b", "y"]] * header + [["1", "2.5", "-3"], ["4e1", "5", "6"], ["7", "8", "9"]]
    text = "\n".join(separator.join(line) for line in lines) + "\n\n"
    path = tmp_path / ("t.data.gz" if packed else "t.data")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    domain = load("table", tmp_path, path=path.name)
    assert values(domain.train) == [[1, 2.5], [40, 5], [7, 8]]
    assert targets(domain) == [[-3], [6], [9]]
    assert domain.kind == "regression" and domain.classes == () and domain.test is None
    assert domain.train.ids[0] == f"t/{2 if header else 1}" or domain.train.ids[0] == f"t.data/{2 if header else 1}"


def test_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbfname,x,y\r\n"a, ""b""",1,2\r\nc,3,4\r\nd,5,6\r\n')
    rows = read_rows(tmp_path / "t.csv")
    assert rows.names == ("name", "x", "y") and list(rows.cells("name")) == ['a, "b"', "c", "d"]


def test_names_positions_and_a_header_that_is_overruled(tmp_path: Path) -> None:
    text = "1,2,3\n4,5,6\n7,8,10\n"
    assert targets(table(tmp_path, text, target=0)) == [[1], [4], [7]]
    assert targets(table(tmp_path, text, target="1")) == [[2], [5], [8]]
    assert targets(table(tmp_path, text, columns=["a", "b", "c"], target=["c", "a"])) == [[3, 1], [6, 4], [10, 7]]
    assert len(table(tmp_path, "1,2\n" + "3,4\n5,6\n8,9\n", header=True).train) == 3
    assert targets(table(tmp_path, "x,y\n1,2\n3,4\n5,7\n", columns=["p", "q"], target="p")) == [[1], [3], [5]]
    assert "2 columns, and `columns` names 1" in refused_table(tmp_path, "1,2\n3,4\n", columns=["a"])


def test_matlab_matrices_and_cells(tmp_path: Path) -> None:
    savemat(tmp_path / "m.mat", {"X": np.arange(8.0).reshape(4, 2), "y": np.array([[1], [2], [3], [5]]), "note": "n"})
    domain = load("table", tmp_path, path="m.mat", target="y")
    assert values(domain.train) == [[0, 1], [2, 3], [4, 5], [6, 7]] and targets(domain) == [[1], [2], [3], [5]]
    cells = np.empty((1, 2), object)
    cells[0, 0], cells[0, 1] = np.array([[1, 2], [3, 4]], np.uint8), np.array([[5, 6], [7, 8], [9, 10]], np.uint8)
    scores = np.empty((1, 2), object)
    scores[0, 0], scores[0, 1] = np.array([[1], [2]], np.uint8), np.array([[3], [4], [6]], np.uint8)
    savemat(tmp_path / "c.mat", {"X": cells, "Y": scores})
    second = load("table", tmp_path, path="c.mat", target="Y", domain_column="group", domain=1)
    assert values(second.train) == [[5, 6], [7, 8], [9, 10]] and targets(second) == [[3], [4], [6]]


@pytest.mark.parametrize("suffix", ["xlsx"])
def test_spreadsheets(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["a", "y"], [1, 2], [None, None], [3, 4.5], [5, 6]):
        book.active.append(row)
    book.create_sheet("empty")
    book.save(tmp_path / "t.xlsx")
    domain = load("table", tmp_path, path="t.xlsx")
    assert values(domain.train) == [[1], [3], [5]] and targets(domain) == [[2], [4.5], [6]]
    assert "no sheet 7; it has: Sheet, empty" in refused("table", tmp_path, path="t.xlsx", sheet=7)
    assert "nothing on this sheet" in refused("table", tmp_path, path="t.xlsx", sheet="empty")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install 'transfer-cli[tables]'" in refused("table", tmp_path, path="t.xlsx")
    (tmp_path / "t.xls").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "xlrd", None)
    assert "pip install 'transfer-cli[tables]'" in refused("table", tmp_path, path="t.xls")


# --- domains --------------------------------------------------------------------------------------


def test_a_value_of_a_column_is_a_domain_and_no_input(patients: Path) -> None:
    domain = load("table", patients, path="patients.csv", domain_column="ward", domain="north")
    assert values(domain.train) == [[41, 0.5], [63, 2.5], [26, 1.0]] and targets(domain) == [[1], [4], [2]]
    assert domain.name == "patients_north" and domain.train.ids == ("patients/2", "patients/4", "patients/7")
    assert "'nort'" in refused("table", patients, path="patients.csv", domain_column="ward", domain="nort")


def test_a_threshold_is_a_domain_and_its_column_stays(patients: Path) -> None:
    settings = {"path": "patients.csv", "drop": ["ward"]}
    young = load("table", patients, **settings, domain="age<45")
    assert [row[0] for row in values(young.train)] == [41, 35, 26]
    named = {"young": "age<45", "old": "age >= 45 & dose<2.5"}
    with pytest.raises(TransferError, match="2 rows are too few"):
        load("table", patients, **settings, domain="old", domains=named)
    assert values(load("table", patients, **settings, domain="young", domains=named).train) == values(young.train)
    assert "Did you mean 'young'" in refused("table", patients, **settings, domain="yong", domains=named)
    assert "no row of" in refused("table", patients, **settings, domain="age>100")


def test_a_named_condition_on_equality_takes_its_column_out_of_every_domain(patients: Path) -> None:
    named = {"north": "ward==north", "others": "ward!=north"}
    north = load("table", patients, path="patients.csv", domain="north", domains=named)
    others = load("table", patients, path="patients.csv", domain="others", domains=named)
    assert [len(row) for row in values(north.train) + values(others.train)] == [2] * 6
    assert [row[0] for row in values(others.train)] == [52, 74, 35]


def test_a_file_is_a_domain(tmp_path: Path) -> None:
    for name, shift in (("r", 0), ("w", 10)):
        (tmp_path / f"wine-{name}.csv").write_text("".join(f"{i + shift},{i}\n" for i in range(3)))
    settings: dict[str, Any] = {"path": "wine-{domain}.csv", "domains": {"red": "r", "white": "w"}}
    assert values(load("table", tmp_path, **settings, domain="white").train) == [[10], [11], [12]]
    assert "Did you mean 'white'" in refused("table", tmp_path, **settings, domain="whit")
    assert "needs domain=NAME" in refused("table", tmp_path, **settings)
    # one unit for both: the statistics are those of all six rows
    pooled = np.array([0, 1, 2, 10, 11, 12.0])
    for name, own in (("red", pooled[:3]), ("white", pooled[3:])):
        found = load("table", tmp_path, **settings, domain=name, standardise=True)
        assert np.allclose(np.array(values(found.train))[:, 0], (own - pooled.mean()) / pooled.std())
    reader = node("table", **settings, domain="red", standardise=True).build(Place(tmp_path, False))
    before = reader.fingerprint()
    (tmp_path / "wine-w.csv").write_text("10,0\n11,1\n13,2\n")
    assert reader.fingerprint() != before


def test_what_a_domain_is_called(patients: Path) -> None:
    assert label(node("table", path="a/lab.csv")) == "lab"
    assert label(node("table", path="a/lab.csv", domain=7)) == "table_7"
    assert label(node("wine", domain="white")) == "wine_white"
    assert "without / in domains" in refused("table", patients, path="patients.csv", domain="a/b", domain_column="ward")


def test_conditions() -> None:
    assert parse_condition("age (day)>=28 & x!='a b'") == [("age (day)", ">=", "28"), ("x", "!=", "a b")]
    assert [plain_text(cell) for cell in ("3.0", 3, " a ", "0.10", "1e3", "1_0")] == [
        "3",
        "3",
        "a",
        "0.1",
        "1000",
        "1_0",
    ]
    assert in_order({"10", "9", "-1.5"}) == ["-1.5", "9", "10"] and in_order({"b", "10", "a"}) == ["10", "a", "b"]


def test_bad_conditions(patients: Path) -> None:
    settings = {"path": "patients.csv", "drop": ["ward"]}
    assert "no condition" in refused("table", patients, **settings, domain="age<45 & x")
    assert "no column 'agee'. Did you mean 'age'?" in refused("table", patients, **settings, domain="agee<45")
    assert "'old' is no number" in refused("table", patients, **settings, domain="age<old")
    assert "needs domain_column=COLUMN" in refused("table", patients, **settings, domain="young")


# --- columns --------------------------------------------------------------------------------------


def test_categories_are_those_of_all_domains_in_one_order(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("kind,x,y\n10,1,1\n9,2,2\n10,3,4\n")
    (tmp_path / "b.csv").write_text("kind,x,y\n2,1,1\n9,2,2\n2.0,3,5\n")
    settings: dict[str, Any] = {"path": "{domain}.csv", "domains": ["a", "b"], "categorical": ["kind"]}
    a, b = (load("table", tmp_path, **settings, domain=name) for name in "ab")
    assert values(a.train) == [[0, 0, 1, 1], [0, 1, 0, 2], [0, 0, 1, 3]]
    assert values(b.train) == [[1, 0, 0, 1], [0, 1, 0, 2], [1, 0, 0, 3]]
    assert a.notes == ("a: one input a value of kind (3)",)


def test_categories_of_one_file(patients: Path) -> None:
    young = load("table", patients, path="patients.csv", domain="age<45", categorical=["ward"])
    assert [row[1:4] for row in values(young.train)] == [[0, 1, 0], [0, 0, 1], [0, 1, 0]]  # east, north, south


def test_roles(patients: Path) -> None:
    settings = {"path": "patients.csv", "target": "age"}
    assert values(load("table", patients, **settings, inputs=["result", "dose"]).train)[0] == [1.0, 0.5]
    assert "'age' is among the inputs, and" in refused("table", patients, **settings, inputs=["age"])
    assert "no column 'dos'. Did you mean 'dose'?" in refused("table", patients, **settings, drop=["dos"])
    assert "no column of" in refused("table", patients, **settings, drop=["ward", "dose", "result"])
    assert targets(load("table", patients, path="patients.csv", drop=["ward"], target_scale=-2.0))[0] == [-2]


@pytest.mark.parametrize("missing", ["", "?", "na", "NaN"])
def test_missing_cells(tmp_path: Path, missing: str) -> None:
    text = f"x,z,y\n1,5,1\n{missing},6,2\n3,7,3\n8,8,{missing}\n5,{missing},5\n"
    assert "missing in x (1), z (1), y (1) of 5 rows" in refused_table(tmp_path, text)
    dropped = refused_table(tmp_path, text, missing="drop")
    assert "2 rows are too few" in dropped
    filled = table(tmp_path, text, missing="mean")
    assert values(filled.train) == [[1, 5], [3, 6], [3, 7], [5, 6]] and targets(filled) == [[1], [2], [3], [5]]
    assert filled.notes == (
        "t: 1 of 5 rows left out, a target is missing",
        "t: missing cells are the mean of their column over this domain: x (1), z (1)",
    )
    assert "no row has a value of 'x'" in refused_table(tmp_path, "x,z,y\n,1,1\n,2,2\n,3,3\n", missing="mean")


def test_the_mean_is_this_domains_alone_and_the_test_split_has_the_training_rows(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("d,x,y\na,,1\nb,900,2\na,100,3\na,100,4\n")
    text = "d,x,y\na,1,1\nb,1000,2\na,,3\na,3,4\nb,2000,1\n"
    domain = table(tmp_path, text, domain_column="d", domain="a", missing="mean", test_path="test.csv")
    assert values(domain.train) == [[1], [2], [3]]
    assert domain.test is not None and values(domain.test) == [[2], [100], [100]]


def test_other_missing_values(tmp_path: Path) -> None:
    text = "x,c,y\n-9,a,1\n-9.0,,2\n3,b,3\n4,a,5\n"
    domain = table(tmp_path, text, categorical=["c"], missing="mean", missing_values=[-9])
    assert values(domain.train) == [[3.5, 0, 1, 0], [3.5, 1, 0, 0], [3, 0, 0, 1], [4, 0, 1, 0]]  # '' is a value here
    domain = table(tmp_path, text, categorical=["c"], missing="mean")
    assert np.allclose(values(domain.train)[1], [-9, 2 / 3, 1 / 3])


def test_classes_by_value_and_by_condition(tmp_path: Path) -> None:
    text = "x,y\n1,0\n2,3.0\n3,1\n4,0\n5,3\n"
    by_value = table(tmp_path, text, kind="classification")
    assert by_value.classes == ("0", "1", "3") and by_value.train.labels.tolist() == [0, 2, 1, 0, 2]
    grouped = table(tmp_path, text, kind="classification", classes={"no": "y==0", "yes": "y>0"})
    assert grouped.classes == ("no", "yes") and grouped.train.labels.tolist() == [0, 1, 1, 0, 1]
    wrong = {"no": "y==0", "yes": "y>1"}
    assert "line 4 fulfils none or several" in refused_table(tmp_path, text, kind="classification", classes=wrong)
    assert "one class, 4" in refused_table(tmp_path, "x,y\n1,4\n2,4\n3,4\n", kind="classification")


BAD = {
    "a word among numbers": ("x,y\n1,2\nold,3\n4,5\n", "line 3, column 'x': 'old' is no number"),
    "a word among targets": ("x,y\n1,2\n3,high\n4,5\n", "line 3, column 'y': 'high' is no number"),
    "constant": ("x,y\n1,2\n2,2\n3,2\n", "target 'y' is 2 in all 3 rows"),
    "constant in float32": ("x,y\n1,1000000000.1\n2,1000000000.2\n3,1000000000.3\n", "as float32"),
    "ragged": ("x,y\n1,2\n3\n4,5\n", "line 3 has 1 cells, line 1 has 2"),
    "too few": ("x,y\n1,2\n3,4\n", "2 rows are too few; 3 at least"),
    "empty": ("\n\n", "is empty"),
    "names alone": ("x,y\n", "has no rows"),
    "too large": ("x,y\n1e39,2\n2,3\n3,4\n", "1e+39 is too large for float32"),
    "infinite": ("x,y\n1,2\ninf,3\n3,4\n", "inf is too large"),
    "two of a name": ("x,x,y\n1,2,3\n2,3,4\n3,4,5\n", "two columns 'x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, case: str) -> None:
    text, reason = BAD[case]
    assert reason in refused_table(tmp_path, text)


def test_other_bad_input(tmp_path: Path) -> None:
    good = "x,y\n1,2\n2,3\n3,5\n"
    assert "no column 'z'" in refused_table(tmp_path, good, target="z")
    assert "no column '9'" in refused_table(tmp_path, good, target=9)
    assert "needs source.path=FILE" in refused("table")
    assert "missing" in refused("table", tmp_path, path="no.csv")
    (tmp_path / "broken.gz").write_bytes(b"\x1f\x8b broken")
    assert "truncated or corrupt" in refused("table", tmp_path, path="broken.gz")
    (tmp_path / "o.csv").write_text("x,z\n1,2\n2,3\n3,4\n")
    assert "differ in their columns" in refused_table(tmp_path, good, test_path="o.csv")
    assert "separator must be one character" in refused_table(tmp_path, good, separator=",,")


# --- the sets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MINE)
def test_the_yaml_has_the_constructors_defaults(name: str) -> None:
    chosen = node(name)
    schema = keyword_schema(chosen.implementation)
    assert set(chosen.parameters) == set(schema)
    for key, (_, default) in schema.items():
        value = chosen.parameters[key]
        assert (list(value) if isinstance(value, list) else value) == (
            list(default) if isinstance(default, tuple) else default
        )


def test_diabetes_is_scikit_learns(tmp_path: Path) -> None:
    data = load_diabetes()
    female, male = (load("diabetes", domain=name) for name in ("female", "male"))
    assert len(female.train) + len(male.train) == 442 and len(values(female.train)[0]) == 9
    rows = [int(name.removeprefix("diabetes/")) for name in male.train.ids]
    wanted = np.delete(data.data[rows], 1, axis=1) * math.sqrt(442)  # scikit-learn's columns have norm 1
    assert np.allclose(values(male.train), wanted, atol=1e-5)
    assert np.allclose(male.train.labels[:, 0], data.target[rows])
    low, high = (load("diabetes", domain=name) for name in ("low_bmi", "high_bmi"))
    assert max(row[2] for row in values(low.train)) < min(row[2] for row in values(high.train))
    assert len(low.train) + len(high.train) == 442 and len(values(low.train)[0]) == 10
    hdl = load_diabetes(scaled=False).data[:, 6]
    rows_f = [int(name.removeprefix("diabetes/")) for name in female.train.ids]
    assert hdl[rows_f].mean() > hdl[rows].mean()


def test_friedman() -> None:
    x, y = make_friedman1(200, 10, noise=0.0, random_state=0)
    assert np.allclose(FUNCTIONS["source"](*x.T), y)
    one, again = load("friedman", domain="close"), load("friedman", domain="close")
    assert one.train.labels.equal(again.train.labels)
    exact = load("friedman", domain="close", noise=0.0, n=2000, seed=1)
    inputs = np.array(values(exact.train))
    a, b, c, d, e = inputs.T[:5]
    wanted = 11 * np.sin(np.pi * a * b) + 18 * (c - 0.45) ** 2 + 9 * d + 6 * e + 1
    assert np.allclose(exact.train.labels[:, 0], wanted, atol=1e-4)
    noisy = load("friedman", domain="close", noise=2.0, n=2000, seed=1)
    assert float((noisy.train.labels - exact.train.labels).std()) == pytest.approx(2, rel=0.05)
    # how far the source's function is from each: nearer in this order
    far = {n: np.sqrt(np.square(f(*inputs.T) - FUNCTIONS["source"](*inputs.T)).mean()) for n, f in FUNCTIONS.items()}
    assert far["source"] == 0 < far["close"] < 2.5 < far["far"] < far["unrelated"]
    # and `unrelated` is a function of what the source ignores
    moved = inputs.copy()
    moved[:, :5] = 0.5
    assert np.array_equal(FUNCTIONS["unrelated"](*moved.T), FUNCTIONS["unrelated"](*inputs.T))
    with pytest.raises(TransferError, match="n must be 3"):
        load("friedman", n=1)


def write_engines(root: Path, train: bool = True) -> None:
    (root / "cmapss").mkdir(exist_ok=True)
    draw = np.random.default_rng(0)

    def rows(lives: list[int]) -> str:
        lines = [[e, c, *np.round(draw.normal(size=24), 3)] for e, n in enumerate(lives, 1) for c in range(1, n + 1)]
        return "\n".join(" ".join(map(str, line)) for line in lines) + "\n"

    if train:
        (root / "cmapss" / "train_FD001.txt").write_text(rows([200, 3]))
    (root / "cmapss" / "test_FD001.txt").write_text(rows([2, 3, 4]))
    (root / "cmapss" / "RUL_FD001.txt").write_text("7\n130\n9\n")


def test_remaining_life_counts_down_and_is_capped(tmp_path: Path) -> None:
    write_engines(tmp_path)
    domain = load("cmapss", tmp_path)
    life = domain.train.labels[:, 0].tolist()
    assert life[:76] == [125] * 75 + [124] and life[-5:] == [1, 0, 2, 1, 0]
    assert domain.test is not None and domain.test.labels[:, 0].tolist() == [8, 7, 125, 125, 125, 12, 11, 10, 9]
    x = np.array(values(domain.train))
    assert x.shape == (203, 24) and np.allclose(x.mean(0), 0, atol=1e-5) and np.allclose(x.std(0), 1, atol=1e-4)
    last = load("cmapss", tmp_path, test_cycles="last", cap=200.0).test
    assert last is not None and last.labels[:, 0].tolist() == [7, 130, 9]
    assert last.ids == ("cmapss_FD001/1/2", "cmapss_FD001/2/3", "cmapss_FD001/3/4")


def test_without_a_training_file_no_engine_is_on_both_sides(tmp_path: Path) -> None:
    write_engines(tmp_path, train=False)
    domain = load("cmapss", tmp_path, standardise_by=None)
    assert domain.test is not None and "no training file" in domain.notes[0]
    engines = [{name.split("/")[1] for name in part.ids} for part in (domain.train, domain.test)]
    assert engines == [{"1", "2"}, {"3"}]
    assert "missing" in refused("cmapss", tmp_path, domain="FD002")


# --- strings --------------------------------------------------------------------------------------


def strings(root: Path, sequences: list[str], name: str = "s.csv", **changes: Any) -> Domain:
    (root / name).write_text("sequence,target\n" + "".join(f"{s},{i}\n" for i, s in enumerate(sequences)))
    return load("sequences", root, **{"path": name, **changes})


def test_the_spectrum_counts_words_and_its_product_is_the_kernel(tmp_path: Path) -> None:
    given = ["ABAB", "BABA", "AAAA"]
    found = np.array(values(strings(tmp_path, given, k=2).train))
    assert found.tolist() == [[0, 2, 1], [0, 1, 2], [3, 0, 0]]  # AA, AB, BA
    both = np.array(values(strings(tmp_path, given, k=[1, 3]).train))

    def kernel(s: str, t: str, k: int) -> int:  # by the definition: pairs of equal words
        return sum(s[i : i + k] == t[j : j + k] for i in range(len(s) - k + 1) for j in range(len(t) - k + 1))

    wanted = [[kernel(s, t, 1) + kernel(s, t, 3) for t in given] for s in given]
    assert (both @ both.T).tolist() == wanted


def test_two_files_share_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "o.csv").write_text("sequence,target\nCA,1\nAC,2\nCC,3\n")
    alone = strings(tmp_path, ["AA", "AB", "BB"], k=1)
    joint = strings(tmp_path, ["AA", "AB", "BB"], k=1, vocabulary=["o.csv"])
    other = load("sequences", tmp_path, path="o.csv", k=1, vocabulary=["s.csv"])
    assert [len(values(d.train)[0]) for d in (alone, joint, other)] == [2, 3, 3]
    assert values(other.train)[0] == [1, 0, 1]


def test_one_hot_keeps_the_positions_that_vary_anywhere(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"encoding": "one_hot", "reference": "first"}
    given = ["MAKA", "MAKC", "MCKA", "MCKC", "MDKA"]
    everything = strings(tmp_path, given, **settings)
    assert values(everything.train)[4] == [0, 0, 1, 1, 0, 0]  # positions 1 and 3, letters A, C, D
    single = strings(tmp_path, given, **settings, domain="mutations<=1")
    assert values(single.train) == [values(everything.train)[i] for i in (0, 1, 2, 4)]
    assert "encoding=spectrum" in refused_strings(tmp_path, ["AB", "ABC", "AC"], encoding="one_hot")
    assert "all strings are equal" in refused_strings(tmp_path, ["AB"] * 3, encoding="one_hot")
    assert "differ in length" in refused_strings(tmp_path, ["AB", "ABC", "AC"], reference="first")
    assert "0 different words" in refused_strings(tmp_path, ["AB", "ABC", "AC"], k=9)


def refused_strings(root: Path, given: list[str], **changes: Any) -> str:
    with pytest.raises(TransferError) as caught:
        strings(root, given, **changes)
    return str(caught.value)


def test_tokens_of_smiles() -> None:
    assert SMILES.findall("C[nH]1Cl%12=Br") == ["C", "[nH]", "1", "Cl", "%12", "=", "Br"]


def test_fasta_files_are_classes(tmp_path: Path) -> None:
    for name, letters in (("m_yes", "ACG"), ("m_no", "ttt"), ("k_yes", "GGG"), ("k_other_no", "AAA")):
        (tmp_path / f"{name}.fa.gz").write_bytes(
            gzip.compress(f">1 x\n{letters}\n{letters}\n\n>2\n{letters}\n".encode())
        )
    settings: dict[str, Any] = {
        "path": {"yes": "{domain}_yes.fa.gz", "no": "{domain}_*no.fa.gz"},
        "domains": {"mouse": "m", "cress": "k"},
        "k": 1,
    }
    mouse, cress = (load("sequences", tmp_path, **settings, domain=name) for name in ("mouse", "cress"))
    assert mouse.classes == cress.classes == ("no", "yes") and mouse.train.labels.tolist() == [1, 1, 0, 0]
    assert values(mouse.train) == [[2, 2, 2, 0], [1, 1, 1, 0], [0, 0, 0, 6], [0, 0, 0, 3]]  # A, C, G, T
    assert values(cress.train)[0] == [0, 0, 6, 0]
    (tmp_path / "k_no.fa.gz").write_bytes(b"")
    assert "several files" in refused("sequences", tmp_path, **settings, domain="mouse")
    (tmp_path / "bad.fa").write_text("ACGT\n")
    assert "not FASTA" in refused("sequences", tmp_path, path="bad.fa")


# --- regression as a user sees it -----------------------------------------------------------------


def test_signed_coverage_and_the_epistemic_share() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randn(20_000, 1, generator=draw, dtype=torch.float64)
    mean = torch.zeros_like(labels)
    narrow = regression(mean, torch.full_like(labels, 0.25), labels, torch.full_like(labels, 0.05))
    for level in (50, 80, 95):
        half = norm.ppf(0.5 + level / 200) / 2
        assert narrow[f"coverage_error_{level}"] == pytest.approx(2 * norm.cdf(half) - 1 - level / 100, abs=0.01)
        assert narrow[f"coverage_error_{level}"] < 0
    assert narrow["epistemic_share"] == pytest.approx(0.2)
    wide = regression(mean, torch.full_like(labels, 4.0), labels)
    assert wide["coverage_error_80"] > 0 and "epistemic_share" not in wide


def test_run_report_and_predict(transfer: Transfer, tmp_path: Path) -> None:
    pair = ["source=diabetes", "target=diabetes", "target.domain=male", "backbone=identity", "target_labels=10"]
    common = ["device=cpu", "threads=1"]
    first = transfer("run", *pair, "method=no_adaptation", "head=ridge", "protocol=transductive", *common)
    assert first.code == 0, first.err
    assert "10 target labels granted" in first.out and "width" in first.out
    figures = json.loads((first.run / "result.json").read_text())["metrics"]["target_test"]
    assert figures["r2"] > 0.3 and figures["coverage_error_95"] == pytest.approx(figures["coverage_95"] - 0.95)
    assert (first.run / "figures" / "predicted_target_test.png").stat().st_size > 20_000
    assert transfer("run", *pair, "method=linear_probe", "protocol=transductive", *common).code == 0

    shown = transfer("report").out
    for text in (
        "RMSE on the target test set",
        "CRPS on the target test set",
        "coverage of 95 % intervals",
        "diabetes_female",
    ):
        assert text in shown
    assert f"{100 * figures['coverage_95']:.1f}, " in shown
    lines = list(csv.DictReader(io.StringIO(transfer("report", "--format", "csv").out)))
    crps = [float(line["mean"]) for line in lines if line["metric"] == "crps" and line["method"] == "no_adaptation"]
    assert crps == [pytest.approx(figures["crps"])]
    assert {line["metric"] for line in lines} == {"rmse", "crps", "coverage_95", "width_95"}

    answer = transfer("predict", str(first.run), "--dataset", "diabetes", "domain=male", "--level", "0.5")
    rows = list(csv.DictReader(io.StringIO(answer.out)))
    assert len(rows) == 207 and list(rows[0]) == ["sample", "mean_0", "std_0", "lower_0", "upper_0"]
    mean, std, lower, upper = (
        np.array([float(row[f"{key}_0"]) for row in rows]) for key in ("mean", "std", "lower", "upper")
    )
    assert np.allclose(upper - mean, norm.ppf(0.75) * std, rtol=1e-4) and np.allclose(
        mean - lower, upper - mean, rtol=1e-4
    )
    assert transfer("predict", str(first.run), "--dataset", "diabetes", "--level", "1.5").code == 2


def test_a_table_runs_from_the_command_line(transfer: Transfer, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x, age = draw.normal(size=(90, 2)), draw.integers(20, 80, 90)
    lines = [f"{a};{b};{c};{d}" for (a, b), c, d in zip(x, age, x @ [2, -1] + 0.01 * age, strict=True)]
    (tmp_path / "lab.csv").write_text("\n".join(["a;b;age;y", *lines]) + "\n")
    both = [f"{side}.{key}" for side in ("source", "target") for key in (f"path={tmp_path}/lab.csv", "name=lab")]
    chosen = ["source=table", "target=table", *both, 'source.domain="age<50"', 'target.domain="age>=50"']
    outcome = transfer(
        "run", *chosen, "backbone=identity", "method=linear_probe", "target_labels=10", "device=cpu", "threads=1"
    )
    assert outcome.code == 0, outcome.err
    result = json.loads((outcome.run / "result.json").read_text())
    assert result["metrics"]["target_test"]["r2"] > 0.99 and result["target"] == "lab_age>=50"
    wrong = transfer("run", *chosen, "source.drop=[agee]", "backbone=identity", "method=linear_probe")
    assert wrong.code == 2 and len(wrong.err.splitlines()) == 1 and "Did you mean 'age'?" in wrong.err


def test_the_unit_of_targets_does_not_matter_to_networks(transfer: Transfer, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(300, 2))
    rows = [f"{a},{b},{d},{c}" for (a, b), c, d in zip(x, x @ [2, -1], "st" * 150, strict=True)]
    (tmp_path / "lab.csv").write_text("\n".join(["a,b,d,y", *rows]) + "\n")
    found = []
    for scale in ("1.0", "1e-13"):
        each = (f"path={tmp_path}/lab.csv", "domain_column=d", f"target_scale={scale}")
        keys = [f"{side}.{key}" for side in ("source", "target") for key in each]
        outcome = transfer(
            *("run", "source=table", "target=table", *keys, "source.domain=s", "target.domain=t", "backbone=mlp"),
            *("method=vbll", "trainer.steps=60", "device=cpu", "threads=1"),
        )
        assert outcome.code == 0, outcome.err
        found.append(json.loads((outcome.run / "result.json").read_text())["metrics"]["target_test"])
    assert found[0]["r2"] > 0.5
    for name in ("r2", "coverage_50", "coverage_95", "epistemic_share"):
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-3), name


def test_columns_that_float32_would_merge_are_told(tmp_path: Path) -> None:
    file = tmp_path / "far.csv"
    file.write_text("when,plain,y\n" + "".join(f"{1.7e9 + i},{1e6 + i},{i % 7}\n" for i in range(60)))
    domain = load("table", tmp_path, path=str(file))
    (note,) = domain.notes
    assert re.search(r"cannot tell values apart in when \(\d\): set standardise=true", note) and "plain" not in note
    domain = load("table", tmp_path, path=str(file), standardise=True)
    assert domain.notes == () and len(np.unique(np.array(values(domain.train))[:, 0])) == 60


# --- real files -----------------------------------------------------------------------------------

SIZES: dict[tuple[str, str | None], tuple[int, int]] = {
    ("wine", "red"): (1599, 11), ("wine", "white"): (4898, 11), ("concrete", "young"): (324, 8), ("concrete", "old"): (706, 8),
    ("heart", "cleveland"): (303, 15), ("heart", "hungarian"): (294, 15), ("school", "boys"): (3654, 24),
    ("school", "girls"): (4404, 24), ("esol", None): (1128, 6), ("freesolv", None): (642, 1), ("gb1", "single"): (28, 80),
    ("gb1", "quadruple"): (5743, 80), ("promoters", "mouse"): (4785, 256), ("cmapss", "FD003"): (10485, 24),
    ("aryl_halide", "XPhos"): (1152, 43), ("esol_smiles", None): (1128, 247), ("freesolv_smiles", None): (642, 247),
}  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize(("name", "domain"), SIZES)
def test_real_tables(data_root: Path, name: str, domain: str | None) -> None:
    if name == "concrete":
        pytest.importorskip("xlrd")
    found = load(name, data_root, **({} if domain is None else {"domain": domain}))
    assert (len(found.train), found.train.inputs.spec.shape[0]) == SIZES[name, domain]


@pytest.mark.data
def test_the_genders_of_schools(data_root: Path) -> None:
    kinds = ("boys", "girls", "mixed")
    female = [
        np.array(values(load("school", data_root, domain=n, standardise=False).train))[:, 5].mean() for n in kinds
    ]
    assert female[0] < 0.001 and female[1] == 1 and 0.4 < female[2] < 0.6  # one girl in a school for boys
