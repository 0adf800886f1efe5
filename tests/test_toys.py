"""The same task, evaluator, checkpoint and predict carry images, tables (regression), source-free settings and sequences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Outcome
from test_resume import assert_same, outcome_of, stop_at

Transfer = Callable[..., Outcome]

COMMON = [
    "plugins=[toys]",
    "augment=none",
    "threads=1",
    "device=cpu",
    "trainer.steps=60",
    "trainer.eval_every=20",
    "trainer.batch_size=32",
]
TOYS = {
    "images": ["source=toy_images", "target=toy_images", "target.shift=40", "method=dann", "trainer.log_every=7"],
    "regression": [
        "source=toy_table",
        "target=toy_table",
        "target.shift=0.5",
        "backbone=mlp",
        "method=source_only",
        "optimizer=adam",
    ],
    "source_free": ["source=none", "target=toy_images", "target_labels=5", "method=lp_ft", "method.head_l2=0.1"],
    "sequences": [
        "source=toy_sequences",
        "target=toy_sequences",
        "target.shift=0.2",
        "backbone=mean_over_time",
        "method=dann",
    ],
}


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for group, choices in {
        "dataset": {"toy_images": "ToyImages", "toy_table": "ToyTable", "toy_sequences": "ToySequences"},
        "backbone": {"mean_over_time": "MeanOverTime"},
    }.items():
        (tmp_path / "conf" / group).mkdir(parents=True)
        for name, attribute in choices.items():
            node = {"name": name, "implementation": f"toys:{attribute}"}
            if group == "dataset":
                node["shift"] = 0
            (tmp_path / "conf" / group / f"{name}.yaml").write_text("# a toy\n" + yaml.safe_dump(node))


@pytest.mark.parametrize("name", TOYS)
def test_toys_run_evaluate_predict_and_resume(
    transfer: Transfer, toys: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chosen = [*COMMON, *TOYS[name]]
    done = transfer("run", *chosen)
    assert done.code == 0, done.err
    result = json.loads((done.run / "result.json").read_text())
    test = result["metrics"]["target_test"]
    if name == "regression":
        assert set(test) >= {"rmse", "nll", "crps", "coverage_95"} and test["r2"] > 0.5
        assert (done.run / "figures" / "predicted_target_test.png").exists()
    else:
        assert test["accuracy"] > 0.8
    assert result["setting"]["source_free"] is (name == "source_free")
    assert transfer("evaluate", str(done.run)).code == 0
    data = next(o.split("=")[1] for o in chosen if o.startswith("target="))
    rows = transfer("predict", str(done.run), "--dataset", data, "shift=1", "--format", "jsonl")
    assert rows.code == 0, rows.err
    first = json.loads(rows.out.splitlines()[0])
    assert ("mean_0" in first and "std_1" in first) if name == "regression" else first["class"] in result["classes"]

    expected = outcome_of(done.run)
    with monkeypatch.context() as patch:
        stop_at(patch, 33, stream="target_labelled" if name == "source_free" else "source")
        assert transfer("run", *chosen, "force=true").code == 143
    assert_same(transfer("run", *chosen).run, expected)


def test_regression_refuses_what_is_for_classes(transfer: Transfer, toys: None) -> None:
    refused = transfer("run", *COMMON, *TOYS["regression"], "selection=im")
    assert refused.code == 2 and "selection=im is for classification" in refused.err


def test_granted_regression_labels_are_n_in_all(transfer: Transfer, toys: None) -> None:
    done = transfer("run", *COMMON, *TOYS["regression"], "target_labels=10")
    assert "10 target labels granted" in done.out
