"""Newton's method for softmax regression: derivatives against autograd, optima against scikit-learn, any Gaussian prior."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from transfer_cli.methods.math import softmax
from transfer_cli.methods.math.softmax import Precision, Softmax


def problem(n: int = 40, width: int = 5, classes: int = 3, seed: int = 0) -> Softmax:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    roots = normal(classes, classes), normal(width, width), normal(classes * width, classes * width)
    a, b, full = (0.1 * r @ r.T for r in roots)
    precision = Precision(normal(classes, width).square() + 0.1, (a, b), full)
    y = torch.randint(classes, (n,), generator=draw)
    return Softmax(normal(n, width), y, normal(n).square(), normal(classes, width), precision)


def objective(p: Softmax, w: Tensor) -> Tensor:
    away = (w - p.mean).flatten()
    losses = F.cross_entropy(p.x @ w.T, p.y, reduction="none")
    return (p.weights * losses).sum() + 0.5 * away @ p.precision.dense() @ away


def test_derivatives_are_autograds() -> None:
    p, w, v = problem(), torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    probs = (p.x @ w.T).softmax(1)
    assert p.value(w) == pytest.approx(float(objective(p, w)), rel=1e-12)
    gradient = torch.func.grad(lambda u: objective(p, u))(w)
    hessian = torch.func.hessian(lambda u: objective(p, u))(w).reshape(15, 15)
    torch.testing.assert_close(p.gradient(w, probs), gradient)
    torch.testing.assert_close(p.hessian(w), hessian)
    torch.testing.assert_close(p.curvature(probs, v).flatten(), hessian @ v.flatten())
    torch.testing.assert_close(p.precision(v).flatten(), p.precision.dense() @ v.flatten())
    torch.testing.assert_close(
        p.precision.scaled(3.0).plus(2 * torch.ones(3, 5)).dense(), 3 * p.precision.dense() + 2 * torch.eye(15)
    )


def test_boehnings_bound_is_one() -> None:
    p, w = problem(), 3 * torch.randn(3, 5, dtype=torch.float64)
    centring = torch.eye(3, dtype=torch.float64) - 1 / 3
    bound = torch.kron(0.5 * centring, (p.x * p.weights[:, None]).T @ p.x)
    gap = bound - softmax.data_hessian(p.x, p.weights, (p.x @ w.T).softmax(1))
    assert float(torch.linalg.eigvalsh(gap).min()) > -1e-9


@pytest.mark.parametrize("dense", [0, 1000])
def test_both_ways_find_the_optimum(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "DENSE", dense)
    p = problem(n=200)
    w = p.minimise(tolerance=1e-8)
    gradient = torch.func.grad(lambda u: objective(p, u))(w)
    assert float(gradient.abs().max()) < 1e-7
    far = p.minimise(start=5 * torch.randn(3, 5, dtype=torch.float64), tolerance=1e-8)
    torch.testing.assert_close(far, w, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dense", [0, 1000])
def test_against_scikit_learn_with_a_free_bias(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(softmax, "DENSE", dense)
    p = problem(n=150)
    x = torch.cat([p.x, torch.ones(150, 1, dtype=torch.float64)], 1)
    diagonal = torch.ones(3, 6, dtype=torch.float64) * 0.5
    diagonal[:, -1] = 0
    w = Softmax(
        x, p.y, torch.ones(150, dtype=torch.float64), torch.zeros(3, 6, dtype=torch.float64), Precision(diagonal)
    )
    found = w.minimise(tolerance=1e-9)
    peer = LogisticRegression(C=2.0, tol=1e-10, max_iter=10_000).fit(p.x.numpy(), p.y.numpy())
    np.testing.assert_allclose(found[:, :-1].numpy(), peer.coef_, atol=1e-5)
