"""Bayesian transfer on frozen features: conjugate updates, evidence, predictives; what the source's prior is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from torch import Tensor

from tests.feature_tasks import context, shifted_classes
from transfer_cli.errors import TransferError
from transfer_cli.methods.bayes.bayes_head import BayesHead, Posterior, bounded, left_out, normal_draws, with_prior
from transfer_cli.methods.bayes.niw_lda import NIWLDA
from transfer_cli.methods.bayes.source_head import BIAS, bound_between, penalties, whitened
from transfer_cli.methods.bayes.summary import Summary
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.niw import NIW, log_evidence
from transfer_cli.methods.math.softmax import Precision, Softmax
from transfer_cli.methods.math.span import Span, centred_block
from transfer_cli.methods.phases import Features, FeatureTask


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def prior(classes: int = 3, width: int = 4) -> NIW:
    root = draws(width, width, seed=5)
    kappa = torch.linspace(0.5, 2.0, classes, dtype=torch.float64)
    return NIW(draws(classes, width, seed=6), kappa, width + 3.5, root @ root.T + torch.eye(width, dtype=torch.float64))


def stretched(granted: int, classes: int = 4, width: int = 12, seed: int = 0, new: bool = False) -> tuple[Any, ...]:
    """Classes whose spread is long in directions that say nothing; the target's means moved, or altogether new ones."""
    root = torch.diag(torch.cat([torch.full((width // 2,), 6.0), torch.full((width // 2,), 0.5)]).double())
    turn = torch.linalg.qr(draws(width, width, seed=55)).Q

    def sample(means: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % classes
        return (means[y] + draws(n, width, seed=seed) @ root) @ turn, y

    means = draws(classes, width, seed=seed + 100)
    moved = draws(classes, width, seed=seed + 200) if new else means + 0.2 * draws(classes, width, seed=seed + 300)
    source, few, test = (
        Features(*sample(m, n, seed + k))
        for k, (m, n) in enumerate(((means, 200), (moved, granted * classes), (moved, 400)))
    )
    return source, few, test


def accuracy(method: NIWLDA | BayesHead, test: Features) -> float:
    assert test.y is not None
    return float((method.predict(test.x).labels == test.y).double().mean())


# --- normal-inverse-Wishart -----------------------------------------------------------------------


def test_in_one_batch_or_in_many_the_posterior_is_the_same() -> None:
    x, y = draws(20, 4), torch.arange(20) % 3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    whole, streamed = prior().update(x, y), prior()
    for part in order.split([1, 7, 0, 12]):
        streamed = streamed.update(x[part], y[part])
    for name in ("mean", "kappa", "nu", "scale"):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name))


def test_the_predictive_is_students() -> None:
    posterior, x = prior().update(draws(9, 4), torch.arange(9) % 3), draws(5, 4, seed=3)
    dof = posterior.nu - 4 + 1
    for c in range(3):
        shape = posterior.scale * (posterior.kappa[c] + 1) / (posterior.kappa[c] * dof)
        wanted = multivariate_t(posterior.mean[c].numpy(), shape.numpy(), df=dof).logpdf(x.numpy())
        np.testing.assert_allclose(posterior.log_density(x)[:, c].numpy(), wanted, rtol=1e-10)


def test_the_evidence_is_the_chain_of_predictives() -> None:
    x, y, within = draws(11, 4), torch.arange(11) % 3, prior().scale
    mean, kappa = prior().mean, prior().kappa
    spare = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    found = log_evidence(x, y, mean, kappa, within, spare)
    for s, value in zip(spare.tolist(), found, strict=True):
        belief, chain = NIW(mean, kappa, 4 + 1 + s, s * within), 0.0
        for i in range(len(x)):
            chain += float(belief.log_density(x[i : i + 1])[0, y[i]])
            belief = belief.update(x[i : i + 1], y[i : i + 1])
        assert float(value) == pytest.approx(chain, rel=1e-9)


# --- the source's summary -------------------------------------------------------------------------


def test_the_summary_is_that_of_its_samples() -> None:
    x, y = 3 * draws(5000, 3), torch.arange(5000) % 4
    centres = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 3], [-1, -1, -1]], dtype=torch.float64)
    summary = Summary.of(x + 3 * centres[y], y, 5)
    assert summary.counts.tolist() == [1250, 1250, 1250, 1250, 0]
    torch.testing.assert_close(summary.means[:4], 3 * centres, atol=0.3, rtol=0)
    torch.testing.assert_close(summary.within, 9 * torch.eye(3, dtype=torch.float64), atol=0.5, rtol=0)
    torch.testing.assert_close(summary.centre, summary.means[:4].mean(0))
    wanted = float(centres.var(0).mean())  # in units of the spread within classes
    assert summary.spread() == pytest.approx(wanted, rel=0.1)


def test_a_summary_needs_spread_and_is_never_singular() -> None:
    for x, y in ((draws(3, 4), torch.arange(3)), (torch.ones(6, 4, dtype=torch.float64), torch.arange(6) % 2)):
        with pytest.raises(TransferError, match="no spread within its classes"):
            Summary.of(x, y, 3)
    torch.linalg.cholesky(Summary.of(draws(6, 40), torch.arange(6) % 2, 2).within)  # fewer samples than features


# --- niw_lda --------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [False, True])
def test_a_prior_from_the_source_is_worth_labels(new: bool) -> None:
    """Against the same method whose prior says nothing of the directions."""
    gains = []
    for seed in range(4):
        source, few, test = stretched(3, seed=seed, new=new)
        setting = {"num_classes": 4, "source_classes": 4, "has_target_labels": True, "source_labels_fit_head": not new}
        method = NIWLDA(context(12, 4, **setting))
        method.fit(FeatureTask(source, None, few))
        blind = Features(draws(200, 12, seed=9) * float(source.x.std()), source.y)
        other = NIWLDA(context(12, 4, **setting), centre="common")
        other.fit(FeatureTask(blind, None, few))
        gains.append(accuracy(method, test) - accuracy(other, test))
    assert min(gains) > 0.1


def test_the_evidence_sees_how_far_the_classes_moved() -> None:
    def kappa(shift: float) -> float:
        source, few, _ = stretched(6)
        method = NIWLDA(context(12, 4, has_target_labels=True))
        summary = Summary.of(source.x, source.y, 4)
        few = Features(few.x + shift * draws(4, 12, seed=77)[few.y] * few.x.std(0), few.y)
        return float(method.prior(summary, few.x, few.y).kappa[0])

    assert kappa(0.0) >= 10 > 1 > kappa(4.0)


def test_without_target_labels_the_source_predicts_and_there_must_be_common_classes() -> None:
    source, _, test = stretched(1)
    method = NIWLDA(context(12, 4))
    method.fit(FeatureTask(source, None, None))
    assert accuracy(method, test) > 0.8
    with pytest.raises(ValueError, match="set target_labels=N"):
        NIWLDA(context(source_labels_fit_head=False))
    with pytest.raises(ValueError, match="centre=common"):
        NIWLDA(context(source_labels_fit_head=False, has_target_labels=True), centre="class")
    with pytest.raises(ValueError, match="above D"):
        NIWLDA(context(), nu=3.0)


def test_temperature_leaves_the_order_alone_and_mends_doubt() -> None:
    source, few, test = stretched(8)
    method = NIWLDA(context(12, 4, has_target_labels=True))
    method.fit(FeatureTask(source, None, few))
    cold = method.predict(test.x)
    method.head.fitted.put(temperature=torch.tensor(7.0, dtype=torch.float64))
    assert torch.equal(method.predict(test.x).labels, cold.labels)
    summary = Summary.of(source.x, source.y, 4)
    certain = NIW(
        summary.means, torch.full((4,), 1e6, dtype=torch.float64), 1e6, 1e4 * summary.within
    )  # Σ far too small
    many = stretched(100)[1]  # that the prior of the temperature has little to say
    assert method.temperature(certain, many.x, many.y) > 5


def test_folds_deal_out_each_class() -> None:
    y = torch.tensor([0, 1, 0, 1, 0, 1, 1, 2])
    folds = folds_of(y, 3)
    assert folds is not None and folds.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    assert folds_of(torch.arange(4), 3) is None and folds_of(y[:0], 3) is None


# --- bayes_head -----------------------------------------------------------------------------------


def fitted(source: Features, few: Features, classes: int = 4, shared: bool = True, **changes: Any) -> BayesHead:
    width = source.x.shape[1]
    setting = {"num_classes": classes, "has_target_labels": True, "source_labels_fit_head": shared}
    method = BayesHead(context(width, classes, **setting), **changes)
    method.fit(FeatureTask(source, None, few))
    return method


def test_the_predictive_is_the_mean_over_the_posterior() -> None:
    """Against draws of the weights themselves; adding the same to all classes' weights changes nothing."""
    mean, root = draws(3, 4), 0.7 * draws(12, 12, seed=1)
    covariance = root @ root.T
    z, noise = draws(5, 4, seed=2), normal_draws(60_000, 3, mean)
    found = Posterior(mean, covariance.view(3, 4, 3, 4)).probs(z, 0.5, noise)
    weights = mean.flatten() + 0.5**0.5 * normal_draws(60_000, 12, mean) @ root.T
    wanted = torch.einsum("skd,bd->sbk", weights.view(-1, 3, 4), z).softmax(2).mean(0)
    torch.testing.assert_close(found, wanted, atol=4e-3, rtol=0)
    shift = torch.kron(torch.ones(3, 3, dtype=torch.float64), 9 * torch.eye(4, dtype=torch.float64))
    same = Posterior(mean, (covariance + shift).view(3, 4, 3, 4)).probs(z, 0.5, noise)
    torch.testing.assert_close(same, found)
    cold = Posterior(mean, covariance.view(3, 4, 3, 4)).probs(z, 0.0, noise)
    torch.testing.assert_close(cold, (z @ mean.T).softmax(1))


def test_boehnings_covariance_is_that_of_its_bound() -> None:
    """x'(λI + ½X'X)⁻¹x (I - 11'/K), against the whole K D x K D matrix, in directions that softmax sees."""
    source, few, _ = stretched(3)
    method = fitted(source, few, covariance="boehning", lam=0.7)
    state = method.head.fitted
    z = whitened(few.x, state.centre, state.whitening)
    prior = penalties(torch.zeros(4, 13, dtype=torch.float64), 0.7)
    torch.testing.assert_close(prior[:, -1], torch.full((4,), BIAS, dtype=torch.float64))
    centring = torch.eye(4, dtype=torch.float64) - 0.25
    whole = torch.kron(0.5 * centring, z.T @ z) + torch.diag(prior.flatten())
    covariance = torch.linalg.inv(whole).view(4, 13, 4, 13)
    between = centring @ torch.einsum("d,kdle,e->kl", z[0], covariance, z[0]) @ centring
    spread = Posterior(state.mean, state.covariance).spread(z[:1])[0]
    torch.testing.assert_close(spread @ spread.T, between, atol=1e-8, rtol=1e-6)


def test_whitened_features_make_the_isotropic_prior_that_of_the_source() -> None:
    """The same optimum as with precision λ S_w on the features as they are."""
    source, few, _ = stretched(4)
    method = fitted(source, few, lam=2.0)
    state, summary = method.head.fitted, Summary.of(source.x, source.y, 4)
    x = torch.cat([few.x - summary.centre, torch.ones(len(few.x), 1, dtype=torch.float64)], 1)
    block = torch.block_diag(2.0 * summary.within, torch.full((1, 1), BIAS, dtype=torch.float64))
    zero, one = torch.zeros(4, 13, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    plain = Softmax(
        x, few.y, torch.ones(len(x), dtype=torch.float64), zero, Precision(zero, kron=(one, block))
    ).minimise()
    z = whitened(few.x, state.centre, state.whitening)
    torch.testing.assert_close(x @ plain.T, z @ state.mean.T, atol=1e-4, rtol=0)


def test_a_prior_from_the_source_is_worth_labels_to_the_head() -> None:
    for new in (False, True):
        source, few, test = stretched(3, new=new, seed=1)
        plain = accuracy(fitted(source, few, shared=not new, whiten=False), test)
        assert accuracy(fitted(source, few, shared=not new), test) > plain + 0.1
        if not new:
            for prior in ("l2sp", "ewc", "source"):
                assert accuracy(fitted(source, few, prior=prior), test) > plain + 0.15


def test_priors_contain_one_another() -> None:
    source, few, _ = stretched(3)
    l2sp = fitted(source, few, prior="l2sp", lam=3.0, covariance="laplace").head.fitted
    for prior in ("ewc", "source"):
        weak = fitted(source, few, prior=prior, lam=3.0, alpha=1e-12, covariance="laplace").head.fitted
        torch.testing.assert_close(weak.mean, l2sp.mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(weak.covariance, l2sp.covariance, atol=1e-6, rtol=0)
        strong = fitted(source, few, prior=prior, alpha=1e6, lam=3.0).head.fitted
        assert not torch.allclose(strong.mean, l2sp.mean, atol=1e-2)
    whole = fitted(source, few, prior="source", alpha=1.0, lam=1e-9, covariance="laplace")
    z_s = whitened(source.x, whole.head.fitted.centre, whole.head.fitted.whitening)
    mean, _ = whole.of_source(z_s, source.y)
    both = torch.cat([z_s, whitened(few.x, whole.head.fitted.centre, whole.head.fitted.whitening)])
    pooled = Softmax(
        both, torch.cat([source.y, few.y]), torch.ones(len(both), dtype=torch.float64), 0 * mean,
        Precision(penalties(mean, 1e-3 * len(z_s))),
    )  # fmt: skip
    approached, alone = (float((w - pooled.minimise()).norm()) for w in (whole.head.fitted.mean, mean))
    assert approached < 0.8 * alone  # a quadratic in the source's place


def test_the_evidence_is_the_integral() -> None:
    """One feature and no bias to speak of: by quadrature over the two classes' difference."""
    source, few, _ = stretched(3)
    method = fitted(source, few, covariance="laplace")
    x, y = draws(9, 1), torch.arange(9) % 2
    precision = Precision(torch.full((2, 1), 1.5, dtype=torch.float64))
    problem = Softmax(x, y, torch.ones(9, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64), precision)
    grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)  # w_0 - w_1 ~ N(0, 2 / 1.5)
    log_prior = -0.5 * grid.square() * 1.5 / 2 - 0.5 * np.log(2 * np.pi * 2 / 1.5)
    signs = torch.where(y == 0, 1.0, -1.0).double()
    log_likelihood = torch.nn.functional.logsigmoid(signs[:, None] * x * grid).sum(0)
    wanted = float(torch.logsumexp(log_prior + log_likelihood, 0) + np.log(24 / 20000))
    assert method.log_evidence(problem) == pytest.approx(wanted, abs=0.05)
    boehning = fitted(source, few, covariance="boehning").log_evidence(problem)
    assert boehning < wanted


def test_temperature_and_strength_are_chosen_by_what_is_left_out() -> None:
    source, few, test = stretched(8)
    chosen = fitted(source, few)
    stiff = fitted(source, few, lam=1e5)
    nll = [-float(m.predict(test.x).log_probs.gather(1, test.y[:, None]).mean()) for m in (chosen, stiff)]
    assert nll[0] < nll[1] - 0.3
    assert float(fitted(source, few, temperature=0.25).head.fitted.temperature) == 0.25
    one_each = fitted(source, Features(few.x[:4], few.y[:4]))  # nothing can be left out: the evidence chooses
    assert torch.isfinite(one_each.predict(test.x).log_probs).all()
    with pytest.raises(ValueError, match="prior=isotropic"):
        BayesHead(context(source_labels_fit_head=False, has_target_labels=True), prior="ewc")
    for wrong in ({"lam": -1.0}, {"lam": 0.0}, {"alpha": 0.0}, {"temperature": -1.0}, {"draws": 1}, {"folds": 1}):
        with pytest.raises(ValueError, match=r"positive|negative|at least 2"):
            BayesHead(context(has_target_labels=True), **wrong)
    with pytest.raises(ValueError, match="folds is at least 2"):
        NIWLDA(context(has_target_labels=True), folds=0)


def test_of_one_label_a_class_an_isotropic_head_learns() -> None:
    """The evidence of so few would have it predict every class alike."""
    found = []
    for seed in range(5):
        source, few, test = stretched(1, seed=seed, new=True)
        nll = {}
        for choose in ("cv", "evidence"):
            log_probs = fitted(source, few, shared=False, choose=choose).predict(test.x).log_probs
            nll[choose] = -float(log_probs.gather(1, test.y[:, None]).mean())
        assert nll["evidence"] > np.log(4) - 0.05
        found.append(nll["cv"])
    assert float(np.mean(found)) < np.log(4) - 0.15


def test_what_was_chosen_is_told() -> None:
    source, few, _ = stretched(4)
    setting = {"num_classes": 4, "source_classes": 4, "has_target_labels": True}
    told = NIWLDA(context(12, 4, **setting)).fit(FeatureTask(source, None, few))
    assert set(told) == {"nu", "kappa", "temperature"} and told["nu"] > 13
    told = BayesHead(context(12, 4, **setting), lam=0.3, temperature=0.5).fit(FeatureTask(source, None, few))
    assert told == {"lambda": 0.3, "alpha": 0.0, "temperature": 0.5}


def test_samples_that_are_all_right_when_left_out_do_not_make_predictions_certain() -> None:
    """Likelihood alone takes the temperature to its floor, and one error then costs a thousand nats."""
    means = 8 * torch.eye(4, 12, dtype=torch.float64)
    y = torch.arange(20) % 4
    source, few = (Features(means[y] + draws(20, 12, seed=seed), y) for seed in (1, 2))
    method = NIWLDA(context(12, 4, has_target_labels=True))
    told = method.fit(FeatureTask(source, None, few))
    assert 0.1 < told["temperature"] <= 1
    between = 0.5 * (means[:1] + means[1:2])
    assert float(method.predict(between).probs.max()) < 0.99


@pytest.mark.parametrize("covariance", ["boehning", "laplace"])
@pytest.mark.parametrize("prior", ["isotropic", "source"])
def test_few_samples_of_many_features_are_solved_in_their_span(prior: str, covariance: Any) -> None:
    """Optimum, covariances of logits in the span and off it, evidence and left-out losses are those of the whole problem."""
    draw = torch.Generator().manual_seed(0)
    width, classes = 30, 3
    z = torch.randn(12, width, generator=draw, dtype=torch.float64)
    z[5], z[:, -1] = z[4], 1  # twins, which span less; and the bias
    y = torch.arange(12) % classes
    mean = torch.randn(classes, width, generator=draw, dtype=torch.float64)
    mean = mean - mean.mean(0)
    source = torch.randn(200, width, generator=draw, dtype=torch.float64)
    none = torch.zeros_like(mean)
    sharp = Precision(none, kron=(bound_between(classes, mean), source.T @ source) if prior == "source" else None)
    problem = with_prior(Softmax(z, y, torch.ones(12, dtype=torch.float64), mean, sharp), sharp, 0.3, 0.1)
    span = Span.of(problem)
    assert span is not None and span.problem.x.shape == (12, 12)
    method = BayesHead(context(width - 1, classes, has_target_labels=True), covariance=covariance)
    found, w = method.posterior(problem), problem.minimise(tolerance=1e-10)
    torch.testing.assert_close(found.mean, w, rtol=0, atol=1e-6)
    torch.testing.assert_close(problem.value(w), span.problem.value(span.problem.minimise()))
    at = torch.cat([z[:4], torch.randn(4, width, generator=draw, dtype=torch.float64)])
    if covariance == "laplace":
        inverse = torch.linalg.inv(problem.hessian(w)).view(*w.shape, *w.shape)
        whole = Posterior(w, inverse)
    else:  # of a precision that between classes is I times the block
        block = 0.5 * z.T @ z + 0.3 * torch.eye(width, dtype=torch.float64)
        block[-1, -1] += 0.01 - 0.3
        block = block + (0.05 * source.T @ source if prior == "source" else 0)
        whole = Posterior(w, torch.linalg.inv(block))
    spreads = [p.spread(at) @ p.spread(at).mT for p in (found, whole)]
    torch.testing.assert_close(*spreads, rtol=1e-6, atol=1e-8)
    assert method.log_evidence(span.problem) == pytest.approx(method.log_evidence(problem), rel=1e-8)
    folds = torch.arange(12) % 2
    here = method.held_out(span.problem, folds)
    assert here == pytest.approx(left_out(problem, folds, lambda p: wholly(p, covariance), list(here), 64), rel=1e-5)


def wholly(problem: Softmax, covariance: str) -> Posterior:
    w = problem.minimise(tolerance=1e-10)
    if covariance == "boehning":
        return bounded(problem, w)
    return Posterior(w, torch.linalg.inv(problem.hessian(w)).view(*w.shape, *w.shape))


def test_what_is_no_small_problem_in_its_span() -> None:
    """As many samples as features, or priors that differ between the classes."""
    x, y = torch.randn(6, 9, dtype=torch.float64), torch.arange(6) % 3
    ones, zero = torch.ones(6, dtype=torch.float64), torch.zeros(3, 9, dtype=torch.float64)
    even = Precision(zero + 1)
    assert Span.of(Softmax(x, y, ones, zero, even)) is not None
    assert Span.of(Softmax(x[:, :6], y, ones, zero[:, :6], Precision(zero[:, :6] + 1))) is None
    uneven = Precision(torch.rand(3, 9, dtype=torch.float64) + 1)
    assert Span.of(Softmax(x, y, ones, zero, uneven)) is None
    assert centred_block(Precision(zero + 1, full=torch.eye(27, dtype=torch.float64))) is None
    between = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert centred_block(Precision(zero + 1, kron=(between, x.T @ x))) is None


def test_a_whole_covariance_that_would_be_too_large_is_refused() -> None:
    task, _ = shifted_classes(width=600, classes=10, granted=20)
    with pytest.raises(TransferError, match=r"too large: set method\.covariance=boehning"):
        BayesHead(context(600, 10, has_target_labels=True), covariance="laplace").fit(task)
