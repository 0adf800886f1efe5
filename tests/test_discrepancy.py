"""Discrepancies and output-space methods: every loss against an independent formula, and transfer that beats its absence."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import ot
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.stats import moment
from sklearn.cluster import KMeans
from test_methods import MIDDLE, START, Toy, batch_of, context, gradients
from torch import Tensor

from transfer_cli.backbones.vectors import MLP
from transfer_cli.data.inputs import InputSpec
from transfer_cli.methods.base import Context, NetworkMethod
from transfer_cli.methods.contrastive.can import CAN, contrastive_discrepancy, spherical_k_means
from transfer_cli.methods.discrepancy.cmd import CMD, central_moment_discrepancy
from transfer_cli.methods.discrepancy.dan import DAN
from transfer_cli.methods.discrepancy.deep_jdot import DeepJDOT, sinkhorn_plan
from transfer_cli.methods.discrepancy.dsan import DSAN
from transfer_cli.methods.discrepancy.jan import JAN
from transfer_cli.methods.math.entropies import entropies, marginal_entropy
from transfer_cli.methods.math.mmd import class_mmd, mmd
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.output.afn import AFN
from transfer_cli.methods.output.bnm import BNM, nuclear_norm
from transfer_cli.methods.output.entropy_min import EntropyMin
from transfer_cli.methods.output.mcc import MCC, class_confusion
from transfer_cli.methods.phases import Batch, Features, FeatureTask, Gradient, Labelled, Progress

Build = Callable[[Context], NetworkMethod]


def draws(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=draw, dtype=dtype) for shape in shapes]


def kernel(x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """The sum of Gaussian kernels exp(-d² / 2σ²), σ² given as multiples of the mean squared distance of different samples."""
    squares = cdist(x, x, "sqeuclidean")
    mean = squares[~np.eye(len(x), dtype=bool)].mean()
    return sum(np.exp(-squares / (2 * s * mean)) for s in sigmas)


FIVE = [2.0**k for k in range(-3, 2)]


def u_statistic(k: np.ndarray, n: int) -> float:
    """Unbiased MMD² from the kernel of n samples of the first kind and the rest, by sums over pairs."""
    total, m = 0.0, len(k) - n
    for i in range(n + m):
        for j in range(n + m):
            if (i < n) != (j < n):
                total -= k[i, j] / (n * m)
            elif i != j:
                total += k[i, j] / (n * (n - 1) if i < n else m * (m - 1))
    return total


# --- maximum mean discrepancy ---------------------------------------------------------------------


def test_mmd_is_the_published_statistic_under_five_gaussian_kernels() -> None:
    s, t = draws((7, 3), (5, 3))
    k = kernel(torch.cat([s, t + 1]).numpy(), FIVE)
    assert float(mmd([(s, t + 1)], "unbiased")) == pytest.approx(u_statistic(k, 7), rel=1e-10)
    w = np.array([1 / 7] * 7 + [-1 / 5] * 5)
    assert float(mmd([(s, t + 1)], "biased")) == pytest.approx(w @ k @ w, rel=1e-10)


def test_linear_mmd_is_the_mean_over_neighbours_and_drops_the_surplus() -> None:
    s, t = draws((9, 3), (7, 3))
    pairs = [(i, i + 3) for i in range(3)]  # three pairs of the seven
    squares = {
        (a, i, b, j): float((x[i] - y[j]).square().sum())
        for a, x in enumerate((s, t))
        for b, y in enumerate((s, t))
        for i in range(6)
        for j in range(6)
    }
    used = [squares[key] for i, j in pairs for key in ((0, i, 0, j), (1, i, 1, j), (0, i, 1, j), (0, j, 1, i))]

    def k(square: float) -> float:
        return sum(math.exp(-square / (2 * sigma * np.mean(used))) for sigma in FIVE)

    h = [k(a) + k(b) - k(c) - k(d) for a, b, c, d in np.array(used).reshape(3, 4)]
    assert float(mmd([(s, t)], "linear")) == pytest.approx(np.mean(h), rel=1e-10)


def test_mmds_estimators_agree_on_what_they_estimate() -> None:
    found: dict[Any, list[float]] = {"unbiased": [], "linear": [], "biased": []}
    for seed in range(60):
        s, t = draws((24, 2), (16, 2), seed=seed)
        for name, values in found.items():
            values.append(float(mmd([(s, t)], name)))
    error = {name: np.std(values) / math.sqrt(60) for name, values in found.items()}
    assert abs(np.mean(found["unbiased"])) < 3 * error["unbiased"], "zero between samples of one distribution"
    assert abs(np.mean(found["linear"])) < 3 * error["linear"]
    assert np.min(found["biased"]) > 0 and error["linear"] > 2 * error["unbiased"]
    s, t = draws((24, 2), (16, 2))
    assert float(mmd([(s, t + 1)])) > 5 * np.std(found["unbiased"])


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "linear"])
def test_mmds_gradient_holds_the_bandwidth_fixed(estimator: Any) -> None:
    s, t = (x.requires_grad_() for x in draws((6, 3), (6, 3)))
    found = torch.autograd.grad(mmd([(s, t)], estimator), (s, t))
    step, wanted = 1e-5, []
    for x in (s, t):
        slope = torch.zeros_like(x)
        for i in range(x.numel()):
            values = []
            for sign in (step, -step):
                shift = torch.zeros(x.numel(), dtype=x.dtype)
                shift[i] = sign
                moved = x.detach() + shift.view_as(x)
                pair = (moved, t.detach()) if x is s else (s.detach(), moved)
                values.append(float(fixed_mmd(*pair, s.detach(), t.detach(), estimator)))
            slope.view(-1)[i] = (values[0] - values[1]) / (2 * step)
        wanted.append(slope)
    torch.testing.assert_close(found, tuple(wanted), rtol=1e-5, atol=1e-8)


def fixed_mmd(s: Tensor, t: Tensor, s0: Tensor, t0: Tensor, estimator: str) -> Tensor:
    """MMD² with the bandwidths of other samples, which `s` and `t` are near."""

    def squares(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, None] - b).square().sum(2)

    if estimator == "linear":
        h = 3
        terms = [(s, s, h), (t, t, h), (s, t, h)]
        mean = torch.stack(
            [
                (s0[:h] - s0[h:]).square().sum(1),
                (t0[:h] - t0[h:]).square().sum(1),
                (s0[:h] - t0[h:]).square().sum(1),
                (s0[h:] - t0[:h]).square().sum(1),
            ]
        ).mean()
        k = [sum(torch.exp(-squares(a, b) / (2 * x * mean)) for x in FIVE) for a, b, _ in terms]
        return (
            k[0][:h, h:].diagonal() + k[1][:h, h:].diagonal() - k[2][:h, h:].diagonal() - k[2][h:, :h].diagonal()
        ).mean()
    z0, z = torch.cat([s0, t0]), torch.cat([s, t])
    mean = squares(z0, z0).sum() / (len(z) * (len(z) - 1))
    k = sum(torch.exp(-squares(z, z) / (2 * x * mean)) for x in FIVE)
    n = len(s)
    if estimator == "biased":
        w = torch.cat([torch.ones(n) / n, -torch.ones(len(t)) / len(t)]).double()
        return w @ k @ w
    off = ~torch.eye(n, dtype=torch.bool)
    return k[:n, :n][off].mean() + k[n:, n:][off].mean() - 2 * k[:n, n:].mean()


def test_mmd_depends_on_neither_scale_nor_place() -> None:
    s, t = draws((12, 3), (9, 3), dtype=torch.float32)
    here = mmd([(s, t)])
    torch.testing.assert_close(mmd([(1e-3 * s, 1e-3 * t)]), here, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mmd([(s + 1000, t + 1000)]), here, rtol=1e-2, atol=1e-3)


def test_mmd_of_samples_that_are_all_equal_is_zero() -> None:
    x = torch.ones(4, 3, requires_grad=True)
    for estimator in ("unbiased", "biased", "linear"):
        value = mmd([(x, torch.ones(5, 3))], estimator)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(value, x)
        assert float(value.detach()) == pytest.approx(0, abs=1e-6) and bool(gradient.isfinite().all())


def test_class_mmd_is_a_distance_of_weighted_means_in_the_kernels_space() -> None:
    s, t, a, b = draws((8, 2), (6, 2), (8, 3), (6, 3))
    w, v = a.exp(), b.exp()
    found = class_mmd(s, t, w, v)
    k = kernel(torch.cat([s, t]).numpy(), FIVE)
    for c in range(3):
        for d in range(3):
            weights = torch.cat([w[:, c] / w[:, c].sum(), -v[:, d] / v[:, d].sum()]).numpy()
            assert float(found[c, d]) == pytest.approx(weights @ k @ weights, rel=1e-9)
    ones = torch.ones(8, 1), torch.ones(6, 1)
    assert float(class_mmd(s, t, *ones)) == pytest.approx(float(mmd([(s, t)], "biased")), rel=1e-9), "one class: MMD"


def test_kernels_are_computed_in_full_precision_under_autocast() -> None:
    s, t = draws((32, 16), (32, 16), dtype=torch.float32)
    weights = torch.rand(32, 3)
    exact = mmd([(s, t)]), class_mmd(s, t, weights, weights), central_moment_discrepancy(s, t, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mmd([(s, t)]), class_mmd(s, t, weights, weights), central_moment_discrepancy(s, t, 5)
        half = mmd([(s.bfloat16(), t.half())])
    torch.testing.assert_close(found, exact)
    assert half.dtype == torch.float32


# --- DAN, JAN, CMD, DSAN --------------------------------------------------------------------------


def outputs(method: NetworkMethod, batch: Batch) -> tuple[Any, Any]:
    assert batch.source is not None
    return method.network(batch.source.x), method.network(batch.target)


@pytest.mark.parametrize("layer", ["features", "logits", "both"])
def test_dan_adds_the_mmd_of_its_layers(layer: Any) -> None:
    method, batch = DAN(context(), weight=2.5, layer=layer), batch_of()
    source, target = outputs(method, batch)
    names = ["features", "logits"] if layer == "both" else [layer]
    wanted = sum(
        u_statistic(kernel(torch.cat([getattr(source, n), getattr(target, n)]).detach().numpy(), FIVE), 12)
        for n in names
    )
    losses = method.losses(batch, START)
    assert list(losses.terms) == ["supervised", "mmd"]
    assert float(losses.terms["mmd"].detach()) == pytest.approx(2.5 * wanted, abs=1e-5)
    assert float(losses.diagnostics["mmd_distance"]) == pytest.approx(wanted, abs=1e-5)
    assert batch.source is not None
    torch.testing.assert_close(losses.terms["supervised"], F.cross_entropy(source.logits, batch.source.y))


def test_jan_multiplies_the_kernels_of_features_and_probabilities() -> None:
    method, batch = JAN(context(classes=3), weight=2.0, gamma=4.0), batch_of(classes=3)
    source, target = outputs(method, batch)
    features = torch.cat([source.features, target.features]).detach().numpy()
    probs = torch.cat([source.logits, target.logits]).detach().softmax(1).numpy()
    wanted = u_statistic(kernel(features, FIVE) * kernel(probs, [0.5]), 12)  # exp(-d² / mean)
    losses = method.losses(batch, MIDDLE)
    assert float(losses.terms["joint_mmd"].detach()) == pytest.approx(2.0 * ramp(0.5, 4.0) * wanted, abs=1e-5)
    assert float(losses.diagnostics["joint_mmd_distance"]) == pytest.approx(wanted, abs=1e-5)
    assert float(method.losses(batch, START).terms["joint_mmd"].detach()) == 0


def test_the_joint_mmd_sees_what_the_marginals_do_not() -> None:
    x = draws((200, 1))[0]
    y = torch.sign(x)
    same, turned = (x, x), (y, -y)
    assert float(mmd([same], "biased")) == pytest.approx(0, abs=1e-9)
    assert float(mmd([turned], "biased")) < 0.05
    assert float(mmd([same, turned], "biased")) > 1


def test_cmd_is_a_sum_of_distances_of_central_moments() -> None:
    s, t = draws((9, 4), (7, 4))
    a, b = s.sigmoid().numpy(), (2 * t + 1).sigmoid().numpy()
    wanted = np.linalg.norm(a.mean(0) - b.mean(0))
    wanted += sum(np.linalg.norm(moment(a, k, axis=0) - moment(b, k, axis=0)) for k in range(2, 6))
    assert float(central_moment_discrepancy(s, 2 * t + 1, 5)) == pytest.approx(wanted, rel=1e-10)
    a, b = np.tanh(s.numpy() / 2), np.tanh((2 * t + 1).numpy() / 2)  # in [-1, 1]
    other = np.linalg.norm(a.mean(0) - b.mean(0)) / 2
    other += sum(np.linalg.norm(moment(a, k, axis=0) - moment(b, k, axis=0)) / 2**k for k in range(2, 6))
    assert other == pytest.approx(wanted, rel=1e-10), "the docstring's other interval"
    x, y = (z.requires_grad_() for z in draws((5, 2), (4, 2)))
    assert torch.autograd.gradcheck(lambda p, q: central_moment_discrepancy(p, q, 4), (x, y))
    (gradient,) = torch.autograd.grad(central_moment_discrepancy(x, x, 3), x)
    assert bool(gradient.isfinite().all()), "at equal moments the norm has no slope"
    method, batch = CMD(context(), weight=2.5, moments=3), batch_of()
    source, target = outputs(method, batch)
    distance = central_moment_discrepancy(source.features, target.features, 3)
    torch.testing.assert_close(method.losses(batch, START).terms["cmd"], 2.5 * distance)


def test_dsan_compares_class_by_class_by_labels_and_predictions() -> None:
    torch.manual_seed(1)
    method, batch = (
        DSAN(context(classes=5), weight=2.0, gamma=4.0),
        batch_of(classes=3),
    )  # the source lacks classes 3 and 4
    with torch.no_grad():
        method.network.head.bias[0] = -100  # and no target sample is predicted to be of class 0
    source, target = outputs(method, batch)
    assert batch.source is not None
    k = kernel(torch.cat([source.features, target.features]).detach().numpy(), FIVE)
    probs, y = target.logits.detach().softmax(1).double().numpy(), batch.source.y.numpy()
    present = [c for c in range(5) if c in y and c in probs.argmax(1)]
    assert 1 <= len(present) < 3
    distances = []
    for c in present:
        weights = np.concatenate([(y == c) / (y == c).sum(), -probs[:, c] / probs[:, c].sum()])
        distances.append(weights @ k @ weights)
    losses = method.losses(batch, MIDDLE)
    assert float(losses.diagnostics["local_mmd_distance"]) == pytest.approx(np.mean(distances), rel=1e-4)
    term = losses.terms["local_mmd"]
    assert float(term.detach()) == pytest.approx(2.0 * ramp(0.5, 4.0) * np.mean(distances), rel=1e-4)
    assert torch.autograd.grad(term, method.network.head.weight, allow_unused=True, retain_graph=True) == (None,)
    assert float(gradients(term, list(method.network.backbone.parameters()))[0].abs().max()) > 0


# --- DeepJDOT -------------------------------------------------------------------------------------


def jdot_costs(method: NetworkMethod, batch: Batch) -> tuple[Tensor, Tensor]:
    source, target = outputs(method, batch)
    assert batch.source is not None
    features = torch.cdist(source.features, target.features).square()
    labels = torch.stack(
        [F.cross_entropy(target.logits, y.expand(len(target.logits)), reduction="none") for y in batch.source.y]
    )
    return features, labels


@pytest.mark.parametrize("solver", ["exact", "sinkhorn"])
def test_deepjdot_pays_what_the_plan_of_its_costs_pays(solver: Any) -> None:
    method = DeepJDOT(context(classes=3), alpha=0.3, label_weight=0.7, solver=solver, reg=0.2, iterations=400)
    batch = batch_of(classes=3)
    batch = replace(batch, target=batch.target[:9])
    features, labels = jdot_costs(method, batch)
    cost = (0.3 * features + 0.7 * labels).detach()
    values = cost.double().numpy()
    uniform = np.ones(12) / 12, np.ones(9) / 9
    plan = (
        ot.emd(*uniform, values)
        if solver == "exact"
        else ot.sinkhorn(*uniform, values, 0.2 * values.mean(), stopThr=1e-12)
    )
    plan = torch.from_numpy(plan).float()
    torch.testing.assert_close(method.plan(cost), plan, rtol=1e-3, atol=1e-5)
    terms = method.losses(batch, START).terms
    assert list(terms) == ["supervised", "transport", "label_transport"]
    wanted = {"transport": 0.3 * (plan * features).sum(), "label_transport": 0.7 * (plan * labels).sum()}
    parameters = list(method.network.parameters())
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-3, atol=1e-5)
    for found, expected in zip(
        gradients(terms["transport"] + terms["label_transport"], parameters),
        gradients(sum(wanted.values()), parameters),  # type: ignore[arg-type]
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)  # the plan is held


def test_the_sinkhorn_plan_nears_the_exact_one_and_stands_costs_far_apart() -> None:
    cost = torch.rand(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = float(ot.emd2(np.ones(8) / 8, np.ones(6) / 6, cost.numpy()))
    paid = [float((sinkhorn_plan(cost, reg, 3000) * cost).sum()) for reg in (1.0, 0.1, 0.01)]
    assert paid[0] > paid[1] > paid[2] and paid[2] == pytest.approx(exact, rel=1e-2)
    wide = torch.cat([cost[:4], cost[4:] + 1e4]).float()
    plan = sinkhorn_plan(wide, 0.01, 50)
    assert bool(plan.isfinite().all()) and float(plan.sum()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 1 / 6))
    assert bool(sinkhorn_plan(torch.zeros(3, 2), 0.05, 5).isfinite().all())


def test_deepjdots_settings_are_checked() -> None:
    for wrong in ({"reg": 0.0}, {"iterations": 0}):
        with pytest.raises(ValueError, match=r"method\.reg must be positive"):
            DeepJDOT(context(), **wrong)
    with pytest.raises(ValueError, match=r"method\.moments"):
        CMD(context(), moments=0)
    with pytest.raises(ValueError, match=r"method\.temperature"):
        MCC(context(), temperature=0.0)
    with pytest.raises(ValueError, match=r"method\.every"):
        CAN(context(), every=0)


# --- output space ---------------------------------------------------------------------------------


def test_mcc_is_the_confusion_of_certain_samples() -> None:
    logits = draws((9, 4))[0] * 3
    probs = (logits / 2.5).softmax(1).numpy()
    certainty = 1 + np.exp((probs * np.log(probs)).sum(1))
    weights = 9 * certainty / certainty.sum()
    confusion = np.zeros((4, 4))
    for i in range(9):
        confusion += weights[i] * np.outer(probs[i], probs[i])
    confusion /= confusion.sum(1, keepdims=True)
    wanted = confusion[~np.eye(4, dtype=bool)].sum() / 4
    assert float(class_confusion(logits, 2.5)) == pytest.approx(wanted, rel=1e-10)
    assert float(class_confusion(torch.zeros(6, 3), 2.5)) == pytest.approx(2 / 3)
    assert float(class_confusion(200 * torch.eye(3), 2.5)) == pytest.approx(0, abs=1e-6)
    method, batch = MCC(context(), weight=1.5, temperature=2.0), batch_of()
    term = method.losses(batch, START).terms["confusion"]
    torch.testing.assert_close(term, 1.5 * class_confusion(outputs(method, batch)[1].logits, 2.0))


def test_mccs_weights_are_held_fixed() -> None:
    logits = draws((7, 3))[0].requires_grad_()
    (found,) = torch.autograd.grad(class_confusion(logits, 1.0), logits)
    certainty = 1 + torch.exp(-entropies(logits)).detach()

    def fixed(z: Tensor) -> Tensor:
        p = z.softmax(1)
        c = torch.einsum("i,ic,id->cd", certainty, p, p)
        return 1 - (c.diagonal() / c.sum(1)).mean()

    torch.testing.assert_close(found, torch.autograd.grad(fixed(logits), logits)[0])


def test_bnm_is_the_sum_of_singular_values() -> None:
    logits = draws((10, 4))[0].requires_grad_()
    probs = logits.detach().softmax(1).numpy()
    u, values, v = np.linalg.svd(probs, full_matrices=False)
    assert float(nuclear_norm(logits.detach())) == pytest.approx(values.sum() / 10, rel=1e-10)
    assert torch.autograd.gradcheck(nuclear_norm, (logits,))
    (found,) = torch.autograd.grad(nuclear_norm(logits), logits)
    slope = (u @ v) / 10  # of the norm, in the probabilities
    wanted = probs * (slope - (probs * slope).sum(1, keepdims=True))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-8, atol=1e-12)
    assert float(nuclear_norm(200 * torch.eye(3).repeat(4, 1))) == pytest.approx(math.sqrt(3 / 12)), "the largest"
    method, batch = BNM(context(), weight=1.5), batch_of()
    terms = method.losses(batch, START).terms
    torch.testing.assert_close(terms["nuclear"], -1.5 * nuclear_norm(outputs(method, batch)[1].logits))


def test_bnm_of_equal_rows_has_a_finite_gradient() -> None:
    logits = torch.ones(6, 3, requires_grad=True)
    nuclear_norm(logits).backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_the_stepwise_norm_loss_pushes_every_norm_by_one_force() -> None:
    method = AFN(context(), weight=0.3, step=1.5)
    x = draws((6, 4))[0].requires_grad_()
    norm = x.norm(dim=1)
    penalty = method.penalty(norm)
    assert float(penalty.detach()) == pytest.approx(1.5**2)
    (found,) = torch.autograd.grad(penalty, x)
    torch.testing.assert_close(found, -2 * 1.5 * x.detach() / norm.detach()[:, None] / 6)
    batch = batch_of()
    losses = method.losses(replace(batch, target=batch.target[:5]), START)
    assert float(losses.terms["norm"].detach()) == pytest.approx(0.3 * 2 * 1.5**2), "each domain its own mean"
    source, _ = outputs(method, batch)
    torch.testing.assert_close(losses.diagnostics["source_norm"], source.features.norm(dim=1).mean().detach())


def test_the_hard_norm_loss_draws_mean_norms_to_the_radius() -> None:
    method, batch = AFN(context(), variant="hard", weight=0.3, radius=7.0), batch_of()
    source, target = outputs(method, batch)
    wanted = sum((o.features.norm(dim=1).mean() - 7) ** 2 for o in (source, target))
    torch.testing.assert_close(method.losses(batch, START).terms["norm"], 0.3 * wanted)


def test_entropy_minimisation_is_its_formula() -> None:
    batch = batch_of(classes=3)
    method = EntropyMin(context(classes=3), weight=0.4, diversity=0.5, gamma=4.0)
    probs = outputs(method, batch)[1].logits.detach().softmax(1).double().numpy()
    entropy, marginal = -(probs * np.log(probs)).sum(1).mean(), -(probs.mean(0) * np.log(probs.mean(0))).sum()
    terms = method.losses(batch, MIDDLE).terms
    weight = 0.4 * ramp(0.5, 4.0)
    assert float(terms["entropy"].detach()) == pytest.approx(weight * entropy, rel=1e-5)
    assert float(terms["diversity"].detach()) == pytest.approx(-weight * 0.5 * marginal, rel=1e-5)
    constant = EntropyMin(context(classes=3), weight=0.4, gamma=None)
    losses = constant.losses(batch, START)
    assert list(losses.terms) == ["supervised", "entropy"]
    torch.testing.assert_close(losses.terms["entropy"].detach(), 0.4 * losses.diagnostics["target_entropy"])


def test_the_marginal_entropy_has_a_slope_where_a_class_underflows() -> None:
    logits = torch.tensor([[200.0, 0.0, -1.0], [300.0, 1.0, 2.0]], requires_grad=True)
    value = marginal_entropy(logits)
    value.backward()
    assert (
        logits.grad is not None
        and bool(logits.grad.isfinite().all())
        and float(value.detach()) == pytest.approx(0, abs=1e-6)
    )
    x = draws((8, 3))[0]
    mean = x.softmax(1).mean(0)
    torch.testing.assert_close(marginal_entropy(x), -(mean * mean.log()).sum())


# --- CAN ------------------------------------------------------------------------------------------


def test_the_contrastive_discrepancy_parts_same_classes_from_others() -> None:
    d = draws((4, 4))[0]
    source, target = torch.eye(4)[[0, 0, 1, 3]], torch.eye(4)[[0, 1, 2, 3, 3]]  # both have 0, 1 and 3
    shared = [0, 1, 3]
    intra = np.mean([float(d[c, c]) for c in shared])
    inter = np.mean([float(d[c, e]) for c in shared for e in shared if c != e])
    assert float(contrastive_discrepancy(d, source, target)) == pytest.approx(intra - inter, rel=1e-9)
    assert float(contrastive_discrepancy(d, source[:1], target[:1])) == pytest.approx(float(d[0, 0])), (
        "one shared class"
    )
    assert float(contrastive_discrepancy(d, source[:1], target[2:3])) == 0, "no shared class"


def test_spherical_k_means_finds_directions_from_given_centres() -> None:
    directions = F.normalize(draws((3, 5), seed=3)[0])
    lengths = torch.rand(90, 1, generator=torch.Generator().manual_seed(0)).double() + 0.5
    x = lengths * (directions.repeat(30, 1) + 0.05 * draws((90, 5))[0])
    start = F.normalize(directions + 0.3 * draws((3, 5), seed=5)[0])
    found = spherical_k_means(x, start)
    unit = F.normalize(x)
    wanted = (
        KMeans(3, init=start.numpy(), n_init=1).fit(unit.numpy()).cluster_centers_
    )  # clusters this clear are the same
    torch.testing.assert_close(found, F.normalize(torch.from_numpy(wanted)), rtol=1e-6, atol=1e-8)
    with_absent = spherical_k_means(x, torch.cat([start, torch.zeros(1, 5, dtype=torch.float64)]))
    torch.testing.assert_close(with_absent[:3], found)
    assert float(with_absent[3].abs().max()) == 0, "a class that the source lacks takes no sample"


def can_task() -> FeatureTask:
    """Source classes 0 to 2 of four along axes; the target turned a little, with few samples of class 2."""
    eye = torch.eye(8, dtype=torch.float64)
    noise = 0.02 * draws((60, 8))[0]
    ys = torch.arange(30) % 3
    yt = torch.tensor([0] * 14 + [1] * 14 + [2] * 2)
    return FeatureTask(Features(3 * eye[ys] + noise[:30], ys), Features(eye[yt] + 0.2 * eye[7] + noise[30:]), None)


def test_can_labels_target_samples_by_near_centres_of_classes_that_have_some() -> None:
    method = CAN(context(classes=4), distance=0.05, samples=3)
    (phase,) = method.phases()
    assert (
        phase.refresh is not None and tuple(phase.refresh.parts) == ("source", "target") and phase.refresh.every is None
    )
    phase.refresh.fit(can_task())
    assert method.kept.tolist() == [1, 1, 0, 0], "too few of class 2, none of class 3"
    eye = torch.eye(8)
    cosine = F.cosine_similarity(method.centres[:2], eye[:2] + 0.2 * eye[7])
    assert float(cosine.min()) > 0.999
    far = torch.stack([eye[0] + 0.2 * eye[7], 5 * eye[1], eye[6], eye[0] + eye[6]])
    assert method.assign(far).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    other = CAN(context(classes=4))
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.centres, method.centres) and torch.equal(other.kept, method.kept)


def test_can_adds_the_discrepancy_of_features_and_probabilities() -> None:
    torch.manual_seed(0)
    method, batch = CAN(context(classes=3), weight=2.0, gamma=4.0, distance=1.0), batch_of(classes=3)
    source, target = outputs(method, batch)
    method.centres.copy_(F.normalize(target.features[:3].detach()))
    method.kept.fill_(1)
    assert batch.source is not None
    labels = F.one_hot(batch.source.y, 3)
    cosines = F.cosine_similarity(target.features.detach()[:, None], method.centres, dim=2)
    assigned = F.one_hot(cosines.argmax(1), 3)
    assert len(cosines.argmax(1).unique()) > 1
    wanted = 0.0
    for s, t in ((source.features, target.features), (source.logits.softmax(1), target.logits.softmax(1))):
        k = kernel(torch.cat([s, t]).detach().numpy(), FIVE)
        shared = [c for c in range(3) if labels[:, c].any() and assigned[:, c].any()]
        d = {}
        for c in shared:
            for e in shared:
                w = np.concatenate([labels[:, c] / labels[:, c].sum(), -assigned[:, e] / assigned[:, e].sum()])
                d[c, e] = w @ k @ w
        wanted += np.mean([d[c, c] for c in shared]) - np.mean([v for (c, e), v in d.items() if c != e])
    losses = method.losses(batch, MIDDLE)
    assert float(losses.terms["contrastive"].detach()) == pytest.approx(2.0 * ramp(0.5, 4.0) * wanted, rel=1e-3)
    assert float(losses.diagnostics["target_share"]) == 1
    method.kept.zero_()
    nothing = method.losses(batch, MIDDLE)
    assert float(nothing.terms["contrastive"].detach()) == 0 == float(nothing.diagnostics["target_share"])


# --- all of them ----------------------------------------------------------------------------------

BUILD: dict[str, Build] = {
    "dan": lambda c: DAN(c, layer="both"),
    "dan_linear": lambda c: DAN(c, estimator="linear"),
    "dan_biased": lambda c: DAN(c, estimator="biased"),
    "jan": JAN,
    "cmd": CMD,
    "dsan": DSAN,
    "deepjdot": DeepJDOT,
    "deepjdot_exact": lambda c: DeepJDOT(c, solver="exact"),
    "mcc": MCC,
    "bnm": BNM,
    "afn": AFN,
    "afn_hard": lambda c: AFN(c, variant="hard"),
    "entropy_min": lambda c: EntropyMin(c, diversity=1.0),
    "can": lambda c: CAN(c, distance=1.0),
}


def ready(name: str, batch: Batch) -> NetworkMethod:
    """The method on four classes, as it is after its first look at the data."""
    torch.manual_seed(0)
    method = BUILD[name](context(classes=4))
    if isinstance(method, CAN):
        source, target = outputs(method, batch)
        assert batch.source is not None
        method.cluster(
            FeatureTask(
                Features(source.features.detach().double(), batch.source.y),
                Features(target.features.detach().double()),
                None,
            )
        )
    return method


@pytest.mark.parametrize("sizes", [(11, 6), (2, 9), (7, 2)])
@pytest.mark.parametrize("name", BUILD)
def test_losses_and_gradients_are_finite_without_a_class_and_for_any_sizes(name: str, sizes: tuple[int, int]) -> None:
    batch = batch_of(classes=2)
    assert batch.source is not None
    n, m = sizes
    method = ready(name, batch)
    batch = Batch(Labelled(batch.source.x[:n], batch.source.y[:n]), batch.target[:m], None)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            terms = method.losses(batch, MIDDLE).terms
        total = torch.stack([t.float() for t in terms.values()]).sum()
        assert len(terms) > 1 and all(bool(t.isfinite()) and t.ndim == 0 for t in terms.values())
        assert all(bool(g.isfinite().all()) for g in gradients(total, list(method.network.parameters())))


@pytest.mark.parametrize("name", BUILD)
def test_one_update_moves_the_network_alone(name: str) -> None:
    method = BUILD[name](context())
    (phase,) = method.phases()
    assert isinstance(phase, Gradient) and phase.on_start is None and phase.after_step is None
    (update,) = phase.updates
    (moves,) = update.moves
    assert set(moves.parameters) == set(method.network.parameters()) == set(method.parameters()) and moves.lr_scale == 1
    losses = method.losses(batch_of(), MIDDLE)
    assert not any(value.requires_grad for value in losses.diagnostics.values())


@pytest.mark.parametrize("name", sorted(BUILD.keys() - {"deepjdot_exact"}))
def test_nothing_in_a_loss_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values, asking for one is an error."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # that device has none
    method, batch = BUILD[name](context()).to("meta"), batch_of()
    assert batch.source is not None
    source = Labelled(batch.source.x.to("meta"), batch.source.y.to("meta"))
    losses = method.losses(Batch(source, batch.target.to("meta"), None), MIDDLE)
    assert all(value.device.type == "meta" for value in losses.terms.values())


# --- transfer beats its absence -------------------------------------------------------------------


def tell(seed: int, n: int = 40) -> Toy:
    """One coordinate tells the class in both domains; another does in the source, and in the target it says the same of all."""
    draw = torch.Generator().manual_seed(seed)

    def sample(source: bool) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        sign = (2 * y - 1).float()
        lasting = sign + 0.4 * torch.randn(n, generator=draw)
        other = (sign if source else 2.0) + 0.2 * torch.randn(n, generator=draw)
        return torch.stack([lasting, other], 1), y

    return *sample(True), *sample(False)


def drift(seed: int, n: int = 60, by: float = 1.2) -> Toy:
    """Two clusters, and in the target both further on: the gap between them is where the source's second cluster begins."""
    draw = torch.Generator().manual_seed(seed)

    def sample(shift: float) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        x = 0.25 * torch.randn(n, 2, generator=draw)
        x[:, 0] += (2 * y - 1) + shift
        return x, y

    return *sample(0.0), *sample(by)


def small_drift(seed: int) -> Toy:
    return drift(seed, by=0.9)


def faded(seed: int, n: int = 60) -> Toy:
    """A strong coordinate tells the class in the source, and in the target is weak noise; a second tells it in both."""
    draw = torch.Generator().manual_seed(seed)

    def sample(source: bool) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        sign = (2 * y - 1).float()
        noise = torch.randn(n, generator=draw)
        strong = 2 * sign + 0.3 * noise if source else 0.5 * noise
        return torch.stack([strong, 1.3 * sign + 0.1 * torch.randn(n, generator=draw)], 1), y

    return *sample(True), *sample(False)


def accuracies(
    build: Build, toy: Callable[[int], Toy], seeds: int = 2, steps: int = 200, lr: float = 0.02
) -> list[float]:
    """On the target, after training on one batch, with a look at the whole before every 20th step if the phase asks for it."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        method = build(context(MLP(InputSpec("vector", (2,)), hidden=(15,)), has_target_labels=False))
        xs, ys, xt, yt = toy(seed)
        (phase,) = method.phases()
        assert isinstance(phase, Gradient)
        optimizer = torch.optim.SGD(method.network.parameters(), lr, momentum=0.9, nesterov=True)
        for step in range(steps):
            if phase.refresh is not None and step % 20 == 0:
                with torch.no_grad():
                    features = [method.features(x).double() for x in (xs, xt)]
                phase.refresh.fit(FeatureTask(Features(features[0], ys), Features(features[1]), None))
            losses = phase.updates[0].objective(Batch(Labelled(xs, ys), xt, None), Progress(step, steps))
            optimizer.zero_grad()
            torch.stack(list(losses.terms.values())).sum().backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float((method.predict(xt).labels == yt).float().mean()))
    return found


@pytest.mark.parametrize(
    "build",
    [
        lambda c, w: DAN(c, weight=w),
        lambda c, w: DAN(c, weight=w, estimator="linear"),
        lambda c, w: JAN(c, weight=w),
        lambda c, w: CMD(c, weight=w),
        lambda c, w: DSAN(c, weight=w),
        lambda c, w: DeepJDOT(c, alpha=0.01 * w, label_weight=0.1 * w, iterations=10),
    ],
    ids=["dan", "dan_linear", "jan", "cmd", "dsan", "deepjdot"],
)
def test_discrepancies_leave_the_coordinate_that_changed(build: Callable[[Context, float], NetworkMethod]) -> None:
    assert min(accuracies(lambda c: build(c, 1.0), tell)) > 0.9
    assert max(accuracies(lambda c: build(c, 0.0), tell)) < 0.6, "without its term it is the baseline"
    assert max(accuracies(lambda c: build(c, -1.0), tell)) < 0.6, "and with the sign turned it is no better"


@pytest.mark.parametrize(
    ("build", "weight", "toy", "steps"),
    [
        (lambda c, w: MCC(c, weight=w), 1.0, drift, 200),
        (lambda c, w: BNM(c, weight=w), 3.0, drift, 400),
        (lambda c, w: EntropyMin(c, weight=w, diversity=1.0), 0.3, drift, 200),
        (lambda c, w: EntropyMin(c, weight=w), 0.3, small_drift, 200),
        (lambda c, w: CAN(c, weight=w, distance=0.5), 3.0, drift, 200),
        (lambda c, w: DeepJDOT(c, alpha=0.1 * w, label_weight=w, iterations=10), 0.3, drift, 200),
    ],
    ids=["mcc", "bnm", "diverse_entropy_min", "entropy_min", "can", "deepjdot"],
)
def test_boundaries_move_to_where_the_target_has_few_samples(
    build: Callable[[Context, float], NetworkMethod], weight: float, toy: Callable[[int], Toy], steps: int
) -> None:
    with_term, without, turned = (
        np.mean(accuracies(lambda c, w=w: build(c, w), toy, steps=steps)) for w in (weight, 0.0, -weight)
    )
    assert with_term > without + 0.1 and with_term > 0.85
    assert turned < without + 0.03


@pytest.mark.parametrize("variant", ["stepwise", "hard"])
def test_larger_features_carry_what_both_domains_have(variant: Any) -> None:
    def afn(weight: float) -> Build:
        return lambda c: AFN(c, variant=variant, weight=weight, radius=10.0)

    with_term, without, turned = (accuracies(afn(w), faded, seeds=6, lr=0.05) for w in (0.05, 0.0, -0.05))
    assert min(with_term) > 0.85 > min(without) and np.mean(turned) < 0.7
    assert np.mean(with_term) > 0.96 and np.mean(without) < 0.93
