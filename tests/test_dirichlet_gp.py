"""Dirichlet-based Gaussian processes: the closed forms against dense ones, the method against what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from feature_tasks import context
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from test_bayes import draws, stretched
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.gaussian_process import dirichlet_gp
from transfer_cli.methods.gaussian_process.dirichlet_gp import (
    DirichletGP,
    DirichletPosterior,
    Few,
    Hyper,
    Labels,
    whitened,
)
from transfer_cli.methods.gaussian_process.expected_softmax import class_probs
from transfer_cli.methods.phases import Features, FeatureTask

HYPER = Hyper(alpha_eps=0.02, lengthscale=0.8, signal=4.0, linear=2.0)


def with_constant(x: Tensor) -> Tensor:
    return whitened(x, torch.zeros_like(x[0]), torch.eye(x.shape[1], dtype=x.dtype))


def covariance(x: Tensor, z: Tensor, hyper: Hyper = HYPER) -> np.ndarray:
    """The kernel as the docstring has it, of inputs without the constant."""
    a, b, width = x.numpy(), z.numpy(), x.shape[1]
    squared = ((a[:, None] - b[None]) ** 2).sum(2)
    stationary = hyper.signal * np.exp(-squared / (2 * width * hyper.lengthscale**2))
    return stationary + hyper.linear * (1 + a @ b.T / width)


def dense(x: Tensor, y: Tensor, z: Tensor, classes: int, hyper: Hyper = HYPER) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of f `(B, K)`, a class at a time, from the paper's formulas."""
    means, variances = [], []
    prior = Labels.of(hyper.alpha_eps, classes).mean
    for k in range(classes):
        alpha = hyper.alpha_eps + (y == k).numpy()
        noise = np.log(1 + 1 / alpha)
        residual = np.log(alpha) - noise / 2 - prior
        inverse = np.linalg.inv(covariance(x, x, hyper) + np.diag(noise))
        cross = covariance(z, x, hyper)
        means.append(prior + cross @ inverse @ residual)
        variances.append(np.diag(covariance(z, z, hyper) - cross @ inverse @ cross.T))
    return np.stack(means, 1), np.stack(variances, 1)


def fitted(source: Features | None, few: Features | None, classes: int = 4, **changes: Any) -> DirichletGP:
    part = few if source is None else source
    assert part is not None
    names = {"source_classes", "source_labels_fit_head"}
    setting = {"has_source": source is not None, "has_target_labels": few is not None}
    setting |= {name: changes.pop(name) for name in names & set(changes)}
    method = DirichletGP(context(part.x.shape[1], classes, **setting), **changes)
    method.fit(FeatureTask(source, None, few))
    return method


def nll(method: DirichletGP, test: Features) -> float:
    assert test.y is not None
    log_probs = method.predict(test.x).log_probs
    assert log_probs is not None
    return -float(log_probs.gather(1, test.y[:, None]).mean())


def accuracy(method: DirichletGP, test: Features) -> float:
    return float((method.predict(test.x).labels == test.y).double().mean())


# --- closed forms ---------------------------------------------------------------------------------


def test_log_normals_have_the_gammas_moments_and_the_mean_is_that_of_classes_alike() -> None:
    labels = Labels.of(0.03, 5)
    for y, noise, alpha in ((labels.own, labels.own_noise, 1.03), (labels.other, labels.other_noise, 0.03)):
        assert np.exp(y + noise / 2) == pytest.approx(alpha)
        assert (np.exp(noise) - 1) * np.exp(2 * y + noise) == pytest.approx(alpha)
    target, noise = labels.table(torch.arange(5), 5)
    assert labels.mean == pytest.approx(float(target.mean()))
    assert noise[2, 2] == pytest.approx(labels.own_noise) and noise[2, 3] == pytest.approx(labels.other_noise)


@pytest.mark.parametrize("twins", [False, True])
def test_with_all_points_the_weight_space_is_the_dense_process(twins: bool) -> None:
    x, y, z = draws(15, 3), torch.arange(15) % 3, draws(6, 3, seed=1)
    if twins:
        x[8:] = x[:7].clone()  # the same points, of other classes
    anchors = with_constant(x).unique(dim=0)
    assert len(anchors) == (8 if twins else 15)
    posterior = DirichletPosterior.fit(HYPER, with_constant(x), y, 3, anchors)
    mean, variance, missed = posterior.moments(with_constant(z))
    wanted_mean, wanted_variance = dense(x, y, z, 3)
    np.testing.assert_allclose(mean.numpy(), wanted_mean, atol=1e-6)
    np.testing.assert_allclose((variance + missed).numpy(), wanted_variance, atol=1e-6)


@pytest.mark.parametrize("twins", [False, True])
def test_leaving_one_out_is_fitting_without_it(twins: bool) -> None:
    x, y = draws(15, 3), torch.arange(15) % 3
    if twins:
        x[8:] = x[:7].clone()
    whole = DirichletPosterior.fit(HYPER, with_constant(x), y, 3, with_constant(x).unique(dim=0))
    mean, variance = whole.left_out(with_constant(x), y, HYPER.alpha_eps)
    for i in range(15):
        rest = torch.arange(15) != i
        wanted_mean, wanted_variance = dense(x[rest], y[rest], x[i : i + 1], 3)
        np.testing.assert_allclose(mean[i].numpy(), wanted_mean[0], atol=1e-5)
        np.testing.assert_allclose(variance[i].numpy(), wanted_variance[0], atol=1e-5)


def test_leaving_one_out_of_a_nystroem_model_is_fitting_it_without_that_one() -> None:
    x, y, anchors = with_constant(draws(40, 3)), torch.arange(40) % 3, with_constant(draws(9, 3, seed=4))
    mean, variance = DirichletPosterior.fit(HYPER, x, y, 3, anchors).left_out(x, y, HYPER.alpha_eps)
    for i in (0, 17, 39):
        rest = torch.arange(40) != i
        wanted, explained, missed = DirichletPosterior.fit(HYPER, x[rest], y[rest], 3, anchors).moments(x[i : i + 1])
        torch.testing.assert_close(mean[i], wanted[0])
        torch.testing.assert_close(variance[i], (explained + missed)[0])


def test_blocks_of_samples_are_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, anchors = with_constant(draws(40, 3)), torch.arange(40) % 3, with_constant(draws(9, 3, seed=4))
    whole = DirichletPosterior.fit(HYPER, x, y, 3, anchors)
    monkeypatch.setattr(dirichlet_gp, "BLOCK", 7)
    torch.testing.assert_close(DirichletPosterior.fit(HYPER, x, y, 3, anchors).weights, whole.weights)


def test_probabilities_are_the_mean_over_the_posterior() -> None:
    """Of two classes, by quadrature over their difference."""
    mean, variance = 2 * draws(4, 2), draws(4, 2, seed=1).square() + 0.2
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    gap = (mean[:, 1] - mean[:, 0]).numpy()[:, None] + variance.sum(1).sqrt().numpy()[:, None] * nodes
    wanted = (1 / (1 + np.exp(-gap))) @ weights / weights.sum()
    np.testing.assert_allclose(class_probs(mean, variance, 40_000)[:, 1].numpy(), wanted, atol=5e-3)
    torch.testing.assert_close(class_probs(mean, variance, 0), mean.softmax(1))


def test_dense_posterior_is_scipys_conditional() -> None:
    """Of the other oracle: the density of the labels factorises into what `dense` predicts."""
    x, y = draws(5, 2), torch.tensor([0, 1, 1, 0, 1])
    labels = Labels.of(HYPER.alpha_eps, 2)
    target, noise = (column[:, 0].numpy() for column in labels.table(y, 2))
    joint = covariance(x, x) + np.diag(noise)
    whole = multivariate_normal(np.full(5, labels.mean), joint).logpdf(target)
    part = multivariate_normal(np.full(4, labels.mean), joint[:4, :4]).logpdf(target[:4])
    mean, variance = dense(x[:4], y[:4], x[4:], 2)
    last = multivariate_normal(mean[0, :1], variance[0, :1] + noise[4]).logpdf(target[4:])
    assert whole - part == pytest.approx(float(last))


# --- the method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [False, True])
def test_whitening_by_the_source_is_worth_labels(new: bool) -> None:
    gains = []
    for seed in range(3):
        source, few, test = stretched(3, seed=seed, new=new)
        plain = fitted(source, few, source_labels_fit_head=not new, whiten=False)
        gains.append(accuracy(fitted(source, few, source_labels_fit_head=not new), test) - accuracy(plain, test))
    assert min(gains) > 0.1


def test_hyperparameters_are_those_of_the_least_left_out_loss() -> None:
    source, few, test = stretched(8)
    method = fitted(source, few)
    state = method.head.fitted
    some = method.some([(whitened(few.x, state.centre, state.whitening), few.y)])
    assert some is not None and int(some.asked.sum()) == len(few.y)
    anchors, best = some.x.unique(dim=0), method.chosen(some, 4)
    least = some.loss(method.left_out(some, best, 4, anchors))
    for name, values in dirichlet_gp.GRID.items():
        for value in values:
            assert some.loss(method.left_out(some, best._replace(**{name: value}), 4, anchors)) >= least - 1e-9
    bad = fitted(source, few, alpha_eps=0.001, lengthscale=0.1, signal=30.0, linear=0.01)
    assert nll(method, test) < nll(bad, test) - 0.3
    set_ = fitted(source, few, lengthscale=3.0).head.fitted.theta.exp()
    assert float(set_[1]) == pytest.approx(3.0 * 12**0.5)


def test_temperature_leaves_the_order_alone_and_mends_doubt() -> None:
    source, few, test = stretched(8)
    method = fitted(source, few)
    before = method.predict(test.x)
    method.head.fitted.put(temperature=torch.tensor(7.0, dtype=torch.float64))
    assert torch.equal(method.predict(test.x).labels, before.labels)
    assert nll(method, test) > 0.5
    some = Few(with_constant(few.x), few.y, torch.ones(len(few.y), dtype=torch.bool))
    meaningless = Few(some.x, draws(len(few.y)).argsort() % 4, some.asked)
    sure = Hyper(alpha_eps=0.001, lengthscale=0.05, signal=30.0, linear=30.0)
    assert method.temperature(meaningless, sure) > 1.5 > method.temperature(some, method.chosen(some, 4))


def test_beyond_its_points_it_is_sparse_and_as_good() -> None:
    source, _, test = stretched(1)
    exact = fitted(source, None, lengthscale=2.0, signal=3.0, linear=3.0, alpha_eps=0.01)
    sparse = fitted(source, None, lengthscale=2.0, signal=3.0, linear=3.0, alpha_eps=0.01, points=40)
    assert len(exact.head.fitted.anchors) == 200 and len(sparse.head.fitted.anchors) == 40
    assert accuracy(sparse, test) > accuracy(exact, test) - 0.02
    assert nll(sparse, test) < nll(exact, test) + 0.05
    every = fitted(source, None, lengthscale=2.0, signal=3.0, linear=3.0, alpha_eps=0.01, points=200)
    torch.testing.assert_close(every.predict(test.x).log_probs, exact.predict(test.x).log_probs)


def test_few_labels_lean_on_the_source() -> None:
    source, few, test = stretched(1)
    one_each = fitted(source, few)  # nothing can be left out
    assert float(one_each.head.fitted.temperature) == 1.0 and torch.isfinite(one_each.predict(test.x).log_probs).all()
    assert torch.equal(fitted(source, few, hyper="source").head.fitted.theta, one_each.head.fitted.theta)
    single = fitted(source, Features(few.x[:1], few.y[:1]))
    assert torch.isfinite(single.predict(test.x).log_probs).all()
    pooled = fitted(source, few, data="pooled")
    assert len(pooled.head.fitted.anchors) == 204
    assert accuracy(pooled, test) > accuracy(one_each, test) + 0.1
    assert torch.isfinite(fitted(None, few).predict(test.x).log_probs).all()


def test_what_is_predicted_is_the_dense_process_of_the_whitened_features() -> None:
    _, few, test = stretched(8)
    hyper = {"alpha_eps": 0.02, "lengthscale": 0.3, "signal": 20.0, "linear": 0.5}
    method = fitted(None, few, **hyper)
    x, z = ((part.x - few.x.mean(0)) / few.x.std(0, correction=0) for part in (few, test))
    mean, variance = (torch.from_numpy(column) for column in dense(x, few.y, z, 4, Hyper(**hyper)))
    temperature = float(method.head.fitted.temperature)
    assert temperature != 1
    wanted = (class_probs(mean, variance, 64).log() / temperature).softmax(1)
    torch.testing.assert_close(method.predict(test.x).probs.double(), wanted, atol=1e-5, rtol=0)


def test_far_from_all_samples_it_says_that_it_does_not_know() -> None:
    source, few, _ = stretched(8)
    method = fitted(source, few, linear=1e-6, lengthscale=1.0)
    probs = method.predict(few.x[:1] + 1e4).probs
    torch.testing.assert_close(probs, torch.full_like(probs, 0.25), atol=0.1, rtol=0)


def test_what_it_refuses() -> None:
    for wrong in ({"alpha_eps": 0.0}, {"lengthscale": -1.0}, {"points": 1}, {"draws": 1}):
        with pytest.raises(ValueError, match=r"positive|at least 2"):
            DirichletGP(context(), **wrong)
    for wrong in ({"hyper": "source"}, {"data": "pooled"}):
        with pytest.raises(ValueError, match="source=NAME"):
            DirichletGP(context(has_source=False), **wrong)
    with pytest.raises(ValueError, match=r"method\.data=auto"):
        DirichletGP(context(source_labels_fit_head=False), data="pooled")
    source, _, _ = stretched(1)
    with pytest.raises(TransferError, match="target_labels=N"):
        fitted(source, None, source_labels_fit_head=False)


def test_constants_huge_scales_and_fewer_points_than_dimensions() -> None:
    source, few, test = stretched(3)
    scales = torch.logspace(-6, 6, 12, dtype=torch.float64)
    wide, tall, far = (Features(part.x * scales, part.y) for part in (source, few, test))
    constant = [Features(torch.cat([p.x, torch.ones_like(p.x[:, :1])], 1), p.y) for p in (few, test)]
    assert accuracy(fitted(wide, tall), far) > 0.8
    assert accuracy(fitted(None, constant[0]), constant[1]) == pytest.approx(
        accuracy(fitted(None, few), test), abs=0.05
    )
    thin = fitted(Features(source.x[:8], source.y[:8]), Features(few.x[:4], few.y[:4]))
    assert torch.isfinite(thin.predict(test.x).log_probs).all()


def test_digits_of_other_classes_from_ten_labels_each() -> None:
    """0-4 tell how pixels vary, ten of each of 5-9 are given: against what the covariance alone changes."""
    x, y = (torch.from_numpy(column) for column in load_digits(return_X_y=True))
    low, high = y < 5, (y >= 5).nonzero()[:, 0]
    order = high[torch.randperm(len(high), generator=torch.Generator().manual_seed(0))]
    labels = y[order].long() - 5
    turn = (torch.nn.functional.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0] <= 10).nonzero()[:, 0]
    rest = torch.ones(len(order), dtype=torch.bool)
    rest[turn] = False
    few, test = Features(x[order][turn], labels[turn]), Features(x[order][rest], labels[rest])
    method = fitted(Features(x[low], y[low].long()), few, classes=5, source_classes=5, source_labels_fit_head=False)
    assert accuracy(method, test) > 0.8
    assert nll(method, test) < 0.6
