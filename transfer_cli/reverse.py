"""Reverse validation (Zhong et al., ECML PKDD 2010; Ganin et al., JMLR 2016): does what a run says of the target lead back?

A run's model labels the target's training inputs. The same method then transfers from these to the source, whose labels it does not
see (but for those that `target_labels` grants), and is scored on the source's validation labels: a model that is wrong about the
target misleads the second. It is an ordinary run, of the run's own configuration but for the two data sets and a budget of one
pass over the larger of them.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from transfer_cli import experiment
from transfer_cli.build import Problem, pose_problem, rebuild_model
from transfer_cli.config.compose import load_run, resolve_components, typed
from transfer_cli.config.schema import Config, Split, Subset
from transfer_cli.data.domain import Domain, Part, Place, fingerprint_files
from transfer_cli.data.inputs import ArrayInputs, ImageFiles, Inputs
from transfer_cli.data.task import TransferTask
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.loops.devices import choose_device
from transfer_cli.run_folder import HEADLINE, RunFolder, read_json

FOLDER = "reverse"  # in the run's folder, until the score is there


class ReverseSource:
    """The target's training inputs with what the run's model says of them in the place of labels."""

    def __init__(self, place: Place, *, run: str) -> None:
        self.place, self.run = place, run

    def fingerprint(self) -> str:
        return fingerprint_files([RunFolder(Path(self.run)).checkpoints / "best.pt"])

    def load(self) -> Domain:
        folder, problem, config = _first(self.run, self.place)
        task = problem.task
        part = _labelled(folder, config, problem)
        classes = task.label_space.classes
        if task.kind == "classification":  # a class that nothing is taken for is not part of this domain
            found, labels = part.labels.unique(return_inverse=True)
            classes, part = tuple(classes[c] for c in found.tolist()), replace(part, labels=labels)
        return Domain("reverse source", task.kind, classes, part)


class ReverseTarget:
    """The source's training samples, and as the test split its validation samples."""

    def __init__(self, place: Place, *, run: str) -> None:
        self.place, self.run = place, run

    def fingerprint(self) -> str:
        return fingerprint_files([RunFolder(Path(self.run)).checkpoints / "best.pt"])

    def load(self) -> Domain:
        task = _first(self.run, self.place)[1].task
        assert task.source is not None and task.source_validation is not None
        train, test = (replace(p, inputs=_plain(p.inputs)) for p in (task.source, task.source_validation))
        return Domain("reverse target", task.kind, task.label_space.source, train, test)


def reverse_score(run: str, settings: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """The accuracy, or minus the RMSE, on the source's validation labels; and what is to be told of it.

    `settings`: keys of the configuration for this machine (`device`, `threads`, `data_root`). An interrupted one goes on.

    Raises:
        TransferError: the run has no reverse.
    """
    folder, config = load_run(run)
    config = replace(config, **settings)
    problem = pose_problem(config, resolve_components(config))
    task = problem.task
    if task.source is None or task.source_validation is None or task.label_space.setting != "closed":
        raise TransferError(
            "needs a source with the target's classes (label_space=closed) and split.validation above 0"
        )
    predicted = _labelled(folder, config, problem).labels
    told: dict[str, Any] = {"samples": len(task.source_validation)}
    if task.kind == "classification":
        told["classes"] = len(predicted.unique())
        if told["classes"] == 1:  # nothing can be learnt of one class but to say it
            return float((task.source_validation.labels == predicted[0]).double().mean()), told
    reversed_config = _reversed(run, config, task, told.get("classes"))
    with contextlib.redirect_stdout(io.StringIO()):
        done = experiment.run(typed(asdict(reversed_config)), ["transfer", "validate", run])
    result = read_json(done.result)
    figure = float(result["metrics"]["target_test"][HEADLINE[task.kind]])
    return figure if task.kind == "classification" else -figure, {**told, "steps": result["steps"]}


def clear(run: str) -> None:
    """What a reverse run wrote, its score being kept elsewhere."""
    shutil.rmtree(RunFolder(Path(run)).path / FOLDER, ignore_errors=True)


def _reversed(run: str, config: Config, task: TransferTask, classes: int | None) -> Config:
    assert task.source is not None
    sizes = len(task.target_unlabelled), len(task.source)
    batch = min(config.trainer.batch_size, *sizes)
    steps = min(config.trainer.steps, -(-max(sizes) // batch))
    trainer = replace(
        config.trainer, batch_size=batch, steps=steps, eval_every=steps, checkpoint_every=max(1, steps // 4)
    )
    nodes: dict[str, Any] = {
        side: {"name": f"reverse_{side}", "implementation": f"{__name__}:Reverse{side.capitalize()}", "run": run}
        for side in ("source", "target")
    }
    missing = classes is not None and classes < len(task.label_space.classes)
    return replace(
        config,
        **nodes,
        ood={},
        trainer=trainer,
        features=replace(config.features, cache_gb=0.0),
        subset=Subset(),
        split=Split(validation=0.0),  # there is one checkpoint, and nothing to choose
        selection="last",
        protocol="inductive",
        label_space="open" if missing else "closed",  # samples of the others count as errors
        source_model=None,  # which may have seen the source's labels
        calibration="none",
        conformal="none",
        outputs=str(RunFolder(Path(run)).path / FOLDER),
        retry_failed=True,
    )


def _first(run: str, place: Place) -> tuple[RunFolder, Problem, Config]:
    """The run that is to be reversed, and the problem that it had."""
    folder, config = load_run(run)
    config = replace(config, data_root=config.data_root if place.root is None else str(place.root))
    return folder, pose_problem(config, resolve_components(config)), config


def _labelled(folder: RunFolder, config: Config, problem: Problem) -> Part:
    """The target's training inputs and what the run's model says of them."""
    task, device = problem.task, choose_device(config.device)
    model, _ = rebuild_model(folder, config, resolve_components(config), device)
    evaluator = make_evaluator(config, task, problem.heldout, device)
    unlabelled = task.target_unlabelled
    prediction = evaluator.predict(model, unlabelled.inputs)
    if task.kind == "classification":
        labels = prediction.probs[:, : len(task.label_space.classes)].argmax(1)
    else:
        assert prediction.mean is not None
        labels = prediction.mean.float()
    return Part(_plain(unlabelled.inputs), labels, unlabelled.ids)


def _plain(inputs: Inputs) -> Inputs:
    """As a reader delivers them."""
    if inputs.spec.kind != "image" or isinstance(inputs, ArrayInputs | ImageFiles):
        return inputs
    images = inputs.batch(torch.arange(len(inputs)))
    assert isinstance(images, torch.Tensor)
    return ArrayInputs(images)
