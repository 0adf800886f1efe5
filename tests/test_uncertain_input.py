"""Input that no one would call good, through every method that says how sure it is: a sensible result, or one clear line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from torch import Tensor

from tests.feature_tasks import context, regression
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.metrics import classification
from transfer_cli.evaluation.metrics import regression as figures
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.artefact import SourcePosterior
from transfer_cli.methods.bayes.bayes_head import BayesHead
from transfer_cli.methods.bayes.niw_lda import NIWLDA
from transfer_cli.methods.bayes.source_posterior import SourcePosteriorHead
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.gaussian_process.dirichlet_gp import DirichletGP
from transfer_cli.methods.gaussian_process.gp import GP
from transfer_cli.methods.phases import Features, FeatureTask

Transfer = Callable[..., Outcome]
Make = Callable[[Context], FeatureMethod]


class _Known(BayesHead):
    """On the posterior that a first run left of the source, without it."""

    def fit(self, task: FeatureTask) -> dict[str, float]:
        return super().fit(FeatureTask(None, None, task.target_labelled))


SOFT = {"lam": 1.0, "alpha": 0.1, "draws": 16}  # priors that nothing chooses take less time
CLASSIFIERS: dict[str, tuple[type[FeatureMethod], dict[str, Any]]] = {
    "dirichlet_gp": (DirichletGP, {"draws": 8, "signal": 3.0, "lengthscale": 2.0}),
    "niw_lda": (NIWLDA, {}),
    "source_posterior": (SourcePosteriorHead, {"folds": 2}),
    "prior=": (_Known, {"prior": "source"}),
    **{f"bayes_head {p}": (BayesHead, {"prior": p, **SOFT}) for p in ("isotropic", "l2sp", "ewc", "source")},
    "bayes_head laplace": (BayesHead, {"prior": "source", "covariance": "laplace", "choose": "evidence", **SOFT}),
}
MODES: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in ("scratch", "source", "pooled", "hyper", "icm", "sequential")},
    "guarded": {"mode": "sequential", "guard": "evidence"},
}


def classes_of(n: int = 60, granted: int = 15, width: int = 4, seed: int = 0) -> tuple[FeatureTask, Features]:
    """Three classes apart by three standard deviations, the target's a little further; and target samples to be told."""
    draw = torch.Generator().manual_seed(seed)

    def sample(n: int, shift: float) -> Features:
        y = torch.arange(n) % 3
        x = torch.randn(n, width, generator=draw, dtype=torch.float64) + shift
        return Features(x + 3 * torch.eye(3, width, dtype=torch.float64)[y], y)

    return FeatureTask(sample(n, 0.0), None, sample(granted, 0.3)), sample(90, 0.3)


def functions_of(n: int = 60, granted: int = 15, width: int = 3, seed: int = 0) -> tuple[FeatureTask, Features]:
    draw = torch.Generator().manual_seed(seed)

    def sample(n: int, shift: float) -> Features:
        x = torch.randn(n, width, generator=draw, dtype=torch.float64)
        y = x[:, :1] - 0.5 * x[:, 1:2] + shift + 0.2 * torch.randn(n, 1, generator=draw, dtype=torch.float64)
        return Features(x, y)

    return FeatureTask(sample(n, 0.0), None, sample(granted, 0.3)), sample(90, 0.3)


def changed(
    task: FeatureTask, x: Callable[[Tensor], Tensor] = lambda x: x, y: Callable[[Tensor], Tensor] = lambda y: y
) -> FeatureTask:
    parts = [None if part is None or part.y is None else Features(x(part.x), y(part.y)) for part in vars(task).values()]
    return FeatureTask(*parts)


def classifier(name: str, task: FeatureTask) -> FeatureMethod:
    """Fitted."""
    kind, keys = CLASSIFIERS[name]
    assert task.source is not None
    width = task.source.x.shape[1]
    names: dict[str, Any] = {"class_names": ("a", "b", "c"), "fingerprint": lambda: "as it is"}
    changes: dict[str, Any] = {"has_target_labels": task.target_labelled is not None, **names}
    if name == "prior=":
        first = SourcePosteriorHead(context(width, **names), folds=2)
        first.fit(FeatureTask(task.source, None, None))
        settings = {"whiten": True, "source_l2": 1e-3, "width": width}
        tensors = {key: value for key, value in first.source.named_buffers() if key != "place"}
        changes["prior"] = SourcePosterior("head", ("a", "b", "c"), "as it is", settings, tensors)
    method = kind(context(width, **changes), **keys)
    method.fit(task)
    return method


def process(name: str, task: FeatureTask) -> GP:
    assert task.source is not None
    method = GP(regression(task.source.x.shape[1], has_target_labels=True), draws=8, **MODES[name])
    method.fit(task)
    return method


def told(method: FeatureMethod, test: Features) -> dict[str, float]:
    found = method.predict(test.x)
    assert found.is_finite() and test.y is not None
    return classification(found.log_probs, test.y) if found.log_probs is not None else scored(found, test.y)


def scored(found: Prediction, y: Tensor) -> dict[str, float]:
    assert found.mean is not None and found.variance is not None and bool((found.variance > 0).all())
    assert found.epistemic is not None and bool((found.epistemic <= found.variance * (1 + 1e-9)).all())
    return figures(found.mean, found.variance, y)


# --- scales ---------------------------------------------------------------------------------------

SCALES = {
    "times 1e8": torch.full((4,), 1e8),
    "times 1e-8": torch.full((4,), 1e-8),
    "each its own": torch.tensor([1e-6, 1e8, 1.0, 1e3]),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_units_of_features_are_no_matter(name: str, scale: str) -> None:
    task, test = classes_of()
    factors = SCALES[scale].double()
    plain, other = classifier(name, task), classifier(name, changed(task, lambda x: x * factors))
    before, now = plain.predict(test.x).probs, other.predict(test.x * factors).probs
    torch.testing.assert_close(now, before, rtol=0, atol=1e-4)
    assert told(plain, test)["accuracy"] > 0.85 and told(plain, test)["ece"] < 0.15


@pytest.mark.parametrize("name", MODES)
def test_units_of_features_and_targets_are_no_matter_to_processes(name: str) -> None:
    task, test = functions_of()
    factors, unit = torch.tensor([1e8, 1e-6, 1e3], dtype=torch.float64), 1e8
    plain, other = process(name, task), process(name, changed(task, lambda x: x * factors, lambda y: unit * y))
    before, now = plain.predict(test.x), other.predict(test.x * factors)
    assert before.mean is not None and before.variance is not None and now.mean is not None and now.variance is not None
    torch.testing.assert_close(now.mean / unit, before.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(now.variance.sqrt() / unit, before.variance.sqrt(), rtol=1e-2, atol=1e-3)
    assert told(plain, test)["rmse"] < 0.5 and told(plain, test)["coverage_95"] > 0.6


# --- few, equal, constant --------------------------------------------------------------------------


def as_poor(case: str, test: Features, task: FeatureTask) -> Features:
    """What the test samples are where the training samples are poor."""
    assert test.y is not None and task.target_labelled is not None and task.target_labelled.y is not None
    if case == "constant column":
        return Features(torch.cat([test.x[:, :-1], torch.full_like(test.x[:, :1], 7e5)], 1), test.y)
    if case == "constant targets":
        return Features(test.x, task.target_labelled.y[:1].expand_as(test.y))
    return test


def poor(case: str, task: FeatureTask) -> FeatureTask:
    assert task.source is not None and task.source.y is not None and task.target_labelled is not None
    source, few = task.source, task.target_labelled
    assert few.y is not None and source.y is not None
    if case == "one label":
        n = 3 if few.y.ndim == 1 else 1
        return FeatureTask(source, None, Features(few.x[:n], few.y[:n]))
    if case == "twins":
        again = torch.arange(len(few.x)) % 5
        return FeatureTask(
            Features(source.x[:20].repeat(3, 1), source.y[:20].repeat(3, *source.y.shape[1:])),
            None,
            Features(few.x[again], few.y[again]),
        )
    if case == "constant column":
        return changed(task, lambda x: torch.cat([x[:, :-1], torch.full_like(x[:, :1], 7e5)], 1))
    if case == "constant targets":
        return FeatureTask(source, None, Features(few.x, few.y[:1].expand_as(few.y)))
    if case == "a class absent":
        known, there = source.y != 2, few.y != 1
        return FeatureTask(Features(source.x[known], source.y[known]), None, Features(few.x[there], few.y[there]))
    assert case == "few points"
    return FeatureTask(Features(source.x[:6], source.y[:6]), None, Features(few.x[:3], few.y[:3]))


@pytest.mark.parametrize(
    "case", ["one label", "twins", "constant column", "constant targets", "a class absent", "few points"]
)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_poor_labelled_features(name: str, case: str) -> None:
    task, test = classes_of(width=40 if case == "few points" else 4)
    seen = as_poor(case, test, task) if name != "source_posterior" or case == "constant column" else test
    found = told(classifier(name, poor(case, task)), seen)
    worst = {"one label": 0.4, "constant targets": 0.3, "a class absent": 0.3, "few points": 0.2, "twins": 0.5}
    assert found["accuracy"] >= worst.get(case, 0.7)
    assert found["nll"] < 4  # guessing has 1.1: no one is sure of what is wrong


@pytest.mark.parametrize("case", ["one label", "twins", "constant column", "constant targets", "few points"])
@pytest.mark.parametrize("name", MODES)
def test_poor_numbers(name: str, case: str) -> None:
    task, test = functions_of(width=40 if case == "few points" else 3)
    seen = as_poor(case, test, task) if name != "source" or case == "constant column" else test
    found = told(process(name, poor(case, task)), seen)
    assert found["rmse"] < 2 and found["nll"] < 10


def test_a_source_of_one_class_or_none_that_varies_is_refused_or_learnt() -> None:
    task, _ = classes_of()
    assert task.source is not None
    flat = FeatureTask(Features(torch.ones_like(task.source.x), task.source.y), None, task.target_labelled)
    for name in CLASSIFIERS:
        with pytest.raises(TransferError, match="no spread within its classes"):
            classifier(name, flat)


# --- as a user --------------------------------------------------------------------------------------

BAYESIAN = ["laplace", "swag", "source_prior", "ensemble", "mc_dropout", "vbll"]
NETWORKS = [*BAYESIAN, *(f"finetune optimizer={name}" for name in ("sam", "lbfgs", "newton"))]


def tables(
    folder: Path, kind: str, factor: float = 1.0, bad: tuple[int, int, Any] | None = None, case: str = ""
) -> list[str]:
    """A source's and a target's file, and what chooses them on the command line."""
    options: list[str] = []
    for domain, seed in (("source", 0), ("target", 1)):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(40, 3)) + 0.2 * seed
        classes = np.arange(40) % 2
        x[:, 0] += 3 * classes
        if case == "twins":
            x, classes = x[:20].repeat(2, 0), classes[:20].repeat(2)
        if case == "constant column":
            x[:, 1] = 7.0
        y = [*("ab"[c] for c in classes)] if kind == "classification" else [*(x[:, 0] - x[:, 1])]
        rows = [[*map(float, factor * row), label] for row, label in zip(x, y, strict=True)]
        if bad is not None:
            rows[bad[0]][bad[1]] = bad[2]
        path = folder / f"{domain}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["p", "q", "r", "y"], *rows])
        options += [f"{domain}=table", f"{domain}.path={path}", f"{domain}.target=y", f"{domain}.kind={kind}"]
    return [*options, "threads=1", "device=cpu", "trainer.steps=4", "trainer.batch_size=16", "target_labels=4"]


def lines(outcome: Outcome) -> Sequence[str]:
    return outcome.err.strip().splitlines()


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("method", NETWORKS)
def test_networks_say_that_inputs_are_out_of_scale(transfer: Transfer, tmp_path: Path, method: str, kind: str) -> None:
    """They learn, or end in a line; and they learn once the table is standardised."""
    options = [*tables(tmp_path, kind, 1e8), "backbone=mlp", *f"method={method}".split()]
    shown = transfer("run", *options)
    assert "inputs reach" in shown.out + shown.err and "standardise=true" in shown.out
    assert shown.code == 0 or (shown.code == 2 and len(lines(shown)) == 1 and "became" in lines(shown)[0])
    if method in NETWORKS[:1]:
        mended = transfer("run", *options, "source.standardise=true", "target.standardise=true")
        assert mended.code == 0 and "inputs reach" not in mended.out
        result = json.loads((mended.run / "result.json").read_text())["metrics"]["target_test"]
        assert np.isfinite(list(result.values())).all()


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("case", ["plain", "scaled", "twins", "constant column", "one label"])
def test_a_variational_process_bears_poor_tables(transfer: Transfer, tmp_path: Path, case: str, kind: str) -> None:
    factor, granted = 1e8 if case == "scaled" else 1.0, 1 if case == "one label" else 4
    options = [*tables(tmp_path, kind, factor, case=case), "backbone=identity", "method=svgp"]
    shown = transfer("run", *options, f"target_labels={granted}", "trainer.steps=400", "trainer.eval_every=200")
    assert shown.code == 0, shown.err
    result = json.loads((shown.run / "result.json").read_text())["metrics"]["target_test"]
    assert np.isfinite(list(result.values())).all()
    assert result["accuracy" if kind == "classification" else "r2"] > 0.8


@pytest.mark.parametrize("method", ["gp", "laplace"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [((3, 1, "hello"), "hello"), ((3, 1, ""), "missing"), ((3, 3, ""), "missing"), ((3, 1, "inf"), "inf")],
)
def test_cells_that_are_no_numbers(
    transfer: Transfer, tmp_path: Path, method: str, bad: tuple[int, int, Any], message: str
) -> None:
    shown = transfer("run", *tables(tmp_path, "regression", bad=bad), "backbone=mlp", *f"method={method}".split())
    assert shown.code == 2 and len(lines(shown)) == 1 and message in shown.err.lower(), shown.err


@pytest.mark.parametrize(
    "keys", [["calibration=ts"], ["calibration=ts_map", "conformal=target"], ["calibration=vector"]]
)
@pytest.mark.parametrize("labels", [1, 2])
def test_few_labels_for_calibration(transfer: Transfer, tmp_path: Path, keys: list[str], labels: int) -> None:
    """Of one or two labels a class: fitted, or refused in a line that says how many are needed."""
    options = [
        *tables(tmp_path, "classification"),
        "backbone=identity",
        "method=coral",
        *keys,
        f"target_labels={labels}",
    ]
    shown = transfer("run", *options)
    if shown.code:
        assert shown.code == 2 and len(lines(shown)) == 1 and "set " in shown.err
        return
    found = json.loads((shown.run / "result.json").read_text())
    least = 0.005 if keys == ["calibration=ts"] else 0.1  # without a prior, labels that are all right are believed
    assert least < found["calibration"]["temperature"] < 10
