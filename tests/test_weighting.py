"""Importance weights: each optimum against a general solver and its optimality conditions, and covariate shift that they mend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import feature_tasks
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.baseline.no_adaptation import NoAdaptation
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.heads.knn import KNN
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.math.importance import effective_share
from transfer_cli.methods.math.kernel_map import median_square, rbf
from transfer_cli.methods.phases import Features, FeatureTask
from transfer_cli.methods.weighting import kmm
from transfer_cli.methods.weighting.discriminator import DensityRatio, log_ratio
from transfer_cli.methods.weighting.kliep import KLIEP, fit_mixture
from transfer_cli.methods.weighting.kmm import KMM, least, project, solve

METHODS: list[type[FeatureMethod]] = [KMM, KLIEP, DensityRatio]


def context(width: int, head: Callable[[], Head], kind: str = "classification", classes: int = 2) -> Context:
    if kind == "regression":
        return feature_tasks.regression(width, make_head=head)
    return feature_tasks.context(width, classes, make_head=head)


def classifier(width: int = 2) -> Context:
    return context(width, lambda: Logistic("classification", 2))


def normal(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shifted(n: int = 60, m: int = 50, width: int = 2) -> tuple[Tensor, Tensor]:
    return normal(n, width, 0), 0.7 * normal(m, width, 1) + 0.8


def task(source: Tensor, target: Tensor) -> FeatureTask:
    return FeatureTask(Features(source, torch.arange(len(source)) % 2), Features(target), None)


def weights_of(method: FeatureMethod, source: Tensor, target: Tensor) -> Tensor:
    method.fit(task(source, target))
    assert method.weights is not None
    return method.weights


# --- kernel mean matching -------------------------------------------------------------------------


def kmm_problem(n: int, m: int, gamma: float = 0.5) -> tuple[Tensor, Tensor]:
    source, target = shifted(n, m)
    return rbf(source, source, gamma), n * rbf(source, target, gamma).mean(1)


@pytest.mark.parametrize(
    ("upper", "low", "high"),
    [(1000.0, 0.9, 1.1), (1.3, 0.9, 1.1), (2.0, 1.5, 1.6), (1.5, 0.1, 0.5), (50.0, 0.0, 40.0)],
    ids=["paper", "box binds", "sum binds below", "sum binds above", "free"],
)
def test_kmm_is_the_optimum_that_slsqp_finds(upper: float, low: float, high: float) -> None:
    n = 12
    kernel, linear = kmm_problem(n, 15)
    found = solve(kernel.__matmul__, linear, float(kernel.sum(1).max()), upper, low * n, high * n, tolerance=1e-13)
    k, c = kernel.numpy(), linear.numpy()
    reference = minimize(
        lambda b: 0.5 * b @ k @ b - c @ b,
        np.full(n, 0.3 * high),
        jac=lambda b: k @ b - c,
        method="SLSQP",
        bounds=[(0, upper)] * n,
        constraints=[
            {"type": "ineq", "fun": lambda b: b.sum() - low * n, "jac": lambda b: np.ones(n)},
            {"type": "ineq", "fun": lambda b: high * n - b.sum(), "jac": lambda b: -np.ones(n)},
        ],
        options={"ftol": 1e-15, "maxiter": 2000},
    )
    value = float(0.5 * found @ kernel @ found - linear @ found)
    assert float(found.min()) >= 0 and float(found.max()) <= upper
    assert low * n - 1e-9 <= float(found.sum()) <= high * n + 1e-9
    assert value == pytest.approx(reference.fun, rel=1e-7)
    np.testing.assert_allclose(found, reference.x, atol=2e-3)


def test_kmm_meets_the_optimality_conditions() -> None:
    n, upper = 120, 3.0
    kernel, linear = kmm_problem(n, 90)
    low, high = 0.95 * n, 1.05 * n
    beta = solve(kernel.__matmul__, linear, float(kernel.sum(1).max()), upper, low, high, tolerance=1e-14)
    gradient = kernel @ beta - linear
    inside = (beta > 1e-6) & (beta < upper - 1e-6)
    multiplier = gradient[inside].mean()  # of the sum's constraint, where that binds
    assert 5 < int(inside.sum()) < n and int((beta == upper).sum()) > 3 and int((beta == 0).sum()) > 3
    torch.testing.assert_close(
        gradient[inside], multiplier.expand(int(inside.sum())), atol=1e-6 * float(linear.max()), rtol=0
    )
    assert float((gradient - multiplier)[beta == 0].min()) > -1e-5
    assert float((gradient - multiplier)[beta == upper].max()) < 1e-5
    total = float(beta.sum())
    if low + 1e-6 < total < high - 1e-6:
        assert abs(float(multiplier)) < 1e-5
    else:
        assert float(multiplier) * (1 if total < n else -1) > 0


@pytest.mark.parametrize(("upper", "low", "high"), [(2.0, 5.0, 8.0), (2.0, 50.0, 55.0), (1000.0, 1.0, 2.0)])
def test_the_projection_is_the_nearest_feasible_point(upper: float, low: float, high: float) -> None:
    point = 3 * normal(30, 1, 0)[:, 0]
    found = project(point, upper, low, high)
    assert float(found.min()) >= 0 and float(found.max()) <= upper
    assert low - 1e-9 <= float(found.sum()) <= high + 1e-9
    away = (point - found).numpy()  # (point - found)ᵀ s is greatest at s = found, over all feasible s
    best = linprog(-away, A_ub=np.stack([-np.ones(30), np.ones(30)]), b_ub=[-low, high], bounds=(0, upper))
    assert -best.fun == pytest.approx(float(away @ found.numpy()), abs=1e-7)


@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
def test_the_least_linear_value_is_the_linear_programmes(shift: float) -> None:
    gradient = normal(40, 1, 0)[:, 0] + shift
    rows = np.stack([-np.ones(40), np.ones(40)])
    best = linprog(gradient.numpy(), A_ub=rows, b_ub=[-7.3, 25.1], bounds=(0, 1.7))
    assert least(gradient, 1.7, 7.3, 25.1) == pytest.approx(best.fun, rel=1e-9)


def test_kmm_matches_the_kernel_means_with_the_papers_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = shifted()
    bounds: list[Any] = []

    def spy(*arguments: Any) -> Tensor:
        bounds.extend(arguments[3:])
        return solve(*arguments)

    monkeypatch.setattr(kmm, "solve", spy)
    weights = weights_of(KMM(classifier()), source, target)
    assert bounds == pytest.approx([2 * 60 - 60**0.5, 60**0.5, 2 * 60 - 60**0.5])  # B = 1000 is out of reach
    gamma = 1 / median_square(torch.cat([source, target]), torch.Generator().manual_seed(0))
    kernel, cross = rbf(source, source, gamma), rbf(source, target, gamma)

    def gap(beta: Tensor) -> float:
        return float(beta @ kernel @ beta / 60**2 - 2 * (beta @ cross.mean(1)) / 60 + rbf(target, target, gamma).mean())

    assert gap(weights) < 0.05 * gap(torch.ones(60, dtype=torch.float64))
    assert float(weights.min()) >= 0
    narrow = weights_of(KMM(classifier(), slack=0.0, max_weight=1.0), source, target)
    torch.testing.assert_close(narrow, torch.ones_like(narrow))  # nothing else is feasible


def test_kmm_leaves_domains_that_agree_alone() -> None:
    source, _ = shifted()
    torch.testing.assert_close(weights_of(KMM(classifier()), source, source), torch.ones(60, dtype=torch.float64))


def test_kmm_with_all_samples_as_landmarks_is_exact() -> None:
    source, target = shifted()
    multiply, linear, bound = KMM(classifier(), gamma=2.0).problem(source, target)
    method = KMM(classifier(), gamma=2.0, approximate="nystroem", landmarks=110)
    by_features, linear_too, largest = method.problem(source, target)
    beta = normal(60, 1, 3)[:, 0].abs()
    torch.testing.assert_close(by_features(beta), multiply(beta))
    torch.testing.assert_close(linear_too, linear)
    assert largest == pytest.approx(float(torch.linalg.eigvalsh(rbf(source, source, 2.0))[-1])) and largest <= bound


@pytest.mark.parametrize("approximate", ["nystroem", "random_features"])
def test_approximate_kmm_serves_many_samples(approximate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmm, "LARGEST_EXACT", 1500)
    source, target = shifted(1000, 900)
    with pytest.raises(TransferError, match=r"set method\.approximate=nystroem or random_features"):
        weights_of(KMM(classifier()), source, target)
    weights = weights_of(KMM(classifier(), approximate=approximate, landmarks=100), source, target)
    before, after = source.mean(0) - target.mean(0), weights @ source / weights.sum() - target.mean(0)
    assert float(after.norm()) < 0.2 * float(before.norm())


def test_kmm_knows_neither_order_nor_axes() -> None:
    source, target = shifted()
    weights = weights_of(KMM(classifier()), source, target)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(weights_of(KMM(classifier()), source[order], target), weights[order])
    turn = torch.linalg.qr(normal(2, 2, 7)).Q
    torch.testing.assert_close(weights_of(KMM(classifier()), 9 * source @ turn + 4, 9 * target @ turn + 4), weights)


# --- KLIEP ----------------------------------------------------------------------------------------


def test_kliep_is_the_optimum_that_slsqp_finds_and_meets_its_conditions() -> None:
    source, target = shifted(40, 30)
    on_target, means = rbf(target, target[:8], 0.6), rbf(source, target[:8], 0.6).mean(0)
    alpha = fit_mixture(on_target, means)
    a, b = on_target.numpy(), means.numpy()
    reference = minimize(
        lambda x: -np.log(a @ x).mean(),
        np.full(8, 1 / b.sum()),
        method="SLSQP",
        bounds=[(0, None)] * 8,
        constraints=[{"type": "eq", "fun": lambda x: b @ x - 1}],
        options={"ftol": 1e-14, "maxiter": 2000},
    )
    assert float(means @ alpha) == pytest.approx(1, abs=1e-12) and float(alpha.min()) >= 0
    assert float((on_target @ alpha).log().mean()) == pytest.approx(-reference.fun, abs=1e-8)
    slope = (on_target / (on_target @ alpha)[:, None]).mean(0) / means  # of the likelihood, over the constraint's
    assert float(slope.max()) < 1 + 1e-5, "no centre could gain"
    used = alpha * means > 1e-6
    assert 1 < int(used.sum()) < 8
    torch.testing.assert_close(slope[used], torch.ones(int(used.sum()), dtype=torch.float64), atol=1e-4, rtol=0)


def test_kliep_weighs_by_its_kernels_and_takes_the_likeliest_width() -> None:
    source, target = shifted(80, 61)
    method = KLIEP(classifier(), gamma=[0.001, 20.0, 0.5], centres=20, folds=4)
    report = method.fit(task(source, target))
    assert method.weights is not None and float(method.weights.mean()) == pytest.approx(1)
    assert report["effective_share"] == pytest.approx(effective_share(method.weights))
    shuffled = target[torch.randperm(61, generator=torch.Generator().manual_seed(0))]
    scores = []
    for gamma in (0.001, 20.0, 0.5):
        parts = []
        for fold in range(4):
            kept, left = (shuffled[[i for i in range(61) if (i % 4 == fold) is out]] for out in (False, True))
            centres = kept[:20]
            alpha = fit_mixture(rbf(kept, centres, gamma), rbf(source, centres, gamma).mean(0))
            parts.append(float((rbf(left, centres, gamma) @ alpha).clamp_min(1e-100).log().mean()))
        scores.append(sum(parts))
        assert method.left_out_likelihood(source, shuffled, gamma) == pytest.approx(scores[-1])
    assert report["gamma"] == (0.001, 20.0, 0.5)[int(np.argmax(scores))] == 20.0
    alpha = fit_mixture(rbf(shuffled, shuffled[:20], 20.0), rbf(source, shuffled[:20], 20.0).mean(0))
    torch.testing.assert_close(method.weights, rbf(source, shuffled[:20], 20.0) @ alpha)
    default = KLIEP(classifier()).fit(task(source, target))
    assert default["likelihood"] > 0 and default["gamma"] > 0


def test_kliep_says_so_when_no_kernel_reaches_the_source() -> None:
    source, target = shifted()
    with pytest.raises(TransferError, match=r"set a smaller method\.gamma"):
        KLIEP(classifier(), gamma=1.0).fit(task(source, target + 1000))
    assert KLIEP(classifier()).fit(task(source, target + 1000))["gamma"] > 0, "cross-validation finds one that does"


# --- the classifier of domains --------------------------------------------------------------------


def test_density_ratios_are_the_odds_of_scikit_learns_classifier() -> None:
    source, target = shifted(60, 40)
    x = torch.cat([source, target])
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    # two rows of weights, each with l2 / 2, are one with l2 / 4 on their difference; scikit-learn's loss is a sum over samples
    reference = LogisticRegression(C=2 / (0.05 * 100), tol=1e-10, max_iter=10_000).fit(z, np.arange(100) >= 60)
    odds = reference.decision_function(z[:60]) + math.log(60 / 40)
    np.testing.assert_allclose(log_ratio(source, target, 0.05), odds, atol=1e-4)
    method = DensityRatio(classifier(), l2=0.05, max_weight=1.5)
    weights = weights_of(method, source, target)
    wanted = np.minimum(np.exp(odds), 1.5)
    assert 3 < int((wanted == 1.5).sum()) < 57
    np.testing.assert_allclose(weights / weights.mean(), wanted / wanted.mean(), rtol=1e-4)


def test_the_ratio_of_gaussians_of_one_width_is_found() -> None:
    source, target = normal(20_000, 1, 0), normal(10_000, 1, 1) + 1
    expected = source[:, 0] - 0.5  # log N(x; 1, 1) / N(x; 0, 1)
    found = log_ratio(source, target, 1e-6)
    assert float((found - expected).abs().max()) < 0.15


def test_domains_far_apart_leave_weights_that_are_numbers() -> None:
    source, target = shifted()
    weights = weights_of(DensityRatio(classifier(), l2=1e-9), source, target + 1e6)
    assert bool(torch.isfinite(weights).all()) and float(weights.sum()) > 0


# --- all of them ----------------------------------------------------------------------------------


def test_the_effective_share_counts_the_samples_that_are_left() -> None:
    assert effective_share(torch.full((8,), 3.0)) == pytest.approx(1)
    assert effective_share(torch.tensor([0.0, 5.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert effective_share(torch.tensor([2.0, 2.0, 0.0, 0.0])) == pytest.approx(0.5)


@pytest.mark.parametrize("method", METHODS)
def test_weights_mend_covariate_shift_in_regression(method: type[FeatureMethod]) -> None:
    """Shimodaira's case: a line fitted to a cubic is right where it is fitted, so it must be fitted where the target is."""

    def sample(n: int, centre: float, width: float, seed: int) -> tuple[Tensor, Tensor]:
        x = centre + width * normal(n, 1, seed)
        return x, x**3 - x + 0.3 * normal(n, 1, seed + 10)

    (xs, ys), (xt, yt) = sample(200, 0.5, 0.5, 0), sample(150, 0.0, 0.3, 1)

    def error(kind: type[FeatureMethod]) -> float:
        built = kind(context(1, lambda: Ridge("regression", 1, l2=1e-6), kind="regression"))
        built.fit(FeatureTask(Features(xs, ys), Features(xt), None))
        mean = built.predict(xt).mean
        assert mean is not None
        return float((mean - yt).square().mean())

    plain, weighted = error(NoAdaptation), error(method)
    assert weighted < 0.5 * plain and weighted < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_weights_mend_covariate_shift_in_classification(method: type[FeatureMethod]) -> None:
    """Two classes under a bent border: the straight one of the source is wrong where the target lies."""

    def sample(n: int, centre: float, width: float, seed: int) -> tuple[Tensor, Tensor]:
        x = normal(n, 2, seed)
        x[:, 0] = centre + width * x[:, 0]
        return x, (x[:, 1] > x[:, 0].square() - 1).long()

    (xs, ys), (xt, yt) = sample(400, 0.0, 1.0, 0), sample(300, 1.2, 0.4, 1)

    def accuracy(kind: type[FeatureMethod]) -> float:
        built = kind(classifier())
        built.fit(FeatureTask(Features(xs, ys), Features(xt), None))
        return float((built.predict(xt).labels == yt).double().mean())

    assert accuracy(method) > accuracy(NoAdaptation) + 0.1
    assert accuracy(method) > 0.88


@pytest.mark.parametrize("method", METHODS)
def test_the_head_gets_the_weights_and_the_report_their_share(
    method: type[FeatureMethod], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = shifted()
    given: list[Tensor | None] = []
    monkeypatch.setattr(Logistic, "fit", lambda head, x, y, weights=None: given.append(weights))
    built = method(classifier())
    report = built.fit(task(source, target))
    (weights,) = given
    assert weights is not None and built.weights is not None
    torch.testing.assert_close(weights, built.weights / built.weights.sum())
    share = float(weights.sum() ** 2 / (60 * weights.square().sum()))
    assert report["effective_share"] == pytest.approx(share) and 0.05 < share < 0.95


@pytest.mark.parametrize("method", METHODS)
def test_a_head_that_cannot_heed_weights_is_refused(method: type[FeatureMethod]) -> None:
    with pytest.raises(TransferError, match="head knn cannot heed: set head=logistic"):
        method(context(2, lambda: KNN("classification", 2))).fit(task(*shifted()))


@pytest.mark.parametrize("method", METHODS)
def test_features_that_are_not_numbers_are_refused(method: type[FeatureMethod]) -> None:
    source, target = shifted()
    source[3, 1] = math.nan
    with pytest.raises(TransferError, match="1 of 120 values in the source features are NaN"):
        method(classifier()).fit(task(source, target))


@pytest.mark.parametrize("method", [KMM, KLIEP])
def test_constant_features_have_no_kernel_width(method: type[FeatureMethod]) -> None:
    with pytest.raises(TransferError, match="the features are constant"):
        method(classifier()).fit(task(torch.ones(9, 2).double(), torch.ones(8, 2).double()))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda c: KMM(c, max_weight=0.5), r"method\.max_weight must be at least 1"),
        (lambda c: KMM(c, slack=1.0), r"method\.slack must be between 0 and 1"),
        (lambda c: KMM(c, gamma=0.0), r"method\.gamma must be positive, or null"),
        (lambda c: KLIEP(c, gamma=[1.0, -1.0]), r"method\.gamma is null, a positive number, or a list"),
        (lambda c: KLIEP(c, gamma=[]), r"method\.gamma is null, a positive number, or a list"),
        (lambda c: KLIEP(c, folds=1), r"method\.folds of 2 or more"),
        (lambda c: DensityRatio(c, l2=0.0), r"method\.l2 must be positive"),
        (lambda c: DensityRatio(c, max_weight=0.0), r"method\.max_weight must be positive"),
    ],
)
def test_options_out_of_range_are_named(build: Callable[[Context], FeatureMethod], message: str) -> None:
    with pytest.raises(TransferError, match=message):
        build(classifier())
