"""Second order: solvers of convex heads, optimisers of networks, and the calculus beneath kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_tasks import context
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.finetuning.linear_probe import LinearProbe
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.math import softmax
from transfer_cli.methods.math.kernels import Kernel
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.math.softmax import Precision, Softmax

SOLVERS = ("newton", "newton_cg", "lbfgs")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, width: int, classes: int, scales: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features of which few directions have most of the variance, and labels that are not certain."""
    x = (normal(n, width) * torch.logspace(0, -scales, width, dtype=torch.float64)) @ normal(width, width, seed=1)
    y = torch.distributions.Categorical(logits=2 * x @ normal(width, classes, seed=2)).sample()
    return x, y


# --- solvers ------------------------------------------------------------------------------------


def problem(n: int = 120, width: int = 6, classes: int = 4) -> Softmax:
    x, y = correlated(n, width, classes)
    a, b, full = (0.05 * normal(s, s, seed=s) @ normal(s, s, seed=s).T for s in (classes, width, classes * width))
    precision = Precision(normal(classes, width, seed=5).square() + 0.1, (a, b), full)
    return Softmax(x, y, normal(n, seed=6).square(), normal(classes, width, seed=7), precision)


@pytest.mark.parametrize("n", [4, 120])  # fewer samples than features, and more
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_any_gaussian_prior_end_where_the_gradient_vanishes(solver: Any, n: int) -> None:
    p = problem(n)

    def objective(w: Tensor) -> Tensor:
        away = (w - p.mean).flatten()
        losses = F.cross_entropy(p.x @ w.T, p.y, reduction="none")
        return (p.weights * losses).sum() + 0.5 * away @ p.precision.dense() @ away

    far = 3 * normal(4, 6, seed=8)
    found = [p.minimise(tolerance=1e-8, solver=solver), p.minimise(far, tolerance=1e-8, solver=solver)]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    assert float(torch.func.grad(objective)(found[0]).abs().max()) < 1.1e-8


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
@pytest.mark.parametrize("shape", [(200, 5, 3), (40, 60, 3), (90, 8, 2)])
def test_logistic_regression_is_scikit_learns_by_any_solver(solver: Any, shape: tuple[int, int, int]) -> None:
    x, y = correlated(*shape)
    n, _, classes = shape
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    w, b = fit_logistic(x, y, classes, 0.01, weights, tolerance=1e-10, solver=solver)
    peer = LogisticRegression(C=1 / (0.01 * n), tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
    wanted = peer.predict_proba(x.numpy())
    if classes == 2:  # theirs has one column of weights, w_1 - w_0, and its penalty is twice that of two opposite ones
        peer.set_params(C=2 / (0.01 * n)).fit(x.numpy(), y.numpy())
        wanted = peer.predict_proba(x.numpy())
    np.testing.assert_allclose((x @ w.T + b).softmax(1).numpy(), wanted, atol=2e-6)
    assert float(b.sum().abs()) < 1e-12


def test_whitening_saves_iterations_where_features_are_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = correlated(800, 30, 4, scales=2.5)
    counts = []
    count = softmax.minimize

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        def one(flat: Any) -> Any:
            counts[-1] += 1
            return function(flat)

        return count(one, *args, **kwargs)

    monkeypatch.setattr(softmax, "minimize", counted)
    weights = torch.full((800,), 1 / 800, dtype=torch.float64)
    counts.append(0)
    fit_logistic(x, y, 4, 1e-4, weights, solver="lbfgs")
    monkeypatch.setattr(Softmax, "_whitening", lambda self: (torch.ones(31).double(), torch.ones(31).double()))
    counts.append(0)
    fit_logistic(x, y, 4, 1e-4, weights, solver="lbfgs")
    assert counts[0] < 0.5 * counts[1], counts


def test_the_solver_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("_dense_step", "_conjugate_step", "_whitened"):

        def spied(self: Softmax, *args: Any, of: Any = getattr(Softmax, name), name: str = name) -> Any:
            taken.append(name)
            return of(self, *args)

        monkeypatch.setattr(Softmax, name, spied)
    for n, width, wanted in ((40, 5, "_dense_step"), (3000, 5, "_whitened"), (10, 400, "_whitened")):
        taken.clear()
        x, y = correlated(n, width, 3)
        Logistic("classification", 3, l2=0.1).fit(x, y)
        assert set(taken) == {wanted}, (n, width)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scales_duplicates_constants_and_no_penalty_are_borne(solver: Any) -> None:
    """Features in any units, twice the same, or constant; classes that a line parts, without a penalty."""
    x, y = correlated(60, 4, 2)
    x = torch.cat([1e6 * x, 1e-6 * x, x[:, :1], x[:, :1], torch.zeros(60, 1).double(), torch.ones(60, 1).double()], 1)
    x[:, 0] += 1e7 * y
    weights = torch.full((60,), 1 / 60, dtype=torch.float64)
    for penalty in (1e-3, 0.0):
        w, b = fit_logistic(softmaxed(x), y, 2, penalty, weights, solver=solver)
        assert bool(w.isfinite().all() and b.isfinite().all())
        assert bool(((softmaxed(x) @ w.T + b).argmax(1) == y).all())


def softmaxed(x: Tensor) -> Tensor:
    scale = x.std(0, correction=0)
    return (x - x.mean(0)) / torch.where(scale > 1e-8, scale, 1.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_probe_takes_a_solver(solver: Any) -> None:
    from feature_tasks import shifted_classes

    task, _ = shifted_classes(60)
    probes = [LinearProbe(context(), solver=s) for s in ("auto", solver)]
    for probe in probes:
        probe.fit(task)
    assert task.target is not None
    first, second = (probe.predict(task.target.x).probs for probe in probes)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


# --- ridge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_variance_of_ridge_is_that_of_samples_left_out(weighted: bool) -> None:
    """Against as many fits as there are samples."""
    x, noise = normal(25, 6), normal(25, 2, seed=1)
    y = x[:, :2] + 0.5 * noise
    weights = normal(25, seed=2).square() if weighted else None
    head = Ridge("regression", 2, l2=0.05)
    head.fit(x, y, weights)
    z = softmaxed(x)
    share = torch.full((25,), 1 / 25).double() if weights is None else weights / weights.sum()
    squares = []
    for i in range(25):
        others = share.clone()
        others[i] = 0
        w, b = fit_ridge(z, y, 0.05, others)
        squares.append((y[i] - w @ z[i] - b).square())
    torch.testing.assert_close(head.fitted.variance, share @ torch.stack(squares))


def test_ridges_variance_is_honest_where_samples_are_few() -> None:
    """Ten samples of five features: the residuals of the fit itself would promise less than half the error."""
    slopes, ratios, naive = normal(5, 1), [], []
    for seed in range(200):
        x, new = normal(10, 5, seed=seed), normal(200, 5, seed=1000 + seed)
        y = x @ slopes + normal(10, 1, seed=2000 + seed)
        head = Ridge("regression", 1, l2=0.01)
        head.fit(x, y)
        error = (head.predict(new).mean.double() - new @ slopes).square().mean() + 1  # type: ignore[union-attr]
        ratios.append(float((head.fitted.variance / error).log()))
        residual = (head.predict(x).mean.double() - y).square().mean()  # type: ignore[union-attr]
        naive.append(float((residual / error).log()))
    assert abs(np.mean(ratios)) < 0.4 and np.mean(naive) < -1.5


def test_one_sample_tells_no_variance() -> None:
    with pytest.raises(TransferError, match="two or more"):
        Ridge("regression", 1).fit(normal(1, 3), normal(1, 1))


# --- differentiation and integration ------------------------------------------------------------


def line(n: int, step: float) -> tuple[Tensor, Tensor]:
    """A grid `(n, 1)`, and the matrix of (1 - ℓ² d²/dx²) at ℓ = 1 by central differences, for its inner points `(n - 2, n)`."""
    x = step * torch.arange(n, dtype=torch.float64)[:, None]
    second = torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1) - 2 * torch.eye(n)
    return x, (torch.eye(n) - second / step**2).double()[1:-1]


@pytest.mark.parametrize("form", ["matern12", "matern32", "rbf"])
def test_matern_half_is_greens_function(form: Any) -> None:
    """(1 - ℓ² ∂²) k(·, x') = 2 ℓ s² δ(· - x'); of the smoother kernels that is not so."""
    length, height, step = 0.7, 1.3, 0.7 * 0.02
    x, operator = line(300, step / length)
    theta = torch.tensor([math.log(height), math.log(length)], dtype=torch.float64)
    applied = operator @ Kernel(form, 1)(theta, length * x, length * x) * step / (2 * length * height)
    delta = torch.eye(300, dtype=torch.float64)[1:-1]
    gap = float((applied - delta).abs().max())
    assert gap < 1e-3 if form == "matern12" else gap > 0.1


def test_the_processes_mean_minimises_the_energy_of_its_kernel() -> None:
    """argmin Σ (y - f)² / σ² + ‖f‖²_H is the posterior mean; for Matern-1/2 ‖f‖²_H = ∫ (f² + ℓ² f'²) dx / (2 ℓ s²)."""
    length, noise, step, n = 1.0, 0.3, 0.01, 1600  # eight lengths beyond the data on either side
    x = step * torch.arange(n, dtype=torch.float64)[:, None]
    seen = torch.arange(700, 900, 25)
    y = normal(len(seen))
    theta = torch.zeros(2, dtype=torch.float64)
    k = Kernel("matern12", 1)
    mean = k(theta, x, x[seen]) @ torch.linalg.solve(k(theta, x[seen], x[seen]) + noise * torch.eye(len(seen)), y)
    slope = (torch.diag(torch.ones(n - 1), 1) - torch.eye(n)).double()[:-1] / step
    energy = step * (torch.eye(n, dtype=torch.float64) + length**2 * slope.T @ slope) / (2 * length)
    pick = torch.eye(n, dtype=torch.float64)[seen]
    minimum = torch.linalg.solve(pick.T @ pick / noise + energy, pick.T @ y / noise)
    assert float((minimum - mean)[500:1100].abs().max()) < 2e-3 * float(mean.abs().max())
