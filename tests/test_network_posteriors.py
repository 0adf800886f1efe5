"""Distributions over networks: each formula against a dense or sampled one, and what the whole is worth."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_methods import batch_of, context, regression
from torch import Tensor, nn

from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.backbones.vectors import MLP
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Method
from transfer_cli.methods.bayes.bayes_head import normal_draws
from transfer_cli.methods.bayes.ensemble import Ensemble
from transfer_cli.methods.bayes.laplace import LastLayerLaplace, slope, with_one
from transfer_cli.methods.bayes.mc_dropout import MCDropout
from transfer_cli.methods.bayes.source_prior import SourcePrior
from transfer_cli.methods.bayes.swag import SWAG, snapshot
from transfer_cli.methods.bayes.vbll import VBLL
from transfer_cli.methods.bayes.weight_moments import WeightMoments, assign, flat, mahalanobis, woodbury
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.softmax import Precision, Softmax
from transfer_cli.methods.phases import Batch, ClosedForm, Features, FeatureTask, Gradient, Labelled, Progress

VECTOR, IMAGE = InputSpec("vector", (2,)), InputSpec("image", (1, 16, 16))


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mlp(dropout: float = 0.0) -> MLP:
    return MLP(VECTOR, hidden=(6, 5), dropout=dropout)


@torch.enable_grad()
def trained(method: Method, batch: Batch, steps: int = 100, lr: float = 0.02) -> Method:
    """All phases, by plain SGD on one batch."""
    for phase in method.phases():
        if isinstance(phase, ClosedForm):
            method.eval()
            phase.fit(features_of(method, batch, phase.parts))
            continue
        if phase.on_start is not None:
            phase.on_start()
        method.train()
        total = phase.steps or steps
        optimizers = [
            torch.optim.SGD([{"params": m.parameters, "lr": lr * m.lr_scale} for m in u.moves]) if u.moves else None
            for u in phase.updates
        ]
        for step in range(total):
            progress = Progress(step, total)
            for update, optimizer in zip(phase.updates, optimizers, strict=True):
                with torch.set_grad_enabled(optimizer is not None):
                    losses = update.objective(batch, progress)
                if optimizer is not None:
                    method.zero_grad()
                    torch.stack(list(losses.terms.values())).sum().backward()
                    optimizer.step()
            if phase.after_step is not None:
                phase.after_step(progress)
    return method.eval()


def features_of(method: Method, batch: Batch, parts: Any) -> FeatureTask:
    def features(part: Labelled | None, name: str) -> Features | None:
        if part is None or name not in parts:
            return None
        return Features(method.features(part.x).double().detach(), part.y)

    return FeatureTask(features(batch.source, "source"), None, features(batch.target_labelled, "target_labelled"))


def classes_of(n: int = 60, seed: int = 0) -> Batch:
    """Three overlapping classes in the plane; the target's moved a little."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.5]])
    y = torch.arange(n) % 3
    x = [centres[y] + torch.randn(n, 2, generator=draw) + shift for shift in (0.0, 0.3)]
    return Batch(Labelled(x[0], y), None, Labelled(x[1][:12], y[:12]))


# --- mixtures -------------------------------------------------------------------------------------


def test_the_epistemic_part_of_a_mixture() -> None:
    """Mutual information by the joint of class and member; the variance of means."""
    log_probs = draws(5, 4, 3).log_softmax(2)
    found = Prediction.mixture([Prediction(log_probs=lp) for lp in log_probs])
    joint = log_probs.exp() / 5  # (S, B, K)
    independent = joint.sum(0, keepdim=True) * joint.sum(2, keepdim=True)
    torch.testing.assert_close(found.epistemic, (joint * (joint / independent).log()).sum((0, 2)))
    torch.testing.assert_close(found.probs, log_probs.exp().mean(0))
    certain = Prediction.mixture([Prediction(log_probs=torch.tensor([[0.0, -math.inf]]))] * 2)
    assert float(certain.epistemic) == 0.0 and certain.is_finite()
    means, variances = draws(6, 4, 1), draws(6, 4, 1).exp()
    found = Prediction.mixture([Prediction(mean=m, variance=v) for m, v in zip(means, variances, strict=True)])
    second = (variances + means.square()).mean(0)
    torch.testing.assert_close(found.variance, second - means.mean(0).square())
    torch.testing.assert_close(found.epistemic, means.square().mean(0) - means.mean(0).square())


# --- SWAG -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 9])
def test_moments_are_those_of_all_snapshots(n: int) -> None:
    """Deviations are from the mean so far, the last K of them; fewer while there are fewer."""
    weights, moments = 5 + 1e-3 * draws(n, 7), WeightMoments(7, 4).double()
    for i, w in enumerate(weights):
        moments.add(w, i + 1)
    torch.testing.assert_close(moments.mean, weights.mean(0))
    torch.testing.assert_close(moments.variance, weights.var(0, correction=0))
    last = [weights[i] - weights[: i + 1].mean(0) for i in range(max(0, n - 4), n)]
    wanted = torch.stack(last).T @ torch.stack(last) / (2 * (min(n, 4) - 1))
    torch.testing.assert_close(moments.factor().T @ moments.factor(), wanted)


def test_small_spread_about_large_weights_survives_float32() -> None:
    weights, moments = (5 + 1e-4 * draws(50, 300)).float(), WeightMoments(300, 4)
    for i, w in enumerate(weights):
        moments.add(w, i + 1)
    torch.testing.assert_close(moments.variance, weights.double().var(0, correction=0).float(), rtol=1e-2, atol=0)


def test_draws_have_the_covariance_of_swag() -> None:
    moments = WeightMoments(5, 3).double()
    for i, w in enumerate(2 + draws(8, 5) @ draws(5, 5, seed=1)):
        moments.add(w, i + 1)
    torch.manual_seed(0)
    for scale in (1.0, 0.25):
        sample = torch.stack([moments.draw(scale) for _ in range(20_000)])
        wanted = scale * (torch.diag(0.5 * moments.variance) + moments.factor().T @ moments.factor())
        size = float(wanted.diagonal().max())
        torch.testing.assert_close(torch.cov(sample.T), wanted, atol=0.05 * size, rtol=0)
        torch.testing.assert_close(sample.mean(0), moments.mean, atol=0.03 * size**0.5, rtol=0)


def test_snapshots_are_of_the_tail_and_numbered() -> None:
    due = {step: n for step in range(100) if (n := snapshot(Progress(step, 100), 0.75, 10))}
    assert due == {75: 1, 85: 2, 95: 3}


@torch.no_grad()
def test_swag_collects_what_training_went_through_and_draws_around_it() -> None:
    torch.manual_seed(0)
    method, batch = SWAG(context(mlp(), classes=3), start=0.5, every=5, rank=3, draws=4), classes_of()
    seen: list[Tensor] = []
    collect = method.collect

    def spy(progress: Progress) -> None:
        if progress.step >= 50 and progress.step % 5 == 0:
            seen.append(flat(method.weights()).detach().clone())
        collect(progress)

    method.collect = spy  # type: ignore[method-assign]
    x = classes_of(seed=3).source.x
    trained(method, batch)
    assert len(seen) == 10
    torch.testing.assert_close(method.moments.mean, torch.stack(seen).mean(0))
    found = method.predict(x)
    networks = [drawn.module.predict(x) for drawn in method.drawn]
    torch.testing.assert_close(found.probs, torch.stack([p.probs for p in networks]).mean(0))
    assert float(found.epistemic.min()) >= 0 and float(found.epistemic.max()) > 0
    spread = torch.stack([flat(drawn.parameters()) for drawn in method.drawn]).std(0)
    assert float((spread > 0).double().mean()) > 0.7  # but for units that are off
    single = trained(SWAG(context(mlp(), classes=3), scale=0.0, draws=2), batch)
    assert float(single.predict(x).epistemic.max()) < 1e-6


@torch.no_grad()
def test_each_draw_has_batchnorm_statistics_of_its_own_weights() -> None:
    torch.manual_seed(0)
    method = SWAG(context(SmallCNN(IMAGE, widths=(4,), features=5), classes=2), draws=2, every=2, statistics_steps=3)
    x = torch.rand(12, 1, 16, 16)
    y = torch.arange(12) % 2
    trained(method, Batch(Labelled(x, y), None, None), steps=20, lr=0.1)
    for drawn in method.drawn:
        module = copy.deepcopy(drawn.module)
        conv, norm = module.backbone.blocks[0][0], module.backbone.blocks[0][1]
        activations = conv(2 * x - 1)
        torch.testing.assert_close(norm.running_mean, activations.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            norm.running_var, activations.transpose(0, 1).flatten(1).var(1), atol=1e-5, rtol=1e-4
        )
    means = [drawn.module.backbone.blocks[0][1].running_mean for drawn in method.drawn]
    assert not torch.equal(*means)


# --- source_prior ---------------------------------------------------------------------------------


def test_woodbury_is_the_dense_penalty_and_its_gradient() -> None:
    diagonal, factor, away = draws(9).square() + 0.1, draws(3, 9, seed=1), draws(9, seed=2).requires_grad_()
    inverse, half = woodbury(diagonal, factor)
    found = mahalanobis(away, inverse, factor, half)
    dense = torch.linalg.inv(torch.diag(diagonal) + factor.T @ factor)
    torch.testing.assert_close(found, away @ dense @ away)
    (slope,) = torch.autograd.grad(found, away)
    torch.testing.assert_close(slope, 2 * dense @ away)


def test_the_source_s_posterior_is_the_target_s_prior() -> None:
    """The whole penalty, against dense matrices of the paper's Σ, at weights that have moved."""
    torch.manual_seed(0)
    labelled = {"source": 60, "target_labelled": 12}
    method = SourcePrior(
        context(mlp(), classes=3, labelled=labelled), scale=50.0, epsilon=0.2, head_variance=3.0, rank=4, every=3
    )
    batch = classes_of()
    source, finetune = method.phases()
    assert isinstance(source, Gradient) and source.after_step is not None and isinstance(finetune, Gradient)
    for step in range(60):
        assign(method.weights(), flat(method.weights()).detach() + 0.05 * torch.randn(method.moments.mean.shape))
        source.after_step(Progress(step, 60))
    assert finetune.on_start is not None
    finetune.on_start()
    torch.testing.assert_close(flat(method.weights()).detach(), method.moments.mean)
    outputs = method.network(batch.target_labelled.x)
    assert float(method.penalties(batch, outputs)["source_prior"].detach()) == pytest.approx(0.0, abs=1e-6)
    away = 0.3 * torch.randn(method.moments.mean.shape)
    assign(method.weights(), method.moments.mean + away)
    moments, v = method.moments, away.double()
    last = moments.deviations.double()
    sigma = 50.0 * (torch.diag(0.5 * moments.variance.double()) + last.T @ last / (2 * 3)) + 0.2 * torch.eye(len(v))
    found = {name: term.detach() for name, term in method.penalties(batch, outputs).items()}
    assert float(found["source_prior"]) == pytest.approx(float(0.5 * v @ torch.linalg.solve(sigma, v)) / 12, rel=1e-3)
    head = sum(float(p.detach().square().sum()) for p in method.network.head.parameters())
    assert float(found["head_prior"]) == pytest.approx(0.5 * head / 3.0 / 12, rel=1e-5)


def test_the_prior_of_several_targets_counts_once_for_all() -> None:
    """Their loss is a mean over them."""
    changes = {"label_mean": torch.zeros(2), "label_std": torch.ones(2), "target_width": 2}
    method = SourcePrior(regression(mlp(), labelled={"target_labelled": 12}, **changes), head_variance=3.0)
    found = method.penalties(Batch(None, None, None), None)["head_prior"]
    head = sum(float(p.detach().square().sum()) for p in method.network.head.parameters())
    assert float(found.detach()) == pytest.approx(0.5 * head / 3.0 / (12 * 2), rel=1e-5)


def test_a_strong_prior_holds_and_a_weak_one_lets_go() -> None:
    def moved(epsilon: float) -> float:
        torch.manual_seed(0)
        labelled = {"target_labelled": 12}
        method = SourcePrior(
            context(mlp(), classes=3, labelled=labelled), scale=1e-6, epsilon=epsilon, backbone_lr=1.0, rank=2
        )
        trained(method, classes_of(), lr=0.01)
        return float((flat(method.weights()).detach() - method.moments.mean).norm())

    assert moved(1e-2) < 0.25 * moved(1e3)


def test_source_prior_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="source_model"):
        network = SWAG(context(mlp(), classes=3)).network.state_dict()
        SourcePrior(context(mlp(), classes=3, source_model=network))
    for wrong in ({"scale": 0.0}, {"epsilon": 0.0}, {"head_variance": -1.0}, {"rank": 1}, {"every": 0}, {"start": 1.0}):
        with pytest.raises(ValueError, match=r"positive|start is a share"):
            SourcePrior(context(mlp(), classes=3), **wrong)
    with pytest.raises(TransferError, match="set source=NAME"):
        SourcePrior(context(mlp(), classes=3), source_steps=0).phases()


# --- ensemble -------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_ensemble_of_one_network_several_times_is_that_network() -> None:
    method = Ensemble(context(mlp(), classes=3, make_backbone=mlp), members=3).eval()
    x = classes_of().source.x
    assert float(method.predict(x).epistemic.max()) > 1e-4  # they start apart
    for other in method.others:
        other.load_state_dict(method.network.state_dict())
    found, alone = method.predict(x), method.network.predict(x)
    torch.testing.assert_close(found.probs, alone.probs)
    assert float(found.epistemic.max()) < 1e-6
    both = Ensemble(regression(mlp(), make_backbone=mlp), members=3).eval().predict(x)
    assert bool((both.epistemic > 0).all()) and bool((both.variance > both.epistemic).all())


def test_members_train_as_if_each_were_alone() -> None:
    torch.manual_seed(0)
    batch = classes_of()
    method = Ensemble(context(mlp(), classes=3, make_backbone=mlp), members=3)
    single = Ensemble(context(mlp(), classes=3, make_backbone=mlp), members=1)
    single.network.load_state_dict(method.others[1].state_dict())
    start = flat(method.others[0].parameters()).detach().clone()
    trained(method, batch, steps=20)
    trained(single, batch, steps=20)
    torch.testing.assert_close(flat(method.others[1].parameters()), flat(single.network.parameters()))
    assert not torch.equal(flat(method.others[0].parameters()), start)
    with pytest.raises(ValueError, match="starts its members apart"):
        Ensemble(context(mlp(), classes=3))
    with pytest.raises(ValueError, match="source_model"):
        Ensemble(context(mlp(), classes=3, make_backbone=mlp, source_model=single.network.state_dict()))
    with pytest.raises(ValueError, match="at least 1"):
        Ensemble(context(mlp(), classes=3, make_backbone=mlp), members=0)


# --- mc_dropout -----------------------------------------------------------------------------------


@torch.no_grad()
def test_without_dropout_there_is_no_doubt_and_with_it_the_mean_over_masks() -> None:
    """One hidden layer of three units before the head: all eight masks by hand."""
    x = classes_of().source.x[:5]
    torch.manual_seed(0)
    method = MCDropout(context(MLP(VECTOR, hidden=(3,)), classes=2), rate=0.4, draws=4000).eval()
    z = method.network.features(x)
    wanted = torch.zeros(5, 2)
    for code in range(8):
        kept = torch.tensor([(code >> i) & 1 for i in range(3)]).float()
        weight = 0.6 ** float(kept.sum()) * 0.4 ** float(3 - kept.sum())
        wanted += weight * method.network.head(z * kept / 0.6).softmax(1)
    found = method.predict(x)
    torch.testing.assert_close(found.probs, wanted, atol=0.02, rtol=0)
    assert float(found.epistemic.min()) > 1e-4
    assert not any(m.training for m in method.modules()), "put back"
    sure = MCDropout(context(mlp(), classes=3), rate=0.0, draws=5).eval()
    assert float(sure.predict(x).epistemic.max()) < 1e-6
    torch.testing.assert_close(sure.predict(x).probs, sure.network.predict(x).probs)
    mean = MCDropout(regression(mlp()), draws=10).eval().predict(x)
    assert bool((mean.epistemic > 0).all()) and bool((mean.variance > mean.epistemic).all())


@torch.no_grad()
def test_dropout_comes_after_every_stage_or_before_the_head_alone() -> None:
    x = torch.ones(1, 2)
    for layers, inner in (("all", True), ("last", False)):
        torch.manual_seed(0)
        method = MCDropout(context(mlp(), classes=3), layers=layers, rate=0.5).train()  # type: ignore[arg-type]
        distinct = len({tuple(method.network.features(x)[0].tolist()) for _ in range(20)})
        assert (distinct > 1) == inner
        method.eval()
        assert torch.equal(method.features(x), method.features(x))
    own = MCDropout(context(mlp(dropout=0.5), classes=3), rate=0.0).eval()  # the backbone's own stays on
    assert float(own.predict(x).epistemic) > 0
    copied = copy.deepcopy(MCDropout(context(mlp(), classes=3), rate=0.5)).eval()
    copied.dropout.p = 0.0
    assert float(copied.predict(x).epistemic) < 1e-6, "a copy's hooks are its own"
    for wrong in ({"rate": 1.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="rate is a share"):
            MCDropout(context(mlp(), classes=3), **wrong)


# --- laplace --------------------------------------------------------------------------------------


def laplace_of(batch: Batch, **changes: Any) -> LastLayerLaplace:
    torch.manual_seed(0)
    method = LastLayerLaplace(context(mlp(), classes=3), **changes)
    trained(method, batch)
    return method


def test_the_full_covariance_is_the_inverse_hessian_by_automatic_differentiation() -> None:
    batch = classes_of()
    method = laplace_of(batch, covariance="full", lam=0.7)
    x = torch.cat([batch.source.x, batch.target_labelled.x])
    y = torch.cat([batch.source.y, batch.target_labelled.y])
    z = with_one(method.features(x).double().detach())
    head = method.network.head
    w = torch.cat([head.weight, head.bias[:, None]], 1).double().detach()

    def loss(flat_w: Tensor) -> Tensor:
        v = flat_w.view_as(w)
        return F.cross_entropy(z @ v.T, y, reduction="sum") + 0.35 * v.square().sum()

    wanted = torch.linalg.inv(torch.func.hessian(loss)(w.flatten()))
    torch.testing.assert_close(method.posterior.covariance.view_as(wanted), wanted, rtol=1e-6, atol=1e-9)


def test_the_kronecker_form_is_the_dense_matrix_of_its_factors() -> None:
    batch = classes_of()
    method = laplace_of(batch, lam=0.7, temperature=1.0)
    z = with_one(draws(4, 5, seed=9))
    w = method.posterior.mean
    train = with_one(method.features(torch.cat([batch.source.x, batch.target_labelled.x])).double().detach())
    probs = (train @ w.T).softmax(1)
    between = sum(torch.diag(p) - torch.outer(p, p) for p in probs) / len(probs)
    dense = torch.linalg.inv(torch.kron(between, train.T @ train) + 0.7 * torch.eye(w.numel(), dtype=torch.float64))
    logits = torch.einsum("bd,kdle,be->bkl", z, dense.view(*w.shape, *w.shape), z)
    centring = torch.eye(3, dtype=torch.float64) - 1 / 3
    root = method.around(train, w, 0.7).spread(z)
    torch.testing.assert_close(root @ root.transpose(1, 2), centring @ logits @ centring)


def test_the_evidence_chooses_as_the_dense_formula_does() -> None:
    batch = classes_of()
    for covariance in ("full", "kronecker"):
        method = laplace_of(batch, covariance=covariance)
        z = with_one(method.features(torch.cat([batch.source.x, batch.target_labelled.x])).double().detach())
        w = method.posterior.mean
        probs = (z @ w.T).softmax(1)
        blocks = torch.stack([torch.diag(p) - torch.outer(p, p) for p in probs])
        if covariance == "full":
            hessian = torch.einsum("nab,nc,nd->acbd", blocks, z, z).reshape(w.numel(), w.numel())
        else:
            hessian = torch.kron(blocks.mean(0), z.T @ z)
        eye = torch.eye(w.numel(), dtype=torch.float64)

        def log_evidence(lam: float, hessian: Tensor = hessian, w: Tensor = w, eye: Tensor = eye) -> float:
            dets = torch.linalg.slogdet(lam * eye).logabsdet - torch.linalg.slogdet(hessian + lam * eye).logabsdet
            return float(0.5 * dets - 0.5 * lam * w.square().sum())

        lam = method.evidence(z, w)
        assert all(log_evidence(lam) >= log_evidence(lam * factor) for factor in (0.8, 1.25))


def test_leaving_samples_out_is_a_newton_step_from_the_trained_head() -> None:
    """Near the optimum under λ it is the head that training without them would find."""
    z, y = with_one(draws(60, 3)), torch.arange(60) % 3
    ones, zero = torch.ones(60, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    problem = Softmax(z, y, ones, zero, Precision(torch.full_like(zero, 2.0)))
    w = problem.minimise()
    for covariance, tolerance in (("full", 0.05), ("kronecker", 0.15)):
        method = LastLayerLaplace(context(mlp(), classes=3), covariance=covariance)  # type: ignore[arg-type]
        part = replace(problem, x=z[6:], y=y[6:], weights=ones[6:])
        without = method.around(part.x, w, 2.0)
        step = without.times(slope(problem, w) - slope(part, w))
        wanted = part.minimise() - w
        assert float((step - wanted).norm()) < tolerance * float(wanted.norm())
        losses = method.held_out(problem, w)
        moved = still = 0.0
        folds = folds_of(y, 5)
        for fold in range(5):
            left, seen = folds == fold, folds != fold
            other = replace(problem, x=z[seen], y=y[seen], weights=ones[seen]).minimise()
            moved += float(F.cross_entropy(z[left] @ other.T, y[left], reduction="sum")) / 60
            still += float(F.cross_entropy(z[left] @ w.T, y[left], reduction="sum")) / 60
        assert abs(losses[min(losses)] - moved) < 0.2 * (moved - still)


@torch.no_grad()
def test_regression_is_bayesian_linear_regression_on_the_features() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 2)
    y = 10 + 4 * (x[:, :1] + 0.3 * torch.randn(40, 1))
    method = LastLayerLaplace(regression(mlp()), lam=0.5)
    trained(method, Batch(Labelled(x, y), None, None))
    z = with_one(method.features(x).double().detach())
    noise = float(method.network.log_noise.detach().exp())
    covariance = torch.linalg.inv(z.T @ z / noise + 0.5 * torch.eye(6, dtype=torch.float64))
    at = with_one(method.features(x[:7] + 3).double().detach())
    found = method.predict(x[:7] + 3)
    wanted = 16 * torch.einsum("bd,de,be->b", at, covariance, at)[:, None]
    torch.testing.assert_close(found.epistemic.double(), wanted, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.variance - found.epistemic, torch.full_like(wanted, 16 * noise), rtol=1e-5, atol=0)
    assert bool(found.epistemic.mean() > method.predict(x).epistemic.mean())  # away from the data


@torch.no_grad()
def test_temperature_is_chosen_and_labels_stay() -> None:
    """At temperature one a head of few labels is too unsure; at zero it is the network."""
    batch, test = classes_of(), classes_of(600, seed=7).source
    cold, warm = (laplace_of(batch, temperature=t) for t in (0.0, 1.0))
    torch.testing.assert_close(
        cold.predict(test.x).probs, cold.network.predict(test.x).probs.double(), atol=1e-5, rtol=0
    )
    chosen = laplace_of(batch)

    def nll(method: LastLayerLaplace) -> float:
        return float(F.nll_loss(method.predict(test.x).log_probs, test.y))

    assert nll(chosen) <= min(nll(cold), nll(warm)) + 0.02
    assert float(warm.predict(test.x).epistemic.mean()) > 0
    same = (warm.predict(test.x).labels == cold.predict(test.x).labels).double().mean()
    assert float(same) > 0.97
    for wrong in ({"lam": 0.0}, {"temperature": -1.0}, {"folds": 1}, {"draws": 1}):
        with pytest.raises(ValueError, match="lam is positive"):
            LastLayerLaplace(context(mlp(), classes=3), **wrong)


# --- vbll -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("covariance", ["diagonal", "dense"])
def test_the_bound_lies_below_the_expected_log_likelihood_and_is_its_formula(covariance: Any) -> None:
    """Against Monte Carlo over q: E log p(y | W φ) is at least the bound, and the KL term is that of the densities."""
    torch.manual_seed(0)
    batch = classes_of()
    method = VBLL(context(mlp(), classes=3, labelled={"source": 60, "target_labelled": 12}), covariance=covariance)
    with torch.no_grad():
        for p in method.parameters():
            p.add_(0.1 * torch.randn(p.shape))
        method.log_scale.sub_(0.5)
    x, y = batch.source.x[:6], batch.source.y[:6]
    features, logits = method.network(x)
    variances = method.variances(features)
    scale = method.scale()
    factors = torch.diag_embed(scale) if covariance == "diagonal" else scale
    one = with_one(features)
    for k in range(3):
        torch.testing.assert_close(variances[:, k], torch.einsum("bd,de,be->b", one, factors[k] @ factors[k].T, one))
    noise = normal_draws(40_000, 3, logits)
    sampled = (logits + variances.sqrt() * noise[:, None]).log_softmax(2)
    expected = sampled.gather(2, y.expand(len(noise), -1)[..., None]).mean()
    bound = -method.bound(logits, variances, y)
    assert float(bound) < float(expected) < float(bound) + 0.5
    jensen = (logits + variances.sqrt() * noise[:, None]).exp().sum(2).mean(0).log()  # log Σ E exp
    torch.testing.assert_close(bound, (logits.gather(1, y[:, None])[:, 0] - jensen).mean(), atol=0.02, rtol=0)
    head = method.network.head
    means = torch.cat([head.weight, head.bias[:, None]], 1)
    q = [torch.distributions.MultivariateNormal(m, scale_tril=f) for m, f in zip(means, factors, strict=True)]
    p = torch.distributions.MultivariateNormal(torch.zeros(6), torch.eye(6))
    divergence = sum(torch.distributions.kl_divergence(one_q, p) for one_q in q)
    torch.testing.assert_close(method.divergence(), divergence)
    found = method.losses(batch, Progress(0, 1)).terms
    torch.testing.assert_close(found["kl"], divergence / 72)


@torch.no_grad()
def test_regression_s_bound_is_the_expectation_itself() -> None:
    """By Gauss-Hermite quadrature over wᵀφ."""
    torch.manual_seed(0)
    method = VBLL(regression(mlp()), prior_variance=2.0)
    x, y = torch.randn(6, 2), 10 + 4 * torch.randn(6, 1)
    features, logits = method.network(x)
    variances = method.variances(features)
    nodes, weights = (torch.tensor(v) for v in __import__("numpy").polynomial.hermite_e.hermegauss(20))
    means = logits.double() + variances.double().sqrt() * nodes[:, None, None]
    target = (y.double() - 10) / 4
    losses = torch.stack([method.network.supervised(m, y) for m in means])
    assert target.shape == (6, 1)
    wanted = (weights / weights.sum() * losses.double()).sum()
    torch.testing.assert_close(method.bound(logits, variances, y).double(), wanted, rtol=1e-5, atol=1e-6)
    found = method.eval().predict(x)
    torch.testing.assert_close(found.epistemic, 16 * variances)


def test_with_several_targets_the_optimum_is_each_one_s_posterior() -> None:
    """S_t = (ΦᵀΦ / σ_t² + I / v)⁻¹ is where the whole objective is flat."""
    torch.manual_seed(0)
    changes = {"label_mean": torch.zeros(2), "label_std": torch.ones(2), "target_width": 2}
    labelled = {"target_labelled": 30}
    method = VBLL(
        regression(mlp(), has_source=False, labelled=labelled, **changes), covariance="dense", prior_variance=2.0
    )
    batch = Batch(None, None, Labelled(torch.randn(30, 2), torch.randn(30, 2)))
    with torch.no_grad():
        method.network.log_noise.copy_(torch.tensor([0.3, -0.7]))
        one = with_one(method.network(batch.target_labelled.x).features)
        noise = method.network.log_noise.exp()[:, None, None]
        root = torch.linalg.cholesky(torch.linalg.inv(one.T @ one / noise + torch.eye(6) / 2.0))
        method.below.copy_(root.tril(-1))
        method.log_scale.copy_(root.diagonal(dim1=1, dim2=2).log())
    terms = method.losses(batch, Progress(0, 1)).terms
    parts = torch.autograd.grad(terms["kl"], (method.below, method.log_scale), retain_graph=True)
    slopes = torch.autograd.grad(sum(terms.values()), (method.below, method.log_scale))
    assert max(float(s.abs().max()) for s in slopes) < 1e-3 * max(float(s.abs().max()) for s in parts)


@torch.no_grad()
def test_a_variational_layer_learns_and_doubts_where_there_were_no_data() -> None:
    torch.manual_seed(0)
    batch, test = classes_of(), classes_of(300, seed=5).source
    labelled = {"source": 60, "target_labelled": 12}
    method = VBLL(context(mlp(), classes=3, labelled=labelled))
    trained(method, batch, steps=600, lr=0.1)
    found = method.predict(test.x)
    assert float((found.labels == test.y).double().mean()) > 0.7
    assert float(found.epistemic.mean()) > 0
    prior = VBLL(context(mlp(), classes=3, labelled={"source": 1})).eval()
    trained(prior, batch, steps=600, lr=0.05)
    assert float(prior.log_scale.exp().mean()) > 1.5 * float(method.log_scale.exp().mean())  # fewer samples, more doubt
    for wrong in ({"prior_variance": 0.0}, {"draws": 1}):
        with pytest.raises(ValueError, match="prior_variance is positive"):
            VBLL(context(mlp(), classes=3), **wrong)


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SWAG, Ensemble, MCDropout, VBLL, LastLayerLaplace])
def test_regression_and_a_target_of_its_own_classes(kind: type[Method]) -> None:
    """Two targets at once; and without a source that fits, the granted labels alone."""
    torch.manual_seed(0)
    changes = {"label_mean": torch.zeros(2), "label_std": torch.ones(2), "target_width": 2, "make_backbone": mlp}
    method = kind(regression(mlp(), **changes))
    x = torch.randn(20, 2)
    trained(method, Batch(Labelled(x, torch.randn(20, 2)), None, Labelled(x[:6], torch.randn(6, 2))), steps=40)
    found = method.predict(x)
    assert found.mean is not None and found.mean.shape == (20, 2) and found.is_finite()
    assert found.epistemic is not None and bool((found.epistemic <= found.variance).all())
    alone = kind(context(mlp(), classes=3, make_backbone=mlp, source_labels_fit_head=False))
    batch = classes_of()
    trained(alone, Batch(None, None, batch.target_labelled), steps=40)
    assert all("source" not in phase.parts for phase in alone.phases())
    assert alone.predict(x).is_finite() and alone.predict_source(x).is_finite()


def test_batches_that_a_source_lacks_are_no_terms() -> None:
    method = SWAG(context(mlp()))
    batch = batch_of()
    whole = method.losses(batch, Progress(0, 1)).terms
    assert set(whole) == {"supervised", "target_supervised"}
    assert set(method.losses(Batch(batch.source, None, None), Progress(0, 1)).terms) == {"supervised"}
    wanted = F.cross_entropy(method.network(batch.target_labelled.x).logits, batch.target_labelled.y)
    torch.testing.assert_close(whole["target_supervised"], wanted)
    assert isinstance(method.drawn, nn.ModuleList)
