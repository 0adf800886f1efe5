"""Divergences: values against closed forms of Gaussians and brute force, gradients by finite differences, and their method."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome
from scipy import integrate, stats
from test_methods import START, batch_of, context, train
from torch import Tensor, nn

from transfer_cli.methods.discrepancy.divergence import Divergence
from transfer_cli.methods.math import divergences
from transfer_cli.methods.math.mmd import WIDTHS
from transfer_cli.methods.phases import Batch, Labelled, Progress

Transfer = Callable[..., Outcome]
DIRECTIONS = torch.nn.functional.normalize(
    torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), dim=0
)
FAMILY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mmd": divergences.mmd,
    "coral": divergences.coral,
    "kl": divergences.kl,
    "knn_kl": divergences.knn_kl,
    "wasserstein": lambda s, t: divergences.wasserstein(s, t, DIRECTIONS),
    "renyi": lambda s, t: divergences.renyi(s, t, 0.3),
}
every = pytest.mark.parametrize("name", FAMILY)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussians(n: int, m: int, width: int) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Samples of two Gaussians, and their means and covariances."""
    means = normal(width, seed=1), normal(width, seed=2)
    roots = [torch.eye(width).double() + 0.3 * normal(width, width, seed=s) for s in (3, 4)]
    covariances = [r @ r.T for r in roots]
    return (
        means[0] + normal(n, width, seed=5) @ roots[0].T,
        means[1] + normal(m, width, seed=6) @ roots[1].T,
        (*means, *covariances),
    )


# --- all of them --------------------------------------------------------------------------------


@every
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    """mmd holds its bandwidth fixed: its gradient is that of the kernel at the bandwidth of here (its own tests say so)."""
    source, target, _ = gaussians(8, 6, 3)
    inputs = (source.requires_grad_(), target.requires_grad_())
    if name == "mmd":
        squares = torch.cdist(torch.cat(inputs), torch.cat(inputs)).detach().square()
        mean = squares.sum() / (14 * 13)

        def held(s: Tensor, t: Tensor) -> Tensor:
            def k(a: Tensor, b: Tensor) -> Tensor:
                d = (a[:, None] - b).square().sum(2)
                return sum((torch.exp(-d / (u * mean)) for u in WIDTHS), torch.zeros_like(d))

            inside = sum((k(x, x).sum() - k(x, x).diagonal().sum()) / (len(x) * (len(x) - 1)) for x in (s, t))
            return inside - 2 * k(s, t).mean()

        assert torch.autograd.gradcheck(held, inputs)
        for found, wanted in zip(
            torch.autograd.grad(FAMILY[name](*inputs), inputs), torch.autograd.grad(held(*inputs), inputs), strict=True
        ):
            torch.testing.assert_close(found, wanted)
        return
    assert torch.autograd.gradcheck(FAMILY[name], inputs)


@every
def test_equal_samples_do_not_differ_and_moved_ones_do(name: str) -> None:
    """But mmd, unbiased, and knn_kl, which sees each sample among the target's, are then below zero."""
    source, target, _ = gaussians(40, 40, 3)
    same, moved = FAMILY[name](source, source), FAMILY[name](source, target)
    assert float(moved) > 0.01
    assert float(same) < 1e-9
    if name not in ("mmd", "knn_kl"):
        assert float(same) == pytest.approx(0, abs=1e-6)


@every
def test_the_order_of_samples_and_a_common_shift_do_not_count(name: str) -> None:
    source, target, _ = gaussians(20, 13, 3)
    wanted = FAMILY[name](source, target)
    turned = FAMILY[name](source.flip(0) + 5, target[torch.randperm(13)] + 5)
    torch.testing.assert_close(turned, wanted)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(name: str, dtype: torch.dtype) -> None:
    source, target, _ = gaussians(40, 30, 3)
    low = source.to(dtype), target.to(dtype)
    high = low[0].float(), low[1].float()
    direct = FAMILY[name] if name != "wasserstein" else lambda s, t: divergences.wasserstein(s, t, DIRECTIONS.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = direct(*low)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, direct(*high))


# --- closed forms of Gaussians ------------------------------------------------------------------


def test_kl_and_renyi_of_gaussians_are_their_integrals() -> None:
    """In one dimension, by quadrature, of the Gaussians with the samples' moments."""
    source, target = 0.5 + 1.3 * normal(30, 1), normal(20, 1, seed=1)
    p, q = (stats.norm(float(x.mean()), float(x.std())) for x in (source, target))
    kl, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -15, 15)
    assert float(divergences.kl(source, target)) == pytest.approx(kl, rel=1e-7)
    for alpha in (0.2, 0.5, 0.9):
        inner, _ = integrate.quad(lambda x, a=alpha: math.exp(a * p.logpdf(x) + (1 - a) * q.logpdf(x)), -15, 15)
        wanted = math.log(inner) / (alpha - 1)
        assert float(divergences.renyi(source, target, alpha)) == pytest.approx(wanted, rel=1e-7)


def test_in_several_dimensions_kl_is_torchs_and_renyis_limit() -> None:
    source, target, _ = gaussians(50, 40, 4)
    p, q = (torch.distributions.MultivariateNormal(x.mean(0), x.T.cov()) for x in (source, target))
    wanted = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(divergences.kl(source, target), wanted)
    torch.testing.assert_close(divergences.renyi(source, target, 1 - 1e-7), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(  # twice Bhattacharyya's distance, which is symmetric
        divergences.renyi(source, target), divergences.renyi(target, source)
    )


def test_shrinkage_makes_few_samples_enough() -> None:
    source, target, _ = gaussians(5, 4, 12)
    for d in (divergences.kl, divergences.renyi):
        found = d(source.requires_grad_(), target, shrinkage=0.1)
        (gradient,) = torch.autograd.grad(found, source)
        assert bool(found.isfinite() & gradient.isfinite().all()) and float(found.detach()) > 0
    whole = divergences.kl(source, target, shrinkage=1.0)  # spheres with the samples' mean variances
    a, b = (x.var(0).mean() for x in (source, target))
    away = (source.mean(0) - target.mean(0)).square().sum()
    torch.testing.assert_close(whole, 0.5 * (12 * a / b + away / b - 12 + 12 * (b / a).log()))


def test_neighbours_tell_the_divergence_of_gaussians() -> None:
    """KL = ½ D (a / b - 1 - log a / b + v² / b) of N(v, a I) and N(0, b I)."""
    source, target = 0.8 + 0.7**0.5 * normal(1500, 2), normal(1200, 2, seed=1)
    wanted = 0.7 - 1 - math.log(0.7) + 0.8**2
    assert float(divergences.knn_kl(source, target)) == pytest.approx(wanted, abs=0.08)
    assert abs(float(divergences.knn_kl(source[:700], source[700:]))) < 0.08
    far, near = normal(3, 2) + 100, normal(2, 2)
    assert bool(divergences.knn_kl(far, near, k=5).isfinite()), "no more neighbours than samples"


def test_neighbours_against_a_loop() -> None:
    source, target, _ = gaussians(9, 7, 3)
    logs = []
    for i, s in enumerate(source):
        inside = sorted(float((s - z).norm()) for j, z in enumerate(source) if j != i)
        across = sorted(float((s - z).norm()) for z in target)
        logs.append(math.log(across[1] / inside[1]))
    wanted = 3 * sum(logs) / 9 + math.log(7 / 8)
    assert float(divergences.knn_kl(source, target, k=2)) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (7, 3), (12, 8), (1, 6)])
def test_wasserstein_in_one_dimension_is_scipys(n: int, m: int) -> None:
    source, target = normal(n, 1), 0.5 + 2 * normal(m, 1, seed=1)
    wanted = stats.wasserstein_distance(source[:, 0].numpy(), target[:, 0].numpy())
    assert float(divergences.wasserstein(source, target)) == pytest.approx(wanted, rel=1e-12)


def test_sliced_wasserstein_of_moved_samples_is_the_mean_of_their_shadows() -> None:
    """E_θ |θᵀ v| = ‖v‖ Γ(D/2) / (√π Γ((D + 1)/2)) where the target is the source moved by v; and each is scipy's."""
    source, v = normal(30, 3), torch.tensor([2.0, -1.0, 0.5]).double()
    wanted = float(v.norm()) * math.gamma(1.5) / (math.sqrt(math.pi) * math.gamma(2))
    found = divergences.wasserstein(source, source + v, number=20_000)
    assert float(found) == pytest.approx(wanted, rel=0.03)
    target = normal(20, 3, seed=1)
    each = [stats.wasserstein_distance((source @ d).numpy(), (target @ d).numpy()) for d in DIRECTIONS.T]
    assert float(divergences.wasserstein(source, target, DIRECTIONS)) == pytest.approx(np.mean(each), rel=1e-12)


def test_mmd_of_gaussians_is_its_closed_form() -> None:
    """E exp(-‖x - y‖² / w) of x - y ~ N(μ, S): |I + 2 S / w|^-½ exp(-μᵀ (w I + 2 S)⁻¹ μ), at each draw's bandwidth."""
    _, _, (mean_s, mean_t, cov_s, cov_t) = gaussians(1, 1, 2)
    p, q = (torch.distributions.MultivariateNormal(m, c) for m, c in ((mean_s, cov_s), (mean_t, cov_t)))
    identity, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def expected(mean: Tensor, covariance: Tensor, bandwidth: float) -> float:
        total = 0.0
        for width in WIDTHS:
            w = width * bandwidth
            exponent = mean @ torch.linalg.solve(w * identity + 2 * covariance, mean)
            total += float(torch.linalg.det(identity + 2 * covariance / w) ** -0.5 * torch.exp(-exponent))
        return total

    gaps = []
    for _ in range(100):
        source, target = p.sample((120,)), q.sample((100,))
        z = torch.cat([source, target])
        bandwidth = float(torch.cdist(z, z).square().sum() / (len(z) * (len(z) - 1)))
        wanted = expected(zero, 2 * cov_s, bandwidth) + expected(zero, 2 * cov_t, bandwidth)
        wanted -= 2 * expected(mean_s - mean_t, cov_s + cov_t, bandwidth)
        gaps.append(float(divergences.mmd(source, target)) - wanted)
    assert abs(np.mean(gaps)) < 3 * np.std(gaps) / 10 + 0.005 and np.std(gaps) < 0.2


def test_coral_of_gaussians_is_the_gap_of_their_covariances() -> None:
    source, target, (_, _, cov_s, cov_t) = gaussians(40_000, 40_000, 3)
    wanted = float((cov_s - cov_t).square().sum()) / 36
    assert float(divergences.coral(source, target)) == pytest.approx(wanted, rel=0.05)


# --- the method ---------------------------------------------------------------------------------


@every
def test_the_method_adds_its_divergence(name: str) -> None:
    method = Divergence(context(nn.Linear(3, 5)), divergence=name, weight=0.7)  # type: ignore[arg-type]
    x, y, target = normal(12, 3).float(), torch.arange(12) % 2, normal(9, 3, seed=1).float() + 1
    torch.manual_seed(4)
    losses = method.losses(Batch(Labelled(x, y), target, None), Progress(0, 1))
    source_features, target_features = method.network.backbone(x), method.network.backbone(target)
    torch.manual_seed(4)
    own = {
        "kl": lambda s, t: divergences.kl(s, t, 0.1) / 5,
        "renyi": lambda s, t: divergences.renyi(s, t, 0.5, 0.1) / 5,
        "knn_kl": lambda s, t: divergences.knn_kl(s, t) / 5,
        "wasserstein": divergences.wasserstein,
    }.get(name, FAMILY[name])
    wanted = own(source_features, target_features)
    torch.testing.assert_close(losses.diagnostics[name], wanted)
    torch.testing.assert_close(losses.terms["divergence"], 0.7 * wanted)
    assert not losses.diagnostics[name].requires_grad and losses.terms["divergence"].requires_grad


@every
def test_the_method_brings_the_domains_together(name: str) -> None:
    """And without the term they stay apart."""
    batch = batch_of(40)
    ends = {}
    for weight in (0.0, 100.0 if name == "coral" else 1.0):  # 1 / (4 D²) is small
        torch.manual_seed(0)
        method = Divergence(context(), divergence=name, weight=weight)  # type: ignore[arg-type]
        train(method, batch, 60, lr=0.02)
        torch.manual_seed(1)
        ends[weight > 0] = float(method.losses(batch, START).diagnostics[name])
    assert ends[True] < 0.7 * ends[False], ends


def test_the_method_runs(transfer: Transfer) -> None:
    chosen = ["method=divergence", "method.divergence=renyi", "trainer.steps=20", "trainer.precision=bf16"]
    run = transfer("run", *SMALL, *chosen).run
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [e for e in events if e["split"] == "diagnostics" and math.isfinite(e["values"]["renyi"])]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shrinkage": 0.0}, "shrinkage is a share"),
        ({"alpha": 1.0}, "alpha is an order between 0 and 1"),
        ({"neighbours": 0}, "at least 1"),
        ({"directions": 0}, "at least 1"),
    ],
)
def test_wrong_values_are_refused(wrong: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Divergence(context(nn.Linear(3, 5)), **wrong)
