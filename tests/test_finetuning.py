"""Fine-tuning: each method's term against an independent formula, what it moves, and a toy on which it beats its absence."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from test_methods import START, Toy, batch_of, context, gradients, probe_task, regression, train
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.backbones.digits import LeNet, SmallCNN
from transfer_cli.backbones.torchvision import Torchvision
from transfer_cli.backbones.vectors import MLP, Identity
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.finetuning.bitfit import BitFit
from transfer_cli.methods.finetuning.bss import BSS, smallest_squares
from transfer_cli.methods.finetuning.co_tuning import CoTuning, direct_relationship, reverse_relationship
from transfer_cli.methods.finetuning.delta import DELTA, attended_distance, by_channel, feature_maps
from transfer_cli.methods.finetuning.distill import Distill, softened_divergence
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.finetuning.l2_sp import L2SP
from transfer_cli.methods.finetuning.lora import LoRA, LowRank
from transfer_cli.methods.finetuning.lp_ft import LPFT
from transfer_cli.methods.phases import Batch, ClosedForm, Features, FeatureTask, Gradient, Labelled, Progress
from transfer_cli.torchvision_compat import models

FAMILY: dict[str, Callable[..., FineTune]] = {
    "finetune": FineTune, "lp_ft": LPFT, "l2_sp": L2SP, "bss": BSS, "delta": DELTA, "co_tuning": CoTuning,
    "bitfit": BitFit, "lora": LoRA, "distill": Distill,
}  # fmt: skip
NO_SOURCE = {"has_source": False, "source_labels_fit_head": False}
OWN_HEAD = {"source_labels_fit_head": False}


def mlp(width: int = 2, hidden: tuple[int, ...] = (8,), activation: Any = "relu", freeze: str = "none") -> MLP:
    return MLP(InputSpec("vector", (width,)), hidden=hidden, activation=activation, freeze=freeze)


def prepare(method: FineTune, batch: Batch, source_steps: int = 0) -> Gradient:
    """The phases up to the last one, whose start is made."""
    assert batch.target_labelled is not None
    *before, last = method.phases()
    for phase in before:
        if isinstance(phase, ClosedForm):
            method.eval()
            with torch.no_grad():
                features = method.features(batch.target_labelled.x).double()
            phase.fit(FeatureTask(None, None, Features(features, batch.target_labelled.y)))
        elif source_steps:
            train(method, batch, source_steps, lr=0.1)
    assert isinstance(last, Gradient) and last.on_start is not None
    last.on_start()
    return last


def fit(method: FineTune, batch: Batch, steps: int, lr: float, source_steps: int = 0) -> None:
    """What the loops do, in a few lines."""
    (update,) = prepare(method, batch, source_steps).updates
    groups = [{"params": list(m.parameters), "lr": lr * m.lr_scale} for m in update.moves]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    method.train()
    for step in range(steps):
        losses = update.objective(batch, Progress(step, steps))
        optimizer.zero_grad()
        torch.stack(list(losses.terms.values())).sum().backward()
        optimizer.step()
    method.eval()


def kept(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# --- what all have in common ----------------------------------------------------------------------


def phase_names(method: FineTune) -> list[tuple[str, int | None]]:
    return [(p.name, p.steps if isinstance(p, Gradient) else -1) for p in method.phases()]


def test_phases_follow_the_setting() -> None:
    assert phase_names(FineTune(context())) == [("source", None), ("finetune", None)]
    assert phase_names(LPFT(context(), source_steps=70)) == [("source", 70), ("head", -1), ("finetune", None)]
    assert phase_names(LPFT(context(), source_steps=0)) == [("head", -1), ("finetune", None)]
    assert phase_names(LPFT(context(**NO_SOURCE), source_steps=70)) == [("head", -1), ("finetune", None)]
    started = context(source_model=SmallStart.state())
    assert phase_names(FineTune(started)) == [("finetune", None)], "another run's network stands for the source phase"
    assert phase_names(CoTuning(started)) == [("relationship", -1), ("finetune", None)]


class SmallStart:
    """The network of another run, as `source_model` gives it."""

    @staticmethod
    @cache
    def state() -> dict[str, Tensor]:
        torch.manual_seed(5)
        return kept(FineTune(context()).network)


def test_the_source_phase_has_a_head_of_its_own_where_classes_differ() -> None:
    shared = FineTune(context())
    assert shared.source_head is shared.network.head
    method = FineTune(context(classes=3, source_classes=7, **OWN_HEAD))
    assert method.source_head.out_features == 7 and method.network.head.out_features == 3
    batch = batch_of(classes=7)
    assert batch.source is not None
    loss = method.source_losses(batch, START).terms["supervised"]
    logits = method.source_head(method.network.features(batch.source.x))
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.source.y))
    phase = method.phases()[0]
    assert isinstance(phase, Gradient) and not phase.predicts and shared.phases()[0].predicts
    (moves,) = phase.updates[0].moves
    assert set(method.source_head.parameters()) < set(moves.parameters)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_lower_layers_learn_more_slowly_and_everything_moves_once(kind: str) -> None:
    backbone = mlp(hidden=(8, 7, 6))
    given = context(backbone, bottleneck=4) if kind == "classification" else regression(backbone, bottleneck=4)
    method = FineTune(given, backbone_lr=0.2, layer_decay=0.5)
    moves = method.moves()
    assert [m.lr_scale for m in moves] == [1.0, 0.2, 0.1, 0.05]
    for move, layer in zip(moves[1:], reversed(backbone.layers), strict=True):
        assert set(move.parameters) == set(layer.parameters())
    moved = [p for m in moves for p in m.parameters]
    assert len(moved) == len(set(moved)) and set(moved) == set(method.network.parameters())  # regression's noise too
    part = FineTune(context(mlp(hidden=(8, 7), freeze="up-to-layer1")), backbone_lr=0.2)
    assert [m.lr_scale for m in part.moves()] == [1.0, 0.2], "frozen stages are left out"


def test_layer_wise_rates_count_only_layers_that_learn() -> None:
    backbone = Torchvision(InputSpec("image", (3, 32, 32)), model="resnet18", weights="none")
    moves = FineTune(context(backbone), backbone_lr=0.1, layer_decay=0.5).moves()
    rate = {id(p): m.lr_scale for m in moves for p in m.parameters}
    net = backbone.model
    found = [rate[id(next(stage.parameters()))] for stage in (net.layer4, net.layer3, net.layer2, net.layer1, net.bn1)]
    assert found == pytest.approx([0.1, 0.05, 0.025, 0.0125, 0.00625])
    assert rate[id(net.conv1.weight)] == pytest.approx(0.003125)


def test_plain_finetuning_is_cross_entropy_on_the_granted_labels() -> None:
    method, batch = FineTune(context()), batch_of()
    losses = method.losses(batch, START)
    assert batch.target_labelled is not None and list(losses.terms) == ["target_supervised"]
    logits = method.network(batch.target_labelled.x).logits
    wanted = F.cross_entropy(logits, batch.target_labelled.y)
    torch.testing.assert_close(losses.terms["target_supervised"], wanted)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_an_absent_class_and_unequal_batches_give_finite_gradients(name: str, precision: str) -> None:
    torch.manual_seed(0)
    method = FAMILY[name](context(mlp(hidden=(8, 6)), classes=3, source_classes=3, bottleneck=5))
    x = torch.randn(5, 2)
    batch = Batch(None, torch.randn(9, 2), Labelled(x, torch.tensor([0, 2, 0, 0, 2])))  # class 1 is absent
    (update,) = prepare(method, batch).updates
    method.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        terms = update.objective(batch, START).terms
    total = torch.stack([term.float() for term in terms.values()]).sum()
    assert bool(torch.isfinite(total))
    total.backward()
    for move in update.moves:
        for p in move.parameters:
            assert p.grad is not None and bool(torch.isfinite(p.grad).all())


@pytest.mark.parametrize("name", [n for n in FAMILY if n not in ("co_tuning", "distill")])
def test_regression_is_finetuned_too(name: str) -> None:
    torch.manual_seed(0)
    method = FAMILY[name](regression(mlp(hidden=(8, 6)), **NO_SOURCE))
    x = torch.randn(12, 2)
    batch = Batch(None, None, Labelled(x, 10 + 4 * x[:, :1]))
    before = float(method.supervised_loss(x, 10 + 4 * x[:, :1]).detach())
    fit(method, batch, steps=60, lr=0.02)
    assert float(method.supervised_loss(x, 10 + 4 * x[:, :1]).detach()) < before - 0.1


@pytest.mark.parametrize("name", FAMILY)
def test_the_state_is_whole(name: str) -> None:
    """A new method that loads it, before anything was fitted, predicts and goes on alike."""
    torch.manual_seed(0)
    first, second = (FAMILY[name](context(mlp(hidden=(8, 6)))) for _ in range(2))
    batch = batch_of()
    fit(first, batch, steps=3, lr=0.05)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.eval()
    assert batch.target is not None
    assert torch.equal(first.predict(batch.target).probs, second.predict(batch.target).probs)
    ours, theirs = (m.phases()[-1].updates[0].objective(batch, START).terms for m in (first, second))  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (lambda: FineTune(context(domain_batches="domain_specific")), "set trainer.domain_batches=separate"),
        (lambda: L2SP(context(), alpha=-1.0), "alpha and beta"),
        (lambda: BSS(context(), k=0), "k is 1 or more"),
        (lambda: DELTA(context(), temperature=0.0), "temperature is above 0"),
        (lambda: DELTA(context(Identity(InputSpec("vector", (2,))))), "take method=lp_ft"),
        (lambda: CoTuning(context(), temperature=0.0), "temperature is above 0"),
        (lambda: Distill(context(), temperature=-1.0), "temperature is above 0"),
        (lambda: LoRA(context(), rank=0), "rank is 1 or more"),
        (lambda: LoRA(context(resnet())), "take method=bitfit"),
        (lambda: LoRA(context(mlp(freeze="all"))), "take method=bitfit"),
        (lambda: BitFit(context(mlp(freeze="all"))), "take method=linear_probe"),
    ],
)
def test_wrong_values_are_refused(build: Callable[[], FineTune], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        build()


@pytest.mark.parametrize("method", [CoTuning, Distill])
def test_some_need_a_source_that_was_trained_on(method: Callable[..., FineTune]) -> None:
    with pytest.raises(TransferError, match="set source=NAME"):
        method(context(), source_steps=0).phases()
    with pytest.raises(TransferError, match="source_model=RUN"):
        method(context(**NO_SOURCE)).phases()
    method(context(source_model=SmallStart.state(), **NO_SOURCE), source_steps=0).phases()


# --- LP-FT ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_head_phase_is_the_optimum_of_its_head(kind: str) -> None:
    task, _, target = probe_task()
    assert target.y is not None
    backbone = Identity(InputSpec("vector", (4,)))
    x = target.x.numpy()
    if kind == "classification":
        method = LPFT(context(backbone, classes=3), head_l2=0.5)
        reference = LogisticRegression(C=1 / (0.5 * 12), tol=1e-10, max_iter=10_000).fit(x, target.y.numpy())
        wanted = reference.decision_function(x)
        wanted -= wanted.mean(1, keepdims=True)
    else:
        method = LPFT(regression(backbone), head_l2=0.5)
        y = target.x[:, :1] * 4 + 10  # in their own units
        task = replace(task, target_labelled=Features(target.x, y))
        wanted = Ridge(alpha=0.5 * 12).fit(x, ((y - 10) / 4).numpy()).predict(x).reshape(-1, 1)
    phase = next(p for p in method.phases() if isinstance(p, ClosedForm))
    phase.fit(task)
    with torch.no_grad():
        logits = method.network.head(target.x.float())
    found = (logits - logits.mean(1, keepdim=True) if kind == "classification" else logits).numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-3)


# --- L2-SP ----------------------------------------------------------------------------------------


def test_l2_sp_pulls_to_the_start_of_the_phase() -> None:
    torch.manual_seed(0)
    method, batch = L2SP(context(), alpha=0.3, beta=0.7), batch_of()
    parameters = list(method.network.backbone.parameters())
    with torch.no_grad():
        for p in parameters:  # as the source phase does after the method was built
            p.add_(torch.randn_like(p))
    prepare(method, batch)
    assert float(method.losses(batch, START).terms["l2_sp"].detach()) == 0
    start = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn_like(p))
    terms = method.losses(batch, START).terms
    squares = [float((p.detach() - w).square().sum()) for p, w in zip(parameters, start, strict=True)]
    assert float(terms["l2_sp"].detach()) == pytest.approx(0.15 * sum(squares), rel=1e-5)
    for p, w, found in zip(parameters, start, gradients(terms["l2_sp"], parameters), strict=True):
        torch.testing.assert_close(found, 0.3 * (p.detach() - w))
    head = method.network.head.weight
    torch.testing.assert_close(gradients(terms["l2_head"], [head])[0], 0.7 * head.detach())


def test_l2_sp_leaves_frozen_weights_out() -> None:
    backbone = mlp(hidden=(8, 7), freeze="up-to-layer1")
    method, batch = L2SP(context(backbone), alpha=2.0), batch_of()
    prepare(method, batch)
    with torch.no_grad():
        backbone.layers[0][0].bias.add_(100)  # which no step does
        backbone.layers[1][0].bias.add_(1)
    assert float(method.losses(batch, START).terms["l2_sp"].detach()) == pytest.approx(7, rel=1e-5)


# --- BSS ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(7, 4), (4, 7)])
def test_the_smallest_singular_values_are_eigenvalues_of_the_gram_matrix(n: int, d: int) -> None:
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smaller = x.T @ x if d < n else x @ x.T
    wanted = np.linalg.eigvalsh(smaller.numpy())  # ascending
    for k in (1, 3, 4, 9):
        assert float(smallest_squares(x, k=k)) == pytest.approx(wanted[:k].sum(), rel=1e-10)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: smallest_squares(v, k=2), (x,))


def test_bss_adds_the_term_of_the_batchs_features_in_full_precision() -> None:
    method, batch = BSS(context(), weight=0.5, k=2), batch_of()
    assert batch.target_labelled is not None
    values = torch.linalg.svdvals(method.network(batch.target_labelled.x).features)
    found = method.losses(batch, START).terms["spectral_shrinkage"]
    torch.testing.assert_close(found, 0.5 * (values[-1] ** 2 + values[-2] ** 2))
    x = torch.randn(16, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = smallest_squares(x, k=1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.linalg.svdvals(x.float())[-1] ** 2)


# --- DELTA ----------------------------------------------------------------------------------------


def resnet() -> Torchvision:
    return Torchvision(InputSpec("image", (3, 32, 32)), model="resnet18", weights="none")


def images(channels: int = 1, side: int = 16, n: int = 6, classes: int = 3) -> Batch:
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, n, channels, side, side, generator=draw)
    return Batch(None, x[1], Labelled(x[0], torch.arange(n) % classes))


def small_cnn() -> SmallCNN:
    return SmallCNN(InputSpec("image", (1, 16, 16)), widths=(4, 6), features=8)


@pytest.mark.parametrize(
    ("build", "channels", "stages"),
    [
        (small_cnn, 1, 3),
        (lambda: LeNet(InputSpec("image", (1, 16, 16))), 1, 3),
        (resnet, 3, 6),
        (lambda: tiny_vit(), 3, 4),
        (lambda: mlp(256, (8, 7)), 1, 2),
    ],
)
def test_delta_reads_the_stages_of_any_backbone(build: Callable[[], Backbone], channels: int, stages: int) -> None:
    torch.manual_seed(0)
    backbone = build()
    method, batch = DELTA(context(backbone, classes=3, **NO_SOURCE), alpha=1.0), images(channels)
    prepare(method, batch)
    assert batch.target_labelled is not None
    assert torch.equal(method.start.module.head.weight, method.network.head.weight), "w⁰ with the head that was fitted"  # type: ignore[union-attr]
    maps, gaps = method.at_start(batch.target_labelled)
    assert len(maps) == len(gaps) == stages
    assert all(by_channel(m).shape[:2] == g.shape and not m.requires_grad for m, g in zip(maps, gaps, strict=True))
    method.eval()
    assert float(method.losses(batch, START).terms["delta"].detach()) == pytest.approx(0, abs=1e-6)
    start = kept(method.start)
    method.train()
    losses = method.losses(batch, START)
    (torch.stack(list(losses.terms.values())).sum()).backward()
    assert not changed(method.start, start), "its BatchNorm statistics stay, and its weights"
    assert all(p.grad is None for p in method.start.parameters())
    assert not any(m._forward_hooks for m in backbone.modules())


class InPlace(Backbone):
    accepts = ("vector",)
    out_features = 4

    def __init__(self) -> None:
        super().__init__(InputSpec("vector", (2,)))
        self.linear, self.relu, self.last = nn.Linear(2, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.relu(self.linear(x)))


def test_deltas_maps_are_what_a_stage_put_out_whatever_comes_next() -> None:
    torch.manual_seed(0)
    method, batch = DELTA(context(InPlace(), **NO_SOURCE)), batch_of()
    prepare(method, batch)
    assert batch.target_labelled is not None
    maps, _ = method.at_start(batch.target_labelled)
    backbone = method.network.backbone
    assert isinstance(backbone, InPlace)
    torch.testing.assert_close(maps[0], backbone.linear(batch.target_labelled.x).detach())
    assert float(maps[0].detach().min()) < 0


def test_deltas_gaps_are_the_effect_of_a_channel_on_each_samples_loss() -> None:
    """To first order: of taking a small share of the channel away."""
    torch.manual_seed(0)
    method, batch = DELTA(context(small_cnn(), classes=3)).double(), images()
    assert batch.target_labelled is not None
    labelled = Labelled(batch.target_labelled.x.double(), batch.target_labelled.y)
    prepare(method, Batch(None, None, labelled))
    method.train()  # the start evaluates all the same
    _, gaps = method.at_start(labelled)
    network, step = method.start.module, 1e-6
    stages = list(network.backbone.stages().values())  # type: ignore[union-attr,operator]

    def losses_without(stage: nn.Module, channel: int, share: float) -> Tensor:
        def take(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, channel] *= 1 - share
            return output

        handle = stage.register_forward_hook(take)
        with torch.no_grad():
            logits = network(labelled.x).logits
        handle.remove()
        return F.cross_entropy(logits, labelled.y, reduction="none")

    for stage, gap in zip(stages, gaps, strict=True):
        for channel in (0, 3):
            wanted = (losses_without(stage, channel, step) - losses_without(stage, channel, -step)) / (2 * step)
            torch.testing.assert_close(gap[:, channel].double(), wanted, rtol=1e-4, atol=1e-6)
    assert float(gaps[0].abs().max()) > 1e-3


def test_deltas_distance_against_its_formula() -> None:
    torch.manual_seed(0)
    now, start, gap = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5), torch.randn(3, 4) * 1e-3
    wanted = 0.0
    for i in range(3):
        centred = gap[i] - gap[i].mean()
        scores = [math.exp(float(c / centred.abs().mean()) / 2.5) for c in centred]
        wanted += sum(s / sum(scores) * float(((now[i, j] - start[i, j]) ** 2).sum()) / 3 for j, s in enumerate(scores))
    assert float(attended_distance(now, start, gap, temperature=2.5)) == pytest.approx(wanted, rel=1e-5)
    even = attended_distance(now, start, torch.zeros(3, 4), temperature=2.5)
    torch.testing.assert_close(even, (now - start).square().sum((2, 3)).mean(), msg="all channels alike")
    tokens, tokens_then = torch.randn(3, 7, 4), torch.randn(3, 7, 4)  # (B, T, C)
    rounded = [maps.bfloat16() for maps in (now, start, gap)]  # what autocast hands over is not what is computed in
    in_bf16, in_float = (attended_distance(*m, temperature=2.5) for m in (rounded, [m.float() for m in rounded]))
    assert float(in_bf16) == pytest.approx(float(in_float), rel=1e-6)
    found = attended_distance(tokens, tokens_then, torch.zeros(3, 4), temperature=1.0)
    torch.testing.assert_close(found, (tokens - tokens_then).square().sum(1).mean())


def test_delta_pulls_the_maps_back() -> None:
    """Along its gradient the maps of the network come nearer to those of the start."""
    torch.manual_seed(0)
    method, batch = DELTA(context(mlp(hidden=(8, 6)), **NO_SOURCE), alpha=1.0), batch_of()
    prepare(method, batch)
    parameters = list(method.network.backbone.parameters())
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn_like(p))

    def distance() -> Tensor:
        assert batch.target_labelled is not None
        with feature_maps(method.network.backbone) as now:
            method.network(batch.target_labelled.x)
        maps, _ = method.at_start(batch.target_labelled)
        return torch.stack([(n - m).square().sum() for n, m in zip(now.values(), maps, strict=True)]).sum().detach()

    before = distance()
    for p, slope in zip(parameters, gradients(method.losses(batch, START).terms["delta"], parameters), strict=True):
        p.data.sub_(0.01 * slope)
    assert float(distance()) < float(before)


# --- Co-Tuning ------------------------------------------------------------------------------------


def test_the_direct_relationship_is_the_mean_prediction_of_a_class() -> None:
    probs = torch.rand(9, 5, dtype=torch.float64).softmax(1)
    y = torch.tensor([0, 0, 2, 2, 2, 0, 2, 0, 2])
    found = direct_relationship(probs, y, 3)
    torch.testing.assert_close(found[0], probs[y == 0].mean(0))
    torch.testing.assert_close(found[2], probs[y == 2].mean(0))
    torch.testing.assert_close(found[1], probs.mean(0), msg="a class without samples")


def test_the_reverse_relationship_is_bayes_rule_on_a_logistic_regression() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    probs = (2 * torch.randn(60, 4, generator=draw) + 3 * F.one_hot(y, 4)).double().softmax(1)
    found = reverse_relationship(probs, y, 3, l2=0.01)
    reference = LogisticRegression(C=1 / (0.01 * 60), tol=1e-10, max_iter=10_000).fit(probs.numpy(), y.numpy())
    joint = reference.predict_proba(np.eye(4)).T * probs.mean(0).numpy()
    np.testing.assert_allclose(found, joint / joint.sum(1, keepdims=True), atol=1e-4)
    assert found.argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("relationship", ["direct", "reverse"])
@pytest.mark.parametrize("separate", [True, False])
def test_co_tunings_term_is_cross_entropy_to_the_relationship(relationship: Any, separate: bool) -> None:
    torch.manual_seed(0)
    given = {"source_classes": 5, **OWN_HEAD} if separate else {"source_classes": 3}
    method = CoTuning(context(classes=3, **given), weight=0.7, relationship=relationship, temperature=2.0)
    batch = batch_of(classes=3)
    last = prepare(method, batch)
    assert batch.target_labelled is not None
    x, y = batch.target_labelled.x, batch.target_labelled.y
    width = 5 if separate else 3
    assert method.relation.shape == (3, width)
    torch.testing.assert_close(method.relation.sum(1), torch.ones(3))
    for own, theirs in zip(method.kept_head.parameters(), method.source_head.parameters(), strict=True):
        assert torch.equal(own, theirs) and own is not theirs, "starts as the source's head"
    if relationship == "direct":
        probs = (method.source_head(method.features(x)) / 2).softmax(1)
        torch.testing.assert_close(method.relation[1], probs[y == 1].mean(0).detach())
    log_probs = method.kept_head(method.features(x)).log_softmax(1)
    wanted = -sum(method.relation[y[i], s] * log_probs[i, s] for i in range(len(y)) for s in range(width)) / len(y)
    terms = method.losses(batch, START).terms
    torch.testing.assert_close(terms["co_tuning"], 0.7 * wanted)
    moved = {p for m in last.updates[0].moves for p in m.parameters}
    assert set(method.kept_head.parameters()) < moved and set(method.network.parameters()) < moved
    assert all(float(g.abs().max()) > 0 for g in gradients(terms["co_tuning"], [method.kept_head.weight]))


# --- BitFit and LoRA ------------------------------------------------------------------------------


class Wrapped(Backbone):
    def __init__(self, inner: nn.Module, out_features: int) -> None:
        super().__init__(InputSpec("image", (3, 16, 16)))
        self.inner, self.out_features = inner, out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def stages(self) -> dict[str, nn.Module]:
        encoder = getattr(self.inner, "encoder", None)
        if encoder is None:
            return {"all": self.inner}
        return {"conv_proj": self.inner.conv_proj, **dict(encoder.layers.named_children()), "ln": encoder.ln}  # type: ignore[dict-item]


def tiny_vit() -> Wrapped:
    torch.manual_seed(0)
    vit = models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    vit.heads = nn.Identity()
    return Wrapped(vit, 16)


def tiny_swin() -> Wrapped:
    torch.manual_seed(0)
    swin = models.SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=[4, 4], stochastic_depth_prob=0.0
    )
    swin.head = nn.Identity()
    return Wrapped(swin, 16)


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin, small_cnn, lambda: mlp(256, (8, 7))])
def test_bitfit_moves_biases_and_the_head_alone(build: Callable[[], Backbone]) -> None:
    backbone = build()
    channels = 3 if isinstance(backbone, Wrapped) else 1
    method = BitFit(context(backbone, classes=3, **NO_SOURCE))
    before = kept(method.network)
    fit(method, images(channels), steps=2, lr=0.1)
    biases = {name for name, _ in backbone.named_parameters() if name.rpartition(".")[2] in ("bias", "in_proj_bias")}
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    found = changed(method.network, before)
    assert found - statistics <= {f"backbone.{name}" for name in biases} | {"head.weight", "head.bias"}
    assert {"head.weight", "head.bias"} < found
    if isinstance(backbone, Wrapped) and hasattr(backbone.inner, "encoder"):
        assert "backbone.inner.encoder.layers.encoder_layer_1.self_attention.in_proj_bias" in found
        assert "backbone.inner.encoder.ln.bias" in found, "those of normalisation layers too"


@pytest.mark.parametrize("build", [tiny_vit, tiny_swin, small_cnn, lambda: mlp(256, (8, 7))])
def test_lora_starts_as_the_identity_and_moves_its_updates_alone(build: Callable[[], Backbone]) -> None:
    plain = build()
    backbone = copy.deepcopy(plain)
    batch = images(3 if isinstance(backbone, Wrapped) else 1)
    assert batch.target is not None
    x = batch.target
    method = LoRA(context(backbone, classes=3, **NO_SOURCE), rank=2, alpha=6.0)
    for module in (plain, method):
        module.eval()
    with torch.no_grad():
        assert torch.equal(method.features(x), plain(x))
    before = kept(method.network)
    fit(method, batch, steps=3, lr=0.1)
    found = {name for name in changed(method.network, before) if "running" not in name and "num_batches" not in name}
    assert {name.rpartition(".")[2] for name in found if name.startswith("backbone")} == {"a", "b"}
    assert len([name for name in found if name.endswith(".b")]) == len(method.updates)
    # What it computes is the plain network with the updates added to its weights: under training's attention and evaluation's.
    state = {name.replace("parametrizations.", "").replace(".original", ""): v for name, v in kept(backbone).items()}
    state = {name: value for name, value in state.items() if not name.endswith((".0.a", ".0.b"))}
    for name, module in backbone.named_modules():
        if isinstance(module, LowRank):
            product = module.b.detach() @ module.a.detach()
            state[name.replace("parametrizations.", "").removesuffix(".0")] += 3.0 * product
            assert torch.linalg.matrix_rank(product) <= 2
    plain.load_state_dict(state)
    with torch.no_grad():
        merged = plain(x)
        torch.testing.assert_close(method.features(x), merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(method.features(x).detach(), merged, rtol=1e-4, atol=1e-5)  # no fast path: gradients
    twin = copy.deepcopy(method)  # as a running average of the weights makes one
    twin.updates[0].b.data.add_(1)
    with torch.no_grad():
        assert not torch.allclose(twin.features(x), merged), "its updates are its own"
        torch.testing.assert_close(method.features(x), merged, rtol=1e-4, atol=1e-5)


def test_lora_reaches_every_map_of_a_transformer() -> None:
    method = LoRA(context(tiny_vit(), classes=3))
    names = {n for n, _ in method.network.backbone.named_parameters() if n.endswith(".a")}
    attention = "inner.encoder.layers.encoder_layer_0.self_attention"
    assert {
        f"{attention}.parametrizations.in_proj_weight.0.a",
        f"{attention}.out_proj.parametrizations.weight.0.a",
        "inner.encoder.layers.encoder_layer_1.mlp.0.parametrizations.weight.0.a",
    } < names
    assert len(names) == 2 * 4
    assert [u.b.shape[0] for u in method.updates[:1]] == [48]
    assert 0.15 < float(method.updates[0].a.detach().std()) < 0.35  # 1 / sqrt(16)


def test_lora_and_bitfit_leave_the_source_phase_and_frozen_layers_as_they_are() -> None:
    method = LoRA(context(mlp(hidden=(8, 7), freeze="up-to-layer1")))
    assert len(method.updates) == 1, "no update of a frozen layer"
    source = method.phases()[0]
    assert isinstance(source, Gradient)
    moved = set(source.updates[0].moves[0].parameters)
    assert moved.isdisjoint(method.tuned()) and len(moved) == 4  # weight and bias of layer2 and of the head
    tuned = {p for m in method.moves() for p in m.parameters}
    assert tuned == {*method.tuned(), *method.network.head.parameters()}
    biases = BitFit(context(mlp(hidden=(8, 7), freeze="up-to-layer1")))
    assert len(biases.tuned()) == 1
    (source_moves,) = biases.phases()[0].updates[0].moves  # type: ignore[union-attr]
    assert len(source_moves.parameters) == 4


def test_a_method_on_updates_moves_to_another_device_whole() -> None:
    method = LoRA(context(mlp()))
    method.to("meta")
    assert all(p.device.type == "meta" for p in method.tuned())
    assert set(method.tuned()) <= set(method.parameters()), "still the registered ones"


# --- distillation ---------------------------------------------------------------------------------


def test_the_softened_divergence_and_its_limit_at_high_temperature() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 4, generator=draw, dtype=torch.float64)
    student = torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    wanted = 9 * (p * (p / q).log()).sum() / 5
    torch.testing.assert_close(softened_divergence(teacher, student, 3.0).double(), wanted, rtol=1e-5, atol=1e-6)
    (slope,) = torch.autograd.grad(softened_divergence(teacher, student, 100.0), student)
    gap = (student - teacher).detach()
    limit = (gap - gap.mean(1, keepdim=True)) / 4 / 5  # section 2.1 of the paper: the logits are matched
    torch.testing.assert_close(slope, limit, rtol=0.05, atol=1e-3)


def test_distillation_asks_the_network_of_the_phases_start() -> None:
    torch.manual_seed(0)
    backbone = mlp(hidden=(8, 6))
    method, batch = Distill(context(backbone, bottleneck=5), weight=0.5, temperature=3.0), batch_of()
    with torch.no_grad():
        backbone.layers[0][0].weight.mul_(3)  # as the source phase does
    last = prepare(method, batch)
    assert set(last.parts) == {"target", "target_labelled"}
    method.eval()
    assert float(method.losses(batch, START).terms["distillation"].detach()) == pytest.approx(0, abs=1e-6)
    before, at_start = kept(method.teacher), method.network(batch.target).logits.detach()
    fit(method, batch, steps=20, lr=0.3)
    assert set(changed(method.teacher, before)) <= set(), "BatchNorm statistics included"
    torch.testing.assert_close(method.teacher(batch.target).logits, at_start)
    losses = method.losses(batch, START)
    student = method.network(batch.target).logits
    wanted = 0.5 * softened_divergence(at_start, student, 3.0)
    torch.testing.assert_close(losses.terms["distillation"], wanted, atol=0, rtol=1e-5)
    turned = 0.5 * softened_divergence(student, at_start, 3.0)
    assert abs(float((turned / wanted).detach()) - 1) > 0.005
    assert all(p.grad is None for p in method.teacher.parameters())


# --- toys: few target labels ----------------------------------------------------------------------


def noisy(seed: int, per_class: int = 6, wrong: int = 2, width: int = 40, shift: float = 0.7) -> tuple[Toy, Labelled]:
    """One coordinate of many tells the class; the target's is shifted, and some of its few labels are wrong."""
    draw = torch.Generator().manual_seed(seed)

    def sample(n: int, shift: float) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        x = torch.randn(n, width, generator=draw)
        x[:, 0] = 1.5 * (2 * y - 1) + 0.5 * x[:, 0] + shift
        return x, y

    source, target, (x, y) = sample(300, 0), sample(300, shift), sample(2 * per_class, shift)
    return (*source, *target), Labelled(x, torch.cat([1 - y[:wrong], y[wrong:]]))


def shifted(seed: int) -> tuple[Toy, Labelled]:
    """All labels right; the telling coordinate far off where the source had it."""
    return noisy(seed, per_class=10, wrong=0, width=6, shift=3.0)


def weak(seed: int) -> tuple[Toy, Labelled]:
    """A strong direction tells the class, weak ones tell the few wrong labels."""
    draw = torch.Generator().manual_seed(seed)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        x = torch.randn(n, 4, generator=draw) * torch.tensor([0.5, 0.3, 0.3, 0.3])
        x[:, 0] += 2 * y - 1
        return x, y

    source, target, (x, y) = sample(300), sample(300), sample(16)
    return (*source, *target), Labelled(x, torch.cat([1 - y[:3], y[3:]]))


def turned(seed: int) -> tuple[Toy, Labelled]:
    """In the target another coordinate tells the class."""
    draw = torch.Generator().manual_seed(seed)

    def sample(n: int, telling: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 2
        x = torch.randn(n, 6, generator=draw)
        x[:, telling] = 1.5 * (2 * y - 1) + 0.5 * x[:, telling]
        if telling:
            x[:, 0] *= 3
        return x, y

    source, target, few = sample(300, 0), sample(300, 1), sample(80, 1)
    return (*source, *target), Labelled(*few)


def renamed(seed: int) -> tuple[Toy, Labelled]:
    """Four classes under other names, shifted; one label of each."""
    draw = torch.Generator().manual_seed(seed)

    def sample(n: int, shift: float) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 4
        return torch.randn(n, 20, generator=draw) + 3 * torch.eye(4, 20)[y] + shift, y

    (xs, ys), (xt, yt), (x, y) = sample(400, 0), sample(400, 0.3), sample(4, 0.3)
    return (xs, ys, xt, (yt + 1) % 4), Labelled(x, (y + 1) % 4)


Few = Callable[[int], tuple[Toy, Labelled]]
SHAPES: dict[Few, dict[str, Any]] = {
    noisy: {"width": 40, "hidden": (16,)},
    shifted: {"width": 6, "hidden": (8,), "activation": "tanh"},
    weak: {"width": 4, "hidden": (4,), "activation": "tanh"},
    turned: {"width": 6, "hidden": (8,), "activation": "tanh"},
    renamed: {"width": 20, "hidden": (16, 6)},
}


def toy_context(toy: Few, **changes: Any) -> Context:
    if toy is renamed:
        return context(mlp(**SHAPES[toy]), classes=4, source_classes=4, **OWN_HEAD, **changes)
    return context(mlp(**SHAPES[toy]), **changes)


@cache
def trained_on_source(toy: Few, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(seed)
    method = FineTune(toy_context(toy))
    (xs, ys, _, _), _ = toy(seed)
    train(method, Batch(Labelled(xs, ys), None, None), 120, lr=0.1)
    return kept(method.network), kept(method.source_head)


def accuracy(build: Callable[[Context], FineTune], toy: Few, steps: int, lr: float) -> float:
    """On the target, mean of three draws; every method starts from the same source's network."""
    found = []
    for seed in range(3):
        network, source_head = trained_on_source(toy, seed)
        (_, _, xt, yt), few = toy(seed)
        torch.manual_seed(seed)
        method = build(toy_context(toy, source_model=None if toy is renamed else network))
        method.network.load_state_dict(network, strict=False)
        method.source_head.load_state_dict(source_head)
        if toy is renamed:
            method.network.head.reset_parameters()  # the new head of other classes
        fit(method, Batch(None, xt, few), steps, lr)
        with torch.no_grad():
            found.append(float((method.predict(xt).labels == yt).float().mean()))
    return sum(found) / len(found)


@cache
def plain(toy: Few, steps: int, lr: float, backbone_lr: float = 1.0) -> float:
    return accuracy(lambda c: FineTune(c, backbone_lr=backbone_lr), toy, steps, lr)


def test_l2_sp_keeps_what_wrong_labels_would_spoil() -> None:
    assert plain(noisy, 150, 0.1) < 0.78
    assert accuracy(lambda c: L2SP(c, backbone_lr=1.0), noisy, 150, 0.1) > 0.86
    none = accuracy(lambda c: L2SP(c, alpha=0.0, beta=0.0, backbone_lr=1.0), noisy, 150, 0.1)
    assert none == pytest.approx(plain(noisy, 150, 0.1))


def test_distillation_keeps_what_wrong_labels_would_spoil() -> None:
    assert accuracy(lambda c: Distill(c, backbone_lr=1.0), noisy, 150, 0.1) > 0.92
    none = accuracy(lambda c: Distill(c, weight=0.0, backbone_lr=1.0), noisy, 150, 0.1)
    assert none == pytest.approx(plain(noisy, 150, 0.1))
    assert accuracy(lambda c: Distill(c, weight=-0.1, backbone_lr=1.0), noisy, 30, 0.1) < 0.78


def test_bss_shrinks_the_directions_that_wrong_labels_use() -> None:
    assert plain(weak, 250, 0.1) < 0.87
    assert accuracy(lambda c: BSS(c, weight=1.0, k=3, backbone_lr=1.0), weak, 250, 0.1) > 0.92


def test_delta_keeps_the_maps_that_matter() -> None:
    assert accuracy(lambda c: DELTA(c, alpha=0.0, backbone_lr=1.0), weak, 250, 0.1) < 0.89
    assert accuracy(lambda c: DELTA(c, alpha=30.0, backbone_lr=1.0), weak, 250, 0.1) > 0.92


def test_lp_ft_does_not_distort_good_features() -> None:
    assert plain(renamed, 150, 0.1) < 0.82
    assert accuracy(lambda c: LPFT(c, backbone_lr=1.0), renamed, 150, 0.1) > 0.86


def test_co_tuning_wants_the_head_of_the_sources_own_classes() -> None:
    """A source model predicts the target's: with a source of others its head would be one that nothing has trained."""
    other = {"source_labels_fit_head": False, "source_classes": 5}
    start = {k: v.clone() for k, v in FineTune(context(mlp())).network.state_dict().items()}
    with pytest.raises(ValueError, match="leave that out"):
        CoTuning(context(mlp(), source_model=start, **other))
    CoTuning(context(mlp(), source_model=start))
    FineTune(context(mlp(), source_model=start, **other))


def test_co_tuning_learns_from_the_sources_head() -> None:
    assert accuracy(lambda c: CoTuning(c, weight=0.0, backbone_lr=1.0), renamed, 150, 0.03) < 0.82
    assert accuracy(lambda c: CoTuning(c, backbone_lr=1.0), renamed, 150, 0.03) > 0.85

    class Mistaken(CoTuning):
        def relate(self, task: FeatureTask) -> None:
            super().relate(task)
            self.relation.copy_(self.relation.roll(1, 0))

    assert accuracy(lambda c: Mistaken(c, backbone_lr=1.0), renamed, 150, 0.03) < 0.75


def test_bitfit_mends_a_shift_and_cannot_learn_wrong_things_by_heart() -> None:
    assert accuracy(BitFit, shifted, 150, 0.3) > 0.97
    assert accuracy(lambda c: BitFit(c, backbone_lr=0.0), shifted, 150, 0.3) < 0.95, "the head alone"
    assert plain(shifted, 150, 0.3) < 0.92


def test_lora_of_rank_one_turns_to_another_coordinate() -> None:
    assert accuracy(lambda c: LoRA(c, rank=1, alpha=1.0), turned, 150, 0.05) > 0.95
    assert accuracy(lambda c: LoRA(c, rank=1, alpha=1.0, backbone_lr=0.0), turned, 150, 0.05) < 0.9, "the head alone"
    assert accuracy(lambda c: LoRA(c, rank=1, alpha=0.0), turned, 150, 0.05) < 0.9
