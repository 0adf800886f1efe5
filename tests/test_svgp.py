"""Stochastic variational Gaussian processes: against GPyTorch and the exact process, and what training them teaches."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from feature_tasks import context, regression
from torch import Tensor, nn

from transfer_cli.backbones.vectors import MLP
from transfer_cli.data.inputs import InputSpec
from transfer_cli.methods.gaussian_process.svgp import FLOOR, NOISE, SVGP
from transfer_cli.methods.math.sparse import JITTER
from transfer_cli.methods.phases import Batch, ClosedForm, Features, FeatureTask, Gradient, Labelled, Phase, Progress

Sample = tuple[Tensor, Tensor]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def train(
    method: SVGP,
    source: Sample | None = None,
    few: Sample | None = None,
    steps: int = 100,
    size: int = 32,
    lr: float = 0.02,
) -> SVGP:
    """All phases, as the loops would."""
    for phase in method.phases():
        run(phase, method, source, few, steps, size, lr)
    method.requires_grad_(False)
    return method.eval()


def run(
    phase: Phase, method: SVGP, source: Sample | None, few: Sample | None, steps: int, size: int, lr: float
) -> None:
    parts = [
        part if part and name in phase.parts else None for name, part in (("source", source), ("target_labelled", few))
    ]
    if isinstance(phase, ClosedForm):
        method.eval()
        with torch.no_grad():
            found = [part and Features(method.features(part[0]).double(), part[1]) for part in parts]
        phase.fit(FeatureTask(found[0] or None, None, found[1] or None))
        return
    assert isinstance(phase, Gradient)
    method.train()
    draw = torch.Generator().manual_seed(0)
    groups = [[{"params": list(m.parameters), "lr": lr * m.lr_scale} for m in update.moves] for update in phase.updates]
    optimizers = [torch.optim.SGD(group, momentum=0.9) if group else None for group in groups]
    for step in range(steps):
        labelled = []
        for part in parts:
            which = None if part is None else torch.randperm(len(part[0]), generator=draw)[:size]
            labelled.append(None if part is None else Labelled(part[0][which], part[1][which]))
        batch = Batch(labelled[0], None, labelled[1])
        for update, optimizer in zip(phase.updates, optimizers, strict=True):
            if optimizer is None:
                with torch.no_grad():
                    update.objective(batch, Progress(step, steps))
                continue
            losses = update.objective(batch, Progress(step, steps))
            optimizer.zero_grad()
            torch.stack(list(losses.terms.values())).sum().backward()
            optimizer.step()


def randomised(method: SVGP, seed: int = 0) -> SVGP:
    """Some inducing points, hyperparameters and q; features as they are."""
    m, k = len(method.inducing), method.outputs
    root = draws(k, m, m, seed=seed).double() / m**0.5
    method.inducing.data.copy_(draws(*method.inducing.shape, seed=seed + 1))
    method.precision.copy_(torch.eye(m).double() + root @ root.mT)
    method.pull.copy_(draws(k, m, seed=seed + 2))
    method.theta.data.copy_(0.3 * draws(len(method.theta), seed=seed + 3))
    return method


# --- against GPyTorch -----------------------------------------------------------------------------


def peer_of(method: SVGP) -> Any:
    """GPyTorch's own model with the same q, a task at a time in a batch."""
    import gpytorch

    tasks, z = torch.Size([method.outputs]), method.inducing.detach()
    signal, length = (float(value.exp()) for value in method.hyper().detach())

    class Peer(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            distribution = gpytorch.variational.CholeskyVariationalDistribution(len(z), batch_shape=tasks)
            strategy = gpytorch.variational.VariationalStrategy(
                self,
                z,
                distribution,
                learn_inducing_locations=False,
                jitter_val=JITTER * signal,
            )
            super().__init__(strategy)
            self.mean_module = gpytorch.means.ZeroMean(batch_shape=tasks)
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    peer = Peer().double()
    peer.covar_module.outputscale = signal
    peer.covar_module.base_kernel.lengthscale = length
    covariance = torch.linalg.inv(method.precision)
    distribution = peer.variational_strategy._variational_distribution
    distribution.variational_mean.data.copy_((covariance @ method.pull[:, :, None])[:, :, 0])
    distribution.chol_variational_covar.data.copy_(torch.linalg.cholesky(covariance))
    peer.variational_strategy.variational_params_initialized.fill_(1)
    return peer


@pytest.fixture
def gpytorch_quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit|linear_operator|gpytorch")
        yield


@torch.no_grad()
def test_the_process_is_gpytorchs(gpytorch_quiet: None) -> None:
    method = randomised(SVGP(context(3, 4), inducing=6))
    x = draws(9, 3, seed=9)
    _, mean, variance = method.latent(x)
    found = peer_of(method).eval()(x.double())
    torch.testing.assert_close(mean, found.mean.T, atol=1e-6, rtol=0)
    torch.testing.assert_close(variance, found.variance.T, atol=1e-6, rtol=0)


def test_objective_and_its_slopes_are_gpytorchs(gpytorch_quiet: None) -> None:
    """The bound without its KL term, which the hyperparameters do not move."""
    import gpytorch

    method = randomised(SVGP(regression(3), inducing=6))
    method.counts.copy_(torch.tensor([9.0, 0.0]))
    x, y = draws(9, 3, seed=9), draws(9, 1, seed=10)
    loss = method.losses(Batch(Labelled(x, y), None, None), Progress(0, 1)).terms["supervised"]
    slopes = torch.autograd.grad(loss, [method.theta, method.log_noise])
    peer, likelihood = peer_of(method).train(), gpytorch.likelihoods.GaussianLikelihood().double()
    likelihood.noise = NOISE + FLOOR
    wanted = -likelihood.expected_log_prob(y[:, 0].double(), peer(x.double())).mean()
    torch.testing.assert_close(loss, wanted, atol=1e-6, rtol=0)
    raw = [
        peer.covar_module.raw_outputscale,
        peer.covar_module.base_kernel.raw_lengthscale,
        likelihood.noise_covar.raw_noise,
    ]
    theirs = torch.autograd.grad(wanted, raw)
    values = [peer.covar_module.outputscale, peer.covar_module.base_kernel.lengthscale, likelihood.noise]
    constraints = [
        peer.covar_module.raw_outputscale_constraint, peer.covar_module.base_kernel.raw_lengthscale_constraint,
        likelihood.noise_covar.raw_noise_constraint,
    ]  # fmt: skip
    for mine, their, r, value, constraint in zip(
        [slopes[0][0], slopes[0][1], slopes[1][0]], theirs, raw, values, constraints, strict=True
    ):
        at = r.detach().requires_grad_()
        (rate,) = torch.autograd.grad(constraint.transform(at).log().sum(), at)  # d log value / d raw
        assert float(mine) == pytest.approx(float((their / rate).sum()), rel=1e-4, abs=1e-5), value


# --- against the exact process --------------------------------------------------------------------


@pytest.mark.parametrize("twins", [False, True])
def test_with_all_points_inducing_and_normal_noise_it_is_the_exact_process(twins: bool) -> None:
    x, y, at = draws(15, 2), draws(15, 1, seed=1), draws(7, 2, seed=2)
    if twins:
        x[8:] = x[:7].clone()
    method = SVGP(regression(2), inducing=15, natural_lr=1.0)
    place, step = method.phases()[0], method.phases()[1].updates[1]
    place.fit(FeatureTask(Features(x.double(), y), None, None))
    with torch.no_grad():
        step.objective(Batch(Labelled(x, y), None, None), Progress(0, 10))
    found = method.predict(at)

    a, b = (((v.double() - method.centre) / method.scale).numpy() for v in (x, at))

    def covariance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.exp(-((u[:, None] - v[None]) ** 2).sum(2) / (2 * 2))  # length-scale √D

    inverse = np.linalg.inv(covariance(a, a) + (NOISE + FLOOR) * np.eye(15))
    cross = covariance(b, a)
    np.testing.assert_allclose(found.mean[:, 0].detach(), cross @ inverse @ y[:, 0].double().numpy(), atol=1e-4)
    variance = 1 - np.einsum("bi,ij,bj->b", cross, inverse, cross)
    np.testing.assert_allclose(found.epistemic[:, 0].detach(), variance, atol=1e-5)
    np.testing.assert_allclose(found.variance[:, 0].detach(), variance + NOISE, atol=1e-5)


def test_minibatches_reach_what_the_whole_does() -> None:
    x = draws(400, 1)
    y = (2 * x).sin() + 0.3 * draws(400, 1, seed=1)
    task = FeatureTask(Features(x.double(), y), None, None)
    whole, parts = (SVGP(regression(1), inducing=20, natural_lr=r) for r in (1.0, 0.1))
    whole.place(task)
    with torch.no_grad():
        whole.natural_step(Batch(Labelled(x, y), None, None), Progress(0, 10))
    run(parts.phases()[0], parts, (x, y), None, 0, 0, 0.0)
    run(parts.phases()[1], parts, (x, y), None, 300, 40, 0.0)
    at = torch.linspace(-2, 2, 30)[:, None]
    with torch.no_grad():
        a, b = whole.predict(at), parts.predict(at)
    torch.testing.assert_close(a.mean, b.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(a.epistemic, b.epistemic, atol=0.002, rtol=0.3)


# --- softmax, and as many samples as classes ------------------------------------------------------


def test_derivatives_are_those_of_the_expected_log_likelihood() -> None:
    method = SVGP(context(3, 3), inducing=2, samples=200_000)
    mean, variance = (
        draws(2, 3).double().requires_grad_(),
        (0.3 + draws(2, 3, seed=1).square()).double().requires_grad_(),
    )
    y = torch.tensor([2, 0])
    by_mean, by_variance = torch.autograd.grad(2 * method.expected_log_likelihood(mean, variance, y), [mean, variance])
    slope, curvature = method.derivatives(mean.detach(), variance.detach(), y)
    torch.testing.assert_close(slope, by_mean, atol=5e-3, rtol=0)
    torch.testing.assert_close(curvature, -2 * by_variance, atol=1e-2, rtol=0)  # Price's theorem


def test_expected_log_likelihood_is_the_integral() -> None:
    """Of two classes, by quadrature over their difference."""
    method = SVGP(context(3, 2), inducing=2, samples=100_000)
    mean, variance = draws(2, 2).double(), 0.5 + draws(2, 2, seed=1).double().square()
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    gap = (mean[:, 1] - mean[:, 0]).numpy()[:, None] + variance.sum(1).sqrt().numpy()[:, None] * nodes
    wanted = (-np.logaddexp(0, -gap) @ weights / weights.sum()).mean()  # both are of class 1
    found = method.expected_log_likelihood(mean, variance, torch.tensor([1, 1]))
    assert float(found) == pytest.approx(wanted, abs=5e-3)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_as_many_samples_as_classes_are_not_taken_for_them(classes: int) -> None:
    """The trap: a likelihood that tells axes by their length transposes such a batch."""
    method = randomised(SVGP(context(3, classes), inducing=6)).eval()
    x, y = draws(3 * classes, 3, seed=9), torch.arange(3 * classes) % classes
    whole = method.predict(x).log_probs
    for part in torch.arange(3 * classes).split(classes):
        torch.testing.assert_close(method.predict(x[part]).log_probs, whole[part])
        _, mean, _ = method.latent(x[part])
        sure, order = torch.zeros_like(mean), part.flip(0)
        found = method.expected_log_likelihood(mean, sure, y[order])
        assert float(found.detach()) == pytest.approx(-float(F.cross_entropy(mean, y[order]).detach()), abs=1e-4)
        slope, curvature = method.derivatives(mean, sure, y[order])
        probs = mean.softmax(1)
        torch.testing.assert_close(slope, F.one_hot(y[order], classes) - probs, atol=1e-4, rtol=0)
        torch.testing.assert_close(curvature, probs * (1 - probs), atol=1e-4, rtol=0)


# --- what training teaches ------------------------------------------------------------------------


def rings(n: int, seed: int = 0) -> Sample:
    """Three classes by distance from the origin."""
    y = torch.arange(n) % 3
    angle = 2 * torch.pi * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    radius = 1 + y + 0.15 * draws(n, seed=seed + 1)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y


def accuracy(method: SVGP, test: Sample) -> float:
    return float((method.predict(test[0]).labels == test[1]).double().mean())


def test_classes_that_no_line_parts_and_doubt_where_nothing_was_seen() -> None:
    method = train(SVGP(context(2, 3), inducing=40), rings(600))
    assert accuracy(method, rings(300, seed=5)) > 0.95
    far = method.predict(torch.tensor([[60.0, -60.0]])).probs
    torch.testing.assert_close(far, torch.full_like(far, 1 / 3), atol=0.1, rtol=0)
    still = SVGP(context(2, 3), inducing=40, natural_lr=1e-9)
    assert accuracy(train(still, rings(600)), rings(300, seed=5)) < 0.6


def test_noise_is_learnt_and_intervals_hold() -> None:
    x = 3 * torch.rand(2000, 1, generator=torch.Generator().manual_seed(0))
    y = 5 + 3 * (2 * x).sin() + 0.5 * draws(2000, 1, seed=1)
    moments = {"label_mean": y.mean(0), "label_std": y.std(0)}
    method = train(SVGP(regression(1, **moments), inducing=30), (x, y), steps=300)
    at = torch.linspace(0.1, 2.9, 400)[:, None]
    new = 5 + 3 * (2 * at).sin() + 0.5 * draws(400, 1, seed=2)
    found = method.predict(at)
    assert float((found.mean - 5 - 3 * (2 * at).sin()).square().mean().sqrt()) < 0.15
    assert float((found.variance - found.epistemic).sqrt().mean()) == pytest.approx(0.5, rel=0.15)
    inside = ((new - found.mean).abs() < 1.96 * found.variance.sqrt()).double().mean()
    assert 0.92 < float(inside) < 0.98
    away = method.predict(torch.tensor([[1.5], [30.0]]))
    signal = float(method.hyper()[0].exp()) * float(y.var())  # in the targets' units
    assert float(away.epistemic[1]) == pytest.approx(signal, rel=1e-3)
    assert float(away.epistemic[1]) > 20 * float(away.epistemic[0])


def test_a_power_below_one_gives_the_word_to_the_target() -> None:
    x, y = rings(600)
    few = rings(30, seed=3)
    turned = (x, (y + 1) % 3)  # the source says otherwise
    pooled, own = (train(SVGP(context(2, 3), inducing=40, source_power=p), turned, few) for p in (1.0, 0.001))
    assert accuracy(pooled, rings(300, seed=5)) < 0.2
    assert accuracy(own, rings(300, seed=5)) > 0.7
    alone = train(SVGP(context(2, 3, source_labels_fit_head=False), inducing=40), turned, few)
    assert accuracy(alone, rings(300, seed=5)) > 0.7
    assert float(alone.counts[0]) == 0


def deep(frozen: bool, **changes: Any) -> SVGP:
    torch.manual_seed(0)
    backbone = nn.Sequential(MLP(InputSpec("vector", (2,)), hidden=(16,)), nn.BatchNorm1d(16))
    given = context(2, 3, backbone=backbone, feature_dim=16)
    return SVGP(given, features="frozen" if frozen else "joint", inducing=30, **changes)


def test_a_deep_kernel_is_frozen_or_trained_with_the_process() -> None:
    still = deep(frozen=True)
    assert not still.features(rings(5)[0]).requires_grad and deep(frozen=False).features(rings(5)[0]).requires_grad
    before = {key: value.clone() for key, value in still.network.state_dict().items()}
    train(still, rings(300))
    for key, value in still.network.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert [phase.name for phase in still.phases()] == ["inducing", "variational"]

    method = deep(frozen=False)
    assert [phase.name for phase in method.phases()] == ["network", "inducing", "variational"]
    first, place, last = method.phases()
    run(first, method, rings(300), None, 50, 32, 0.02)
    run(place, method, rings(300), None, 0, 0, 0.0)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    run(last, method, rings(300), None, 50, 32, 0.02)
    for key in ("network.backbone.0.layers.0.weight", "inducing", "theta", "pull", "precision"):
        key = key if key in before else next(k for k in before if k.startswith("network.backbone.0") and "weight" in k)
        assert not torch.equal(method.state_dict()[key], before[key]), key
    assert torch.equal(method.network.head.weight, before["network.head.weight"])
    assert accuracy(method.eval(), rings(300, seed=5)) > 0.8


def test_where_it_starts_from_another_run_or_nothing_could_train_there_is_no_first_phase() -> None:
    source = deep(frozen=False).network.state_dict()
    backbone = nn.Sequential(MLP(InputSpec("vector", (2,)), hidden=(16,)), nn.BatchNorm1d(16))
    given = context(2, 3, backbone=backbone, feature_dim=16, source_model=source)
    assert [phase.name for phase in SVGP(given).phases()] == ["inducing", "variational"]
    assert [phase.name for phase in deep(False, network_steps=0).phases()] == ["inducing", "variational"]
    assert deep(False, network_steps=7).phases()[0].steps == 7
    plain = SVGP(context(2, 3))  # of features as they are
    assert not plain.joint and not plain.inducing.requires_grad


def test_the_default_dtype_is_left_alone_and_the_process_is_in_double() -> None:
    method = train(deep(frozen=False), rings(120), steps=3)
    assert torch.get_default_dtype() is torch.float32
    assert all(p.dtype is torch.float32 for p in method.network.parameters())
    assert all(v.dtype is torch.float64 for v in method.latent(method.features(rings(5)[0])))


def test_nearly_no_noise_and_twins_in_few_points() -> None:
    x = draws(15, 2)
    x[8:] = x[:7].clone()
    y = (x[:, :1] > 0).float() + 1e-6
    method = SVGP(regression(2), inducing=64, natural_lr=1.0)
    method.log_noise.data.fill_(-50.0)
    assert float(method.noise().detach()) == pytest.approx(1e-6)
    found = train(method, (x, y), steps=20, size=15, lr=0.0)
    assert found.predict(draws(9, 2, seed=4)).is_finite()
    assert len(method.inducing.unique(dim=0)) == 64
    torch.testing.assert_close(found.predict(x).mean, y.double(), atol=1e-2, rtol=0)


def test_a_factor_that_is_none_makes_the_loss_not_finite() -> None:
    method = randomised(SVGP(context(3, 3), inducing=6))
    method.counts.copy_(torch.tensor([9.0, 0.0]))
    method.precision[0, 0, 0] = -1.0
    losses = method.losses(Batch(Labelled(draws(9, 3), torch.arange(9) % 3), None, None), Progress(0, 1))
    assert not torch.isfinite(losses.terms["supervised"])


def test_what_it_refuses() -> None:
    for wrong in ({"natural_lr": 0.0}, {"natural_lr": 1.1}, {"source_power": 0.0}, {"source_power": 2.0}):
        with pytest.raises(ValueError, match="above 0"):
            SVGP(context(), **wrong)
    for wrong in ({"hyper_lr": -1.0}, {"inducing": 0}, {"samples": 0}, {"draws": 0}, {"network_steps": -1}):
        with pytest.raises(ValueError, match="not negative"):
            SVGP(context(), **wrong)
