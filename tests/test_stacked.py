"""Seeds that train together: each one's steps are those of its single run, and its run folder is an ordinary one."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from test_resume import assert_same, outcome_of

from transfer_cli import experiment, together
from transfer_cli.build import build_method, labelled_sizes, pose_problem, training_labels
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.identity import identify
from transfer_cli.config.schema import OUTSIDE_IDENTITY
from transfer_cli.data import batching
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.loops import stacked
from transfer_cli.loops.console import Console, SeedConsole
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.session import Session, make_session, run_phases
from transfer_cli.loops.stack import stack_trees
from transfer_cli.loops.stacked import check_stackable, run_together
from transfer_cli.run_folder import RunFolder

Transfer = Callable[..., Outcome]

STEPS = 5
TINY = [
    "experiment=smoke", "device=cpu", f"trainer.steps={STEPS}", "trainer.batch_size=16", "trainer.eval_every=100",
    "trainer.log_every=1", "backbone.widths=[4,6]", "backbone.features=10", "subset.source=64", "subset.target=48",
    "subset.test=20", "source.n=300", "source.n_test=50", "threads=1",
]  # fmt: skip


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks and inputs in float64."""
    to_model = batching.to_model

    def doubled(x: Any, *args: Any) -> Any:
        x = to_model(x, *args)
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    monkeypatch.setattr(batching, "to_model", doubled)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sessions_of(overrides: Sequence[str], seeds: Sequence[int], outputs: Path) -> list[Session]:
    config = typed(composed([*overrides, f"outputs={outputs}"]))
    components, device, made = resolve_components(config), torch.device("cpu"), []
    problem = pose_problem(config, components)
    shape, labels, sizes = problem.task.shape, training_labels(problem.task), labelled_sizes(problem.task)
    for seed in seeds:
        own = replace(config, seed=seed)
        method = build_method(own, components, shape, device, labels, sizes=sizes)
        evaluator = make_evaluator(own, problem.task, problem.heldout, device)
        identity = identify(own, components)
        folder = RunFolder(identity.folder(outputs))
        folder.path.mkdir(parents=True)
        voice, interrupt = SeedConsole(seed), Interrupt()
        made.append(
            make_session(own, components, problem.task, method, evaluator, folder, identity, device, voice, interrupt)
        )
    return made


def logged(session: Session) -> list[dict[str, Any]]:
    lines = session.metrics.path.read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["split"] in ("train", "diagnostics")]


def apart(ours: Session, own: Session) -> float:
    """The largest difference between two runs' tensors; what they logged, which is float32, agrees or the test fails."""
    a, b = ours.method.state_dict(), own.method.state_dict()
    assert a.keys() == b.keys()
    largest = [float((a[name].double() - b[name].double()).abs().max()) for name in a if a[name].numel()]
    for x, y in zip(logged(ours), logged(own), strict=True):
        assert x["values"].keys() == y["values"].keys() and x["step"] == y["step"]
        assert x["values"] == pytest.approx(y["values"], rel=1e-5, abs=1e-6)
    return max(largest)


def compare(overrides: Sequence[str], tmp_path: Path, seeds: Sequence[int] = (0, 5)) -> float:
    single = sessions_of(overrides, seeds, tmp_path / "single")
    before = {name: value.clone() for name, value in single[0].method.state_dict().items()}
    for session in single:
        run_phases(session)
    after = single[0].method.state_dict()
    moved = [name for name in before if before[name].shape == after[name].shape and not before[name].equal(after[name])]
    assert moved, "nothing was trained"
    ours = sessions_of(overrides, seeds, tmp_path / "together")
    for session in ours:
        check_stackable(session)
    _, failed = run_together(ours, Console())
    assert failed == {}
    first, second = (session.method.state_dict() for session in ours[:2])
    assert any(not first[name].equal(second[name]) for name in moved), "seeds differ"
    return max(apart(a, b) for a, b in zip(ours, single, strict=True))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, rendered_once: None) -> None:
    """No figure is drawn."""
    monkeypatch.setattr(together, "draw_figures", lambda folder: None)
    monkeypatch.setattr(experiment, "draw_figures", lambda folder: None)


# BatchNorm and dropout throughout (the discriminators'), several updates a step (mcd), a hook after each step and augmented views
# (mean_teacher), phases one after another (adda), granted labels, statistics of each domain, Adam.
@pytest.mark.parametrize(
    "more",
    [
        ["method=source_only"],
        ["method=dann", "backbone.dropout=0.3"],
        ["method=deep_coral", "trainer.domain_batches=joint"],
        ["method=mcc", "optimizer=adamw"],
        ["method=mcd"],
        ["method=cdan_e", "trainer.clip_norm=0.5"],
        ["method=mean_teacher"],
        ["method=adda", "method.source_steps=4"],
        ["method=finetune", "target_labels=1", "method.source_steps=4", "optimizer=adam"],
        ["method=source_only", "target_labels=1", "trainer.ema=0.8"],
        ["method=dann", "trainer.domain_batches=domain_specific"],
        ["method=mc_dropout", "method.rate=0.2"],
    ],
    ids=" ".join,
)
def test_steps_are_those_of_single_runs(double: None, tmp_path: Path, more: list[str]) -> None:
    assert compare([*TINY, *more], tmp_path) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["can", "dan", "jan", "afn", "fixmatch", "tent", "swag", "mdd", "pada", "vbll", "laplace"]
)
def test_more_methods(double: None, tmp_path: Path, name: str) -> None:
    more = {
        "pada": ["label_space=partial", "subset.target_classes=['0','1','2']"],
        "laplace": ["method.covariance=full"],  # eigenvectors of Kronecker factors have signs of their own
    }
    assert compare([*TINY, f"method={name}", *more.get(name, [])], tmp_path) < 1e-9


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["method=wdgrl"], "draws random numbers within a step"),
        (["method=delta", "target_labels=1", "method.source_steps=2"], "differentiates within its objective"),
        # It asks tensors whether they require a gradient, which those of a stack answer wrongly.
        (["method=l2_sp", "target_labels=1", "method.source_steps=2"], "loss term 'l2_sp' of seed 0 differs"),
        (["optimizer=sam"], "optimizer"),
        (["trainer.precision=bf16"], "trainer.precision=32"),
        (["method=coral"], "trains no backbone"),
    ],
    ids=str,
)
def test_what_does_not_stack_is_one_line(transfer: Transfer, tmp_path: Path, more: list[str], reason: str) -> None:
    outcome = transfer("run", *TINY, *more, "seeds_together=2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and reason in outcome.err, outcome.err
    states = [json.loads(path.read_text())["state"] for path in tmp_path.rglob("status.json")]
    # What was trained before the step that does not stack is kept, for each seed's own run to go on from.
    assert states == (["running"] * 2 if "method.source_steps=2" in more else [])


def runs_of(tmp_path: Path, outputs: str) -> list[Path]:
    return sorted(
        (tmp_path / outputs / "runs").glob("*/*-seed*"), key=lambda p: int(p.name.split("seed")[1].split("-")[0])
    )


SHORT = [*TINY, "method=dann", "trainer.steps=12", "trainer.eval_every=6", "trainer.checkpoint_every=3"]


def test_each_seed_is_an_ordinary_run(transfer: Transfer, tmp_path: Path) -> None:
    assert transfer("run", *SHORT, "seeds_together=3", "outputs=a").code == 0
    assert transfer("run", "-m", *SHORT, "seed=0,1,2", "outputs=b").code == 0
    ours, own = runs_of(tmp_path, "a"), runs_of(tmp_path, "b")
    assert [run.name for run in ours] == [run.name for run in own] and len(ours) == 3
    for a, b in zip(ours, own, strict=True):
        assert {p.name for p in a.rglob("*")} == {p.name for p in b.rglob("*")}
        for x, y in zip(events(a), events(b), strict=True):
            assert {k: x[k] for k in ("step", "phase", "split")} == {k: y[k] for k in ("step", "phase", "split")}
            if x["split"] == "train":
                assert x["values"] == pytest.approx(y["values"], rel=1e-2)
        assert json.loads((a / "manifest.json").read_text())["seeds_together"] == 3
        assert (a / "config.yaml").read_text() == (b / "config.yaml").read_text().replace("outputs: b", "outputs: a")
    again = transfer("run", *SHORT, "seed=1", "outputs=a")  # by itself it is found
    assert "finished before" in again.out
    grown = transfer("run", *SHORT, "seeds_together=5", "outputs=a")
    assert grown.out.count("finished before") == 3 and "seeds 3 to 4" in grown.out
    evaluated = transfer("evaluate", ours[0])
    assert "agrees" in evaluated.out


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def interrupted(transfer: Transfer, monkeypatch: pytest.MonkeyPatch, at: int, *overrides: str) -> None:
    """A run that a SIGTERM finds in step `at`."""
    step, count = stacked._Together._after_step, [0]

    def counted(self: Any, progress: Any) -> None:
        step(self, progress)
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(stacked._Together, "_after_step", counted)
        assert transfer("run", *overrides).code == 143


def test_a_stopped_stack_ends_as_one_that_was_not(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert transfer("run", *SHORT, "seeds_together=2", "outputs=a").code == 0
    interrupted(transfer, monkeypatch, 5, *SHORT, "seeds_together=2", "outputs=b")
    assert transfer("run", *SHORT, "seeds_together=2", "outputs=b").code == 0
    for a, b in zip(runs_of(tmp_path, "a"), runs_of(tmp_path, "b"), strict=True):
        assert_same(b, outcome_of(a))


def test_stacked_and_single_runs_go_on_from_one_another(
    double: None, transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert transfer("run", "-m", *SHORT, "seed=0,1", "outputs=a").code == 0
    interrupted(transfer, monkeypatch, 5, *SHORT, "seeds_together=2", "outputs=b")
    assert "going on" in transfer("run", *SHORT, "seed=1", "outputs=b").out  # one goes on alone ...
    assert transfer("run", *SHORT, "seeds_together=2", "outputs=b").code == 0  # ... and the other too
    for a, b in zip(runs_of(tmp_path, "a"), runs_of(tmp_path, "b"), strict=True):
        ours, own = (
            torch.load(run / "checkpoints" / "last.pt", weights_only=True)["parts"]["method"] for run in (b, a)
        )
        assert max(float((ours[n].double() - own[n].double()).abs().max()) for n in ours) < 1e-9


def test_a_seed_that_fails_costs_only_itself(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stack = stack_trees

    def poisoned(parts: Sequence[Any]) -> Any:
        whole = stack(parts)
        if isinstance(whole, dict) and "source" in whole:
            whole["source"][0][1].fill_(math.nan)
        return whole

    monkeypatch.setattr(stacked, "stack_trees", poisoned)
    monkeypatch.setattr(stacked, "CHECKED", 0)
    outcome = transfer("run", *SHORT, "seeds_together=3", "trainer.eval_every=12", "outputs=a")
    assert outcome.code == 2 and "1 of 3 seeds failed. seed 1:" in outcome.err and "became nan" in outcome.err
    states = [json.loads((run / "status.json").read_text())["state"] for run in runs_of(tmp_path, "a")]
    assert states == ["finished", "failed", "finished"]


def test_seeds_together_is_no_part_of_the_identity() -> None:
    assert "seeds_together" in OUTSIDE_IDENTITY
