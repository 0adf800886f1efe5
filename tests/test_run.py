"""The main job as a user meets it: run, its outputs, finding it finished, predicting, evaluating."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome
from PIL import Image

Transfer = Callable[..., Outcome]


def test_a_run_leaves_its_whole_folder(transfer: Transfer) -> None:
    outcome = transfer("run", *SMALL)
    assert outcome.code == 0, outcome.err
    run = outcome.run
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.yaml", "manifest.json", "status.json", "metrics.jsonl", "result.json", "predictions.npz",
        "features.npz", "examples.npz", "checkpoints", "figures", "run.log",
    }  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert result["schema_version"] == 1
    assert (result["source"], result["target"], result["method"]) == ("synth_digits", "digits", "dann")
    assert result["setting"] == {
        "target_labels": 0, "protocol": "inductive", "label_space": "closed", "source_free": False
    }  # fmt: skip
    assert set(result["metrics"]["target_test"]) >= {"accuracy", "macro_f1", "nll", "brier", "ece"}
    assert result["selection"]["validator"] == "im" and result["selection"]["uses_target_labels"] is False
    assert result["steps"] == 40 and set(result["seconds"]) == {"load", "fit", "evaluate"}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {e["split"] for e in events} == {"train", "diagnostics", "health", "validators", "target_test"}
    train = [e for e in events if e["split"] == "train"]
    assert [e["step"] for e in train] == [10, 20, 30, 40]
    assert set(train[0]["values"]) == {"supervised", "domain"}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["threads"] == 1 and set(manifest["fingerprints"]) == {"source", "target"}
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    for name in ("last.pt", "best.pt"):
        torch.load(run / "checkpoints" / name, weights_only=True)
    assert (run / "run.log").read_text() == "".join(line + "\n" for line in outcome.out.splitlines()), (
        "run.log holds the lines that were printed"
    )


def test_predictions_recompute_the_result(transfer: Transfer) -> None:
    run = transfer("run", *SMALL).run
    arrays = np.load(run / "predictions.npz")
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    for split in ("source_test", "target_test"):
        guesses = arrays[f"{split}_probs"].argmax(1)
        assert np.mean(guesses == arrays[f"{split}_labels"]) == pytest.approx(metrics[split]["accuracy"])
        assert len(arrays[f"{split}_ids"]) == len(guesses)


def test_finished_runs_are_found_and_left_alone(transfer: Transfer) -> None:
    first = transfer("run", *SMALL)
    before = {p: p.stat().st_mtime_ns for p in first.run.rglob("*") if p.is_file() and p.name != "lock"}
    second = transfer("run", *SMALL, "workers=0")  # workers are outside the identity
    assert second.code == 0 and "finished before" in second.out and second.run == first.run
    assert second.out.splitlines()[1:] == first.out.splitlines()[-len(second.out.splitlines()) + 1 :]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_the_same_run_twice_gives_identical_files(transfer: Transfer) -> None:
    def contents() -> dict[str, bytes]:
        kept = {}
        for path in run.rglob("*"):
            if path.is_file() and path.name not in (
                "lock",
                "status.json",
                "manifest.json",
                "result.json",
                "last.pt",
                "previous.pt",
            ):
                kept[path.name] = path.read_bytes()
        result = json.loads((run / "result.json").read_text())
        del result["seconds"]
        for name in ("last.pt", "previous.pt"):
            content = torch.load(run / "checkpoints" / name, weights_only=True)
            del content["parts"]["clock"]  # the only time in a checkpoint
            kept[name] = repr(content).encode()
        return {**kept, "result": json.dumps(result).encode()}

    run = transfer("run", *SMALL).run
    before = contents()
    transfer("run", *SMALL, "force=true")
    after = contents()
    assert before.keys() == after.keys() and len(before) > 8
    assert [name for name in before if before[name] != after[name]] == []


def test_another_seed_is_another_run(transfer: Transfer) -> None:
    first, second = transfer("run", *SMALL), transfer("run", *SMALL, "seed=1")
    assert first.run != second.run
    losses = [(r.run / "metrics.jsonl").read_text() for r in (first, second)]
    assert losses[0] != losses[1]


def test_evaluate_agrees_and_notices_a_changed_result(transfer: Transfer) -> None:
    run = transfer("run", *SMALL).run
    agreed = transfer("evaluate", str(run))
    assert agreed.code == 0 and "result.json agrees" in agreed.out
    result = json.loads((run / "result.json").read_text())
    result["metrics"]["target_test"]["accuracy"] += 0.01
    (run / "result.json").write_text(json.dumps(result))
    differing = transfer("evaluate", str(run))
    assert differing.code == 1 and "differs: target_test accuracy" in differing.out


def test_predict_files_and_data_sets(transfer: Transfer, tmp_path: Path) -> None:
    run = transfer("run", *SMALL).run
    table = list(csv.DictReader(transfer("predict", str(run), "--dataset", "digits").out.splitlines()))
    assert len(table) == 1797 and set(table[0]) == {"sample", "class", "probability"}
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "black.png")
    rows = [json.loads(r) for r in transfer("predict", str(run), "black.png", "--format", "jsonl").out.splitlines()]
    assert rows[0]["sample"] == "black.png"
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1)
    assert rows[0]["class"] == max(rows[0]["probabilities"], key=rows[0]["probabilities"].get)
    refused = transfer("predict", str(run), "nothing.png")
    assert refused.code == 2 and "nothing.png" in refused.err


def test_predictions_of_the_command_are_those_of_the_run(transfer: Transfer) -> None:
    run = transfer("run", *SMALL).run
    told = {
        r["sample"]: r["class"]
        for r in csv.DictReader(transfer("predict", str(run), "--dataset", "digits").out.splitlines())
    }
    arrays = np.load(run / "predictions.npz")
    guesses = arrays["target_test_probs"].argmax(1)
    assert [told[i] for i in arrays["target_test_ids"]] == [str(g) for g in guesses]


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=source_only", "target_labels=3"],
        ["method=deep_coral", "method.layer=features", "method.weight=10"],
        ["method=dann", "trainer.domain_batches=joint", "trainer.ema=0.9", "trainer.clip_norm=1"],
        ["method=dann", "trainer.precision=bf16", "trainer.channels_last=false", "optimizer=adamw", "schedule=cosine"],
        ["method=linear_probe", "target_labels=5"],
        ["method=l2_sp", "target_labels=5", "method.alpha=0.2", "method.layer_decay=0.5", "schedule.warmup=0.1"],
        ["method=dann", "protocol=transductive", "selection=oracle", "bottleneck=32", "augment=none"],
        ["method=finetune", "source=none", "target_labels=all", "selection=last", "backbone=lenet"],
        ["method=linear_probe", "source=none", "backbone=identity", "target_labels=all"],
    ],
)  # fmt: skip
def test_combinations_run_and_resolve_to_agreeing_results(transfer: Transfer, overrides: list[str]) -> None:
    outcome = transfer("run", *SMALL, *overrides)
    assert outcome.code == 0, outcome.err
    assert transfer("evaluate", str(outcome.run)).code == 0
    result = json.loads((outcome.run / "result.json").read_text())
    assert result["selection"]["uses_target_labels"] is ("selection=oracle" in overrides)
    assert result["metrics"]["target_test"]["accuracy"] > 0.1
    assert (result["metrics"]["source_test"] is None) == ("source=none" in overrides)
