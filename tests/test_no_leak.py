"""Target labels that were not granted reach the evaluator's figures alone: no bit of weights, choice, scores or predictions."""

from __future__ import annotations

import copy
import gc
import json
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome
from torch import Tensor

from transfer_cli import experiment
from transfer_cli.build import Problem, pose_problem
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.schema import Config
from transfer_cli.data.domain import Domain, Part, Place, fingerprint_values, numbered
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.evaluation.evaluator import Evaluator
from transfer_cli.evaluation.validators import VALIDATORS
from transfer_cli.registry import Component

Transfer = Callable[..., Outcome]

N, CLASSES = 150, 3
LABELS: dict[str, Tensor] = {}
"""The target's labels as the reader below delivers them, by kind: what a test changes."""


class Shifted:
    """Three Gaussian classes, or a smooth function, of four columns; the target's are moved."""

    def __init__(self, place: Place, *, kind: str = "classification", target: bool = False) -> None:
        self.kind, self.target = kind, target

    def fingerprint(self) -> str:
        return fingerprint_values(self.kind, self.target)  # blind to the change

    def load(self) -> Domain:
        draw = torch.Generator().manual_seed(int(self.target))
        classes = torch.arange(N) % CLASSES
        x = torch.randn(N, 4, generator=draw) + 2 * torch.eye(4)[classes] + 0.7 * self.target
        truth: Tensor = classes
        if self.kind == "regression":
            truth = (x[:, :1].sin() + x[:, 1:2]).float()
        labels = LABELS.setdefault(self.kind, truth) if self.target else truth
        names = ("a", "b", "c") if self.kind == "classification" else ()
        return Domain("shifted", self.kind, names, Part(ArrayInputs(x), labels, numbered("row", N)))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    LABELS.clear()
    monkeypatch.setattr(experiment, "draw_figures", lambda folder: None)
    folder = tmp_path / "conf" / "dataset"
    folder.mkdir(parents=True)
    node = {"name": "shifted", "implementation": f"{__name__}:Shifted", "kind": "classification", "target": False}
    (folder / "shifted.yaml").write_text("# A test's\n" + yaml.safe_dump(node))
    monkeypatch.chdir(tmp_path)
    yield
    LABELS.clear()


COMMON = [
    "source=shifted", "target=shifted", "target.target=true", f"plugins=[{__name__}]", "device=cpu", "threads=1", "backbone=mlp",
    "trainer.steps=12", "trainer.eval_every=4", "trainer.batch_size=16", "trainer.log_every=4",
]  # fmt: skip
REGRESSION = ["source.kind=regression", "target.kind=regression"]
FROZEN = ["backbone=identity"]
RUNS = {
    "closed form": ["method=coral", *FROZEN],
    "gradients": ["method=dann", "selection=snd"],
    "gradients, transductive": ["method=deep_coral", "protocol=transductive", "selection=mmd"],
    "Gaussian process": ["method=dirichlet_gp", *FROZEN, "selection=dev"],
    "regression": ["method=gp", *FROZEN, *REGRESSION, "target_labels=5"],
    "few labels": ["method=mme", "target_labels=3", "selection=atc"],
    "calibrated": [
        "method=source_only",
        "target_labels=4",
        "calibration=ts_map",
        "conformal=split",
        "conformal_level=0.5",
    ],
    "few labels, transductive": ["method=finetune", "target_labels=2", "protocol=transductive", "selection=silhouette"],
}


@cache
def settings(*overrides: str) -> tuple[Config, dict[str, Component]]:
    config = typed(composed([*COMMON, *overrides]))
    return config, resolve_components(config)


def posed(overrides: list[str]) -> Problem:
    return pose_problem(*settings(*overrides))


def granted(overrides: list[str]) -> dict[str, Any]:
    """What was granted, by sample."""
    task = posed(overrides).task
    parts = [part for part in (task.target_labelled, task.target_calibration) if part is not None]
    return {i: label for part in parts for i, label in zip(part.ids, part.labels.tolist(), strict=True)}


def change_ungranted(overrides: list[str], seed: int) -> None:
    """New labels at random for all samples but the granted ones; a class's grants are drawn by label, so that a few must stay."""
    kind = "regression" if "target.kind=regression" in overrides else "classification"
    before = granted(overrides)
    old = LABELS[kind].clone()
    draw = torch.Generator().manual_seed(seed)
    new = old + torch.randint(1, CLASSES, old.shape, generator=draw)
    new = 10 * torch.randn(old.shape, generator=draw) if kind == "regression" else new % CLASSES
    kept = torch.tensor([f"row/{i}" in before for i in range(N)])
    while True:
        LABELS[kind] = torch.where(kept.view(-1, *[1] * (old.ndim - 1)), old, new)
        after = granted(overrides)
        if after == before:
            break
        for name in after.keys() - before.keys():
            kept[int(name.partition("/")[2])] = True
    assert int(kept.sum()) < len(before) + 30


def known(run: Path) -> dict[str, Any]:
    """All that a run leaves, the figures on target test labels and the clock apart."""
    result = json.loads((run / "result.json").read_text())
    figures = result["metrics"].pop("target_test")
    (result["calibration"] or {}).pop("before", None)
    del result["selection"]["oracle"], result["seconds"]
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    arrays: dict[str, Any] = {}
    for name in ("predictions", "features", "examples"):
        with np.load(run / f"{name}.npz") as file:
            arrays |= {f"{name} {key}": file[key] for key in file.files if key != "target_test_labels"}
    states = {name: torch.load(run / "checkpoints" / name, weights_only=True) for name in ("last.pt", "best.pt")}
    validators = run / "validators.json"
    return {
        "figures": figures,
        "result": result,
        "events": [event for event in events if event["split"] != "target_test"],
        "arrays": arrays,
        "weights": [states["last.pt"]["parts"]["method"], states["best.pt"]["method"], states["best.pt"]["step"]],
        "of runs": json.loads(validators.read_text()) if validators.exists() else None,
    }


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def run_of(transfer: Transfer, overrides: list[str], outputs: str) -> Path:
    done = transfer("run", *COMMON, *overrides, f"outputs={outputs}")
    assert done.code == 0, done.err
    return done.run


def differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {key for key in a if not same(a[key], b[key])}


def unmoved(transfer: Transfer, overrides: list[str], seeds: range) -> None:
    before = known(run_of(transfer, overrides, "before"))
    for seed in seeds:
        LABELS.clear()
        posed(overrides)  # the true ones again
        change_ungranted(overrides, seed)
        after = known(run_of(transfer, overrides, f"after{seed}"))
        assert differing(before, after) == {"figures"}
    if "target.kind=regression" not in overrides:
        assert set(before["result"]["validators"]) == set(VALIDATORS), "all of them were looked at"


@pytest.mark.parametrize("overrides", RUNS.values(), ids=RUNS)
def test_ungranted_labels_change_the_evaluators_figures_alone(transfer: Transfer, overrides: list[str]) -> None:
    unmoved(transfer, overrides, range(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["cdan", "mcd", "shot", "fixmatch", "can", "pseudo_label", "adabn", "mcc", "swag", "laplace"]
)
def test_they_do_so_with_many_a_method(transfer: Transfer, method: str) -> None:
    unmoved(transfer, [f"method={method}", *(["bottleneck=16"] if method == "adabn" else [])], range(3))


def test_granted_labels_and_the_oracle_do_change_more(transfer: Transfer) -> None:
    """Or the test above would hold for a comparison that sees nothing."""
    overrides = ["method=mme", "target_labels=3"]
    before = known(run_of(transfer, overrides, "before"))
    some = next(iter(granted(overrides)))
    LABELS["classification"] = LABELS["classification"].clone()
    LABELS["classification"][int(some.partition("/")[2])] += 1
    LABELS["classification"] %= CLASSES
    assert {"weights", "arrays", "result", "events"} <= differing(before, known(run_of(transfer, overrides, "after")))
    LABELS.clear()
    overrides = ["method=dann", "selection=oracle"]
    before = known(run_of(transfer, overrides, "before"))
    change_ungranted(overrides, 0)
    assert "result" in differing(before, known(run_of(transfer, overrides, "after")))


def test_scores_of_runs_do_not_depend_on_them(transfer: Transfer) -> None:
    chosen = (["method=coral", *FROZEN], ["method=mean_match", *FROZEN], ["method=source_only", "trainer.steps=8"])
    found = []
    for outputs in ("before", "after"):
        runs = [run_of(transfer, overrides, outputs) for overrides in chosen]
        done = transfer("validate", f"{outputs}/runs", "--device", "cpu", "--threads", "1")
        assert done.code == 0, done.err
        found.append([known(run) for run in runs])
        change_ungranted(chosen[0], 0)
    for before, after in zip(*found, strict=True):
        assert set(before["of runs"]["scores"]) == {"agreement", "reverse"}
        assert differing(before, after) == {"figures"}


# --- who can reach them ---------------------------------------------------------------------------

ATOMS = (str, bytes, int, float, bool, type(None), type, types.ModuleType, torch.device, torch.dtype)


def reachable(*roots: Any) -> Iterator[Tensor | np.ndarray]:
    """Every array that can be reached from the objects, through attributes, containers and closures; not through the evaluator."""
    seen: set[int] = set()
    kept, stack = [], list(roots)  # kept alive, so that no id is used twice
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, (*ATOMS, Evaluator)):
            continue
        seen.add(id(thing))
        kept.append(thing)
        if isinstance(thing, Tensor | np.ndarray):
            yield thing
        elif isinstance(thing, types.FunctionType):
            stack += [cell.cell_contents for cell in thing.__closure__ or ()] + list(thing.__defaults__ or ())
        else:
            stack += gc.get_referents(thing)


@pytest.mark.parametrize("overrides", [
    ["method=gp", *FROZEN, "target_labels=6"], ["method=dann"], ["method=dann", "protocol=transductive", "target_labels=6"],
])  # fmt: skip
def test_nothing_but_the_evaluator_holds_them(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    """In regression each target value is a number of its own, by which it is known again."""
    overrides = [*overrides, *REGRESSION]
    posed(overrides)
    LABELS["regression"] = 1000 + torch.arange(N).float()[:, None]
    secret = set(LABELS["regression"][:, 0].tolist()) - {value[0] for value in granted(overrides).values()}
    found: list[tuple[set[float], set[float]]] = []
    original = experiment.run_phases

    def look(session: Any) -> int:
        def values(*roots: Any) -> set[float]:
            return {v for x in reachable(*roots) for v in torch.as_tensor(x).double().flatten().tolist()} & secret

        steps = original(session)
        mine = values(session, session.method, session.method.phases(), session.task, *gc.get_referents(session))
        found.append((mine, values(session.monitor.evaluator.heldout)))
        return steps

    monkeypatch.setattr(experiment, "run_phases", look)
    run_of(transfer, overrides, "outputs")
    ((outside, inside),) = found
    assert not outside, "neither a method nor a loop can read them"
    assert inside and inside <= secret, "and they would have been found"


class Spied(Part):
    """A part that notes who reads its labels."""

    readers: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        if name == "labels":
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.endswith(
                ("dataclasses.py", "data/domain.py", "<string>", "test_no_leak.py")
            ):
                frame = frame.f_back  # a part of the part
            Spied.readers.add(Path(frame.f_code.co_filename).name)
        return super().__getattribute__(name)

    def take(self, indices: Tensor) -> Part:
        return Spied(**vars(super().take(indices)))


@pytest.mark.parametrize("name", ["closed form", "gradients", "calibrated"])
def test_nothing_but_the_evaluator_reads_them(transfer: Transfer, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    original = experiment.pose_problem

    def pose(*arguments: Any) -> Problem:
        problem = original(*arguments)
        test = Spied(**vars(problem.heldout.target_test))
        Spied.readers = set()
        return replace(problem, heldout=replace(problem.heldout, target_test=test))

    monkeypatch.setattr(experiment, "pose_problem", pose)
    run_of(transfer, RUNS[name], "outputs")
    assert Spied.readers <= {"evaluator.py", "extraction.py"} and "evaluator.py" in Spied.readers, Spied.readers


def test_a_copy_of_the_comparison_is_the_same(transfer: Transfer) -> None:
    kept = known(run_of(transfer, RUNS["closed form"], "outputs"))
    other = copy.deepcopy(kept)
    assert not differing(kept, other)
    name = next(key for key in other["arrays"] if key.endswith("_probs"))
    other["arrays"][name][0, 0] += 1e-6
    assert differing(kept, other) == {"arrays"}
