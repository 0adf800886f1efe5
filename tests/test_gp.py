"""Gaussian processes: the mathematics against other computations, the method against what it promises."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpytorch
import numpy as np
import pytest
import torch
import yaml
from conftest import Outcome
from feature_tasks import regression
from scipy.stats import kstest, multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor, kernels
from torch import Tensor

from transfer_cli.config.folders import packaged_folder
from transfer_cli.data.readers.friedman import FUNCTIONS
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.gaussian_process.gp import GP
from transfer_cli.methods.math import gp as exact
from transfer_cli.methods.math import sparse
from transfer_cli.methods.math.kernels import Kernel
from transfer_cli.methods.math.laplace import (
    Laplace,
    Prior,
    hessian,
    hessian_by_differences,
    laplace,
    maximum_a_posteriori,
    starts_of,
)
from transfer_cli.methods.math.processes import CONSTANT, Autoregressive, Coregional, Plain
from transfer_cli.methods.phases import Features, FeatureTask
from transfer_cli.registry import component, keyword_schema
from transfer_cli.report.closing import _transfer_lines

Transfer = Callable[..., Outcome]
FORMS = ["rbf", "matern12", "matern32", "matern52", "linear"]
F64 = {"dtype": torch.float64}


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, **F64)


def close(a: Any, b: Any, tolerance: float = 1e-8) -> None:
    torch.testing.assert_close(torch.as_tensor(a, **F64), torch.as_tensor(b, **F64), rtol=tolerance, atol=tolerance)


# --- kernels --------------------------------------------------------------------------------------


def of_sklearn(form: str, lengths: Any) -> Any:
    if form == "rbf":
        return kernels.RBF(lengths)
    return kernels.Matern(lengths, nu={"matern12": 0.5, "matern32": 1.5, "matern52": 2.5}[form])


@pytest.mark.parametrize("ard", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_kernels_are_scikit_learns(form: str, ard: bool) -> None:
    x, z = points(7, 3), points(5, 3, seed=1)
    kernel = Kernel(form, 3, ard, linear=form != "linear")
    theta = 0.5 * points(kernel.size, seed=2)
    lengths = theta[1 : 1 + kernel.scales].exp().numpy()
    if form == "linear":
        expected = (x.numpy() * theta.exp().numpy() / 3) @ z.numpy().T
    else:
        expected = math.exp(theta[0]) * of_sklearn(form, lengths if ard else lengths[0])(x.numpy(), z.numpy())
        expected = expected + math.exp(theta[-1]) / 3 * x.numpy() @ z.numpy().T
    close(kernel(theta, x, z), expected)
    close(kernel.diagonal(theta, x), kernel(theta, x, x).diagonal())


@pytest.mark.parametrize("form", FORMS)
def test_kernels_have_two_derivatives_where_points_coincide_too(form: str) -> None:
    x = points(5, 2)
    x[1] = x[0]
    kernel = Kernel(form, 2, ard=True)
    theta = (0.3 * points(kernel.size, seed=3)).requires_grad_()
    function = lambda t: kernel(t, x, x)  # noqa: E731
    assert torch.autograd.gradcheck(function, theta)
    assert torch.autograd.gradgradcheck(function, theta)
    close(kernel(theta, x, x)[0, 1], kernel.diagonal(theta, x)[0], 1e-15)


def test_matern12_is_the_greens_function_of_its_differential_operator() -> None:
    """(1 - ℓ² d²/dx²) k(x, z) = 2 ℓ δ(x - z): the discretised operator's inverse is the kernel, up to that scale."""
    length, step = 0.5, 0.01
    grid = torch.arange(-8, 8, step, **F64)[:, None]
    n = len(grid)
    second = (
        -2 * torch.eye(n, **F64) + torch.diag(torch.ones(n - 1, **F64), 1) + torch.diag(torch.ones(n - 1, **F64), -1)
    ) / step**2
    green = torch.linalg.inv(torch.eye(n, **F64) - length**2 * second) / step
    middle = slice(3 * n // 8, 5 * n // 8)  # far from the ends, where the inverse is zero
    k = Kernel("matern12", 1)(vector(0.0, math.log(length)), grid, grid)
    torch.testing.assert_close(2 * length * green[middle, middle], k[middle, middle], rtol=0, atol=2e-4)
    other = Kernel("rbf", 1)(vector(0.0, math.log(length)), grid, grid)
    assert (2 * length * green - other)[middle, middle].abs().max() > 0.05


# --- exact ----------------------------------------------------------------------------------------


def toy(n: int = 20, width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = points(n, width, seed=seed)
    return x, (2 * x[:, 0]).sin() + 0.5 * x[:, -1] + 0.3 * points(n, seed=seed + 1)


def ours(form: str = "rbf", width: int = 3, ard: bool = False) -> tuple[Plain, Tensor]:
    process = Plain(Kernel(form, width, ard))
    return process, torch.cat([0.3 * points(process.kernel.size, seed=4), vector(math.log(0.2))])


@pytest.mark.parametrize("form", FORMS[:4])
def test_posterior_and_likelihood_are_scikit_learns(form: str) -> None:
    (x, y), new, (process, theta) = toy(), points(9, 3, seed=5), ours(form)
    kernel = kernels.ConstantKernel(math.exp(theta[0])) * of_sklearn(form, math.exp(theta[1])) + kernels.ConstantKernel(
        CONSTANT
    )
    peer = GaussianProcessRegressor(kernel, alpha=math.exp(theta[-1]), optimizer=None).fit(x.numpy(), y.numpy())
    posterior = exact.condition(process, theta, x, y)
    mean, covariance = peer.predict(new.numpy(), return_cov=True)
    close(posterior.mean(new), mean)
    close(posterior.covariance(new, new), covariance)
    close(posterior.variance(new), covariance.diagonal().copy())
    (moments,) = exact.predict([posterior], new)
    close(moments.mean, mean)
    close(moments.variance, covariance.diagonal().copy())
    close(moments.noise, np.full(9, math.exp(theta[-1])))
    close(exact.negative_log_likelihood(process, x, y)(theta), -peer.log_marginal_likelihood_value_)


def test_posterior_is_gpytorchs_and_no_size_switches_to_iterative_solvers() -> None:
    """At 900 points, where GPyTorch would begin conjugate gradients unless `max_cholesky_size` is raised."""

    class Peer(gpytorch.models.ExactGP):
        def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            one = gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5))
            self.covar_module = one + gpytorch.kernels.ConstantKernel()

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    (x, y), new, (process, theta) = toy(900), points(9, 3, seed=5), ours("matern52")
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    peer = Peer(x, y, likelihood).double()
    scaled, constant = peer.covar_module.kernels
    scaled.outputscale, scaled.base_kernel.lengthscale = math.exp(theta[0]), math.exp(theta[1])
    constant.constant, likelihood.noise = vector(CONSTANT), math.exp(theta[-1])
    with gpytorch.settings.max_cholesky_size(10_000), torch.no_grad():
        found = peer.eval()(new)
    posterior = exact.condition(process, theta, x, y)
    close(posterior.mean(new), found.mean, 1e-6)
    close(posterior.variance(new), found.variance, 1e-6)
    k = process.between(x, x)(theta) + theta[-1].exp() * torch.eye(900, **F64)
    close(posterior.mean(new), process.between(new, x)(theta) @ torch.linalg.solve(k, y))


@pytest.mark.parametrize("ard", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_likelihood_has_the_gradient_and_hessian_of_its_formula(form: str, ard: bool) -> None:
    (x, y), (process, theta) = toy(12), ours(form, ard=ard)

    def formula(t: Tensor) -> Tensor:
        k = process.between(x, x)(t) + t[-1].exp() * torch.eye(12, **F64)
        return 0.5 * (y @ torch.linalg.solve(k, y) + torch.logdet(k) + 12 * math.log(2 * math.pi))

    function = exact.negative_log_likelihood(process, x, y)
    close(function(theta), formula(theta))
    at = theta.clone().requires_grad_()
    close(torch.autograd.grad(function(at), at)[0], torch.func.grad(formula)(theta))
    close(hessian(function, theta), torch.func.hessian(formula)(theta), 1e-7)
    torch.testing.assert_close(hessian(function, theta), hessian_by_differences(function, theta), rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(function, at)


def test_leave_one_out_is_brute_force() -> None:
    (x, y), (process, theta) = toy(15), ours()
    mean, variance = exact.leave_one_out(exact.condition(process, theta, x, y), y)
    for i in range(15):
        others = torch.arange(15) != i
        (left,) = exact.predict([exact.condition(process, theta, x[others], y[others])], x[i : i + 1])
        close(mean[i], left.mean[0])
        close(variance[i], (left.variance + left.noise)[0])


def test_a_mixture_has_the_moments_of_its_samples() -> None:
    parts = [
        exact.Moments(vector(m), vector(v), vector(s)) for m, v, s in ((-1, 0.5, 0.2), (2, 0.1, 0.4), (0.5, 1, 0.3))
    ]
    weights = vector(0.2, 0.5, 0.3)
    mean, variance, noise = exact.mixture(parts, weights)
    means, totals = vector(-1, 2, 0.5), vector(0.7, 0.5, 1.3)
    close(mean[0], (weights * means).sum())
    close((variance + noise)[0], (weights * (totals + means.square())).sum() - mean[0] ** 2)
    close(noise[0], 0.2 * 0.2 + 0.5 * 0.4 + 0.3 * 0.3)


# --- two functions --------------------------------------------------------------------------------


def test_sequential_bayes_is_the_joint_autoregressive_model() -> None:
    """[f_s, f_t] with f_t = ρ f_s + δ, all labels at once; the source's data come in through its posterior alone."""
    (x_s, y_s), (x_t, y_t), new = toy(30), toy(8, seed=7), points(6, 3, seed=9)
    source, theta_s = ours()
    kernel = Kernel("matern32", 3, ard=True)
    theta_t = torch.cat([vector(1.7), 0.4 * points(kernel.size, seed=11), vector(math.log(0.05))])
    process = Autoregressive(exact.condition(source, theta_s, x_s, y_s), kernel)
    posterior = exact.condition(process, theta_t, x_t, y_t)

    rho = theta_t[0]
    k_s = lambda a, b: source.between(a, b)(theta_s)  # noqa: E731
    k_t = lambda a, b: rho**2 * k_s(a, b) + kernel(theta_t[1:], a, b) + CONSTANT  # noqa: E731
    joint = torch.cat(
        [torch.cat([k_s(x_s, x_s), rho * k_s(x_s, x_t)], 1), torch.cat([rho * k_s(x_t, x_s), k_t(x_t, x_t)], 1)]
    )
    noise = torch.cat([theta_s[-1].exp().expand(30), theta_t[-1].exp().expand(8)])
    cross = torch.cat([rho * k_s(x_s, new), k_t(x_t, new)])
    solved = torch.linalg.solve(joint + torch.diag(noise), torch.cat([torch.cat([y_s, y_t])[:, None], cross], 1))
    close(posterior.mean(new), cross.T @ solved[:, 0])
    close(posterior.covariance(new, new), k_t(new, new) - cross.T @ solved[:, 1:])
    close(posterior.variance(new), (k_t(new, new) - cross.T @ solved[:, 1:]).diagonal())

    # The evidence of the target's labels is the joint one less the source's own.
    both = multivariate_normal(np.zeros(38), (joint + torch.diag(noise)).numpy()).logpdf(torch.cat([y_s, y_t]).numpy())
    alone = -float(exact.negative_log_likelihood(source, x_s, y_s)(theta_s))
    close(-exact.negative_log_likelihood(process, x_t, y_t)(theta_t), both - alone)


def test_coregional_covariance_is_a_kronecker_product() -> None:
    x, kernel = points(6, 3), Kernel("rbf", 3)
    theta = torch.cat([0.3 * points(kernel.size, seed=1), vector(0.4, -0.7, -1.0, -2.0)])
    a, r = math.exp(0.4), math.tanh(-0.7)
    both = torch.cat([torch.cat([x, torch.full_like(x[:, :1], i)], 1) for i in (0.0, 1.0)])
    process = Coregional(kernel)
    expected = torch.kron(torch.tensor([[1, a * r], [a * r, a**2]], **F64), kernel(theta, x, x))
    expected = expected + torch.kron(torch.eye(2, **F64), torch.full((6, 6), CONSTANT, **F64))
    close(process.between(both, both)(theta), expected)
    close(process.diagonal(both)(theta), expected.diagonal())
    close(process.noise(both)(theta), torch.cat([vector(-1.0).exp().expand(6), vector(-2.0).exp().expand(6)]))


# --- sparse ---------------------------------------------------------------------------------------


def test_sparse_is_exact_where_every_point_induces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "BLOCK", 7)
    (x, y), new, (process, theta) = toy(25), points(6, 3, seed=5), ours("matern32")
    close(sparse.negative_log_bound(process, x, x, y)(theta), exact.negative_log_likelihood(process, x, y)(theta), 1e-6)
    dense, found = exact.condition(process, theta, x, y), sparse.condition(process, theta, x, x, y)
    close(found.mean(new), dense.mean(new), 1e-6)
    close(found.variance(new), dense.variance(new), 1e-6)
    close(found.covariance(new, x), dense.covariance(new, x), 1e-6)


def test_sparse_is_titsias_formula_and_below_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, y), z, new, (process, theta) = toy(25), points(6, 3, seed=8), points(4, 3, seed=5), ours()
    inverse = torch.linalg.inv(process.between(z, z)(theta))
    cross, noise = process.between(x, z)(theta), theta[-1].exp()
    q = cross @ inverse @ cross.T
    density = multivariate_normal(np.zeros(25), (q + noise * torch.eye(25, **F64)).numpy()).logpdf(y.numpy())
    trace = (process.diagonal(x)(theta) - q.diagonal()).sum() / (2 * noise)
    whole = sparse.negative_log_bound(process, z, x, y)
    close(-whole(theta), density - trace, 1e-6)
    assert float(whole(theta)) > float(exact.negative_log_likelihood(process, x, y)(theta))
    s = torch.linalg.inv(process.between(z, z)(theta) + cross.T @ cross / noise)  # Titsias 2009, equations 6 to 10
    k = process.between(new, z)(theta)
    posterior = sparse.condition(process, theta, z, x, y)
    close(posterior.mean(new), k @ s @ cross.T @ y / noise, 1e-6)
    close(posterior.covariance(new, new), process.between(new, new)(theta) - k @ (inverse - s) @ k.T, 1e-6)

    monkeypatch.setattr(sparse, "BLOCK", 4)
    blocks = sparse.negative_log_bound(process, z, x, y)
    close(blocks(theta), whole(theta))
    at = theta.clone().requires_grad_()
    assert torch.autograd.gradcheck(blocks, at)
    twice = sparse.negative_log_bound(process, z, torch.cat([x, x]), torch.cat([y, y]))
    close(sparse.negative_log_bound(process, z, x, y, times=2)(theta), twice(theta))


def test_sparse_takes_any_prior() -> None:
    """The autoregressive one over a sparse source, against the exact one over an exact source."""
    (x_s, y_s), (x_t, y_t), new = toy(30), toy(12, seed=7), points(6, 3, seed=9)
    source, theta_s = ours("matern32")
    kernel, theta = Kernel("matern32", 3), vector(0.8, -1.0, 0.2, -2.0)
    dense = Autoregressive(exact.condition(source, theta_s, x_s, y_s), kernel)
    thin = Autoregressive(sparse.condition(source, theta_s, x_s, x_s, y_s), kernel)
    a, b = exact.condition(dense, theta, x_t, y_t), sparse.condition(thin, theta, x_t, x_t, y_t)
    close(a.mean(new), b.mean(new), 1e-6)
    close(a.variance(new), b.variance(new), 1e-6)


def test_inducing_points_are_centres_or_the_points_themselves() -> None:
    x = torch.cat([points(40, 2), points(40, 2)])
    assert len(sparse.inducing_points(x, 40)) == 40  # the distinct ones
    few = sparse.inducing_points(x, 5)
    assert few.shape == (5, 2) and float(torch.cdist(x, few).min(1).values.square().mean()) < 0.5 * float(
        x.var(0).sum()
    )
    close(few, sparse.inducing_points(x, 5))


# --- Laplace --------------------------------------------------------------------------------------


def normal_prior(d: int, seed: int = 0) -> Prior:
    root = torch.eye(d, **F64) + 0.4 * points(d, d, seed=seed)
    wide = torch.full((d,), 50.0, **F64)
    return Prior(points(d, seed=seed + 1), root @ root.T, -wide, wide)


def test_laplace_is_exact_for_a_linear_normal_model() -> None:
    x, y, noise, prior = points(8, 3), points(8, seed=1), 0.3, normal_prior(3)

    def loss(theta: Tensor) -> Tensor:
        return 0.5 * ((y - x @ theta).square() / noise + math.log(2 * math.pi * noise)).sum()

    for twice in (True, False):
        found = laplace(loss, prior, starts_of(prior), twice=twice)
        marginal = x @ prior.covariance @ x.T + noise * torch.eye(8, **F64)
        evidence = multivariate_normal((x @ prior.mean).numpy(), marginal.numpy()).logpdf(y.numpy())
        assert found.log_evidence == pytest.approx(evidence, abs=1e-5)
        precision = x.T @ x / noise + torch.linalg.inv(prior.covariance)
        close(found.covariance, torch.linalg.inv(precision), 1e-6)
        solved = torch.linalg.solve(precision, x.T @ y / noise + torch.linalg.solve(prior.covariance, prior.mean))
        close(found.mode, solved, 1e-4)
    other = laplace(loss, prior, starts_of(prior), value=lambda theta: loss(theta) + 2)
    assert other.log_evidence == pytest.approx(evidence - 2, abs=1e-5)


def test_the_evidence_of_a_gp_is_its_integral() -> None:
    """Over length-scale and noise, on a grid."""
    (x, y), kernel = toy(25, width=1), Kernel("rbf", 1)
    prior = Prior.of([(0.0, 0.5, -9, 9), (-2.0, 0.5, -9, 9)], x)
    likelihood = exact.negative_log_likelihood(Plain(kernel), x, y)
    of_two = lambda theta: likelihood(torch.cat([theta.new_zeros(1), theta]))  # noqa: E731
    found = laplace(of_two, prior, starts_of(prior))
    side = torch.linspace(-2.5, 2.5, 41, **F64)
    grid = torch.cartesian_prod(side, side - 2)
    values = torch.stack([-of_two(theta) - prior.negative_log_density(theta) for theta in grid])
    integral = float(values.logsumexp(0)) + 2 * math.log(float(side[1] - side[0]))
    assert found.log_evidence == pytest.approx(integral, abs=0.1)
    weights = (values - values.logsumexp(0)).exp()
    spread = (weights[:, None] * (grid - weights @ grid).square()).sum(0)
    torch.testing.assert_close(found.covariance.diagonal(), spread, rtol=0.25, atol=0)


def test_no_direction_is_wider_than_the_prior() -> None:
    prior = Prior.of([(0.0, 1.0, -5, 5), (0.0, 2.0, -5, 5)], vector(0.0))
    found = laplace(lambda t: -0.3 * t[0].square() + 0.5 * t[1].square(), prior, starts_of(prior))
    close(found.covariance, torch.diag(vector(1.0, 1 / (1 + 0.25))), 1e-6)


def test_draws_are_antithetic_within_bounds_and_of_the_right_spread() -> None:
    prior = normal_prior(3)
    found = Laplace(prior, points(3, seed=5), points(3, 3, seed=6), 0.0)
    draws = found.draws(4000)
    close(draws.mean(0), found.mode)
    torch.testing.assert_close(torch.cov(draws.T), found.covariance, rtol=0.1, atol=0.1)
    close(found.draws(1), found.mode[None])
    narrow = replace(found, prior=replace(prior, lower=found.mode - 0.1, upper=found.mode + 0.1))
    assert float((narrow.draws(50) - found.mode).abs().max()) <= 0.1 + 1e-12


def test_a_search_ends_where_an_optimum_is_known_and_finds_the_better_of_two() -> None:
    prior, calls = Prior.of([(0.0, 10.0, -30, 30)] * 2, vector(0.0)), [0]

    def two_wells(theta: Tensor) -> Tensor:
        """About (-4, 0), and a deeper one about (12, 0)."""
        calls[0] += 1
        wells = torch.stack([vector(-4.0, 0.0), vector(12.0, 0.0)])
        away = (theta - wells).square() * vector(1.0, 3.0)
        return -torch.logsumexp(-away.sum(1) / 20 + vector(0.0, 3.0), 0) * 20

    def found(*starts: Tensor) -> tuple[Tensor, int]:
        calls[0] = 0
        return maximum_a_posteriori(two_wells, prior, torch.stack(starts)), calls[0]

    (once, alone), (twice, both) = found(vector(-9.0, 5.0)), found(vector(-9.0, 5.0), vector(-9.0, 5.0))
    assert torch.equal(once, twice) and alone < both < 2 * alone - 2
    close(found(vector(-9.0, 5.0), vector(18.0, -3.0))[0], found(vector(18.0, -3.0))[0], 1e-4)
    assert float(found(vector(-9.0, 5.0), vector(18.0, -3.0))[0][0]) > 10 > -3 > float(once[0])


def test_the_optimum_lies_within_bounds_and_steps_back_from_failures() -> None:
    prior = Prior.of([(0.0, 1.0, -1.0, 2.0)], vector(0.0))
    close(maximum_a_posteriori(lambda t: (t - 9).square().sum(), prior, starts_of(prior)), vector(2.0), 1e-6)

    def fails_beyond_one(theta: Tensor) -> Tensor:
        if float(theta.detach()) > 1:
            raise TransferError("no value here")
        return (theta - 0.9).square().sum() * 10

    found = maximum_a_posteriori(fails_beyond_one, prior, starts_of(prior))
    close(found, vector(18 / 21), 1e-3)

    def fails(theta: Tensor) -> Tensor:
        raise TransferError("no value here")

    with pytest.raises(TransferError, match="no value here"):
        maximum_a_posteriori(fails, prior, starts_of(prior))


# --- pitfalls -------------------------------------------------------------------------------------


def test_cholesky_adds_as_little_as_it_needs_and_says_when_nothing_helps() -> None:
    x = points(30, 2)
    close(exact.cholesky(x.T @ x), torch.linalg.cholesky(x.T @ x), 1e-15)
    singular = torch.ones(30, 30, **F64)
    factor = exact.cholesky(singular)
    torch.testing.assert_close(factor @ factor.T, singular, rtol=1e-4, atol=1e-4)
    with pytest.raises(TransferError, match="30 points is not positive definite, even with jitter: a larger noise"):
        exact.cholesky(singular - 2 * torch.eye(30, **F64))
    with pytest.raises(TransferError, match="it is not finite"):
        exact.cholesky(singular * float("nan"))


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_a_millionth(seed: int) -> None:
    """RBF, 400 points: float32 fails in each of these, float64 in none."""
    x = torch.rand(400, 1, generator=torch.Generator().manual_seed(seed), **F64)
    process, theta = Plain(Kernel("rbf", 1)), vector(0.0, math.log(0.3), math.log(1e-6))
    y = (6 * x[:, 0]).sin()
    k = process.between(x, x)(theta)
    _, info = torch.linalg.cholesky_ex((k + 1e-6 * torch.eye(400, **F64)).float())
    assert int(info) > 0
    posterior = exact.condition(process, theta, x, y)
    assert float((posterior.mean(x) - y).abs().max()) < 1e-3
    at = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact.negative_log_likelihood(process, x, y)(at), at)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_in_fifteen_points(seed: int) -> None:
    """Exact copies, with equal labels and with other ones; L-BFGS stays within its bounds and its prior."""
    x = points(15, 2, seed=seed)
    x[5:10] = x[:5]
    for y in (x[:, 0].sin(), x[:, 0].sin() + points(15, seed=seed + 50)):
        method = fitted(FeatureTask(None, None, Features(x, y[:, None])), mode="scratch")
        prediction = method.predict(x)
        assert prediction.is_finite() and float(prediction.variance.min()) > 0
        assert float((prediction.mean[:5] - prediction.mean[5:10]).abs().max()) < 1e-6


def test_the_default_dtype_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dtype: torch.dtype) -> None:
        raise AssertionError("set_default_dtype leaks into networks")

    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    method = fitted(pair("close")[0], guard="evidence")
    assert torch.get_default_dtype() == torch.float32
    assert all(buffer.dtype == torch.float64 for name, buffer in method.fitted.named_buffers() if name != "place")


# --- the method -----------------------------------------------------------------------------------


def pair(domain: str, n: int = 20, n_source: int = 120, seed: int = 0) -> tuple[FeatureTask, Features]:
    """Friedman's source and a relative, in units of their own; and the target's test samples."""
    draw = np.random.default_rng(seed)

    def sample(name: str, size: int) -> Features:
        x = draw.random((size, 10))
        y = FUNCTIONS[name](*x.T) + draw.standard_normal(size)
        return Features(torch.from_numpy(x), torch.from_numpy(y)[:, None])

    return FeatureTask(sample("source", n_source), None, sample(domain, n)), sample(domain, 300)


def built(task: FeatureTask, **keys: Any) -> GP:
    labelled = task.source or task.target_labelled
    assert labelled is not None and labelled.y is not None
    context = regression(
        labelled.x.shape[1],
        has_source=task.source is not None,
        has_target_labels=task.target_labelled is not None,
        target_width=labelled.y.shape[1],
        backbone=torch.nn.Identity(),
    )
    return GP(context, **keys)


def fitted(task: FeatureTask, **keys: Any) -> GP:
    method = built(task, **keys)
    method.fit(task)
    return method


def rmse(prediction: Prediction, test: Features) -> float:
    assert prediction.mean is not None and test.y is not None
    return float((prediction.mean - test.y).square().mean().sqrt())


def coverage(prediction: Prediction, test: Features) -> float:
    assert prediction.mean is not None and prediction.variance is not None
    return float(((prediction.mean - test.y).abs() <= 1.96 * prediction.variance.sqrt()).double().mean())


MODES = ["source", "pooled", "hyper", "icm", "sequential"]


@pytest.fixture(scope="module")
def close_pair() -> tuple[FeatureTask, Features]:
    return pair("close")


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gains_from_a_close_source(close_pair: tuple[FeatureTask, Features], mode: str) -> None:
    task, test = close_pair
    scratch = rmse(fitted(task, mode="scratch").predict(test.x), test)
    method = fitted(task, mode=mode)
    prediction = method.predict(test.x)
    assert rmse(prediction, test) < {"hyper": 0.98, "source": 0.8}.get(mode, 0.75) * scratch
    assert 0.7 < coverage(prediction, test) <= 1
    assert prediction.epistemic is not None and prediction.variance is not None
    assert bool((prediction.epistemic > 0).all() & (prediction.epistemic < prediction.variance).all())
    assert task.source is not None
    assert rmse(method.predict_source(task.source.x), task.source) < 2


def test_sequential_beats_the_source_alone_on_a_far_target() -> None:
    task, test = pair("far", n=40)
    alone = rmse(fitted(task, mode="source").predict(test.x), test)
    assert rmse(fitted(task).predict(test.x), test) < 0.8 * alone


def test_a_target_that_is_minus_the_source_is_learnt_through_rho() -> None:
    """Few labels are enough for f_t = ρ f_s + c, though ρ = -1 is four standard deviations from its prior's mean."""
    task, test = pair("source", n=15)
    assert task.target_labelled is not None and task.target_labelled.y is not None and test.y is not None
    few = Features(task.target_labelled.x, 30 - task.target_labelled.y)
    method = built(task)
    assert method.fit(replace(task, target_labelled=few))["rho"] < -0.3
    test, scratch = Features(test.x, 30 - test.y), fitted(replace(task, target_labelled=few), mode="scratch")
    assert rmse(method.predict(test.x), test) < 0.7 * rmse(scratch.predict(test.x), test)


def test_laplace_covers_where_a_maximum_does_not() -> None:
    """Ten labels and length-scales for ten inputs: the maximum's intervals are too narrow."""
    found: dict[str, list[float]] = {"map": [], "laplace": []}
    for seed in range(6):
        task, test = pair("close", n=10, seed=seed)
        for kind in found:
            found[kind].append(
                coverage(fitted(task, mode="scratch", hyper_posterior=kind, ard=True).predict(test.x), test)
            )
    assert np.mean(found["laplace"]) > np.mean(found["map"]) + 0.02


@pytest.mark.parametrize("mode", ["pooled", "hyper", "icm", "sequential"])
def test_the_guard_tells_help_from_harm(mode: str) -> None:
    task, test = pair("unrelated", n=50)
    scratch = fitted(task, mode="scratch").predict(test.x)
    method = built(task, mode=mode, guard="evidence")
    figures = method.fit(task)
    guarded = method.predict(test.x)
    assert rmse(guarded, test) < 1.02 * rmse(scratch, test)
    if mode not in ("hyper", "icm"):  # whose functions share smoothness and noise in truth: this does help
        assert figures["transfer_weight"] < 0.1 and figures["log_evidence_gain"] < 0

    task, test = pair("close", n=20)
    method = built(task, mode=mode, guard="evidence")
    figures = method.fit(task)
    assert figures["transfer_weight"] > (0.7 if mode in ("icm", "hyper") else 0.9) and figures["log_evidence_gain"] > 0
    gain = figures["log_evidence_gain"]
    assert figures["transfer_weight"] == pytest.approx(1 / (1 + math.exp(-gain)))


@pytest.mark.parametrize("keys", [{"hyper_posterior": "map"}, {"approximation": "sparse", "inducing": 50}])
@pytest.mark.parametrize("mode", ["pooled", "hyper", "icm", "sequential"])
def test_the_guard_has_its_evidence_without_draws_too(mode: str, keys: dict[str, Any]) -> None:
    task, test = pair("unrelated", n=50)
    method = built(task, mode=mode, guard="evidence", **keys)
    assert 0 <= method.fit(task)["transfer_weight"] < (1 if mode == "hyper" else 0.5)
    assert rmse(method.predict(test.x), test) < 1.1 * rmse(fitted(task, mode="scratch").predict(test.x), test)


def test_a_guarded_prediction_is_the_mixture_of_both() -> None:
    task, test = pair("far", n=15)
    method = fitted(task, guard="evidence")
    w = 0.3
    method.fitted.put(transfer_weight=vector(w))
    a, b = fitted(task).predict(test.x), fitted(task, mode="scratch").predict(test.x)
    found = method.predict(test.x)
    mean = w * a.mean + (1 - w) * b.mean
    second = w * (a.variance + a.mean.square()) + (1 - w) * (b.variance + b.mean.square())
    close(found.mean, mean)
    close(found.variance, second - mean.square(), 1e-7)
    noise = w * (a.variance - a.epistemic) + (1 - w) * (b.variance - b.epistemic)
    close(found.variance - found.epistemic, noise, 1e-7)
    assert rmse(method.predict_source(task.source.x), task.source) < 2  # the guard is the target's alone


def test_priors_are_those_of_the_papers_model() -> None:
    task, _ = pair("close")
    method = built(task, mode="hyper", tau=0.2, noise=(0.3, 1.1), lengthscale=(2.0, 0.6), signal=(1.5, 0.9))
    method.fitted.put(mean_x=torch.zeros(10, **F64))
    plain = method._prior("source", None)
    close(plain.mean, [math.log(1.5), math.log(2 * math.sqrt(10)), math.log(0.3)])
    close(plain.covariance, torch.diag(vector(0.81, 0.36, 1.21)))
    source = Laplace(plain, vector(0.2, 0.9, -1.5), 0.3 * points(3, 3), 0.0)
    hyper = method._prior("hyper", source)
    close(hyper.mean, source.mode)
    close(hyper.covariance, source.root @ source.root.T + 0.04 * torch.eye(3, **F64))
    sequential = method._prior("sequential", source)
    close(sequential.mean, [1.0, math.log(0.1), 0.9, -1.5])
    close(sequential.covariance.diagonal().sqrt(), [0.5, 1.5, 0.7, 0.7])


def test_the_method_predicts_the_posterior_of_its_state() -> None:
    """Sequential, by hand from the hyperparameters that it found."""
    task, test = pair("far", n=15, n_source=60)
    method = fitted(task, kernel="matern32", ard=True, linear=True, hyper_posterior="map")
    assert task.source is not None and task.target_labelled is not None
    (x, y), (x_t, y_t) = ((part.x, part.y[:, 0]) for part in (task.source, task.target_labelled))
    inputs = lambda v: (v - x.mean(0)) / x.std(0, correction=0)  # noqa: E731
    outputs = lambda v: (v - y.mean()) / y.std(correction=0)  # noqa: E731
    kernel = Kernel("matern32", 10, ard=True, linear=True)
    source = exact.condition(Plain(kernel), method.fitted.source_best_0[0], inputs(x), outputs(y))
    theta = method.fitted.sequential_0[0]
    assert len(theta) == 1 + kernel.size + 1
    posterior = exact.condition(Autoregressive(source, kernel), theta, inputs(x_t), outputs(y_t))
    at, found = inputs(test.x), method.predict(test.x)
    close(found.mean[:, 0], posterior.mean(at) * y.std(correction=0) + y.mean())
    close(found.epistemic[:, 0], posterior.variance(at) * y.var(correction=0))
    close((found.variance - found.epistemic)[:, 0], (theta[-1].exp() * y.var(correction=0)).expand(300))


@pytest.mark.parametrize(
    "keys", [{"ard": True}, {"kernel": "linear"}, {"kernel": "linear", "ard": True}, {"linear": True, "ard": True}]
)
def test_every_kernel_in_every_mode(keys: dict[str, Any]) -> None:
    task, test = pair("close", n=12, n_source=40)
    for mode in ("scratch", *MODES):
        assert rmse(fitted(task, mode=mode, **keys).predict(test.x), test) < 6


def test_units_do_not_matter() -> None:
    """Also huge ones: inputs and outputs moved and stretched."""
    task, test = pair("close", n=15)
    assert task.source is not None and task.target_labelled is not None
    scales = 10.0 ** torch.arange(-5, 5, **F64)
    move = lambda f: Features(f.x * scales + 3, f.y * 1e12 - 5e12)  # noqa: E731
    moved = replace(task, source=move(task.source), target_labelled=move(task.target_labelled))
    for keys in ({}, {"mode": "scratch"}):
        a, b = fitted(task, **keys).predict(test.x), fitted(moved, **keys).predict(move(test).x)
        torch.testing.assert_close(b.mean, a.mean * 1e12 - 5e12, rtol=1e-4, atol=1e9)
        torch.testing.assert_close(b.variance, a.variance * 1e24, rtol=1e-3, atol=0)


def test_several_targets_are_independent() -> None:
    task, test = pair("close", n=12)
    second = lambda f: Features(f.x, torch.cat([f.y, f.x[:, :1].square() * 7], 1))  # noqa: E731
    both = replace(task, source=second(task.source), target_labelled=second(task.target_labelled))
    method = built(both, guard="evidence")
    figures = method.fit(both)
    found, alone = method.predict(test.x), fitted(task, guard="evidence").predict(test.x)
    assert found.mean.shape == (300, 2)
    close(found.mean[:, 0], alone.mean[:, 0])
    close(found.variance[:, 0], alone.variance[:, 0])
    assert figures["transfer_weight"] == pytest.approx(float(method.fitted.transfer_weight.mean()))
    assert rmse(Prediction(mean=found.mean[:, 1:]), Features(test.x, test.x[:, :1].square() * 7)) < 1


@pytest.mark.parametrize("keys", [{"guard": "evidence"}, {"mode": "icm"}, {"approximation": "sparse", "inducing": 30}])
def test_state_alone_predicts(keys: dict[str, Any]) -> None:
    task, test = pair("close", n=12)
    method, other = fitted(task, **keys), built(task, **keys)
    expected = method.predict(test.x)
    other.load_state_dict({key: value.clone() for key, value in method.state_dict().items()})
    with torch.inference_mode():
        found = other.predict(test.x)
    close(found.mean, expected.mean, 1e-12)
    close(found.variance, expected.variance, 1e-12)
    again, _ = pair("far", n=30, seed=3)
    method.fit(again)  # factors of the fit before are not used again
    close(method.predict(test.x).mean, fitted(again, **keys).predict(test.x).mean, 1e-12)


def test_sparse_comes_near_exact(close_pair: tuple[FeatureTask, Features]) -> None:
    task, test = close_pair
    for mode in ("scratch", *MODES):
        dense = fitted(task, mode=mode, hyper_posterior="map").predict(test.x)
        whole = fitted(task, mode=mode, approximation="sparse", inducing=400).predict(test.x)
        torch.testing.assert_close(
            whole.mean, dense.mean, rtol=0, atol=0.01
        )  # but for its optimum's tolerance, the same
        torch.testing.assert_close(whole.variance, dense.variance, rtol=0.01, atol=0)
        thin = fitted(task, mode=mode, approximation="sparse", inducing=60).predict(test.x)
        assert rmse(thin, test) < 1.25 * rmse(dense, test), mode
    method = fitted(task, exact_limit=100)  # the source is sparse, the target exact
    assert hasattr(method.fitted, "source_inducing_0") and not hasattr(method.fitted, "sequential_inducing_0")


def test_left_out_figures_and_noise_are_in_the_targets_units(close_pair: tuple[FeatureTask, Features]) -> None:
    task, test = close_pair
    method = built(task)
    figures = method.fit(task)
    prediction = method.predict(test.x)
    nll = 0.5 * ((test.y - prediction.mean).square() / prediction.variance + (2 * math.pi * prediction.variance).log())
    assert figures["left_out_nll"] == pytest.approx(float(nll.mean()), abs=0.6)
    assert 0.4 < figures["noise"] < 2.5  # one in truth


def test_functions_are_draws_of_the_prediction() -> None:
    task, test = pair("far", n=15)
    method = fitted(task, guard="evidence")
    method.fitted.put(transfer_weight=vector(0.5))
    x = test.x[:5]
    found, prediction = method.functions(x, 4000), method.predict(x)
    spread = prediction.epistemic.sqrt()
    assert found.shape == (4000, 5, 1)
    assert float(((found.mean(0) - prediction.mean) / spread).abs().max()) < 0.08
    torch.testing.assert_close(found.std(0), spread, rtol=0.06, atol=0)
    near = torch.cat([x[:1], x[:1] + 1e-4])
    values = method.functions(near, 50)
    assert float((values[:, 0] - values[:, 1]).abs().max()) < 0.2 * float(values[:, 0].std())  # functions, not points
    close(method.functions(x, 3), method.functions(x, 3))
    assert method.functions(x, 1).shape == (1, 5, 1)


# --- calibration by simulation --------------------------------------------------------------------


def test_ranks_of_the_truth_are_uniform() -> None:
    """Simulation-based calibration (Talts et al. 2018) at known hyperparameters: f at a new point among its posterior."""
    process, theta, ranks = Plain(Kernel("matern32", 2)), vector(0.2, -0.3, -1.5), []
    for seed in range(300):
        x = points(9, 2, seed=seed)
        f = exact.cholesky(process.between(x, x)(theta)) @ points(9, seed=1000 + seed)
        y = f + math.exp(-0.75) * points(9, seed=2000 + seed)
        posterior = exact.condition(process, theta, x[:8], y[:8])
        z = (f[8] - posterior.mean(x[8:])) / posterior.variance(x[8:]).sqrt()
        ranks.append(float(torch.special.ndtr(z)))
    assert kstest(ranks, "uniform").pvalue > 0.01


def test_ranks_are_uniform_with_hyperparameters_from_the_prior() -> None:
    """The whole method: θ from its prior, labels from θ, and the new label's place in the prediction."""
    ranks, inside = [], 0
    blank = FeatureTask(None, None, Features(points(25, 2), points(25, 1)))
    method = built(blank, mode="scratch")
    method.fitted.put(mean_x=torch.zeros(2, **F64))
    prior = method._prior("scratch", None)
    process = method._process("scratch", 0)
    for seed in range(150):
        theta = prior.mean + prior.covariance.diagonal().sqrt() * points(3, seed=seed)
        x = points(26, 2, seed=500 + seed)
        k = process.between(x, x)(theta) + theta[-1].exp() * torch.eye(26, **F64)
        y = exact.cholesky(k) @ points(26, seed=900 + seed)
        prediction = fitted(FeatureTask(None, None, Features(x[:25], y[:25, None])), mode="scratch").predict(x[25:])
        z = float((y[25] - prediction.mean[0, 0]) / prediction.variance[0, 0].sqrt())
        ranks.append(0.5 * (1 + math.erf(z / math.sqrt(2))))
        inside += abs(z) < 1.645
    assert kstest(ranks, "uniform").pvalue > 0.01
    assert 0.83 < inside / 150 < 0.97


# --- bad input, configuration, runs ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "granted", "keys", "message"),
    [
        (False, True, {}, "method.mode=sequential needs a source: set source=NAME, or method.mode=scratch"),
        (True, False, {}, "needs target labels: set target_labels=N, or method.mode=source"),
        (False, True, {"mode": "source"}, "needs a source"),
        (True, False, {"mode": "scratch"}, "needs target labels"),
        (
            True,
            True,
            {"mode": "source", "guard": "evidence"},
            "weighs a transfer against scratch, and mode=source is none",
        ),
        (True, True, {"draws": 0}, "are positive"),
        (True, True, {"noise": (0.0, 1.0)}, "are positive"),
    ],
)
def test_refusals(source: bool, granted: bool, keys: dict[str, Any], message: str) -> None:
    task, _ = pair("close", n=5, n_source=10)
    task = replace(
        task, source=task.source if source else None, target_labelled=task.target_labelled if granted else None
    )
    with pytest.raises((TransferError, ValueError), match=message):
        built(task, **keys)


def test_one_label_few_points_and_constants() -> None:
    task, test = pair("close", n=1, n_source=8)  # fewer points than inputs
    for mode in ("scratch", *MODES):
        assert fitted(task, mode=mode).predict(test.x).is_finite()
    assert task.source is not None and task.target_labelled is not None
    constant = Features(task.source.x.clone(), torch.full_like(task.source.y, 3.0))
    constant.x[:, 2] = 1e9  # an input that says nothing
    same = fitted(FeatureTask(constant, None, Features(constant.x[:4], constant.y[:4])), guard="evidence")
    prediction = same.predict(constant.x)
    assert rmse(prediction, constant) < 0.01 and prediction.is_finite()
    with pytest.raises(TransferError, match="target labels of at least two values"):
        fitted(FeatureTask(None, None, Features(constant.x, constant.y)), mode="scratch")
    with pytest.raises(TransferError, match="NaN or infinite"):
        fitted(replace(task, target_labelled=Features(task.target_labelled.x * float("nan"), task.target_labelled.y)))
    with pytest.raises(TransferError, match="is too large"):
        many = Features(points(20_001, 1), points(20_001, 1, seed=1))
        fitted(FeatureTask(many, None, None), mode="source", approximation="exact")


def test_the_yaml_says_the_constructors_defaults() -> None:
    node = yaml.safe_load((packaged_folder() / "method" / "gp.yaml").read_text())
    own = {key: value for key, value in node.items() if key not in ("name", "implementation", "search")}
    assert own == {k: list(v) if isinstance(v, tuple) else v for k, (_, v) in keyword_schema(GP).items()}
    assert set(node["search"]) <= set(own)
    component("method", node)


def test_verdicts_in_words() -> None:
    assert _transfer_lines({}) == []
    assert _transfer_lines({"transfer_weight": 0.97, "log_evidence_gain": 3.4}) == [
        "transfer weight 0.97: the source helps (log evidence +3.4)"
    ]
    assert "it is not clear" in _transfer_lines({"transfer_weight": 0.5})[0]
    assert _transfer_lines({"transfer_weight": 0.01, "log_evidence_gain": -5.0})[0].endswith(
        "the source does not help (log evidence -5.0)"
    )


def test_a_run_states_its_verdict_and_can_be_evaluated_again(transfer: Transfer) -> None:
    pair_of = ["source=diabetes", "source.domain=female", "target=diabetes", "target.domain=male", "backbone=identity"]
    outcome = transfer(
        "run", *pair_of, "method=gp", "method.guard=evidence", "target_labels=20", "threads=1", "device=cpu"
    )
    assert outcome.code == 0, outcome.err
    line = next(line for line in outcome.out.splitlines() if line.startswith("transfer weight"))
    result = json.loads((outcome.run / "result.json").read_text())
    assert line == _transfer_lines(result["fit"])[0]
    assert 0 < result["fit"]["transfer_weight"] <= 1 and "epistemic_share" in result["metrics"]["target_test"]
    predict = ("predict", str(outcome.run), "--dataset", "diabetes", "domain=male", "--draws", "400")
    drawn = list(csv.DictReader(transfer(*predict, "--batch-size", "7").out.splitlines()))
    assert drawn == list(csv.DictReader(transfer(*predict).out.splitlines())), "one function, whatever the batches"
    values = torch.tensor([[float(row[f"draw{i}_0"]) for i in range(400)] for row in drawn])
    mean, std, share = (
        torch.tensor([float(row[f"{k}_0"]) for row in drawn]) for k in ("mean", "std", "epistemic_share")
    )
    off = (values.mean(1) - mean) / (std * share.sqrt())  # without noise
    assert float(off.abs().max()) < 5 / 400**0.5
    torch.testing.assert_close(values.std(1), std * share.sqrt(), rtol=0.2, atol=0)
    again = transfer("evaluate", str(outcome.run))
    assert again.code == 0 and "result.json agrees" in again.out, again.out + again.err
    assert Path(outcome.run / "figures").exists()
    refused = transfer("run", *pair_of, "method=gp", "threads=1", "device=cpu")
    assert refused.code == 2 and "needs target labels: set target_labels=N" in refused.err
    refused = transfer("run", "method=gp", "threads=1", "device=cpu")
    assert refused.code == 2 and "does not do classification" in refused.err
