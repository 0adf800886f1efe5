"""Optimal transport: plans against POT, assignment problems and closed forms; maps, and domains that they bring together."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

import feature_tasks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SkRidge
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.baseline.no_adaptation import NoAdaptation
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.heads.knn import KNN
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.math import transport
from transfer_cli.methods.math.transport import entropic_plan, exact_plan, forbid_other_classes, relative_cost
from transfer_cli.methods.moments.coral import alignment
from transfer_cli.methods.phases import Features, FeatureTask
from transfer_cli.methods.transport.jdot import JDOT
from transfer_cli.methods.transport.linear_ot import LinearOT, covariance, gaussian_map
from transfer_cli.methods.transport.ot import OT, group_lasso_plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the optional backends that POT looks for
    pot = import_module("ot")


def context(
    width: int = 2, head: Callable[[], Head] | None = None, kind: str = "classification", classes: int = 2
) -> Context:
    if kind == "regression":
        return feature_tasks.regression(width, has_target_labels=True, make_head=head or (lambda: Ridge(kind, 1)))
    make_head = head or (lambda: Logistic(kind, classes))
    return feature_tasks.context(width, classes, has_target_labels=True, make_head=make_head)


def normal(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blobs(n: int = 41, m: int = 31, gap: float = 1.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two classes side by side; in the target both are moved by more than their distance."""
    ys, yt = torch.arange(n) % 2, torch.arange(m) % 2
    move = torch.tensor([2.2, 1.0], dtype=torch.float64)
    xs, xt = 0.3 * normal(n, 2, 0), 0.3 * normal(m, 2, 1) + move
    xs[:, 0] += gap * ys
    xt[:, 0] += gap * yt
    return xs, ys, xt, yt


def task_of(xs: Tensor, ys: Tensor, xt: Tensor, labelled: Features | None = None) -> FeatureTask:
    return FeatureTask(Features(xs, ys), Features(xt), labelled)


def accuracy(method: FeatureMethod, x: Tensor, y: Tensor) -> float:
    return float((method.predict(x).labels == y).double().mean())


def uniform(n: int) -> Any:
    return np.full(n, 1 / n)


# --- plans ----------------------------------------------------------------------------------------


def test_costs_are_squared_distances_over_their_median() -> None:
    xs, _, xt, _ = blobs()
    plain = pot.dist(xs.numpy(), xt.numpy())
    np.testing.assert_allclose(relative_cost(xs, xt), plain / np.sort(plain.ravel())[(plain.size - 1) // 2], rtol=1e-9)
    torch.testing.assert_close(relative_cost(1e4 * xs, 1e4 * xt), relative_cost(xs, xt))


def test_the_exact_plan_is_the_best_assignment() -> None:
    cost = relative_cost(normal(25, 3, 0), normal(25, 3, 1))
    rows, columns = linear_sum_assignment(cost.numpy())
    wanted = torch.zeros(25, 25, dtype=torch.float64)
    wanted[rows, columns] = 1 / 25
    torch.testing.assert_close(exact_plan(cost), wanted)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.01])
def test_the_entropic_plan_has_its_marginals_and_is_pots(reg: float) -> None:
    xs, _, xt, _ = blobs()
    cost = relative_cost(xs, xt)
    plan, (f, g), error = entropic_plan(cost, reg, 20_000, tolerance=1e-11)
    assert error <= 1e-11
    torch.testing.assert_close(plan.sum(1), torch.full((41,), 1 / 41, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.full((31,), 1 / 31, dtype=torch.float64), rtol=1e-8, atol=0)
    reference = pot.bregman.sinkhorn_log(
        uniform(41), uniform(31), cost.numpy(), reg, numItermax=50_000, stopThr=1e-12, warn=False
    )
    np.testing.assert_allclose(plan, reference, atol=1e-9)
    torch.testing.assert_close(plan, ((f[:, None] + g - cost) / reg).exp())
    again = entropic_plan(cost, reg, 100, start=(f, g), tolerance=1e-9)
    torch.testing.assert_close(again.plan, plan)


def test_without_entropy_in_the_limit_the_plan_is_exact() -> None:
    xs, _, xt, _ = blobs()
    cost = relative_cost(xs, xt)
    exact = float((exact_plan(cost) * cost).sum())
    above = [float((entropic_plan(cost, reg, 5000).plan * cost).sum()) - exact for reg in (0.3, 0.03, 0.003)]
    assert above[0] > above[1] > above[2] > -1e-9 and above[2] < 0.002


@pytest.mark.parametrize("reg", [1e-12, 1e-6, 1e-3, 1e6])
def test_no_strength_of_entropy_gives_anything_but_numbers(reg: float) -> None:
    xs, ys, xt, _ = blobs()
    cost = relative_cost(xs, xt + 3)
    one_hot = F.one_hot(ys, 2).double()
    for found in (entropic_plan(cost, reg, 200), group_lasso_plan(cost, one_hot, reg, 2.0, 50)):
        assert bool(torch.isfinite(found.plan).all()) and 0 <= found.error <= 2
        torch.testing.assert_close(found.plan.sum(1), torch.full((41,), 1 / 41, dtype=torch.float64))
    method = OT(context(), reg=reg, max_iter=100)
    report = method.fit(task_of(xs, ys, xt))
    assert bool(torch.isfinite(method.fitted.images).all()) and all(math.isfinite(v) for v in report.values())


def test_the_group_lasso_plan_is_pots() -> None:
    xs, ys, xt, _ = blobs(gap=0.4)
    cost, one_hot = relative_cost(xs, xt), F.one_hot(ys, 2).double()
    reg, eta = 0.1, 0.05
    reference = pot.da.sinkhorn_lpl1_mm(
        uniform(41), ys.numpy(), uniform(31), cost.numpy(), reg, eta, numItermax=10, numInnerItermax=5000
    )
    # POT takes the root of masses themselves, of 1/31 in all at each target sample; here they are relative to that
    plan, _, error = group_lasso_plan(cost, one_hot, reg, eta * 31**0.5, 5000, epsilon=31 * 1e-3)
    assert error <= 1e-7
    np.testing.assert_allclose(plan, reference, atol=1e-7)
    assert float((plan - entropic_plan(cost, reg, 5000).plan).abs().max()) > 1e-4


def test_the_group_lasso_lowers_its_objective_and_parts_the_classes() -> None:
    xs, ys, xt, _ = blobs(gap=0.4)
    cost, one_hot, reg, eta = relative_cost(xs, xt), F.one_hot(ys, 2).double(), 0.1, 0.3

    def objective(plan: Tensor) -> float:
        groups = (31 * (one_hot.T @ plan) + 1e-3).sqrt().sum() / 31
        return float((plan * cost).sum() + reg * torch.special.xlogy(plan, plan).sum() + eta * groups)

    def purity(plan: Tensor) -> float:
        return float((31 * (one_hot.T @ plan)).max(0).values.mean())

    plain, grouped = entropic_plan(cost, reg, 2000).plan, group_lasso_plan(cost, one_hot, reg, eta, 2000).plan
    assert objective(grouped) < objective(plain) - 0.01
    assert purity(grouped) > purity(plain) + 0.15
    torch.testing.assert_close(group_lasso_plan(cost, one_hot, reg, 0.0, 2000).plan, plain, atol=1e-7, rtol=0)


def test_a_plan_too_large_for_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    xs, ys, xt, _ = blobs()
    monkeypatch.setattr(transport, "LARGEST_PLAN", 1270)
    for method in (OT(context()), JDOT(context())):
        with pytest.raises(
            TransferError, match=r"41 x 31 samples is too large: set method=linear_ot, or fewer samples"
        ):
            method.fit(task_of(xs, ys, xt))


def test_without_pot_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "find_spec", lambda name: None)
    for build in (lambda: OT(context(), regularise="none"), lambda: JDOT(context())):
        with pytest.raises(TransferError, match=r"needs the package POT: pip install 'transfer-cli\[transport\]'"):
            build()
    OT(context(), regularise="entropic")  # needs none


def test_constant_features_have_nothing_to_transport() -> None:
    ones = torch.ones(9, 2, dtype=torch.float64)
    with pytest.raises(TransferError, match="more than half of the source and target features are equal"):
        OT(context()).fit(task_of(ones, torch.arange(9) % 2, ones))


def test_what_pot_complains_of_becomes_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def emd(*arguments: Any, **options: Any) -> Any:
        warnings.warn("numItermax reached", stacklevel=2)
        return arguments[2]

    monkeypatch.setattr(pot, "emd", emd)
    with pytest.raises(TransferError, match="POT found no transport plan of 3 x 4 samples: numItermax reached"):
        exact_plan(torch.ones(3, 4, dtype=torch.float64))


# --- ot -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularise", ["none", "entropic", "group_lasso"])
def test_images_are_means_of_the_target_under_the_plan_as_pot_has_them(regularise: Any) -> None:
    xs, ys, xt, _ = blobs()
    method = OT(context(), regularise=regularise, reg=0.1, eta=0.3, max_iter=5000)
    report = method.fit(task_of(xs, ys, xt))
    cost = relative_cost(xs, xt)
    if regularise == "none":
        reference = pot.da.EMDTransport(norm="median")
    else:
        reference = pot.da.SinkhornTransport(
            reg_e=0.1, norm="median", max_iter=50_000, tol=1e-12, method="sinkhorn_log"
        )
    reference.out_of_sample_map = "ferradans"
    reference.fit(Xs=xs.numpy(), Xt=xt.numpy())
    new = 0.5 * normal(25, 2, 9) + 0.5
    if regularise == "group_lasso":  # POT has the class term in other units
        reference.coupling_ = group_lasso_plan(cost, F.one_hot(ys, 2).double(), 0.1, 0.3, 5000).plan.numpy()
    np.testing.assert_allclose(method.map_source(xs), reference.transform(Xs=xs.numpy()), atol=1e-4)
    np.testing.assert_allclose(method.map_source(new), reference.transform(Xs=new.numpy()), atol=1e-4)
    assert report["transport_cost"] == pytest.approx(float((reference.coupling_ * cost.numpy()).sum()), rel=0.01)
    assert report["marginal_error"] <= 1e-7
    torch.testing.assert_close(method.map_target(new), new)


def test_a_sample_moves_alike_in_training_and_out_of_it() -> None:
    xs, ys, xt, _ = blobs()
    method = OT(context())
    method.fit(task_of(xs, ys, xt))
    together = method.map_source(xs)
    torch.testing.assert_close(method.map_source(xs.flip(0)), together.flip(0))
    torch.testing.assert_close(method.map_source(xs[7:8]), together[7:8])
    beside = xs[7:8] + 1e-5
    torch.testing.assert_close(method.map_source(beside), together[7:8] + 1e-5)


def test_equal_samples_of_the_source_keep_an_image_each() -> None:
    xs, ys, xt, _ = blobs()
    xs[2] = xs[1]  # of another class
    method = OT(context(), regularise="none")
    method.fit(task_of(xs, ys, xt))
    images = method.map_source(xs)
    assert not torch.allclose(images[1], images[2])
    plan = exact_plan(relative_cost(xs, xt))
    torch.testing.assert_close(images, plan @ xt * 41)


def test_transport_knows_neither_scale_nor_axes() -> None:
    xs, ys, xt, _ = blobs()
    turn = torch.linalg.qr(normal(2, 2, 5)).Q
    first, second = OT(context()), OT(context())
    first.fit(task_of(xs, ys, xt))
    second.fit(task_of(100 * xs @ turn + 3, ys, 100 * xt @ turn + 3))
    torch.testing.assert_close(second.fitted.images, 100 * first.fitted.images @ turn + 3, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("regularise", ["none", "entropic", "group_lasso"])
def test_no_mass_goes_to_a_target_sample_of_another_known_class(regularise: Any) -> None:
    xs, ys, xt, yt = blobs(gap=0.2)
    known = torch.tensor([3, 8, 20, 29])
    labelled = Features(xt[known], yt[known])
    cost = relative_cost(xs, xt)
    forbid_other_classes(cost, ys, xt, labelled)
    masked = np.where(np.isin(np.arange(31), known), yt.numpy(), -1)
    semi = pot.da.SinkhornTransport(norm="median", limit_max=1000).fit(xs.numpy(), ys.numpy(), xt.numpy(), masked)
    forbidden = semi.cost_ > 100
    assert forbidden.sum() == 2 * 20 + 2 * 21
    np.testing.assert_allclose(cost.numpy()[~forbidden], semi.cost_[~forbidden], rtol=1e-9)
    method = OT(context(), regularise=regularise)
    method.fit(task_of(xs, ys, xt, labelled))
    free = OT(context(), regularise=regularise)
    free.fit(task_of(xs, ys, xt))
    one_hot = F.one_hot(ys, 2).double()
    plan = {
        "none": lambda c: exact_plan(c),
        "entropic": lambda c: entropic_plan(c, 0.1, 1000).plan,
        "group_lasso": lambda c: group_lasso_plan(c, one_hot, 0.1, 0.3, 1000).plan,
    }[regularise]
    assert float((plan(cost) * torch.from_numpy(forbidden)).sum()) < 1e-9
    assert float((plan(relative_cost(xs, xt)) * torch.from_numpy(forbidden)).sum()) > 0.01
    found = plan(cost)
    torch.testing.assert_close(method.fitted.images, found @ xt / found.sum(1, keepdim=True))
    assert not torch.allclose(free.fitted.images, method.fitted.images, atol=1e-3)


def test_a_known_class_that_the_source_lacks_is_no_obstacle() -> None:
    xs, ys, xt, _ = blobs()
    labelled = Features(xt[:2], torch.tensor([2, 2]))
    for regularise in ("none", "entropic", "group_lasso"):
        method = OT(context(classes=3), regularise=regularise)  # type: ignore[arg-type]
        method.fit(task_of(xs, ys, xt, labelled))
        assert bool(torch.isfinite(method.fitted.images).all())


@pytest.mark.parametrize("regularise", ["none", "entropic", "group_lasso"])
def test_transport_brings_moved_classes_back(regularise: Any) -> None:
    xs, ys, xt, yt = blobs()
    plain = NoAdaptation(context())
    plain.fit(task_of(xs, ys, xt))
    assert accuracy(plain, xt, yt) < 0.7
    method = OT(context(), regularise=regularise)
    method.fit(task_of(xs, ys, xt))
    assert accuracy(method, xt, yt) == 1.0
    assert float((method.predict_source(xs).labels == ys).double().mean()) == 1.0


def test_transport_serves_regression() -> None:
    xs, xt = normal(60, 1, 0), normal(50, 1, 1) + 4
    ys, yt = 3 * xs, 3 * (xt - 4)
    errors = []
    for build in (NoAdaptation, OT, JDOT, lambda c: LinearOT(c, ridge=0.0)):
        method = build(context(1, kind="regression"))
        method.fit(task_of(xs, ys, xt))
        mean = method.predict(xt).mean
        assert mean is not None
        errors.append(float((mean - yt).square().mean()))
    assert errors[0] > 50 and max(errors[1:]) < 2
    entropic = OT(context(1, kind="regression"), regularise="entropic")
    entropic.fit(task_of(xs, ys, xt))
    grouped = OT(context(1, kind="regression"), regularise="group_lasso")  # there are no classes
    grouped.fit(task_of(xs, ys, xt))
    torch.testing.assert_close(grouped.fitted.images, entropic.fitted.images)


@pytest.mark.parametrize("build", [OT, LinearOT, JDOT])
def test_what_was_fitted_survives_a_checkpoint(build: Callable[[Context], FeatureMethod]) -> None:
    xs, ys, xt, _ = blobs()
    first, second = build(context()), build(context())
    first.fit(task_of(xs, ys, xt))
    second.load_state_dict(first.state_dict())
    new = normal(9, 2, 4)
    assert torch.equal(first.predict(new).probs, second.predict(new).probs)
    assert torch.equal(first.predict_source(new).probs, second.predict_source(new).probs)


# --- linear_ot ------------------------------------------------------------------------------------


def covariances(width: int = 5) -> tuple[Tensor, Tensor]:
    return covariance(normal(60, width, 0) @ normal(width, width, 2), 0), covariance(
        normal(50, width, 1) @ normal(width, width, 3), 0
    )


def test_the_gaussian_map_takes_one_covariance_to_the_other_and_is_pots() -> None:
    source, target = covariances()
    found = gaussian_map(source, target)
    torch.testing.assert_close(found @ source @ found, target)
    torch.testing.assert_close(found, found.T)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    zero = np.zeros(5)
    reference, _ = pot.gaussian.bures_wasserstein_mapping(zero, zero, source.numpy(), target.numpy())
    np.testing.assert_allclose(found, reference, atol=1e-8)


def test_the_gaussian_map_moves_samples_least() -> None:
    source, target = covariances()

    def moved(a: Tensor) -> float:  # E ‖x - x A‖², x ~ N(0, C_s)
        rest = torch.eye(5, dtype=torch.float64) - a
        return float(torch.trace(rest.T @ source @ rest))

    zero = np.zeros(5)
    least = pot.gaussian.bures_wasserstein_distance(zero, zero, source.numpy(), target.numpy()) ** 2
    assert moved(gaussian_map(source, target)) == pytest.approx(least, rel=1e-8)
    x, z = normal(60, 5, 0) @ normal(5, 5, 2), normal(50, 5, 1) @ normal(5, 5, 3)
    coral = alignment(x, z, 0.0)
    torch.testing.assert_close(coral.T @ source @ coral, target)
    assert moved(coral) > least * 1.01, "CORAL's does the same, by a longer way"


def test_linear_transport_gives_the_source_the_targets_moments() -> None:
    xs, ys, xt, _ = blobs()
    method = LinearOT(context(), ridge=0.0)
    method.fit(task_of(xs, ys, xt))
    images = method.map_source(xs)
    torch.testing.assert_close(images.mean(0), xt.mean(0))
    torch.testing.assert_close(torch.cov(images.T), torch.cov(xt.T))
    torch.testing.assert_close(method.map_target(xt), xt)
    method = LinearOT(context(1), ridge=0.3)
    method.fit(task_of(xs[:, :1], ys, xt[:, :1]))
    scale = ((xt[:, 0].var() + 0.3) / (xs[:, 0].var() + 0.3)).sqrt()
    torch.testing.assert_close(method.map_source(xs[:, :1]), (xs[:, :1] - xs[:, 0].mean()) * scale + xt[:, 0].mean())


def test_a_rank_deficient_source_is_mapped_within_its_span() -> None:
    basis = torch.linalg.qr(normal(6, 6, 8)).Q[:, :3]
    small, target = normal(40, 3, 0) * torch.tensor([1.0, 2.0, 3.0]).double(), normal(50, 6, 1)
    found = gaussian_map(covariance(small @ basis.T, 0.0), covariance(target, 0.0))
    assert bool(torch.isfinite(found).all()) and float(torch.linalg.eigvalsh(found)[0]) > -1e-10
    inside = gaussian_map(covariance(small, 0.0), covariance(target @ basis, 0.0))
    torch.testing.assert_close(found, basis @ inside @ basis.T, atol=1e-6, rtol=0)
    few = gaussian_map(covariance(normal(4, 30, 2), 0.0), covariance(normal(3, 30, 3), 0.0))
    assert bool(torch.isfinite(few).all())
    constant = LinearOT(context(), ridge=0.0)
    constant.fit(task_of(torch.ones(8, 2).double(), torch.arange(8) % 2, blobs()[2]))
    torch.testing.assert_close(constant.map_source(torch.ones(1, 2).double())[0], blobs()[2].mean(0))


def test_linear_transport_straightens_a_stretched_domain() -> None:
    ys, yt = torch.arange(80) % 2, torch.arange(70) % 2
    xs, xt = normal(80, 2, 0), normal(70, 2, 1)
    xs[:, 0] += 6 * ys
    xt[:, 0] += 6 * yt
    xt = xt * torch.tensor([0.1, 5.0]).double() + 20
    plain, method = NoAdaptation(context()), LinearOT(context(), ridge=0.0)
    for m in (plain, method):
        m.fit(task_of(xs, ys, xt))
    assert accuracy(plain, xt, yt) < 0.6 and accuracy(method, xt, yt) > 0.95


# --- jdot -----------------------------------------------------------------------------------------


def fit_jdot(method: JDOT, task: FeatureTask, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the head was fitted to, round by round; the source first."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    fit = type(method.head).fit

    def spy(head: Any, x: Tensor, y: Tensor, weights: Any = None) -> None:
        calls.append((x, y, weights))
        fit(head, x, y, weights)

    with monkeypatch.context() as patch:
        patch.setattr(type(method.head), "fit", spy)
        method.fit(task)
    return calls


def test_jdots_head_is_scikit_learns_under_the_plan() -> None:
    xs, ys, xt, _ = blobs(gap=1.0)
    method = JDOT(context(head=lambda: Logistic("classification", 2, l2=0.01)), alpha=0.7, iterations=1)
    report = method.fit(task_of(xs, ys, xt))
    first = Logistic("classification", 2, l2=0.01)
    first.fit(xs, ys)
    log_probs = first.predict(xt).log_probs
    assert log_probs is not None
    cost = 0.7 * relative_cost(xs, xt).numpy()
    plan = pot.emd(uniform(41), uniform(31), cost - log_probs.double().numpy()[:, ys.numpy()].T)
    mass = np.stack([plan[ys.numpy() == c].sum(0) for c in (0, 1)], 1)  # (n_t, 2)
    assert ((mass > 1e-12).sum(1) == 2).any(), "some target sample gets mass from both classes"
    rows, classes = np.nonzero(mass > 1e-15)
    copies = xt.numpy()[rows]
    centre, scale = copies.mean(0), copies.std(0)
    reference = LogisticRegression(C=2 / 0.01, tol=1e-10, max_iter=10_000)
    reference.fit((copies - centre) / scale, classes, sample_weight=mass[rows, classes])
    wanted = reference.predict_proba((xt.numpy() - centre) / scale)
    np.testing.assert_allclose(method.predict(xt).probs, wanted, atol=1e-4)
    objective = (plan * (cost - np.log(wanted)[:, ys.numpy()].T)).sum()
    assert report == {"objective": pytest.approx(objective, rel=1e-4), "rounds": 1.0}


def test_jdot_in_regression_fits_barycentric_labels() -> None:
    xs, xt = normal(41, 1, 0), normal(31, 1, 1) + 2
    ys = 3 * xs + 50 + 4 * normal(41, 1, 2)
    method = JDOT(context(1, lambda: Ridge("regression", 1, l2=0.05), kind="regression"), alpha=0.5, iterations=1)
    method.fit(task_of(xs, ys, xt))
    first = Ridge("regression", 1, l2=0.05)
    first.fit(xs, ys)
    mean = first.predict(xt).mean
    assert mean is not None
    loss = (ys.numpy() - mean.double().numpy().T) ** 2 / float(ys.var(correction=0))
    plan = pot.emd(uniform(41), uniform(31), 0.5 * relative_cost(xs, xt).numpy() + loss)
    labels = 31 * plan.T @ ys.numpy()
    z = (xt.numpy() - xt.numpy().mean(0)) / xt.numpy().std(0)
    reference = SkRidge(alpha=0.05 * 31).fit(z, labels)
    found = method.predict(xt).mean
    assert found is not None
    np.testing.assert_allclose(found, reference.predict(z).reshape(-1, 1), rtol=1e-5)


def test_jdots_objective_never_rises() -> None:
    xs, ys, xt, _ = blobs(n=61, m=51, gap=1.0)
    objectives = []
    for rounds in range(1, 5):
        method = JDOT(context(head=lambda: Logistic("classification", 2, l2=1e-9)), alpha=0.3, iterations=rounds)
        objectives.append(method.fit(task_of(xs, ys, xt))["objective"])
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(objectives))
    assert objectives[-1] < objectives[0] - 0.03


def test_jdot_stops_once_the_plan_stays() -> None:
    xs, ys, xt, yt = blobs()
    method = JDOT(context(), iterations=50)
    assert method.fit(task_of(xs, ys, xt))["rounds"] < 10
    assert accuracy(method, xt, yt) == 1.0
    plain = NoAdaptation(context())
    plain.fit(task_of(xs, ys, xt))
    assert accuracy(plain, xt, yt) < 0.7


def test_granted_labels_hold_jdots_plan_and_join_its_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    xs, ys, xt, yt = blobs(gap=0.2)
    labelled = Features(xt[:5], yt[:5])
    method = JDOT(context(), iterations=3)
    calls = fit_jdot(method, task_of(xs, ys, xt, labelled), monkeypatch)
    assert len(calls) >= 2
    for x, y, weights in calls[1:]:
        assert torch.equal(x[-5:], xt[:5]) and torch.equal(y[-5:], yt[:5])
        assert float(weights[-5:].sum()) == pytest.approx(float(weights[:-5].sum()))
        for sample, label in zip(xt[:5], yt[:5], strict=True):  # what was transported there has their class alone
            arrived = (x[:-5] == sample).all(1)
            assert int(arrived.sum()) == 1 and int(y[:-5][arrived]) == int(label)
    x, y, weights = calls[-1]
    total = torch.zeros(31, dtype=torch.float64)
    for row, weight in zip(x[:-5], weights[:-5], strict=True):
        total += weight * (xt == row).all(1)
    torch.testing.assert_close(total, torch.full((31,), 1 / 31, dtype=torch.float64))


def test_jdot_refuses_a_head_that_cannot_heed_weights() -> None:
    with pytest.raises(TransferError, match="head knn cannot heed: set head=logistic, ridge or svm"):
        JDOT(context(head=lambda: KNN("classification", 2)))
    JDOT(context(1, lambda: KNN("regression", 1), kind="regression"))  # whose fits have no weights


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda c: OT(c, reg=0.0),
            r"method\.reg must be positive, not 0.0: without entropy set method\.regularise=none",
        ),
        (lambda c: OT(c, eta=-1.0), r"method\.eta >= 0"),
        (lambda c: OT(c, max_iter=0), r"method\.max_iter >= 1"),
        (lambda c: LinearOT(c, ridge=-1.0), r"method\.ridge must not be negative"),
        (lambda c: JDOT(c, alpha=0.0), r"method\.alpha > 0"),
        (lambda c: JDOT(c, iterations=0), r"method\.iterations >= 1"),
    ],
)
def test_options_out_of_range_are_named(build: Callable[[Context], FeatureMethod], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        build(context())
