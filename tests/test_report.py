"""The lines that end a run, the table of many runs, and a run's figures, from folders written by hand."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from transfer_cli.commands import report, show
from transfer_cli.errors import TransferError
from transfer_cli.report.closing import result_lines
from transfer_cli.report.figures import draw_figures
from transfer_cli.report.runs import collect
from transfer_cli.report.tables import aggregate
from transfer_cli.run_folder import RunFolder, write_json

PNG = b"\x89PNG\r\n"
CONFIG: dict[str, Any] = {
    "source": {"name": "synth_digits", "implementation": "m:A"},
    "target": {"name": "digits", "implementation": "m:B"},
    "backbone": {"name": "small_cnn", "widths": [32, 64]},
    "method": {"name": "dann", "weight": 1.0, "search": {"weight": {"low": 0.1}}},
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "schedule": {"name": "constant"},
    "augment": {"name": "none"},
    "trainer": {"steps": 800, "batch_size": 64},
    "selection": "auto",
    "seed": 0,
    "data_seed": 0,
}
CLASSIFICATION = {"accuracy": 0.88, "macro_f1": 0.874, "nll": 0.4123, "brier": 0.2, "ece": 0.0312}
REGRESSION = {"rmse": 0.31, "r2": 0.9, "nll": 0.25, "crps": 0.17, "coverage_95": 0.941}


def result_of(kind: str = "classification", **changes: Any) -> dict[str, Any]:
    metrics = CLASSIFICATION if kind == "classification" else REGRESSION
    best = 0.913 if kind == "classification" else -0.305
    result: dict[str, Any] = {
        "schema_version": 1,
        "source": "synth_digits",
        "target": "digits",
        "backbone": "small_cnn",
        "method": "dann",
        "seed": 0,
        "data_seed": 0,
        "kind": kind,
        "classes": [str(i) for i in range(10)] if kind == "classification" else [],
        "metrics": {"source_test": dict(metrics), "target_test": dict(metrics)},
        "selection": {
            "candidates": 15,
            "validator": "im",
            "uses_target_labels": False,
            "step": 700,
            "score": 1.9,
            "oracle": {"step": 750, "score": best, "uses_target_labels": True},
        },
        "steps": 800,
    }
    return {**result, **changes}


def write_run(
    path: Path,
    accuracy: float = 0.88,
    *,
    method: str = "dann",
    seed: int = 0,
    data_seed: int = 0,
    config: dict[str, Any] | None = None,
    validator: str = "im",
    kind: str = "classification",
    pair: tuple[str, str] = ("synth_digits", "digits"),
    time: str = "2026-11-01T10:00:00+0000",
) -> Path:
    """A finished run; `config` holds changes by dotted key."""
    path.mkdir(parents=True)
    content = copy.deepcopy(CONFIG)
    content["method"]["name"], content["seed"], content["data_seed"] = method, seed, data_seed
    for key, value in (config or {}).items():
        group, _, rest = key.partition(".")
        if rest:
            content[group][rest] = value
        else:
            content[group] = value
    result = result_of(kind, method=method, seed=seed, data_seed=data_seed, source=pair[0], target=pair[1])
    result["metrics"]["target_test"]["accuracy" if kind == "classification" else "rmse"] = accuracy
    result["selection"] |= {"validator": validator, "uses_target_labels": validator == "oracle"}
    (path / "config.yaml").write_text(yaml.safe_dump(content))
    write_json(path / "result.json", result)
    write_json(path / "status.json", {"state": "finished", "time": time})
    return path


def rows_of(folder: Path) -> dict[str, list[str]]:
    """Row name to its cells, `mean/std/n`."""
    (table,) = aggregate(collect([folder]))
    shown: dict[str, list[str]] = {}
    for row in table.rows:
        cells = [table.cells.get((row, pair)) for pair in table.pairs]
        shown[str(row)] = ["-" if c is None else f"{c.mean:.2f}/{c.std:.2f}/{len(c.runs)}" for c in cells]
    return shown


# The end of a run


def test_result_lines_of_classification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = result_lines(result_of(), tmp_path / "outputs/runs/synth_digits-digits/dann-seed0-1a2b3c4d")
    assert lines == [
        "               accuracy  macro-F1    NLL    ECE",
        "source test      88.0 %    87.4 %  0.412  0.031",
        "target test      88.0 %    87.4 %  0.412  0.031",
        "checkpoint: step 700, chosen by im without target labels "
        "(the best by target labels would have been step 750, 91.3 %)",
        "outputs/runs/synth_digits-digits/dann-seed0-1a2b3c4d        next: transfer report",
    ]


def test_result_lines_of_regression_and_of_a_folder_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    lines = result_lines(result_of("regression"), tmp_path / "runs/a-b/gp-seed0-1a2b3c4d")
    assert lines[0].split("  ")[-1] == "95 % coverage"
    assert lines[2].split() == ["target", "test", "0.31", "0.900", "0.250", "0.17", "94.1", "%"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert lines[3].endswith("(the best by target labels would have been step 750, RMSE 0.305)")
    assert lines[4] == f"{tmp_path}/runs/a-b/gp-seed0-1a2b3c4d        next: transfer report {tmp_path}/runs"


def test_result_lines_without_a_source_test() -> None:
    result = result_of(metrics={"source_test": None, "target_test": CLASSIFICATION})
    assert [line[:11] for line in result_lines(result, Path("x"))[1:2]] == ["target test"]


@pytest.mark.parametrize(
    ("selection", "steps", "line"),
    [
        ({"validator": "oracle", "uses_target_labels": True}, 800, "step 700, chosen by oracle with target labels"),
        (
            {"validator": "last", "step": 800},
            800,
            "step 800, the last (the best by target labels would have been step 750",
        ),
        (
            {"step": 750},
            800,
            "step 750, chosen by im without target labels (target labels would have found none better)",
        ),
        (
            {"oracle": {"step": 300, "score": 0.88}},
            800,
            "without target labels (target labels would have found none better)",
        ),
        ({"step": 0, "candidates": 1}, 0, "the closed-form fit, with nothing to choose from"),
    ],
)
def test_checkpoint_line(selection: dict[str, Any], steps: int, line: str) -> None:
    result = result_of(steps=steps)
    result["selection"] |= selection
    assert line in result_lines(result, Path("x"))[-2]


def test_result_lines_refuse_what_they_cannot_read() -> None:
    with pytest.raises(TransferError, match=r"result\.json is missing or damaged in .*force=true"):
        result_lines(None, Path("x"))
    with pytest.raises(TransferError, match="schema_version 2"):
        result_lines(result_of(schema_version=2), Path("x"))


# The table


def test_seeds_are_averaged_and_the_baseline_comes_first(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((0.90, 0.92, 0.94)):
        write_run(tmp_path / f"dann{seed}", accuracy, seed=seed)
    write_run(tmp_path / "data_seed", 0.92, data_seed=1)
    write_run(tmp_path / "base", 0.7, method="source_only")
    write_run(tmp_path / "coral", 0.8, method="coral", pair=("mnist", "usps"))
    assert rows_of(tmp_path) == {
        "source_only": ["-", "70.00/nan/1"],
        "coral": ["80.00/nan/1", "-"],
        "dann": ["-", "92.00/1.63/4"],
    }


def test_settings_that_differ_make_rows_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.8, config={"method.weight": 0.5}, seed=1)
    write_run(tmp_path / "base", 0.7, method="source_only")
    assert set(rows_of(tmp_path)) == {"source_only", "dann method.weight=0.5", "dann method.weight=1"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"target_labels": 5}, "target_labels=5"),
        ({"protocol": "transductive"}, "protocol=transductive"),
        ({"backbone": {"name": "resnet18", "weights": "imagenet"}}, "backbone=resnet18"),
        ({"optimizer": {"name": "adam", "lr": 0.001}}, "optimizer=adam"),
        ({"trainer.steps": 100}, "trainer.steps=100"),
        ({"backbone.widths": [8, 8]}, "backbone.widths=[8,8]"),
        ({"trainer.clip_norm": 1.0}, "trainer.clip_norm=1"),
    ],
)
def test_other_methods_with_other_settings_are_told_apart_too(
    tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    write_run(tmp_path / "base", 0.7, method="source_only")
    write_run(tmp_path / "dann", 0.9, config=config)
    names = list(rows_of(tmp_path))
    assert names[1] == f"dann {told}"
    assert names[0].startswith("source_only ")


def test_a_method_s_versions_are_rows_and_those_of_several_methods_are_not_told(tmp_path: Path) -> None:
    for method, version, accuracy in (("dann", 1, 0.8), ("mcd", 1, 0.5), ("mcd", 2, 0.9)):
        run = write_run(tmp_path / f"{method}{version}", accuracy, method=method)
        write_json(run / "manifest.json", {"components": {"method": {"name": method, "version": version}}})
    assert [*rows_of(tmp_path)] == ["dann", "mcd method.version=1", "mcd method.version=2"]


def test_settings_of_different_pairs_need_no_label(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.8, config={"trainer.steps": 3000}, pair=("mnist", "usps"))
    assert rows_of(tmp_path) == {"dann": ["80.00/nan/1", "90.00/nan/1"]}


def test_what_leaves_the_identity_alone_is_averaged(tmp_path: Path) -> None:
    changes = {"device": "cuda", "workers": 7, "outputs": "/elsewhere", "plugins": ["mine"], "selection": "im"}
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.8, seed=1, config={**changes, "method.implementation": "moved:DANN"})
    assert rows_of(tmp_path) == {"dann": ["85.00/7.07/2"]}


def test_data_of_one_name_and_other_files_are_other_columns(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.9, pair=("arrays", "digits"), config={"source.path": "a.npz"})
    write_run(tmp_path / "b", 0.8, pair=("arrays", "digits"), config={"source.path": "b.npz"})
    (table,) = aggregate(collect([tmp_path]))
    assert table.pairs == [("arrays path=a.npz", "digits"), ("arrays path=b.npz", "digits")]


def test_the_oracle_is_marked_and_stays_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.95, validator="oracle", config={"selection": "oracle"})
    assert list(rows_of(tmp_path)) == ["dann", "dann (oracle)"]
    write_run(tmp_path / "c", 0.85, validator="last", config={"selection": "last"})
    assert list(rows_of(tmp_path)) == ["dann selection=im", "dann selection=last", "dann (oracle)"]


def test_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "new", 0.9, time="2026-11-03T10:00:00+0000")
    write_run(tmp_path / "old", 0.5)
    assert rows_of(tmp_path) == {"dann": ["90.00/nan/1"]}
    (table,) = aggregate(collect([tmp_path]))
    assert [path.name for path in table.older] == ["old"]


def test_regression_has_a_table_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", 0.9)
    write_run(tmp_path / "b", 0.04321, kind="regression")
    assert [table.kind for table in aggregate(collect([tmp_path]))] == ["classification", "regression"]
    assert report.main([str(tmp_path)]) == 0
    assert "0.04321 (1)" in capsys.readouterr().out


# The command


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In `outputs/runs`: two finished seeds, an oracle's run, a failed, an interrupted and a damaged one."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs/runs/synth_digits-digits"
    write_run(folder / "dann-seed0-aaaaaaaa", 0.90)
    write_run(folder / "dann-seed1-bbbbbbbb", 0.92, seed=1)
    write_run(folder / "dann-seed0-cccccccc", 0.95, validator="oracle", config={"selection": "oracle"})
    for name, status in {
        "coral-seed0-dddddddd": {"state": "failed", "error": "the loss term 'supervised'\nbecame nan | step 3"},
        "mcd-seed0-eeeeeeee": {"state": "running"},
    }.items():
        (folder / name).mkdir()
        write_json(folder / name / "status.json", status)
    (write_run(folder / "adda-seed0-ffffffff") / "result.json").write_text("{")
    return folder


def test_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([]) == 0
    assert capsys.readouterr().out == (
        """\
accuracy on the target test set, %: mean ± standard deviation (runs)
backbone=small_cnn target_labels=0 protocol=inductive label_space=closed selection=im

                synth_digits
                -> digits
dann            91.0 ± 1.4 (2) +1 failed
dann (oracle)   95.0 (1)

(oracle): target test labels chose the checkpoint, so these are upper bounds, not results

failed (retry_failed=true runs them again)
  outputs/runs/synth_digits-digits/adda-seed0-ffffffff  result.json is missing or damaged: force=true runs it again
  outputs/runs/synth_digits-digits/coral-seed0-dddddddd  the loss term 'supervised' became nan | step 3

unfinished (the same command goes on with an interrupted run)
  outputs/runs/synth_digits-digits/mcd-seed0-eeeeeeee  interrupted
"""
    )


def test_markdown(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--format", "md", "outputs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("| method | synth_digits -> digits |")
    assert lines[start + 1 : start + 4] == [
        "| --- | ---: |",
        "| dann | 91.0 ± 1.4 (2) +1 failed |",
        "| dann (oracle) | 95.0 (1) |",
    ]
    assert "- outputs/runs/synth_digits-digits/mcd-seed0-eeeeeeee  interrupted" in lines


def test_csv(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "method,settings,oracle,source,target,metric,mean,std,runs,seeds,data_seeds,baseline,worse,im_worse,"
        "bound,best,failed,unfinished,unscored",
        "dann,,false,synth_digits,digits,accuracy_percent,91.0,1.4142135623730951,2,0 1,0 0,,,,false,false,1,0,0",
        "dann,,true,synth_digits,digits,accuracy_percent,95.0,,1,0,0,,,,false,false,0,0,0",
    ]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("result.json", {"schema_version": 1}, "it lacks figures"),
        ("result.json", [], "missing or damaged"),
        ("result.json", result_of("classification") | {"selection": None}, "it lacks figures"),
        ("result.json", result_of("classification") | {"selection": {"step": 1}}, "it lacks candidates, uses_target"),
        (
            "result.json",
            result_of("classification") | {"metrics": {"target_test": {"accuracy": None}}},
            "lacks figures",
        ),
        ("status.json", "x", "adda-seed0-ffffffff  new"),
        ("manifest.json", 3, "91.0"),
        ("validators.json", {"scores": 5}, "91.0"),
    ],
)
def test_a_damaged_run_takes_no_other_with_it(
    runs: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, said: str
) -> None:
    damaged = runs / "adda-seed0-ffffffff"
    write_json(damaged / "result.json", result_of("classification"))
    write_json(damaged / name, content)
    report.main([])
    shown = capsys.readouterr().out
    assert said in shown and "91.0 ± 1.4 (2)" in shown
    for arguments in (["--html", str(runs / "page.html")], ["--select", "oracle"], ["--format", "json"]):
        assert report.main(arguments) == 0
    assert show.main([str(damaged)]) == 0


def test_a_run_named_twice_counts_once(runs: Path) -> None:
    one = runs / "dann-seed0-aaaaaaaa"
    assert len(collect([one, one, runs, Path("outputs")])) == 6
    assert [record.path for record in collect([one])] == [one.relative_to(Path.cwd())]


def test_nothing_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TransferError, match=r"no runs under outputs/runs: start one with `transfer run`"):
        report.main([])
    with pytest.raises(TransferError, match="there is no folder nowhere"):
        report.main(["nowhere"])
    with pytest.raises(TransferError, match="--format must be one of text, md, csv"):
        report.main(["--format", "mdd"])


def test_report_imports_neither_torch_nor_hydra(runs: Path) -> None:
    code = (
        "import sys; from transfer_cli.commands.report import main; import transfer_cli.report.figures; main([]);"
        "print(sorted({'torch', 'hydra', 'omegaconf', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {"PYTHONPATH": str(Path(report.__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.strip() == "[]"
    assert "91.0" in done.stdout


# Figures


def write_events(folder: Path, *, steps: int = 800, phases: tuple[str, ...] = ("adapt",)) -> None:
    lines = []
    for step in range(50, steps + 1, 50):
        phase = phases[min(len(phases) - 1, (step - 1) * len(phases) // steps)]
        for split, values in {
            "train": {"supervised": 2.0 / step, "domain": 0.69},
            "validators": {"im": step / steps, "entropy": -1.0, "source_val": float("nan")},
            "target_test": {"accuracy": 0.5 + step / 2000, "rmse": 1.0 / step, "nll": 1.0},
        }.items():
            lines.append(json.dumps({"step": step, "phase": phase, "split": split, "values": values}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))


def classified(folder: Path, classes: list[str], heads: int | None = None) -> RunFolder:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes), 200)
    probs = rng.dirichlet(np.ones(heads or len(classes)), 200)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "predictions.npz", target_test_labels=labels, target_test_probs=probs)
    write_json(folder / "result.json", result_of(classes=classes))
    return RunFolder(folder)


def test_figures_of_classification_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    drawn = []
    for name in ("a", "b"):
        folder = classified(tmp_path / name, ["ants", "bees", "a$b_{", "虫", "a class with a very long name"])
        write_events(folder.path, phases=("pretrain", "adapt"))
        draw_figures(folder)
        drawn.append({path.name: path.read_bytes() for path in folder.figures.iterdir()})
    assert set(drawn[0]) == {"learning_curves.png", "confusion_target_test.png", "reliability.png"}
    assert all(content.startswith(PNG) for content in drawn[0].values())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("classes", "heads"), [(31, None), (4, 3)])
def test_confusion_of_many_classes_and_of_a_class_without_a_head(
    tmp_path: Path, classes: int, heads: int | None
) -> None:
    folder = classified(tmp_path, [str(i) for i in range(classes)], heads)
    draw_figures(folder)
    assert {path.name for path in folder.figures.iterdir()} == {"confusion_target_test.png", "reliability.png"}


def test_a_closed_form_fit_has_no_learning_curve(tmp_path: Path) -> None:
    folder = classified(tmp_path, ["a", "b"])
    for split in ("validators", "target_test"):
        event = {"step": 0, "phase": "fit", "split": split, "values": {"im": 1.0, "accuracy": 0.5}}
        with folder.metrics.open("a") as file:
            file.write(json.dumps(event) + "\n")
    draw_figures(folder)
    assert not (folder.figures / "learning_curves.png").exists()


@pytest.mark.parametrize("width", [1, 3])
def test_figures_of_regression(tmp_path: Path, width: int) -> None:
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(400, width)).astype(np.float32)
    np.savez(
        tmp_path / "predictions.npz",
        target_test_labels=labels,
        target_test_mean=labels + 0.1,
        target_test_variance=np.full_like(labels, 0.04),
    )
    write_json(tmp_path / "result.json", result_of("regression"))
    write_events(tmp_path)
    draw_figures(RunFolder(tmp_path))
    names = {"learning_curves.png", "predicted_target_test.png", "reliability.png"}
    assert {p.name for p in (tmp_path / "figures").iterdir()} == names


def test_methods_without_a_choice_of_head_do_not_make_others_tell_theirs(tmp_path: Path) -> None:
    head = {"head": {"name": "logistic", "l2": 0.001}}
    write_run(tmp_path / "a", method="coral", config=head)
    write_run(tmp_path / "b", method="dann")
    assert set(rows_of(tmp_path)) == {"coral", "dann"}
    write_run(tmp_path / "c", method="coral", config={"head": {"name": "knn", "k": 1}})
    assert {"coral head=knn", "coral head=logistic"} < set(rows_of(tmp_path))
