"""The front door: help without torch, every bad input one clear line and exit code 2, sweeps, completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, Outcome

from transfer_cli.config import hydra_glue

Transfer = Callable[..., Outcome]


def in_a_process(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "transfer_cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_help_is_instant_and_imports_no_torch(tmp_path: Path) -> None:
    shown = in_a_process("--help", cwd=tmp_path)
    assert shown.returncode == 0 and "transfer run" in shown.stdout
    code = "import sys; from transfer_cli.cli import _main; _main(['--help']); "
    code += "print([m for m in sys.modules if m in ('torch', 'hydra', 'numpy')])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "[]"
    took = min(_seconds("--help", tmp_path) - _seconds(None, tmp_path) for _ in range(5))
    assert took < 0.2, took


def _seconds(argument: str | None, cwd: Path) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-c", "pass"] if argument is None else [sys.executable, "-m", "transfer_cli", argument]
    subprocess.run(command, cwd=cwd, capture_output=True, check=True)
    return time.perf_counter() - began


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "no command 'rnu'. Did you mean 'run'?"),
        (["run", "method=dnan"], "no method named 'dnan'. Did you mean 'dann'? `transfer list method` shows all."),
        (["run", "source=mnsit"], "no source named 'mnsit'. Did you mean 'mnist'?"),
        (["run", "backbone=resnet5"], "Did you mean 'resnet50'?"),
        (["run", "optimizer=adamm"], "Did you mean 'adam"),
        (["run", "experiment=smok"], "Did you mean 'smoke'?"),
        (["run", "selection=imm"], "Did you mean 'im'?"),
        (["run", "method.weihgt=2"], "no key 'method.weihgt' in method 'dann'. Did you mean 'weight'?"),
        (["run", "+method.weihgt=2"], "method 'dann' has no key 'weihgt'. Did you mean 'weight'?"),
        (["run", "trainer.stps=3"], "no key 'trainer.stps'. Did you mean 'steps'?"),
        (["run", "+trainer.stpes=3"], "no key 'trainer.stpes'. Did you mean 'steps'?"),
        (["run", "+sede=3"], "no key 'sede'. Did you mean 'seed'?"),
        (["run", "trainer.steps=abc"], "trainer.steps"),
        (["run", "method.weight=abc"], "method.weight must be a number, not 'abc'."),
        (["run", "trainer.precision=8"], "trainer.precision must be one of 32, bf16, 16; not '8'."),
        (["run", "seed={0"], "cannot read the override 'seed={0'"),
        (["run", "target_labels=-1"], "target_labels must be 0, a number per class, or all"),
        (["run", "image.size=-3"], "image.size must be auto or a number of pixels"),
        (["run", "device=cuda:77"], "device=cuda:77"),
        (["run", "device=gpu"], "device must be auto, cpu, cuda"),
        (["run", "source=mnist"], "TRANSFER_DATA"),
        (["run", "source=mnist", "data_root=nowhere"], "download=true"),
        (["run", "source=image_folder", "source.path=nowhere"], "nowhere"),
        (["run", "source=arrays", "source.path=nothing.npz", "data_root=."], "nothing.npz"),
        (["run", *SMALL, "method=finetune"], "finetune needs target labels: set target_labels=N"),
        (["run", *SMALL, "source=none"], "dann needs a labelled source: set source=NAME."),
        (["run", *SMALL, "source=none", "method=linear_probe"], "linear_probe needs labels"),
        (["run", *SMALL, "trainer.batch_size=601"], "trainer.batch_size=601 is larger than the"),
        (["run", *SMALL, "target_labels=900"], "target_labels=900: digits has fewer training samples"),
        (["run", *SMALL, "subset.source=4"], "no training sample of class"),
        (["run", *SMALL, "backbone.freeze=up-to-block9"], "Did you mean 'up-to-block"),
        (["run", *SMALL, "backbone.weights=nothing.pt"], "backbone.weights: there is no file nothing.pt."),
        (["run", *SMALL, "backbone=resnet18", "backbone.weights=none", "image.channels=1"], "set image.channels=3"),
        (["run", "plugins=[no_such_module]", "method.implementation=no_such_module:X"], "no_such_module"),
        (["run", "trainer.clip_norm=-1"], "trainer.clip_norm is a positive norm"),
        (["run", "bottleneck=0"], "bottleneck is a width, at least 1"),
        (["run", "method=null"], "can be null: choose a NAME"),
        (["run", *SMALL, "schedule.warmup=-1"], "schedule 'inverse_decay': warmup is a share between 0 and 1"),
        (["run", *SMALL, "optimizer.lr=-1"], "optimizer 'sgd': Invalid learning rate: -1.0"),
        (["run", *SMALL, "method.dropout=2"], "method 'dann': dropout probability"),
        (["run", *SMALL, "augment.scale=[0,1]"], "augment 'digits': scale is [low, high] with 0 < low <= high"),
        (["run", *SMALL, "image.size=4"], "backbone small_cnn halves image of 1 x 4 x 4"),
        (["run", *SMALL, "backbone.widths=[]"], "backbone small_cnn"),
        (["run", *SMALL, "backbone=lenet", "image.size=4"], "backbone lenet cannot take"),
        (["run", *SMALL, "method=tca", "method.ridge=0"], "method.ridge must be positive"),
        (["run", *SMALL, "method=tca", "head=svn"], "no head named 'svn'. Did you mean 'svm'?"),
        (["run", *SMALL, "method=tca", "features.normalise=[l3]"], "features.normalise must be one of"),
        (["evaluate", "nowhere"], "nowhere is not a run's folder"),
        (["predict", "nowhere", "x.png"], "nowhere is not a run's folder"),
        (["run", "--config-dir", "nowhere"], "there is no folder nowhere"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], said: str
) -> None:
    monkeypatch.delenv("TRANSFER_DATA", raising=False)
    outcome = transfer(*arguments)
    assert outcome.code == 2
    assert said in outcome.err, outcome.err
    assert outcome.err.startswith("transfer: ") and len(outcome.err.splitlines()) == 1, outcome.err
    assert not [p for p in tmp_path.rglob("outputs/runs/*")], "nothing was begun, and nothing stays"


def test_invalid_yaml_of_ones_own_names_the_line(transfer: Transfer, tmp_path: Path) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text("name: mine\nimplementation: [\n")
    outcome = transfer("run", "method=mine")
    assert outcome.code == 2 and "not valid YAML" in outcome.err and "mine.yaml, line" in outcome.err


def test_a_typo_in_ones_own_yaml(transfer: Transfer, tmp_path: Path) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(
        "name: mine\nimplementation: transfer_cli.methods.adversarial.dann:DANN\nwieght: 2.0\n"
    )
    outcome = transfer("run", *SMALL, "method=mine")
    assert outcome.code == 2 and "method 'mine' has no key 'wieght'. Did you mean 'weight'?" in outcome.err


def test_ones_own_file_wins_over_the_packaged_one(transfer: Transfer, tmp_path: Path) -> None:
    for folder, weight in (("conf", 0.25), ("other", 0.75)):
        (tmp_path / folder / "method").mkdir(parents=True)
        (tmp_path / folder / "method" / "dann.yaml").write_text(
            f"name: dann\nimplementation: transfer_cli.methods.adversarial.dann:DANN\nweight: {weight}\n"
        )
    assert "weight: 0.25" in transfer("run", "--cfg", "job", "--package", "method").out
    assert "weight: 0.75" in transfer("run", "--config-dir", "other", "--cfg", "job", "--package", "method").out
    run = transfer("run", "--config-dir", "other", *SMALL, "method=dann", "trainer.steps=2").run
    command = json.loads((run / "manifest.json").read_text())["command"]
    assert command[:4] == ["transfer", "run", "--config-dir", str(tmp_path / "other")]


def test_domains_that_do_not_fit_are_refused_with_the_way_out(transfer: Transfer, tmp_path: Path) -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    for name, classes, width in (("a", 3, 5), ("b", 2, 5), ("c", 3, 7)):
        labels = np.arange(60) % classes
        np.savez(tmp_path / f"{name}.npz", x=draw.normal(size=(60, width)).astype(np.float32), y=labels)
    vectors = [
        *SMALL,
        "source=arrays",
        "target=arrays",
        "backbone=mlp",
        "augment=none",
        "trainer.batch_size=8",
        "data_root=.",
    ]
    fewer = transfer("run", *vectors, "source.path=a.npz", "target.path=b.npz")
    assert fewer.code == 2 and "label_space=partial" in fewer.err
    assert transfer("run", *vectors, "source.path=a.npz", "target.path=b.npz", "label_space=partial").code == 0
    assert transfer("run", *vectors, "source.path=a.npz", "target.path=b.npz", "subset.source_classes=[0,1]").code == 0
    absent = transfer("run", *vectors, "source.path=a.npz", "target.path=b.npz", "subset.source_classes=[0,7]")
    assert absent.code == 2 and "a has no class 7; its classes are 0, 1, 2." in absent.err
    wider = transfer("run", *vectors, "source.path=a.npz", "target.path=c.npz")
    assert wider.code == 2 and "differ in width" in wider.err
    kinds = transfer("run", *vectors, "source.path=a.npz", "target=digits", "label_space=open")
    assert (kinds.code == 2 and "differ in kind" in kinds.err) or "label_space" in kinds.err


def test_unwritable_outputs(transfer: Transfer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    outcome = transfer("run", *SMALL, "outputs=taken")
    assert outcome.code == 2 and "cannot write to" in outcome.err and "outputs=DIR" in outcome.err


def test_a_loss_that_is_not_finite_names_step_and_term(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_cli.methods.adversarial.dann import DANN
    from transfer_cli.methods.phases import Losses

    original = DANN.losses

    def poisoned(self: DANN, batch: Any, progress: Any) -> Losses:
        losses = original(self, batch, progress)
        factor = float("nan") if progress.step == 12 else 1.0
        return replace(
            losses,
            terms={**losses.terms, "domain": losses.terms["domain"] * factor},
        )

    monkeypatch.setattr(DANN, "losses", poisoned)
    chosen = [*SMALL, "trainer.log_every=5", "trainer.checkpoint_every=5"]
    outcome = transfer("run", *chosen)
    assert outcome.code == 2
    assert "the loss term 'domain' became nan at step 13 of phase 'adapt'" in outcome.err
    assert "the last good checkpoint is that of step 10" in outcome.err
    run = next(Path("outputs/runs/synth_digits-digits").iterdir())
    weights = torch.load(run / "checkpoints" / "last.pt", weights_only=True)["parts"]["method"]
    assert all(bool(torch.isfinite(w).all()) for w in weights.values() if w.is_floating_point())
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and "loss term 'domain'" in status["error"]
    again = transfer("run", *chosen)
    assert again.code == 2 and "failed before" in again.err and "retry_failed=true" in again.err
    monkeypatch.undo()
    monkeypatch.chdir(run.resolve().parents[3])
    assert transfer("run", *chosen, "retry_failed=true").code == 0


def test_a_failing_run_does_not_take_the_sweep_with_it(transfer: Transfer) -> None:
    outcome = transfer("run", "-m", *SMALL, "trainer.steps=5", "method=source_only", "optimizer.lr=1e30,0.01")
    assert outcome.code == 2
    assert "1 of the sweep's runs failed" in outcome.err and "[" in outcome.err and "optimizer.lr=1e" in outcome.err
    assert outcome.out.count("next: transfer report") == 1
    shown = transfer("report")
    assert "failed" in shown.out and "loss term" in shown.out


def test_a_run_held_by_another_process_is_refused(transfer: Transfer, tmp_path: Path) -> None:
    run = transfer("run", *SMALL).run
    code = f"import fcntl, sys; f = open({str(run / 'lock')!r}, 'ab'); fcntl.lockf(f, fcntl.LOCK_EX);"
    code += "print('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        holder.stdout.readline()
        refused = transfer("run", *SMALL)
        assert refused.code == 2 and "running in process" in refused.err
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()
    assert transfer("run", *SMALL).code == 0  # the lock died with its process


def test_changed_data_are_noticed(transfer: Transfer, tmp_path: Path) -> None:
    import numpy as np

    def write(shift: float) -> None:
        draw = np.random.default_rng(0)
        np.savez(tmp_path / "a.npz", x=(draw.normal(size=(90, 5)) + shift).astype(np.float32), y=np.arange(90) % 3)

    write(0.0)
    chosen = [
        *SMALL,
        "source=arrays",
        "source.path=a.npz",
        "target=arrays",
        "target.path=a.npz",
        "backbone=mlp",
        "data_root=.",
    ]
    chosen += ["trainer.batch_size=16"]
    assert transfer("run", *chosen).code == 0
    write(1.0)
    outcome = transfer("run", *chosen)
    assert outcome.code == 2 and "data changed since this run" in outcome.err and "force=true" in outcome.err
    assert transfer("run", *chosen, "force=true").code == 0


def test_hydra_flags_work(transfer: Transfer) -> None:
    assert "method: dann" not in transfer("run", "--cfg", "job").out
    assert "name: dann" in transfer("run", "--cfg", "job").out
    assert re.search(r"method: .*\bdann, deep_coral", transfer("run", "--help").out)
    assert "Defaults" in transfer("run", "--info", "defaults").out


def test_sweeps_leave_their_own_folder(transfer: Transfer) -> None:
    outcome = transfer("run", *SMALL, "trainer.steps=3", "-m", "method=source_only", "seed=0,1")
    assert outcome.code == 0
    assert len(list(Path("outputs/sweeps").glob("*/multirun.yaml"))) == 1
    assert len(list(Path("outputs/runs/synth_digits-digits").iterdir())) == 2
    assert not Path("multirun").exists() and not Path(".hydra").exists()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("transfer re", "report"),
        ("transfer run method=dee", "method=deep_coral"),
        ("transfer run source=synth", "source=synth_digits"),
        ("transfer run trainer.st", "trainer.steps="),
        ("transfer run backbone=resnet5", "backbone=resnet50"),
    ],
)
def test_completion(tmp_path: Path, line: str, offered: str) -> None:
    shown = in_a_process("-sc", "query=bash", cwd=tmp_path, COMP_LINE=line)
    assert offered in shown.stdout.split(), shown.stderr
    assert shown.stderr == ""


def test_predict_takes_a_data_set_of_ones_own_and_says_what_it_cannot_do(transfer: Transfer, tmp_path: Path) -> None:
    run = str(transfer("run", *SMALL).run)
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "more.yaml").write_text("defaults: [synth_digits]\nname: more\nn_test: 20\n")
    predicted = transfer("predict", run, "--dataset", "more", "n=40")
    assert predicted.code == 0 and len(predicted.out.splitlines()) == 1 + 20, predicted.err
    for arguments, said in (
        ([run, "--dataset", "mor"], "no target named 'mor'. Did you mean 'more'?"),
        ([run, "--dataset", "digits", "nn=3"], "no key 'target.nn'"),
        ([run, "--dataset", "digits", "extra"], "'extra' is not key=value; the run's folder comes before --dataset"),
        ([run, "nowhere.png"], "there is no image nowhere.png"),
        ([run, "--dataset", "digits", "--draws", "2"], "only gp draws functions"),
        ([run, "--dataset", "digits", "--output", "no/such/folder.csv"], "--output no/such/folder.csv: No such file"),
    ):
        outcome = transfer("predict", *arguments)
        assert outcome.code == 2 and said in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err


def test_a_sweep_names_the_runs_that_failed(transfer: Transfer) -> None:
    outcome = transfer("run", "-m", *SMALL, "method=source_only,finetune", "trainer.steps=10")
    assert outcome.code == 2
    said = outcome.err.splitlines()
    assert any("1 of the sweep's runs failed" in line for line in said) and "method=finetune" in said[-1]


def test_what_is_of_the_whole_sweep_stays_one_value_over_experiments() -> None:
    of_the_sweep = ["-m", "experiment=a,b", "hydra.launcher.jobs=2", "sweep.n=3", "seed=0,1"]
    given = [*of_the_sweep, "method.weight=1"]
    assert hydra_glue._keys_of_each_job(given) == [*of_the_sweep, "method.weight=choice(1)"]


def test_several_methods_share_a_key_that_the_default_method_has_not(transfer: Transfer) -> None:
    sweep = ["method=coral,sstca", "method.ridge=2", "seed=0,1"]
    assert hydra_glue._keys_of_each_job([*sweep, "optimizer.lr=1"])[1:] == [
        "method.ridge=choice(2)",
        "seed=0,1",
        "optimizer.lr=1",
    ]
    assert [line for line in transfer("plan", *sweep, "--runs").out.splitlines() if line.startswith("new")] == [
        f"new         method={method} method.ridge=2 seed={seed}" for method in ("coral", "sstca") for seed in (0, 1)
    ]
    refused = transfer("plan", "method=coral,kpca", "method.ridge=2")
    assert refused.code == 2 and "there is no key 'method.ridge' in method 'kpca'" in refused.err


def test_a_sweep_over_experiments_takes_keys_of_their_methods(transfer: Transfer) -> None:
    """Hydra holds them against the default's method, which is another."""
    keys = ["method.mode=scratch", "method.hyper_posterior=map", "subset.target_classes=null", "threads=1"]
    outcome = transfer("run", "-m", "experiment=diabetes_sex,friedman_close", *keys)
    assert outcome.code == 0, outcome.err
    configs = [yaml.safe_load(path.read_text()) for path in Path("outputs/runs").glob("*/*/config.yaml")]
    assert len(configs) == 2 and {config["method"]["mode"] for config in configs} == {"scratch"}
    assert "method.mod'" in transfer("run", "-m", "experiment=diabetes_sex,friedman_close", "method.mod=scratch").err
