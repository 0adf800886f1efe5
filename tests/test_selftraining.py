"""Self-training, source-free and test-time methods: each loss against its formula, each state against what it should hold, and
transfer that fails where the term is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Outcome
from scipy.spatial.distance import cdist
from test_methods import MIDDLE, START, batch_of, context, gradients
from test_resume import assert_same, outcome_of, stop_at
from torch import Tensor

from transfer_cli import experiment
from transfer_cli.backbones.vectors import MLP, Identity
from transfer_cli.data.inputs import InputSpec
from transfer_cli.methods.base import Context, NetworkMethod
from transfer_cli.methods.baseline.source_only import SourceOnly
from transfer_cli.methods.phases import Batch, Features, FeatureTask, Gradient, Labelled, Progress
from transfer_cli.methods.selftraining.confidence import confident_cross_entropy
from transfer_cli.methods.selftraining.fixmatch import FixMatch, align
from transfer_cli.methods.selftraining.mean_teacher import MeanTeacher, imbalance
from transfer_cli.methods.selftraining.pseudo_label import PseudoLabel
from transfer_cli.methods.selftraining.shot import SHOT, class_means, nearest
from transfer_cli.methods.testtime.adabn import AdaBN
from transfer_cli.methods.testtime.tent import Tent

Transfer = Callable[..., Outcome]
Build = Callable[[Context], NetworkMethod]
Toy = tuple[Tensor, Tensor, Tensor, Tensor]

SOURCE_FREE: dict[str, Any] = {"adabn": AdaBN, "tent": Tent, "shot": SHOT}
WITH_SOURCE: dict[str, Any] = {"pseudo_label": PseudoLabel, "mean_teacher": MeanTeacher, "fixmatch": FixMatch}


def with_views(batch: Batch, weak: float = 0.1, strong: float = 0.3) -> Batch:
    """The batch with two views of the target, by noise."""
    x = batch.target
    return replace(batch, views={"target": [x + weak * torch.randn_like(x), x + strong * torch.randn_like(x)]})


def phase_of(method: NetworkMethod, name: str) -> Gradient:
    return next(p for p in method.phases() if p.name == name)  # type: ignore[return-value]


def play(method: NetworkMethod, toy: Toy, steps: int, lr: float, noise: tuple[float, float] = (0.1, 0.3)) -> None:
    """All of a method's phases by momentum SGD on whole domains; what the gradient loop does, in a few lines."""
    xs, ys, xt, _ = toy
    for phase in method.phases():
        assert isinstance(phase, Gradient)
        if phase.on_start is not None:
            phase.on_start()
        optimizers = [
            torch.optim.SGD(
                [{"params": list(m.parameters), "lr": lr * m.lr_scale} for m in update.moves],
                momentum=0.9,
                nesterov=True,
            )
            if update.moves
            else None
            for update in phase.updates
        ]
        total = phase.steps or steps
        for step in range(total):
            if phase.refresh is not None and step % 10 == 0:
                method.eval()
                with torch.no_grad():
                    phase.refresh.fit(FeatureTask(None, Features(method.features(xt).double()), None))
            method.train()
            batch = Batch(
                Labelled(xs, ys) if "source" in phase.parts else None, xt if "target" in phase.parts else None, None
            )
            if phase.views:
                batch = with_views(batch, *noise)
            for update, optimizer in zip(phase.updates, optimizers, strict=True):
                if optimizer is None:
                    with torch.no_grad():
                        update.objective(batch, Progress(step, total))
                    continue
                losses = update.objective(batch, Progress(step, total))
                method.zero_grad()
                torch.stack(list(losses.terms.values())).sum().backward()
                optimizer.step()
            if phase.after_step is not None:
                phase.after_step(Progress(step, total))
    method.eval()


def accuracy(build: Build, toy: Toy, steps: int = 200, lr: float = 0.05, **changes: Any) -> float:
    torch.manual_seed(0)
    noise = changes.pop("noise", (0.1, 0.3))
    backbone = changes.pop("backbone", None) or MLP(InputSpec("vector", (2,)), hidden=(15,))
    method = build(context(backbone, has_target_labels=False, **changes))
    play(method, toy, steps, lr, noise)
    with torch.no_grad():
        return float((method.predict(toy[2]).labels == toy[3]).float().mean())


# --- confident predictions as labels ----------------------------------------------------------------


def test_confident_cross_entropy_counts_only_sure_samples_and_divides_by_all() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    probs = torch.tensor(
        [[0.9, 0.1, 0], [0.5, 0.4, 0.1], [0, 0.05, 0.95], [0.9, 0, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]
    )
    loss, used = confident_cross_entropy(logits, probs, 0.9)
    log_probs = logits.detach().log_softmax(1)
    wanted = -(log_probs[0, 0] + log_probs[2, 2] + log_probs[3, 0]) / 6
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-6) and float(used) == 0.5
    none, share = confident_cross_entropy(logits, probs, 0.99)
    assert float(none.detach()) == 0 and float(share) == 0
    (gradient,) = torch.autograd.grad(none, logits)
    assert float(gradient.abs().max()) == 0, "and not NaN"


def test_pseudo_label_adds_its_own_sure_predictions_under_a_ramp() -> None:
    method, batch = PseudoLabel(context(), weight=2.0, threshold=0.55, ramp_start=0.2, ramp_end=0.8), batch_of()
    assert [method.alpha(p) for p in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx([0, 0, 1, 2, 2])
    losses = method.losses(batch, MIDDLE)
    with torch.no_grad():
        q = method.network(batch.target).logits.softmax(1).numpy()
    sure = q.max(1) >= 0.55
    assert 0 < sure.sum() < len(q), "the case is of both kinds"
    wanted = -np.log(q.max(1))[sure].sum() / len(q)  # the most probable class: minus its own log probability
    assert float(losses.terms["pseudo_label"].detach()) == pytest.approx(1.0 * wanted, rel=1e-5)
    assert float(losses.diagnostics["used"]) == pytest.approx(sure.mean())
    # the label is held fixed: d/dz of -log q_max is q - onehot
    logits = method.network(batch.target).logits
    (found,) = torch.autograd.grad(confident_cross_entropy(logits, logits.softmax(1), 0.55)[0], logits)
    by_hand = (q - np.eye(2)[q.argmax(1)]) * sure[:, None] / len(q)
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    assert float(method.losses(batch, START).terms["pseudo_label"].detach()) == 0


def test_pseudo_label_refuses_what_makes_no_sense() -> None:
    for keys in ({"threshold": 1.2}, {"ramp_start": 0.7}, {"ramp_start": -0.1}):
        with pytest.raises(ValueError):
            PseudoLabel(context(), **keys)


# --- mean teacher ------------------------------------------------------------------------------------


def test_mean_teachers_loss_is_the_published_one() -> None:
    torch.manual_seed(0)
    method = MeanTeacher(context(classes=3), weight=2.0, threshold=0.5, class_balance=0.7)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.3 * torch.randn_like(p))  # another network than the student
    batch = with_views(batch_of(classes=3))
    losses = method.losses(batch, MIDDLE)
    first, second = batch.views["target"]
    assert batch.source is not None
    with torch.no_grad():
        p, q = method.network(first).logits.softmax(1).numpy(), method.teacher(second).logits.softmax(1).numpy()
    sure = q.max(1) >= 0.5
    assert 0 < sure.sum() < len(q)
    consistency = np.mean(((p - q) ** 2).mean(1) * sure)
    mean = p.mean(0)
    balance = -np.sum(np.log(mean) / 3 + 2 / 3 * np.log(1 - mean)) * sure.mean()
    terms = {name: float(value.detach()) for name, value in losses.terms.items()}
    logits = method.network(batch.source.x).logits
    supervised = float(F.cross_entropy(logits, batch.source.y).detach())
    assert terms == pytest.approx(
        {"supervised": supervised, "consistency": 2 * consistency, "class_balance": 0.7 * balance}, rel=1e-5
    )
    assert float(losses.diagnostics["used"]) == pytest.approx(sure.mean())
    moved = {p for update in method.phases()[0].updates for m in update.moves for p in m.parameters}
    assert moved == set(method.network.parameters()), "the student alone"
    torch.stack(list(losses.terms.values())).sum().backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    assert "class_balance" not in MeanTeacher(context(classes=3), class_balance=0.0).losses(batch, MIDDLE).terms


def test_the_imbalance_is_least_for_uniform_means() -> None:
    probs = torch.randn(7, 4).softmax(1)
    level = torch.full((7, 4), 0.25)
    assert (
        float(imbalance(level))
        < float(imbalance(probs))
        < float(imbalance(F.one_hot(torch.zeros(7).long(), 4).float()))
    )
    assert math.isfinite(float(imbalance(F.one_hot(torch.zeros(7).long(), 4).float())))


def test_the_teacher_is_the_students_running_average_with_statistics_of_the_target() -> None:
    method = MeanTeacher(context(bottleneck=5, domain_batches="separate"), decay=0.9)
    (phase,) = method.phases()
    assert phase.views == {"target": ("weak", "weak")}
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(1.0)  # as an earlier phase or a source model may
    assert phase.on_start is not None and phase.after_step is not None
    phase.on_start()
    start = [p.clone() for p in method.teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(start, method.network.parameters(), strict=True))
    method.train()
    batch = with_views(batch_of())
    method.losses(batch, START)
    with torch.no_grad():
        for p in method.network.parameters():
            p.mul_(2.0)
    phase.after_step(START)
    for before, mine, theirs in zip(start, method.teacher.parameters(), method.network.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.9 * before + 0.1 * theirs)
    own, students = method.teacher.module.bottleneck[1], method.network.bottleneck[1]  # type: ignore[union-attr, index]
    assert int(own.num_batches_tracked) == 1 and int(students.num_batches_tracked) == 2, (
        "one target batch; both domains"
    )
    method.eval()
    x = batch.target
    torch.testing.assert_close(method.predict(x).log_probs, method.teacher(x).logits.log_softmax(1))
    torch.testing.assert_close(method.features(x), method.teacher(x).features)
    assert not torch.allclose(method.predict(x).probs, method.network.predict(x).probs)
    torch.testing.assert_close(method.predict_source(x).probs, method.network.predict(x).probs)


# --- FixMatch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_fixmatch_teaches_the_strong_view_what_the_weak_one_shows(aligned: bool, relative: bool) -> None:
    torch.manual_seed(0)
    given = {"distribution_alignment": aligned, "relative_threshold": relative}
    method = FixMatch(context(classes=3), weight=1.5, threshold=1.0 if relative else 0.4, **given)
    assert method.phases()[0].views == {"target": ("weak", "strong")} and method.uses_strong
    batch = with_views(batch_of(classes=3), strong=2.0)
    assert batch.source is not None
    losses = method.losses(batch, MIDDLE)
    weak, strong = batch.views["target"]
    with torch.no_grad():
        q, p, s = (method.network(x).logits.softmax(1).double().numpy() for x in (weak, strong, batch.source.x))
    threshold = s.max(1).mean() if relative else 0.4
    if aligned:
        q = q * (s.mean(0) / q.mean(0))
        q = q / q.sum(1, keepdims=True)
    sure = q.max(1) >= threshold
    assert 0 < sure.sum() < len(q)
    wanted = -np.log(p[np.arange(len(p)), q.argmax(1)])[sure].sum() / len(p)
    assert float(losses.terms["pseudo_label"].detach()) == pytest.approx(1.5 * wanted, rel=1e-4)
    assert float(losses.diagnostics["used"]) == pytest.approx(sure.mean())
    supervised = F.cross_entropy(method.network(batch.source.x).logits, batch.source.y)
    torch.testing.assert_close(losses.terms["supervised"], supervised)


def test_alignment_moves_the_mean_prediction_to_the_sources() -> None:
    draw = torch.Generator().manual_seed(0)
    target = (3 * torch.randn(400, 3, generator=draw) + torch.tensor([2.0, 0, 0])).softmax(1)
    source = (3 * torch.randn(300, 3, generator=draw)).softmax(1)
    aligned = align(target, source)
    torch.testing.assert_close(aligned.sum(1), torch.ones(400))
    before, after = ((x.mean(0) - source.mean(0)).abs().sum() for x in (target, aligned))
    assert float(after) < 0.7 * float(before)
    assert bool(torch.isfinite(align(torch.eye(3)[[0, 0, 1]], torch.eye(3)[[1, 2]])).all()), (
        "classes that one side lacks"
    )


# --- AdaBN -------------------------------------------------------------------------------------------


def with_batchnorm(**changes: Any) -> Context:
    """A linear layer, BatchNorm and ReLU between inputs and head."""
    return context(Identity(InputSpec("vector", (2,))), bottleneck=6, **changes)


def test_adabn_replaces_statistics_by_the_plain_average_over_target_batches() -> None:
    torch.manual_seed(0)
    method = AdaBN(with_batchnorm(has_target_labels=False))
    names = [(p.name, p.parts, p.predicts) for p in method.phases()]
    assert names == [("source", ("source", "target_labelled"), False), ("statistics", ("target",), True)]
    source, statistics = method.phases()
    (layer,) = method.layers
    assert method.network.switch is not None
    pair = method.network.switch.layers[0]
    assert layer.weight is pair.source.weight and layer.bias is pair.source.bias, "one scale and shift"
    method.train()
    batch = batch_of()
    for _ in range(3):
        source.updates[0].objective(batch, START)
    assert batch.target_labelled is not None
    method.supervised_loss(batch.target_labelled.x, batch.target_labelled.y)  # granted labels leave statistics too
    assert int(layer.num_batches_tracked) == 1
    kept = {k: v.clone() for k, v in pair.source.state_dict().items()}
    weights = [p.clone() for p in method.parameters()]
    (update,) = statistics.updates
    assert update.moves == [] and statistics.on_start is not None and statistics.steps == 50
    statistics.on_start()
    batches = [torch.randn(n, 2) * 3 + 1 for n in (10, 10, 4)]
    with torch.no_grad():
        for x in batches:
            update.objective(Batch(None, x, None), START)
        inner = [method.network.bottleneck[0](x) for x in batches]  # type: ignore[index]
    torch.testing.assert_close(layer.running_mean, torch.stack([a.mean(0) for a in inner]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([a.var(0) for a in inner]).mean(0))
    assert all(torch.equal(v, kept[k]) for k, v in pair.source.state_dict().items()), "the source's are kept"
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters(), strict=True))
    assert all(m.training for m in method.modules()), "left as it was found"
    method.eval()
    x = batches[0]
    assert not torch.allclose(method.predict(x).probs, method.predict_source(x).probs)


def test_adabns_statistics_come_without_dropout_and_reach_frozen_layers() -> None:
    method = AdaBN(
        context(MLP(InputSpec("vector", (2,)), hidden=(8,), dropout=0.5), bottleneck=4, has_target_labels=False)
    )
    method.train()
    (layer,) = method.layers
    layer.eval()  # as in a frozen backbone
    x = torch.randn(20, 2)
    with torch.no_grad():
        method.estimate(Batch(None, x, None), START)
        method.eval()
        torch.testing.assert_close(
            layer.running_mean, method.network.bottleneck[0](method.network.backbone(x)).mean(0)  # type: ignore[index]
        )  # fmt: skip


def test_batchnorm_methods_say_where_there_is_none() -> None:
    for build in (AdaBN, Tent):
        with pytest.raises(ValueError, match="bottleneck=256"):
            build(context())
    model = AdaBN(with_batchnorm()).network.state_dict()
    plain = {k.replace(".target.", "."): v for k, v in model.items() if ".source." not in k}
    with pytest.raises(ValueError, match="target_labels=0"):
        AdaBN(with_batchnorm(source_model=plain, has_target_labels=True))
    for build in (Tent, SHOT):
        with pytest.raises(ValueError, match="domain_batches=separate"):
            build(with_batchnorm(domain_batches="domain_specific"))


def shifted(shift: float, share: float = 0.5, n: int = 200) -> Toy:
    """Two classes apart along the first axis; the target's lie further along it, the first with `share` of the samples."""
    draw = torch.Generator().manual_seed(0)

    def sample(y: Tensor) -> Tensor:
        noise = torch.randn(2, n, generator=draw)
        return torch.stack([2 * y - 1 + 0.25 * noise[0], 0.5 * noise[1]], 1)

    ys, yt = torch.arange(n) % 2, (torch.arange(n) >= share * n).long()
    return sample(ys), ys, sample(yt) + torch.tensor([shift, 0]), yt


def flat() -> dict[str, Any]:
    """Settings of a network that is BatchNorm between two linear layers."""
    return {"backbone": Identity(InputSpec("vector", (2,))), "bottleneck": 6, "steps": 100}


def test_adabn_undoes_other_units() -> None:
    xs, ys, xt, yt = shifted(0.0)
    toy = xs, ys, 3 * xt + torch.tensor([5.0, 4.0]), yt
    assert accuracy(AdaBN, toy, **flat()) > 0.98
    assert accuracy(SourceOnly, toy, **flat()) < 0.7


# --- Tent --------------------------------------------------------------------------------------------


def test_tent_moves_scales_and_shifts_alone_against_the_entropy() -> None:
    torch.manual_seed(0)
    method = Tent(with_batchnorm(has_target_labels=True), affine_lr=0.3, adapt_steps=7)
    phase = phase_of(method, "adapt")
    assert phase.steps == 7 and phase.parts == ("target", "target_labelled"), "the source is not read"
    (update,) = phase.updates
    (moves,) = update.moves
    assert set(moves.parameters) == set(method.network.bottleneck[1].parameters()) and moves.lr_scale == 0.3  # type: ignore[index]
    method.train()
    batch = replace(batch_of(), source=None)
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(torch.randn_like(p))
    terms = update.objective(batch, START).terms
    z = method.network.bottleneck[0](batch.target)  # type: ignore[index]
    layer = method.network.bottleneck[1]  # type: ignore[index]
    inner = layer.weight * (z - z.mean(0)) / (z.var(0, correction=0) + layer.eps).sqrt() + layer.bias
    p = method.network.head(inner.relu()).softmax(1)
    wanted = -(p * p.log()).sum(1).mean()  # with the statistics of the batch
    assert list(terms) == ["entropy"]
    torch.testing.assert_close(terms["entropy"], wanted)
    for found, expected in zip(
        gradients(terms["entropy"], moves.parameters), gradients(wanted, moves.parameters), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_tent_goes_beyond_statistics() -> None:
    """Classes of another size: the target's statistics put the border inside a class, from which entropy moves it."""
    toy = shifted(1.0, share=0.8)
    tent = accuracy(lambda c: Tent(c, affine_lr=1.0), toy, **flat())
    statistics = accuracy(lambda c: Tent(c, affine_lr=0.0), toy, **flat())
    assert tent > 0.98 and statistics < 0.96
    assert accuracy(lambda c: Tent(c, affine_lr=-1.0), toy, **flat()) < statistics, "towards more entropy"
    assert accuracy(SourceOnly, toy, **flat()) < 0.7


# --- SHOT --------------------------------------------------------------------------------------------


def test_nearest_centroids_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    method = SHOT(context(classes=3, bottleneck=5))
    x = torch.randn(40, 5).relu().double() + 0.1
    method.find_centroids(FeatureTask(None, Features(x), None))
    with torch.no_grad():
        probs = method.network.head(x.float()).softmax(1).numpy()
    features = x.numpy()
    first = np.stack([np.average(features, axis=0, weights=probs[:, k]) for k in range(3)])
    labels = cdist(features, first, "cosine").argmin(1)
    assert set(labels) == {0, 1, 2}
    second = np.stack([features[labels == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(method.centroids, second, rtol=1e-4)
    assert nearest(x.float(), method.centroids).tolist() == cdist(features, second, "cosine").argmin(1).tolist()


def test_a_class_without_samples_takes_none() -> None:
    features = torch.randn(20, 4)
    centroids = class_means(features, F.one_hot(torch.arange(20) % 2 * 2, 4).float())
    assert centroids[1].abs().max() == 0 and torch.isfinite(centroids).all()
    far = -centroids.sum(0, keepdim=True)  # where every cosine with a real centroid may be below that with zero
    assert set(nearest(torch.cat([features, far]), centroids).tolist()) <= {0, 2}


def test_shots_loss_is_information_maximisation_and_the_centroids_labels() -> None:
    torch.manual_seed(0)
    method = SHOT(context(classes=3, bottleneck=5), pseudo_weight=0.7, diversity_weight=1.3)
    phase = phase_of(method, "adapt")
    assert phase.parts == ("target", "target_labelled") and phase.refresh is not None
    assert (phase.refresh.parts, phase.refresh.every) == (["target"], None)
    moved = set(phase.updates[0].moves[0].parameters)
    assert moved == set(method.network.parameters()) - set(method.network.head.parameters()), "the classifier stays"
    method.centroids.copy_(torch.rand(3, 5))
    method.eval()
    batch = replace(batch_of(classes=3), source=None)
    terms = {name: float(value.detach()) for name, value in method.losses(batch, MIDDLE).terms.items()}
    with torch.no_grad():
        features, logits = method.network(batch.target)
    p, labels = logits.softmax(1).numpy(), cdist(features, method.centroids, "cosine").argmin(1)
    mean = p.mean(0)
    wanted = {
        "entropy": -(p * np.log(p)).sum(1).mean(),
        "diversity": 1.3 * (mean * np.log(mean)).sum(),
        "pseudo_label": -0.7 * np.log(p[np.arange(len(p)), labels]).mean(),
    }
    assert terms == pytest.approx(wanted, rel=1e-4)


def test_shots_source_phase_smooths_labels() -> None:
    method, batch = SHOT(context(classes=3), label_smoothing=0.3), batch_of(classes=3)
    assert batch.source is not None
    found = float(method.source_losses(batch, START).terms["supervised"].detach())
    with torch.no_grad():
        log_probs = method.network(batch.source.x).logits.log_softmax(1).numpy()
    soft = 0.7 * np.eye(3)[batch.source.y.numpy()] + 0.3 / 3
    assert found == pytest.approx(-(soft * log_probs).sum(1).mean(), rel=1e-5)
    with pytest.raises(ValueError, match="label_smoothing"):
        SHOT(context(), label_smoothing=1.0)


def test_shot_finds_the_classes_of_a_far_target() -> None:
    toy = shifted(1.2)
    assert accuracy(SHOT, toy) > 0.97
    assert accuracy(SourceOnly, toy) < 0.7
    assert accuracy(lambda c: SHOT(c, pseudo_weight=0.0, diversity_weight=0.0), toy) < 0.7, (
        "entropy alone: one class takes all"
    )
    assert accuracy(lambda c: SHOT(c, pseudo_weight=3.0, diversity_weight=0.0), toy) > 0.97, (
        "centroids hold the classes apart"
    )
    assert accuracy(lambda c: SHOT(c, pseudo_weight=-1.0), toy) < 0.7
    assert accuracy(lambda c: SHOT(c, diversity_weight=-1.0), toy) < 0.7


# --- self-training beats its absence -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "bound", "noise"),
    [
        (lambda c, w: PseudoLabel(c, weight=w, threshold=0.8), 0.95, (0.1, 0.3)),
        (lambda c, w: MeanTeacher(c, weight=10 * w), 0.94, (0.3, 0.3)),
        (lambda c, w: FixMatch(c, weight=w), 0.98, (0.1, 0.3)),
        (lambda c, w: FixMatch(c, weight=w, distribution_alignment=True, relative_threshold=True), 0.98, (0.1, 0.3)),
    ],
    ids=["pseudo_label", "mean_teacher", "fixmatch", "adamatch"],
)
def test_self_training_moves_the_border_into_the_gap(
    build: Callable[[Context, float], NetworkMethod], bound: float, noise: tuple[float, float]
) -> None:
    toy = shifted(0.8)

    def run(weight: float) -> float:
        return accuracy(lambda c: build(c, weight), toy, noise=noise)

    assert run(1.0) > bound
    assert run(0.0) < 0.9, "without its term"
    assert run(-1.0) < 0.9, "away from its own labels"
    assert accuracy(SourceOnly, toy) < 0.9


# --- any batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SOURCE_FREE, *WITH_SOURCE])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_small_unequal_batches_without_some_classes_give_finite_losses_and_gradients(name: str, precision: str) -> None:
    torch.manual_seed(0)
    given = context(Identity(InputSpec("vector", (2,))), classes=5, bottleneck=6, has_target_labels=False)
    method = {**SOURCE_FREE, **WITH_SOURCE}[name](given)
    if name == "shot":
        method.find_centroids(
            FeatureTask(None, Features(torch.rand(3, 6).double()), None)
        )  # fewer samples than classes
    method.train()
    batch = with_views(Batch(Labelled(torch.randn(5, 2), torch.tensor([0, 0, 3, 3, 0])), 100 * torch.randn(2, 2), None))
    for phase in method.phases():
        for update in phase.updates:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                losses = update.objective(batch, MIDDLE)
            assert all(bool(torch.isfinite(v)) and v.dtype == torch.float32 for v in losses.terms.values())
            if update.moves:
                moved = [p for m in update.moves for p in m.parameters]
                torch.stack(list(losses.terms.values())).sum().backward()
                assert all(bool(torch.isfinite(p.grad).all()) for p in moved if p.grad is not None)
                assert any(p.grad is not None for p in moved)


# --- through the command line ------------------------------------------------------------------------


def test_source_free_from_another_runs_model(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [*SMALL, "trainer.steps=10", "trainer.eval_every=10", "bottleneck=16"]
    trained = transfer("run", *short, "method=source_only")
    assert trained.code == 0, trained.err
    reference = json.loads((trained.run / "result.json").read_text())
    tasks: list[Any] = []
    original = experiment.make_session

    def watched(*arguments: Any) -> Any:
        session = original(*arguments)
        tasks.append(session.task)
        return session

    monkeypatch.setattr(experiment, "make_session", watched)
    for name in SOURCE_FREE:
        done = transfer("run", *short, "source=none", f"source_model={trained.run}", f"method={name}")
        assert done.code == 0, done.err
        result = json.loads((done.run / "result.json").read_text())
        assert result["setting"]["source_free"] is True and result["metrics"]["source_test"] is None
        assert tasks[-1].source is None and tasks[-1].source_validation is None
        events = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
        assert {e["phase"] for e in events} == {"statistics" if name == "adabn" else "adapt"}, "no phase on the source"
        model, start = (
            torch.load(run / "checkpoints" / "best.pt", weights_only=True)["method"] for run in (done.run, trained.run)
        )
        assert torch.equal(model["network.head.weight"], start["network.head.weight"]), "the classifier is the source's"
        assert (result["classes"], result["source"]) == (reference["classes"], "none")
    assert transfer("predict", str(done.run), "--dataset", "digits").code == 0
    refused = transfer("run", *SMALL, "source=none", "method=shot")
    assert refused.code == 2 and "source_model" in refused.err


@pytest.mark.parametrize("name", ["adabn", "shot", "mean_teacher"])
def test_stopped_in_the_middle_of_a_phase_they_go_on_exactly(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    chosen = [*SMALL, f"method={name}", "trainer.steps=14", "trainer.eval_every=14", "bottleneck=16", "seed=3"]
    chosen += ["method.statistics_steps=14"] if name == "adabn" else []
    expected = outcome_of(transfer("run", *chosen).run)
    with monkeypatch.context() as patch:
        stop_at(patch, 8, stream="target")  # of the statistics; between two refreshes; beside a teacher
        assert transfer("run", *chosen, "force=true").code == 143
    assert_same(transfer("run", *chosen).run, expected)


def test_granted_target_labels_add_their_term_where_the_source_is_gone(transfer: Transfer) -> None:
    done = transfer("run", *SMALL, "method=tent", "target_labels=2", "trainer.steps=10", "trainer.eval_every=10")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    terms = [set(e["values"]) for e in events if e["split"] == "train" and e["phase"] == "adapt"]
    assert terms and all({"entropy", "target_supervised"} == names for names in terms)
