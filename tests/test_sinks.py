"""Sinks hear what metrics.jsonl hears, once, and change nothing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, Outcome
from test_resume import assert_same, outcome_of, stop_at

from transfer_cli.sinks import SINKS, figures

Transfer = Callable[..., Outcome]

HEARD = '''
import json
import random

import numpy as np
import torch


class Heard:
    """Writes down all that it is told, beside the run, and draws from every generator."""

    def __init__(self, run):
        self.file = (run.folder / "heard.jsonl").open("w")
        self.tell(open=run.name, pair=run.pair, identity=run.identity, steps=run.settings["trainer.steps"])

    def tell(self, **what):
        random.random(), np.random.rand(), torch.rand(1)
        self.file.write(json.dumps(what) + "\\n")
        self.file.flush()

    def write(self, step, values):
        self.tell(step=step, values=dict(values))

    def close(self, state):
        self.tell(close=state)
        self.file.close()


class Shut:
    def __init__(self, run):
        raise OSError("no way in")


class Torn(Heard):
    def write(self, step, values):
        raise ValueError("torn at once")
'''
CHOSEN = [*SMALL, "method=dann", "trainer.steps=20", "trainer.eval_every=10", "trainer.log_every=5"]
SINK = ["plugins=[heard]", "sinks=[heard:Heard]"]


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path) -> None:
    (tmp_path / "heard.py").write_text(HEARD)


def heard(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "heard.jsonl").read_text().splitlines()]


def events(run: Path) -> list[tuple[int, dict[str, float]]]:
    return [figures(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check(run: Path) -> None:
    """Every event once, then the final figures; opened once, closed once."""
    first, *told, last = heard(run)
    assert first["open"] == run.name and first["identity"] == run.name[-8:] and last == {"close": "finished"}
    written = [(t["step"], t["values"]) for t in told]
    assert written[: len(events(run))] == events(run)
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    final = {f"result/{split}/{name}": value for split, values in metrics.items() for name, value in values.items()
             if isinstance(value, float)}  # fmt: skip
    rest = written[len(events(run)) :]
    assert {name: value for _, values in rest for name, value in values.items()}.items() >= final.items()


def test_a_sink_hears_everything_and_changes_nothing(transfer: Transfer) -> None:
    plain = transfer("run", *CHOSEN, "outputs=plain")
    run = transfer("run", *CHOSEN, *SINK).run
    assert run.name == plain.run.name, "a sink is no part of a run's identity"
    check(run)
    assert_same(run, outcome_of(plain.run))


def test_a_resumed_run_tells_each_event_once(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        assert transfer("run", *CHOSEN, *SINK).code == 143
    run = next(Path("outputs").rglob("heard.jsonl")).parent.resolve()
    assert heard(run)[-1] == {"close": "interrupted"}
    assert transfer("run", *CHOSEN, *SINK).code == 0
    check(run)


def test_each_run_of_a_sweep_has_a_sink_of_its_own(transfer: Transfer) -> None:
    assert transfer("run", "-m", *CHOSEN, *SINK, "method=no_adaptation", "seed=0,1").code == 0
    found = [p.parent.resolve() for p in Path("outputs").rglob("heard.jsonl")]
    assert len(found) == 2
    for run in found:
        check(run)


def test_each_seed_of_a_stack_has_a_sink_of_its_own(transfer: Transfer) -> None:
    words = ["seeds_together=2", *SMALL, "method=source_only", "trainer.steps=6", "trainer.eval_every=3"]
    assert transfer("run", *words, *SINK).code == 0
    found = [p.parent.resolve() for p in Path("outputs").rglob("heard.jsonl")]
    assert len(found) == 2
    for run in found:
        check(run)
    wrong = transfer("run", *words, "sinks=[tensorbord]")
    assert wrong.code == 2 and "Did you mean 'tensorboard'?" in wrong.err


def test_a_sink_that_fails_warns_once_and_the_run_goes_on(transfer: Transfer) -> None:
    broken = ["plugins=[heard]", "sinks=[heard:Shut,heard:Torn,heard:Heard]"]
    outcome = transfer("run", *CHOSEN, *broken)
    assert outcome.code == 0
    lines = [line for line in outcome.out.splitlines() if line.startswith("sink ")]
    assert lines == [
        "sink heard:Shut failed and is left out, the run goes on: OSError: no way in",
        "sink heard:Torn failed and is left out, the run goes on: ValueError: torn at once",
    ]


def test_a_failed_run_closes_its_sink(transfer: Transfer) -> None:
    outcome = transfer("run", *CHOSEN, *SINK, "optimizer.lr=1e30", "trainer.log_every=1")
    assert outcome.code == 2
    run = next(Path("outputs").rglob("heard.jsonl")).parent
    assert heard(run)[-1] == {"close": "failed"}


@pytest.mark.parametrize("name", SINKS)
def test_a_missing_package_is_said_before_any_work(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, p=None: None if n == SINKS[name][1] else found(n, p))
    outcome = transfer("run", *CHOSEN, f"sinks=[{name}]")
    assert outcome.code == 2 and outcome.out == "" and not Path("outputs").exists()
    assert outcome.err == f"transfer: sink {name} needs {SINKS[name][1]}: pip install 'transfer-cli[{name}]'\n"


def test_a_sink_that_does_not_exist(transfer: Transfer) -> None:
    wrong = transfer("run", *CHOSEN, "sinks=[tensorbord]")
    assert wrong.code == 2 and "Did you mean 'tensorboard'?" in wrong.err
    assert "sinks is a list: write sinks=[...]" in transfer("run", *CHOSEN, "sinks=tensorboard").err
    assert "list it to allow it" in transfer("run", *CHOSEN, "sinks=[heard:Heard]").err


# --- the packages themselves, where they are installed ---------------------------------------------


def scalars(run: Path) -> dict[tuple[str, int], float]:
    return {(name, step): value for step, values in events(run) for name, value in values.items()}


def test_tensorboard_files_hold_the_events(transfer: Transfer) -> None:
    pytest.importorskip("tensorboardX", reason="needs pip install 'transfer-cli[tensorboard]'")
    from tensorboardX.event_file_writer import EventFileWriter  # noqa: F401 - the package is whole
    from tensorboardX.proto.event_pb2 import Event

    run = transfer("run", *CHOSEN, "sinks=[tensorboard]").run
    (file,) = (run / "tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # TFRecord: length, its checksum, content, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[value.tag, event.step] = value.simple_value
        data = data[16 + size :]
    assert {key: found[key] for key in scalars(run)} == pytest.approx(scalars(run), rel=1e-6)
    assert any(tag.startswith("result/target_test/accuracy") for tag, _ in found)


@pytest.mark.filterwarnings("default")
def test_mlflow_holds_the_events_of_a_run_once(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs pip install 'transfer-cli[mlflow]'")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow.tracking import MlflowClient

    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        assert transfer("run", *CHOSEN, "sinks=[mlflow]").code == 143
    outcome = transfer("run", *CHOSEN, "sinks=[mlflow]")
    assert "sink mlflow failed" not in outcome.out
    run = outcome.run
    client = MlflowClient(f"file:{Path('outputs/mlruns').resolve()}")
    (found,) = client.search_runs([client.get_experiment_by_name("synth_digits-digits").experiment_id])
    assert found.info.run_name == run.name and found.info.status == "FINISHED"
    assert found.data.params["trainer.steps"] == "20"
    history = {
        (name, m.step): m.value
        for name in found.data.metrics
        for m in client.get_metric_history(found.info.run_id, name)
    }
    assert scalars(run).items() <= history.items()
    accuracies = client.get_metric_history(found.info.run_id, "target_test/accuracy")
    assert [m.step for m in accuracies] == [10, 20]


@pytest.mark.filterwarnings("default")
def test_wandb_writes_offline(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs pip install 'transfer-cli[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    outcome = transfer("run", *CHOSEN, "sinks=[wandb]")
    assert "sink wandb failed" not in outcome.out
    (file,) = (outcome.run / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"target_test/accuracy" in content and outcome.run.name.encode() in content
