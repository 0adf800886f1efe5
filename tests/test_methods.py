"""The methods: each loss, gradient and closed-form solution against its formula, and transfer that beats its absence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.backbones.vectors import MLP, Identity
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.methods.adversarial.dann import DANN
from transfer_cli.methods.adversarial.gradient_reversal import (
    DomainDiscriminator,
    domain_loss,
    reverse_gradient,
)
from transfer_cli.methods.base import Context, Network, NetworkMethod
from transfer_cli.methods.baseline.source_only import SourceOnly
from transfer_cli.methods.discrepancy.deep_coral import DeepCORAL
from transfer_cli.methods.finetuning.linear_probe import LinearProbe
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.math.divergences import coral as coral_distance
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import (
    ALL_PARTS,
    Batch,
    ClosedForm,
    Features,
    FeatureTask,
    Gradient,
    Labelled,
    Moves,
    Progress,
)

START, MIDDLE = Progress(0, 100), Progress(50, 100)


def context(backbone: Any = None, classes: int = 2, **changes: Any) -> Context:
    backbone = backbone or MLP(InputSpec("vector", (2,)), hidden=(8,))
    basis = Context(
        backbone=backbone,
        feature_dim=backbone.out_features,
        kind="classification",
        num_classes=classes,
        source_classes=classes,
        has_source=True,
        has_target_labels=True,
        source_labels_fit_head=True,
    )
    return replace(basis, **changes)


def regression(backbone: Any = None, **changes: Any) -> Context:
    changes = {"label_mean": torch.tensor([10.0]), "label_std": torch.tensor([4.0]), "target_width": 1, **changes}
    return context(backbone, classes=0, kind="regression", **changes)


def batch_of(n: int = 12, width: int = 2, classes: int = 2, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(3, n, width, generator=draw), torch.randint(classes, (2, n), generator=draw)
    return Batch(Labelled(x[0], y[0]), x[1] + 1, Labelled(x[2] + 1, y[1]))


def train(method: NetworkMethod, batch: Batch, steps: int, lr: float = 0.05) -> None:
    """The first phase's first update by momentum SGD on one batch; what the gradient loop does, in six lines."""
    phase = method.phases()[0]
    assert isinstance(phase, Gradient)
    update = phase.updates[0]
    groups = [{"params": list(m.parameters), "lr": lr * m.lr_scale} for m in update.moves]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    method.train()
    for step in range(steps):
        losses = update.objective(batch, Progress(step, steps))
        optimizer.zero_grad()
        torch.stack(list(losses.terms.values())).sum().backward()
        optimizer.step()
    method.eval()


def gradients(total: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    return list(torch.autograd.grad(total, parameters, retain_graph=True))


# --- gradient reversal, the ramp, the discriminator -------------------------------------------------


def test_gradient_reversal_is_the_identity_forward_and_minus_its_coefficient_backward() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reverse_gradient(x, 0.7), x)
    w = torch.randn(5, 3, dtype=torch.float64)

    def function(values: Tensor) -> Tensor:
        return (w * values.sin()).sum()

    (found,) = torch.autograd.grad(function(reverse_gradient(x, 0.7)), x)
    step = 1e-6
    wanted = torch.empty_like(found)
    with torch.no_grad():
        for i in range(x.numel()):
            shift = torch.zeros(x.numel(), dtype=torch.float64)
            shift[i] = step
            shift = shift.view_as(x)
            wanted.view(-1)[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    torch.testing.assert_close(found, -0.7 * wanted, rtol=1e-6, atol=1e-8)


def test_the_ramp_is_the_published_one() -> None:
    assert ramp(0.0) == 0.0
    assert ramp(0.1) == pytest.approx(0.4621, abs=1e-4)
    assert ramp(1.0) == pytest.approx(0.99991, abs=1e-5)
    assert ramp(0.3, gamma=4.0) == pytest.approx(math.tanh(0.3 * 4.0 / 2))


def test_the_domain_loss_is_binary_cross_entropy() -> None:
    source, target = torch.randn(20) * 3, torch.randn(20) * 3
    loss, accuracy = domain_loss(source, target)
    labels = torch.cat([torch.ones(20), torch.zeros(20)])
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(torch.cat([source, target]), labels))
    right = float((source > 0).sum() + (target < 0).sum()) / 40
    assert float(accuracy) == pytest.approx(right) and not accuracy.requires_grad
    # domains of unequal batches weigh the same
    loss, accuracy = domain_loss(source[:4].requires_grad_(), target)
    halves = [F.softplus(-source[:4]).mean(), F.softplus(target).mean()]
    torch.testing.assert_close(loss, sum(halves) / 2)
    assert not accuracy.requires_grad


def test_the_discriminator_gives_one_logit_a_sample() -> None:
    discriminator = DomainDiscriminator(6, 16, hidden_layers=3, dropout=0.1)
    assert discriminator(torch.randn(4, 6)).shape == (4,)
    assert sum(isinstance(m, nn.Linear) for m in discriminator.modules()) == 4
    assert DomainDiscriminator(6, 16, hidden_layers=0)(torch.randn(1, 6)).shape == (1,)


# --- DANN -----------------------------------------------------------------------------------------


def test_dann_moves_the_backbone_against_the_discriminator() -> None:
    torch.manual_seed(0)
    method, batch = DANN(context(), weight=3.0, gamma=4.0, hidden=8, dropout=0.0), batch_of()
    backbone, critic = list(method.network.backbone.parameters()), list(method.discriminator.parameters())
    losses = method.losses(batch, MIDDLE)
    assert list(losses.terms) == ["supervised", "domain"]
    assert batch.source is not None
    features = [method.network(x).features for x in (batch.source.x, batch.target)]
    plain, accuracy = domain_loss(*(method.discriminator(f) for f in features))  # without reversal
    torch.testing.assert_close(losses.terms["domain"], plain)
    torch.testing.assert_close(losses.diagnostics["discriminator_accuracy"], accuracy)
    strength = 3.0 * ramp(0.5, 4.0)
    for found, wanted in zip(gradients(losses.terms["domain"], backbone), gradients(plain, backbone), strict=True):
        torch.testing.assert_close(found, -strength * wanted)
        assert float(wanted.abs().max()) > 0
    for found, wanted in zip(gradients(losses.terms["domain"], critic), gradients(plain, critic), strict=True):
        torch.testing.assert_close(found, wanted)  # the discriminator itself descends, at full rate
    supervised = F.cross_entropy(method.network(batch.source.x).logits, batch.source.y)
    torch.testing.assert_close(losses.terms["supervised"], supervised)


def test_dann_starts_without_reversal_and_never_reads_target_labels() -> None:
    method, batch = DANN(context(), hidden=8), batch_of()
    at_start = gradients(method.losses(batch, START).terms["domain"], list(method.network.backbone.parameters()))
    assert all(float(g.abs().max()) == 0 for g in at_start)
    method.losses(replace(batch, target_labelled=None), START)


def test_danns_discriminator_learns_at_its_own_rate() -> None:
    method = DANN(context(), discriminator_lr=7.0)
    (update,) = method.phases()[0].updates
    moved = {m.lr_scale: set(m.parameters) for m in update.moves}
    assert moved == {1.0: set(method.network.parameters()), 7.0: set(method.discriminator.parameters())}


# --- Deep CORAL -----------------------------------------------------------------------------------


def test_coral_is_the_distance_of_unbiased_covariances() -> None:
    source, target = torch.randn(30, 4, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64) * 2 + 1
    gap = np.cov(source.numpy().T) - np.cov(target.numpy().T)
    assert float(coral_distance(source, target)) == pytest.approx((gap**2).sum() / (4 * 4**2), rel=1e-12)
    assert float(coral_distance(source, source)) == 0.0
    assert float(coral_distance(source, source + 5)) == pytest.approx(0, abs=1e-20), "blind to the means"


def test_corals_gradient() -> None:
    source = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(coral_distance, (source, target))


@pytest.mark.parametrize("layer", ["logits", "features"])
def test_deep_coral_adds_its_weighted_distance_at_the_chosen_layer(layer: Any) -> None:
    method, batch = DeepCORAL(context(), weight=2.5, layer=layer), batch_of()
    losses = method.losses(batch, MIDDLE)
    assert batch.source is not None
    outputs = [getattr(method.network(x), layer) for x in (batch.source.x, batch.target)]
    distance = coral_distance(*outputs)
    torch.testing.assert_close(losses.terms["coral"], 2.5 * distance)
    torch.testing.assert_close(losses.diagnostics["coral_distance"], distance)
    assert not losses.diagnostics["coral_distance"].requires_grad
    logits = method.network(batch.source.x).logits
    torch.testing.assert_close(losses.terms["supervised"], F.cross_entropy(logits, batch.source.y))


# --- transfer beats its absence -------------------------------------------------------------------

Toy = tuple[Tensor, Tensor, Tensor, Tensor]


def moons(seed: int, n: int = 150, degrees: float = 35) -> Toy:
    """Two moons and, as the target, others turned by 35 degrees (the toy of Ganin et al., JMLR 2016)."""
    x, y = make_moons(2 * n, noise=0.1, random_state=seed)
    x, angle = x - x.mean(0), math.radians(degrees)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    xs, xt = torch.tensor(x[:n]).float(), torch.tensor(x[n:] @ turn.T).float()
    return xs, torch.tensor(y[:n]), xt, torch.tensor(y[n:])


def shortcut(seed: int, n: int = 200) -> Toy:
    """One coordinate tells the class in both domains; another tells it better in the source, and in the target is noise."""
    draw = torch.Generator().manual_seed(seed)

    def sample(source: bool) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        sign = (2 * y - 1).float()
        lasting = sign + 0.4 * torch.randn(n, generator=draw)
        other = sign + 0.2 * torch.randn(n, generator=draw) if source else 3 * torch.randn(n, generator=draw)
        return torch.stack([lasting, other], 1), y

    return *sample(True), *sample(False)


def target_accuracy(
    build: Callable[[Context], NetworkMethod], toy: Callable[[int], Toy], steps: int, lr: float
) -> float:
    torch.manual_seed(0)
    method = build(context(MLP(InputSpec("vector", (2,)), hidden=(15,)), has_target_labels=False))
    xs, ys, xt, yt = toy(0)
    train(method, Batch(Labelled(xs, ys), xt, None), steps, lr)
    with torch.no_grad():
        return float((method.predict(xt).labels == yt).float().mean())


def dann(weight: float) -> Callable[[Context], NetworkMethod]:
    return lambda c: DANN(c, weight=weight, hidden=32, dropout=0.0, discriminator_lr=1.0)


def coral(weight: float) -> Callable[[Context], NetworkMethod]:
    return lambda c: DeepCORAL(c, weight=weight, layer="features")


def test_dann_turns_the_moons_back() -> None:
    assert target_accuracy(dann(1.0), moons, 1000, 0.05) > 0.87
    assert target_accuracy(dann(0.0), moons, 300, 0.05) < 0.82, "without its term it is the baseline"
    assert 0.6 < target_accuracy(SourceOnly, moons, 300, 0.05) < 0.82


def test_deep_coral_leaves_the_shortcut() -> None:
    assert target_accuracy(coral(100.0), shortcut, 300, 0.02) > 0.82
    assert target_accuracy(coral(0.0), shortcut, 300, 0.02) < 0.75
    assert 0.5 < target_accuracy(SourceOnly, shortcut, 300, 0.02) < 0.75


# --- the network ----------------------------------------------------------------------------------


def test_the_bottleneck_lies_between_backbone_and_head() -> None:
    network = Network(context(bottleneck=5, classes=3))
    out = network(torch.randn(6, 2))
    assert out.features.shape == (6, 5) and out.logits.shape == (6, 3) and network.feature_dim == 5
    assert float(out.features.detach().min()) >= 0


@pytest.mark.parametrize("domain_batches", ["joint", "separate"])
def test_domains_share_batchnorm_statistics_where_asked(domain_batches: str) -> None:
    network = Network(context(bottleneck=5, domain_batches=domain_batches))
    network.train()
    source, target = torch.randn(8, 2), torch.randn(8, 2) * 3 + 2
    alone, _ = network(source), network(target)
    joint = network(torch.cat([source, target]))
    found, of_target = network.both(source, target)
    torch.testing.assert_close(found.logits, joint.logits[:8] if domain_batches == "joint" else alone.logits)
    assert not torch.allclose(joint.logits[:8], alone.logits, atol=1e-3)
    torch.testing.assert_close(of_target.features.shape, found.features.shape)


def test_regression_learns_standardised_targets_and_predicts_in_their_units() -> None:
    method = SourceOnly(regression())
    network = method.network
    with torch.no_grad():
        network.log_noise.fill_(math.log(0.25))
    x, y = torch.randn(9, 2), 10 + 4 * torch.randn(9, 1)
    logits = network(x).logits
    standard = (y - 10) / 4
    wanted = F.gaussian_nll_loss(logits, standard, torch.full_like(standard, 0.25))
    torch.testing.assert_close(network.supervised(logits, y), wanted)
    torch.testing.assert_close(method.supervised_loss(x, y), wanted)
    prediction = method.predict(x)
    assert prediction.mean is not None and prediction.variance is not None
    torch.testing.assert_close(prediction.mean, 10 + 4 * logits)
    torch.testing.assert_close(prediction.variance, torch.full((9, 1), 0.25 * 16))


def test_source_only_is_cross_entropy_on_the_source() -> None:
    method, batch = SourceOnly(context()), batch_of()
    assert batch.source is not None
    losses = method.losses(batch, START)
    assert list(losses.terms) == ["supervised"]
    logits = method.network(batch.source.x).logits
    torch.testing.assert_close(losses.terms["supervised"], F.cross_entropy(logits, batch.source.y))
    log_probs = method.predict(batch.source.x).log_probs
    torch.testing.assert_close(log_probs, logits.log_softmax(1))


# --- phases and what they move --------------------------------------------------------------------


def test_moves_take_each_trainable_parameter_once() -> None:
    layer, frozen = nn.Linear(2, 3), nn.Linear(3, 3)
    frozen.requires_grad_(False)
    both = nn.Sequential(layer, frozen)
    moves = Moves.of(both, layer, frozen, lr_scale=0.3)
    assert len(moves.parameters) == 2 and set(moves.parameters) == set(layer.parameters())
    assert moves.lr_scale == 0.3 and Moves.of(frozen).parameters == []


@pytest.mark.parametrize("freeze", ["up-to-block1", "all"])
def test_a_frozen_backbone_stays_bit_identical_through_training(freeze: str) -> None:
    torch.manual_seed(0)
    backbone = SmallCNN(InputSpec("image", (1, 16, 16)), widths=(4, 8), features=8, freeze=freeze)
    method = DANN(context(backbone, classes=3), hidden=8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(2, 12, 1, 16, 16, generator=draw)
    train(method, Batch(Labelled(images[0], torch.arange(12) % 3), images[1], None), steps=4)
    after = backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    frozen = set(before) if freeze == "all" else {name for name in before if name.startswith("blocks.0.")}
    assert same == frozen, "weights and BatchNorm statistics of frozen stages, and no others"
    assert {"blocks.0.1.running_mean", "blocks.0.1.num_batches_tracked"} <= frozen


# --- closed forms ---------------------------------------------------------------------------------


def blobs(n: int = 90, width: int = 4, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=draw)
    scales = torch.tensor([1.0, 10.0, 0.1, 3.0])
    return ((centres[y] + torch.randn(n, width, generator=draw)) * scales + 2).double(), y


def test_logistic_regression_against_scikit_learn() -> None:
    x, y = blobs()
    weights = torch.rand(90, generator=torch.Generator().manual_seed(1)).double()
    weights /= weights.sum()
    w, b = fit_logistic(x, y, 3, 0.01, weights, tolerance=1e-9)
    reference = LogisticRegression(C=1 / 0.01, tol=1e-10, max_iter=10_000)
    reference.fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    found = (x @ w.T + b).softmax(1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(x.numpy()), atol=1e-5)
    np.testing.assert_allclose(w, reference.coef_ - reference.coef_.mean(0), atol=1e-4)


def test_ridge_against_scikit_learn() -> None:
    x, _ = blobs()
    y = torch.stack([x @ torch.tensor([1.0, 2, 3, 4]).double(), x[:, 0].sin()], 1) + 0.1
    weights = torch.rand(90, generator=torch.Generator().manual_seed(1)).double()
    w, b = fit_ridge(x, y, 0.05, weights)
    reference = Ridge(alpha=0.05).fit(x.numpy(), y.numpy(), sample_weight=weights.numpy())
    np.testing.assert_allclose(w, reference.coef_, rtol=1e-8)
    np.testing.assert_allclose(b, reference.intercept_, rtol=1e-8)


def probe_task() -> tuple[FeatureTask, Features, Features]:
    source = Features(*blobs())
    target = Features(*blobs(n=12, seed=3))
    return FeatureTask(source, Features(torch.cat([target.x, target.x + 1])), target), source, target


@pytest.mark.parametrize("labels", ["all", "source", "target"])
def test_the_linear_probe_is_scikit_learns_optimum(labels: Any) -> None:
    task, source, target = probe_task()
    method = LinearProbe(context(Identity(InputSpec("vector", (4,))), classes=3), l2=0.02, labels=labels)
    (phase,) = method.phases()
    assert isinstance(phase, ClosedForm)
    assert (
        set(phase.parts)
        == {"all": {"source", "target_labelled"}, "source": {"source"}, "target": {"target_labelled"}}[labels]
    )
    phase.fit(FeatureTask(**{name: getattr(task, name) if name in phase.parts else None for name in ALL_PARTS}))
    parts = {"all": [source, target], "source": [source], "target": [target]}[labels]
    x = np.concatenate([p.x.numpy() for p in parts])
    y = np.concatenate([p.y.numpy() for p in parts if p.y is not None])
    each = np.concatenate([np.full(len(p.x), 1 / len(p.x)) for p in parts])  # a domain weighs the same, however large
    scaler = StandardScaler().fit(x)
    reference = LogisticRegression(C=1 / 0.02, tol=1e-10, max_iter=10_000)
    reference.fit(scaler.transform(x), y, sample_weight=each)
    new = blobs(n=30, seed=9)[0]
    found = method.predict(new).probs.numpy()
    np.testing.assert_allclose(found, reference.predict_proba(scaler.transform(new.numpy())), atol=2e-4)


def test_the_linear_probe_in_regression_is_ridge() -> None:
    x, _ = blobs()
    y = (x @ torch.tensor([[1.0, 0.1, 3, 0.2]]).double().T).sin() * 5 + 20
    method = LinearProbe(regression(Identity(InputSpec("vector", (4,)))), l2=0.05)
    method.fit(FeatureTask(Features(x, y), Features(x), None))
    scaler = StandardScaler().fit(x.numpy())
    reference = Ridge(alpha=0.05 * len(x)).fit(scaler.transform(x.numpy()), y.numpy())
    prediction = method.predict(x)
    assert prediction.mean is not None and prediction.variance is not None
    wanted = reference.predict(scaler.transform(x.numpy()))
    np.testing.assert_allclose(prediction.mean[:, 0], wanted.reshape(-1), rtol=1e-5)
    left_out = cross_val_predict(reference, scaler.transform(x.numpy()), y.numpy(), cv=LeaveOneOut())
    residual = float(((y.numpy() - left_out.reshape(-1, 1)) ** 2).mean())
    np.testing.assert_allclose(prediction.variance, np.full((90, 1), residual), rtol=1e-5)


def test_a_feature_that_never_varied_is_ignored() -> None:
    x, y = blobs()
    x = torch.cat([x, torch.full((90, 1), 77.7, dtype=torch.float64)], 1)  # its mean is not exact
    method = LinearProbe(context(Identity(InputSpec("vector", (5,))), classes=3))
    method.fit(FeatureTask(Features(x, y), Features(x), None))
    assert float(method.head.fitted.w[:, 4].abs().max()) < 1e-12
    moved = x.clone()
    moved[:, 4] += 100  # as it may in the target
    torch.testing.assert_close(method.predict(moved).log_probs, method.predict(x).log_probs)


def test_the_linear_probe_needs_labels_for_its_head() -> None:
    backbone = Identity(InputSpec("vector", (4,)))
    for labels, changes in (
        ("source", {"source_labels_fit_head": False}),
        ("target", {"has_target_labels": False}),
        ("all", {"source_labels_fit_head": False, "has_target_labels": False}),
    ):
        with pytest.raises(TransferError, match="linear_probe finds no labels for its head"):
            LinearProbe(context(backbone, **changes), labels=labels)  # type: ignore[arg-type]


# --- fitted state ---------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.fitted = nn.Linear(2, 2), Fitted()


def test_fitted_tensors_survive_a_checkpoint() -> None:
    first, second = Holder(), Holder()
    first.fitted.put(w=torch.randn(3, 2, dtype=torch.float64), count=torch.tensor([1, 2, 3]))
    state = first.state_dict()
    assert set(state) == {"layer.weight", "layer.bias", "fitted.w", "fitted.count"}
    second.load_state_dict(state)  # strictly: into one that never saw them
    for name in ("w", "count"):
        found = getattr(second.fitted, name)
        assert torch.equal(found, getattr(first.fitted, name)) and found.dtype == getattr(first.fitted, name).dtype
    second.fitted.w.zero_()
    assert float(first.fitted.w.abs().sum()) > 0, "a copy, not the same memory"
    first.fitted.put(w=torch.ones(5))
    assert torch.equal(first.fitted.w, torch.ones(5)), "fitting again replaces"


def test_fitted_tensors_arrive_on_the_modules_device() -> None:
    """Checkpoints are read on the CPU; a probe that is used on a GPU needs its solution there."""
    holder, saved = Holder(), Holder()
    saved.fitted.put(w=torch.ones(3))
    holder.to("meta")  # any device but the CPU
    holder.fitted.load_state_dict(saved.fitted.state_dict())
    assert holder.fitted.w.device.type == "meta"


def test_a_probe_predicts_the_same_after_a_checkpoint() -> None:
    task, source, _ = probe_task()
    first, second = (LinearProbe(context(Identity(InputSpec("vector", (4,))), classes=3)) for _ in range(2))
    first.fit(task)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.predict(source.x).probs, second.predict(source.x).probs)


def test_coral_is_computed_in_full_precision_under_autocast() -> None:
    draw = torch.Generator().manual_seed(0)
    source = torch.randn(64, 32, generator=draw)
    target = source + 1e-3 * torch.randn(64, 32, generator=draw)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = coral_distance(source, target)
    torch.testing.assert_close(found, coral_distance(source, target))
