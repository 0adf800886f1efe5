"""`transfer validate`: agreement of runs and reverse validation, kept where the report finds them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome

from transfer_cli import experiment, reverse
from transfer_cli.config.compose import load_run
from transfer_cli.data.domain import Place
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.validators.agreement import agreement
from transfer_cli.report.runs import read_run

Transfer = Callable[..., Outcome]

MOONS = [
    "source=two_moons", "target=two_moons", "target.angle=30", "source.n=200", "target.n=200", "backbone=identity", "threads=1",
    "device=cpu",
]  # fmt: skip
VALIDATE = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "draw_figures", lambda folder: None)


def run_of(transfer: Transfer, *overrides: str) -> Path:
    done = transfer("run", *MOONS, *overrides)
    assert done.code == 0, done.err
    return done.run


def kept(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "validators.json").read_text())
    return content


def test_agreement_by_hand() -> None:
    a = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    b = np.array([[0.7, 0.3], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9]])
    c = np.array([[0.6, 0.4], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])
    # what the two others say: of a 0 1 0 1, of b 0 0 0 1, of c 0 1 1 1 (0.7 + 0.1 against 0.3 + 0.9 is 1 and so on)
    others = [[(b + c).argmax(1).tolist()], [(a + c).argmax(1).tolist()], [(a + b).argmax(1).tolist()]]
    assert others == [[[0, 1, 0, 1]], [[0, 0, 0, 1]], [[0, 1, 1, 1]]]
    assert agreement([a, b, c], classification=True) == [0.25, 0.5, 0.75]
    means = [np.array([[0.0], [2.0]]), np.array([[2.0], [2.0]]), np.array([[4.0], [2.0]])]
    assert agreement(means, classification=False) == pytest.approx([-(4.5**0.5), 0.0, -(4.5**0.5)])


def test_scores_are_written_once_and_reach_the_report(transfer: Transfer) -> None:
    runs = [run_of(transfer, f"method={method}") for method in ("coral", "no_adaptation", "mean_match")]
    done = transfer("validate", *VALIDATE)
    assert done.code == 0, done.err
    for run in runs:
        found = kept(run)
        assert set(found["scores"]) == {"agreement", "reverse"}
        assert found["details"]["agreement"] == {"runs": 3} and found["details"]["reverse"]["samples"] == 13
        assert not (run / "reverse").exists(), "nothing of it is left"
        record = read_run(run)
        assert record is not None and record.scores["reverse"] == found["scores"]["reverse"]
        assert set(record.scores) > {"im", "snd", "agreement"}
    outputs = [np.load(run / "predictions.npz")["target_test_probs"] for run in runs]
    assert [kept(run)["scores"]["agreement"] for run in runs] == agreement(outputs, classification=True)
    before = [(os.stat(run / "validators.json").st_mtime_ns, kept(run)) for run in runs]
    again = transfer("validate", *VALIDATE)
    assert again.out.count("as before") == 3
    assert before == [(os.stat(run / "validators.json").st_mtime_ns, kept(run)) for run in runs]
    anew = transfer("validate", *VALIDATE, "--force", "--validators", "reverse")
    assert "as before" not in anew.out and [b for _, b in before] == [kept(run) for run in runs], "the same again"


def test_two_runs_say_nothing_of_which_is_right(transfer: Transfer) -> None:
    runs = [run_of(transfer, f"method={method}") for method in ("coral", "no_adaptation")]
    said = transfer("validate", "--validators", "agreement").out
    assert "has 2 runs on the same samples, and needs 3" in said
    assert not any((run / "validators.json").exists() for run in runs)


def test_samples_of_one_name_in_other_data_are_others(transfer: Transfer) -> None:
    near = [run_of(transfer, f"method={method}") for method in ("coral", "no_adaptation", "mean_match")]
    far = run_of(transfer, "method=coral", "target.angle=60")
    said = transfer("validate", "--validators", "agreement").out
    assert "3 runs, from" in said and "has 1 runs on the same samples" in said
    assert kept(near[0])["details"]["agreement"] == {"runs": 3} and not (far / "validators.json").exists()
    (near[0] / "predictions.npz").write_bytes(b"PK cut off")
    more = run_of(transfer, "method=pca", "method.components=1")
    said = transfer("validate", "--validators", "agreement").out
    assert "left out" in said and "damaged" in said and kept(more)["details"]["agreement"] == {"runs": 3}


def test_the_reverse_problem_is_what_it_says(transfer: Transfer) -> None:
    run = run_of(transfer, "method=coral")
    folder, config = load_run(str(run))
    source, target = (kind(Place(None), run=str(run)).load() for kind in (reverse.ReverseSource, reverse.ReverseTarget))
    from transfer_cli.build import pose_problem, rebuild_model
    from transfer_cli.config.compose import resolve_components

    task = pose_problem(config, resolve_components(config)).task
    model, _ = rebuild_model(folder, config, resolve_components(config), torch.device("cpu"))
    assert source.train.ids == task.target_unlabelled.ids and source.test is None
    assert torch.equal(source.train.labels, model.predict(task.target_unlabelled.inputs.values).labels)  # type: ignore[attr-defined]
    assert task.source is not None and task.source_validation is not None and target.test is not None
    assert target.train.ids == task.source.ids and target.test.ids == task.source_validation.ids
    assert torch.equal(target.test.labels, task.source_validation.labels)
    score, told = reverse.reverse_score(str(run), {"device": "cpu", "threads": 1})
    assert told == {"samples": 13, "classes": 2, "steps": 0}
    (written,) = (run / "reverse" / "runs").glob("*/*")
    result = json.loads((written / "result.json").read_text())
    assert result["metrics"]["target_test"]["accuracy"] == score
    assert result["selection"]["uses_target_labels"] is False and result["setting"]["target_labels"] == 0


def test_a_model_that_is_right_scores_more_than_one_that_is_wrong(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same samples, labels by the model, and the others."""
    run = run_of(transfer, "method=no_adaptation", "target.angle=0")
    good, _ = reverse.reverse_score(str(run), {"device": "cpu", "threads": 1})
    reverse.clear(str(run))
    original = reverse._labelled

    def noise(*arguments: Any) -> Any:
        part = original(*arguments)
        part.labels.copy_(1 - part.labels)
        return part

    monkeypatch.setattr(reverse, "_labelled", noise)
    bad, _ = reverse.reverse_score(str(run), {"device": "cpu", "threads": 1})
    assert bad < 0.3 < 0.7 < good


def test_a_class_that_nothing_is_taken_for_counts_as_errors(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(transfer, "method=no_adaptation")
    original = reverse._labelled

    def one_class(*arguments: Any) -> Any:
        part = original(*arguments)
        part.labels.fill_(1)
        return part

    monkeypatch.setattr(reverse, "_labelled", one_class)
    score, told = reverse.reverse_score(str(run), {"device": "cpu", "threads": 1})
    assert told["classes"] == 1 and 0 < score < 1 and not (run / "reverse").exists()


def test_two_of_three_classes_still_have_a_reverse(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    done = transfer(
        "run", "method=no_adaptation", "backbone=hog", "experiment=smoke", "threads=1", "device=cpu",
        "subset.source_classes=['0','1','2']", "subset.target_classes=['0','1','2']",
    )  # fmt: skip
    assert done.code == 0, done.err
    original = reverse._labelled

    def without_one(*arguments: Any) -> Any:
        part = original(*arguments)
        part.labels[part.labels == 2] = 0
        return part

    monkeypatch.setattr(reverse, "_labelled", without_one)
    score, told = reverse.reverse_score(str(done.run), {"device": "cpu", "threads": 1})
    assert told["classes"] == 2 and 0 < score < 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["split.validation=0", "method=coral"], "needs a source with the target's classes"),
        (
            ["source=none", "method=linear_probe", "target_labels=5", "trainer.steps=5"],
            "needs a source with the target's classes",
        ),
    ],
)
def test_what_has_no_reverse_is_left_out_with_a_reason(transfer: Transfer, overrides: list[str], said: str) -> None:
    plain = [o for o in MOONS if not (overrides[0] == "source=none" and o.startswith("source"))]
    run = transfer("run", *plain, *overrides).run
    done = transfer("validate", *VALIDATE, "--validators", "reverse")
    assert done.code == 0 and f"left out: {said}" in done.out
    assert not (run / "validators.json").exists()


def test_what_is_asked_wrongly_is_said_in_one_line(transfer: Transfer, tmp_path: Path) -> None:
    for arguments, said in (
        (["--validators", "revers"], "Did you mean 'reverse'?"),
        ([str(tmp_path / "nowhere")], "there is no folder"),
    ):
        refused = transfer("validate", *arguments)
        if "revers" in arguments:
            run_of(transfer, "method=coral")
            refused = transfer("validate", *arguments)
        assert refused.code == 2 and said in refused.err and len(refused.err.splitlines()) == 1


def test_an_interrupted_reverse_run_goes_on(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(transfer, "method=coral")
    original = experiment.run

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run", stopped)
    assert transfer("validate", *VALIDATE, "--validators", "reverse").code == 130
    assert not (run / "validators.json").exists()
    monkeypatch.setattr(experiment, "run", original)
    assert transfer("validate", *VALIDATE, "--validators", "reverse").code == 0
    assert "reverse" in kept(run)["scores"]


def test_a_reverse_run_is_the_runs_own_configuration(transfer: Transfer) -> None:
    done = transfer(
        "run", "method=dann", "experiment=smoke", "threads=1", "device=cpu", "method.weight=0.5", "selection=oracle"
    )
    assert done.code == 0, done.err
    reverse.reverse_score(str(done.run), {"device": "cpu", "threads": 1})
    (written,) = (done.run / "reverse" / "runs").glob("*/*")
    config = yaml.safe_load((written / "config.yaml").read_text())
    assert config["method"]["weight"] == 0.5 and config["selection"] == "last"
    assert config["trainer"]["steps"] == 9, "one pass over the 540 source samples in batches of 64"
    result = json.loads((written / "result.json").read_text())
    assert result["selection"]["candidates"] == 1 and result["selection"]["uses_target_labels"] is False


def test_a_regression_has_both(transfer: Transfer) -> None:
    common = ["experiment=friedman_close", "threads=1", "device=cpu", "target_labels=0", "method=no_adaptation"]
    for head in ("ridge", "knn", "svm"):
        assert transfer("run", *common, f"head={head}").code == 0
    done = transfer("validate", *VALIDATE)
    assert done.code == 0, done.err
    for run in Path("outputs/runs").glob("*/*"):
        assert all(score < 0 for score in kept(run)["scores"].values()) and len(kept(run)["scores"]) == 2


def test_the_score_of_a_run_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="not a run's folder"):
        reverse.reverse_score(str(tmp_path), {})
