"""Few target labels, and domains whose classes differ: losses, games, what they gain, and the whole path with `unknown`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL, Outcome
from test_methods import MIDDLE, batch_of, context, gradients
from torch import Tensor

from transfer_cli.backbones.vectors import MLP
from transfer_cli.config.folders import names_in, packaged_folder
from transfer_cli.data.inputs import InputSpec
from transfer_cli.data.task import LabelSpace
from transfer_cli.evaluation.metrics import classification, open_set, score
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.adversarial.dann import DANN
from transfer_cli.methods.adversarial.gradient_reversal import domain_loss
from transfer_cli.methods.base import NetworkMethod
from transfer_cli.methods.labelspaces.osbp import OSBP
from transfer_cli.methods.labelspaces.pada import PADA
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Features, FeatureTask, Labelled, Progress
from transfer_cli.methods.semisupervised.mme import MME

Transfer = Callable[..., Outcome]


def train(method: NetworkMethod, batch: Batch, steps: int, lr: float, refreshed: bool = True) -> None:
    """What the gradient loop does: the one update by momentum SGD, the target term, a refresh every 20 steps."""
    (phase,) = method.phases()
    (update,) = phase.updates
    groups = [{"params": list(m.parameters), "lr": lr * m.lr_scale} for m in update.moves]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for step in range(steps):
        if phase.refresh is not None and refreshed and step % 20 == 0:
            method.eval()
            with torch.no_grad():
                phase.refresh.fit(FeatureTask(None, Features(method.features(batch.target).double()), None))
        method.train()
        total = sum(update.objective(batch, Progress(step, steps)).terms.values())
        if batch.target_labelled is not None:
            total = total + method.supervised_loss(batch.target_labelled.x, batch.target_labelled.y)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    method.eval()


def blobs(seed: int, centres: Any, n: int, sd: float, shift: tuple[float, ...] = (0.0,)) -> tuple[Tensor, Tensor]:
    """`n` samples around each centre, all moved by `shift`; the class is the centre's number."""
    draw, y = torch.Generator().manual_seed(seed), torch.arange(len(centres)).repeat_interleave(n)
    centres = torch.as_tensor(centres)
    return centres[y] + sd * torch.randn(len(y), centres.shape[1], generator=draw) + torch.tensor(shift), y


def small(width: int, hidden: tuple[int, ...], seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return context(MLP(InputSpec("vector", (width,)), hidden=hidden), **changes)


@torch.no_grad()
def accuracies(method: NetworkMethod, x: Tensor, y: Tensor) -> list[float]:
    """Of each class."""
    guesses = method.predict(x).labels
    return [float((guesses[y == c] == c).float().mean()) for c in y.unique().tolist()]


# --- MME ------------------------------------------------------------------------------------------


def test_mme_predicts_from_directions_alone() -> None:
    method = MME(context(classes=3), temperature=0.2)
    assert method.network.head.bias is None and method.network.head.weight.shape == (3, 8)
    features = torch.randn(5, 8)
    unit = features / features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.network.head(features), unit @ method.network.head.weight.T / 0.2)
    torch.testing.assert_close(method.network.head(7 * features), method.network.head(features))
    x = torch.randn(4, 2)
    torch.testing.assert_close(
        method.predict(x).probs, method.network.head(method.features(x)).softmax(1), msg="predictions use this head"
    )


def test_mmes_classifier_raises_the_entropy_and_its_features_lower_it() -> None:
    torch.manual_seed(0)
    method, batch = MME(context(), weight=0.3), batch_of()
    losses = method.losses(batch, MIDDLE)
    assert list(losses.terms) == ["supervised", "entropy"]
    probs = method.network(batch.target).logits.softmax(1)
    entropy = -(probs * probs.log()).sum(1).mean()
    torch.testing.assert_close(losses.terms["entropy"], -0.3 * entropy)
    torch.testing.assert_close(losses.diagnostics["entropy"], entropy.detach())
    for players, sign in ((method.network.head, -1), (method.network.backbone, 1)):
        parameters = list(players.parameters())
        wanted = gradients(entropy, parameters)
        for found, w in zip(gradients(losses.terms["entropy"], parameters), wanted, strict=True):
            torch.testing.assert_close(found, sign * 0.3 * w)
            assert float(w.abs().max()) > 0
    assert batch.source is not None and batch.target_labelled is not None
    supervised = F.cross_entropy(method.network(batch.source.x).logits, batch.source.y)
    torch.testing.assert_close(losses.terms["supervised"], supervised)
    few = batch.target_labelled
    granted = F.cross_entropy(method.network.head(method.features(few.x)), few.y)
    torch.testing.assert_close(method.supervised_loss(few.x, few.y), granted)
    assert not MME.handles_target_labels, "the loop adds it"


def test_mme_gathers_a_target_with_one_label_a_class() -> None:
    def accuracy(weight: float) -> float:
        found = []
        for seed in (0, 2, 4):
            draw = torch.Generator().manual_seed(seed)
            centres, moved = 2 * torch.randn(4, 6, generator=draw), 1.8 * torch.randn(4, 6, generator=draw)
            (xs, ys), (xt, yt) = blobs(0, centres, 60, 1.0), blobs(1, centres + moved, 60, 1.0)
            one = torch.arange(4) * 60
            method = MME(small(6, (32, 32), seed, classes=4), weight=weight)
            train(method, Batch(Labelled(xs, ys), xt, Labelled(xt[one], yt[one])), 300, 0.02)
            found += accuracies(method, xt, yt)
        return sum(found) / len(found)

    assert accuracy(0.1) > 0.93
    assert accuracy(0.0) < 0.92
    assert accuracy(-0.1) < 0.88


# --- PADA -----------------------------------------------------------------------------------------


def test_pada_weighs_classes_by_what_is_predicted_of_the_whole_target() -> None:
    method = PADA(context(classes=3), refresh_every=7)
    (phase,) = method.phases()
    assert phase.refresh is not None and tuple(phase.refresh.parts) == ("target",) and phase.refresh.every == 7
    assert method.class_weights.tolist() == [1, 1, 1]
    x = torch.randn(40, 2)
    phase.refresh.fit(FeatureTask(None, Features(method.features(x).detach().double()), None))
    shares = method.network(x).logits.detach().softmax(1).mean(0)
    torch.testing.assert_close(method.class_weights, shares / shares.max())
    assert float(method.class_weights.max()) == 1.0 and not method.class_weights.requires_grad
    fresh = PADA(context(classes=3))
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.class_weights, method.class_weights), "kept in checkpoints"


def test_padas_weights_reach_both_losses_of_the_source_and_not_the_target() -> None:
    torch.manual_seed(0)
    method, batch = PADA(context(classes=3), weight=2.0, hidden=8, dropout=0.0), batch_of(classes=3)
    assert batch.source is not None
    plain = method.losses(batch, MIDDLE)
    weights = torch.tensor([1.0, 0.25, 0.0])
    method.class_weights.copy_(weights)
    losses = method.losses(batch, MIDDLE)
    of_sample = weights[batch.source.y]
    each = F.cross_entropy(method.network(batch.source.x).logits, batch.source.y, reduction="none")
    torch.testing.assert_close(losses.terms["supervised"], (of_sample * each).sum() / len(each))
    d_source, d_target = (method.discriminator(method.features(x)) for x in (batch.source.x, batch.target))
    zeros, ones = torch.zeros(12), torch.ones(12)
    of_source = F.binary_cross_entropy_with_logits(d_source, ones, weight=of_sample)
    domain = 0.5 * (of_source + F.binary_cross_entropy_with_logits(d_target, zeros))
    torch.testing.assert_close(losses.terms["domain"], domain)
    assert float(losses.diagnostics["effective_classes"]) == pytest.approx(1.25**2 / (1 + 0.25**2))
    backbone, critic = list(method.network.backbone.parameters()), list(method.discriminator.parameters())
    for players, factor in ((backbone, -2.0 * ramp(0.5)), (critic, 1.0)):
        found, wanted = gradients(losses.terms["domain"], players), gradients(domain, players)
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, factor * w)
    assert float(plain.diagnostics["effective_classes"]) == pytest.approx(3)


def test_pada_with_equal_weights_is_dann() -> None:
    options = {"weight": 0.7, "gamma": 3.0, "hidden": 8, "dropout": 0.0}
    pada, dann = PADA(context(classes=3), **options), DANN(context(classes=3), **options)
    dann.load_state_dict({k: v for k, v in pada.state_dict().items() if k != "class_weights"})
    batch = batch_of(classes=3)
    torch.testing.assert_close(dann.losses(batch, MIDDLE).terms, pada.losses(batch, MIDDLE).terms)


def test_source_weights_of_one_leave_the_domain_loss_as_it_is() -> None:
    source, target = torch.randn(6), torch.randn(9)
    assert torch.equal(domain_loss(source, target)[0], domain_loss(source, target, torch.ones(6))[0])


def test_pada_is_not_drawn_to_classes_that_the_target_lacks() -> None:
    centres = [(-2.0, 0.0), (2.0, 0.0), (0.0, 3.0), (0.0, -3.0)]
    (xs, ys), (xt, yt) = blobs(2, centres, 50, 0.4), blobs(12, centres[:2], 100, 0.4, (0.7, 1.3))

    def outcome(**options: Any) -> tuple[float, PADA]:
        settings = {"weight": 1.0, **{k: v for k, v in options.items() if k != "refreshed"}}
        method = PADA(small(2, (15,), 2, classes=4), hidden=32, dropout=0.0, discriminator_lr=1.0, **settings)
        train(method, Batch(Labelled(xs, ys), xt, None), 400, 0.01, refreshed=options.get("refreshed", True))
        return sum(accuracies(method, xt, yt)) / 2, method

    accuracy, method = outcome()
    assert accuracy > 0.98
    assert method.class_weights[:2].min() > 0.7 and method.class_weights[2:].max() < 0.2
    assert outcome(refreshed=False)[0] < 0.7, "DANN"
    assert outcome(weight=0.0)[0] < 0.96


# --- OSBP -----------------------------------------------------------------------------------------


def opened(**changes: Any) -> Any:
    return context(label_space="open", **changes)


def test_osbp_is_for_an_open_label_space() -> None:
    for setting in ("closed", "partial", "separate"):
        with pytest.raises(ValueError, match=f"needs label_space=open, .*not {setting}"):
            OSBP(context(label_space=setting))
    for threshold in (0.0, 1.0):
        with pytest.raises(ValueError, match="threshold is a probability"):
            OSBP(opened(), threshold=threshold)


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_osbps_game_is_played_over_the_probability_of_unknown(threshold: float) -> None:
    torch.manual_seed(0)
    method, batch = OSBP(opened(classes=3), weight=0.4, threshold=threshold), batch_of(classes=3)
    losses = method.losses(batch, MIDDLE)
    assert list(losses.terms) == ["supervised", "adversarial"]
    probs = method.network(batch.target).logits.softmax(1)
    assert probs.shape == (12, 4)
    unknown = probs[:, 3]
    plain = -(threshold * unknown.log() + (1 - threshold) * (1 - unknown).log()).mean()
    torch.testing.assert_close(losses.terms["adversarial"], plain)
    torch.testing.assert_close(losses.diagnostics["unknown_probability"], unknown.detach().mean())
    for player, factor in ((method.network.head, 1.0), (method.network.backbone, -0.4)):
        parameters = list(player.parameters())
        found, wanted = gradients(losses.terms["adversarial"], parameters), gradients(plain, parameters)
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, factor * w)
            assert float(w.abs().max()) > 0
    assert batch.source is not None
    supervised = F.cross_entropy(method.network(batch.source.x).logits, batch.source.y)
    torch.testing.assert_close(losses.terms["supervised"], supervised)


def test_osbp_stays_finite_where_it_is_certain() -> None:
    method, batch = OSBP(opened()), batch_of()
    with torch.no_grad():
        method.network.head.weight.mul_(1e4)
    losses = method.losses(batch, MIDDLE)
    found = gradients(sum(losses.terms.values()), list(method.network.parameters()))
    assert all(bool(g.isfinite().all()) for g in found)


def test_osbp_finds_the_unknown_behind_a_shift() -> None:
    """A third coordinate tells the domain: a classifier could call every target sample half unknown by it."""

    def outcome(weight: float) -> float:
        found = []
        for seed in range(3):
            known = [(-2.0, 0.0, 0.0), (2.0, 0.0, 0.0)]
            xs, ys = blobs(seed, known, 75, 0.4)
            xt, yt = blobs(seed + 10, [*known, (0.0, 3.0, 0.0)], 60, 0.4, (0.0, 0.0, 2.5))
            method = OSBP(small(3, (15,), seed, label_space="open"), weight=weight)
            train(method, Batch(Labelled(xs, ys), xt, None), 500, 0.003)
            with torch.no_grad():
                found.append(open_set(method.predict(xt).labels, yt, 2).get("hos", 0.0))
        return sum(found) / len(found)

    assert outcome(1.0) > 0.85
    assert outcome(0.0) < 0.8
    assert outcome(-1.0) < 0.65


# --- all three ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method_class", [MME, PADA, OSBP])
def test_classes_absent_from_a_batch_and_domains_of_unequal_size(method_class: Any) -> None:
    for domain_batches in ("joint", "separate"):
        method = method_class(opened(classes=5, bottleneck=3, domain_batches=domain_batches))
        draw = torch.Generator().manual_seed(0)
        labelled = Labelled(torch.randn(2, 2, generator=draw), torch.tensor([0, 3]))
        losses = method.losses(Batch(labelled, torch.randn(9, 2, generator=draw), None), MIDDLE)
        total = sum(losses.terms.values())
        moved = [p for m in method.phases()[0].updates[0].moves for p in m.parameters]
        assert bool(total.isfinite()) and all(bool(g.isfinite().all()) for g in gradients(total, moved))


@pytest.mark.parametrize("method_class", [MME, PADA, OSBP])
def test_what_is_moved(method_class: Any) -> None:
    method = method_class(opened())
    (update,) = method.phases()[0].updates
    moved = {m.player: set(m.parameters) for m in update.moves}
    assert moved.pop("network") == set(method.network.parameters())
    critic = set(method.discriminator.parameters()) if method_class is PADA else None
    assert moved == ({} if critic is None else {"discriminator": critic})


@pytest.mark.parametrize("method_class", [MME, PADA, OSBP])
def test_half_precision_stays_finite(method_class: Any) -> None:
    method, batch = method_class(opened()), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.losses(batch, MIDDLE)
    assert all(term.dtype == torch.float32 and bool(term.isfinite()) for term in losses.terms.values())


# --- figures with an unknown class ----------------------------------------------------------------


def test_open_set_figures_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    guesses = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0, 1])
    figures = open_set(guesses, labels, known=2)
    os_star = (3 / 4 + 1 / 2) / 2
    assert figures == pytest.approx(
        {"unknown_accuracy": 0.5, "os_star": os_star, "hos": 2 * os_star * 0.5 / (os_star + 0.5)}
    )
    assert open_set(torch.zeros(10, dtype=torch.int64), labels, 2) == pytest.approx(
        {"unknown_accuracy": 0, "os_star": 0.5, "hos": 0}
    )
    without = labels < 2
    assert set(open_set(guesses[without], labels[without], 2)) == {"os_star"}, "no sample is unknown"
    assert open_set(guesses[~without], labels[~without], 2) == {"unknown_accuracy": 0.5}
    assert open_set(torch.zeros(3), torch.full((3,), 2), 2)["unknown_accuracy"] == 0
    assert open_set(torch.tensor([1, 2]), torch.tensor([0, 2]), 2)["hos"] == 0


def test_open_set_figures_of_a_method_that_cannot_say_unknown() -> None:
    log_probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]).log()
    labels = torch.tensor([0, 1, 2])
    figures = score("classification", Prediction(log_probs=log_probs), labels, known=2)
    assert (figures["os_star"], figures["unknown_accuracy"], figures["hos"]) == (1.0, 0.0, 0.0)
    plain = score("classification", Prediction(log_probs=log_probs), labels)
    assert plain == classification(log_probs, labels) and not {"os_star", "hos"} & set(plain)
    assert {k: figures[k] for k in plain} == plain


# --- as a user ------------------------------------------------------------------------------------


@pytest.fixture
def blob_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    node = {"name": "toy_blobs", "implementation": "toys:ToyBlobs", "classes": "abc", "shift": 0.0}
    (tmp_path / "conf" / "dataset" / "toy_blobs.yaml").write_text("# a toy\n" + yaml.safe_dump(node))


BLOBS = [
    *SMALL, "plugins=[toys]", "source=toy_blobs", "target=toy_blobs", "target.shift=0.3", "backbone=mlp", "augment=none",
    "trainer.steps=40", "trainer.eval_every=20", "trainer.batch_size=16",
]  # fmt: skip


def test_osbp_from_run_to_report(transfer: Transfer, blob_data: None) -> None:
    """d is only in the target; its samples are scored as `unknown`, by every method."""
    open_pair = [*BLOBS, "target.classes=abd", "label_space=open"]
    done = transfer("run", *open_pair, "method=osbp", "trainer.steps=120")
    assert done.code == 0, done.err
    assert "classes: 2 shared (a, b), 1 only in the source (c), 1 only in the target (d)" in done.out
    assert "made for" not in done.out
    header = next(line for line in done.out.splitlines() if "accuracy" in line and "NLL" in line)
    assert header.split()[-3:] == ["OS*", "unknown", "HOS"]
    result = json.loads((done.run / "result.json").read_text())
    assert result["classes"] == ["a", "b", "c", "unknown"]
    figures = result["metrics"]["target_test"]
    assert not {"hos", "os_star"} & set(result["metrics"]["source_test"])
    assert set(result["validators"]) >= {"source_val", "im", "entropy"} and math.isfinite(result["validators"]["im"])
    with np.load(done.run / "predictions.npz") as arrays:
        labels, probs = (arrays[f"target_test_{name}"] for name in ("labels", "probs"))
        assert arrays["source_test_probs"].shape[1] == 4
    assert probs.shape[1] == 4 and set(labels) == {0, 1, 3}
    right = {c: float((probs[labels == c].argmax(1) == c).mean()) for c in (0, 1, 3)}
    assert figures["unknown_accuracy"] == pytest.approx(right[3])
    assert figures["os_star"] == pytest.approx((right[0] + right[1]) / 2)
    assert figures["hos"] > 0.6, figures
    assert (done.run / "figures" / "confusion_target_test.png").exists()
    events = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    assert all("hos" in e["values"] for e in events if e["split"] == "target_test")

    again = transfer("evaluate", str(done.run))
    assert again.code == 0 and "result.json agrees" in again.out
    told = transfer("predict", str(done.run), "--dataset", "toy_blobs", "classes=d", "shift=0.3", "--format", "jsonl")
    assert told.code == 0, told.err
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert list(rows[0]["probabilities"]) == ["a", "b", "c", "unknown"]
    assert sum(row["class"] == "unknown" for row in rows) > len(rows) / 3

    plain = transfer("run", *open_pair, "method=source_only")
    assert plain.code == 0, plain.err
    figures = json.loads((plain.run / "result.json").read_text())["metrics"]["target_test"]
    assert figures["unknown_accuracy"] == figures["hos"] == 0 and figures["os_star"] > 0.5
    shown = transfer("report")
    assert shown.code == 0 and "osbp" in shown.out


def test_pada_on_a_partial_pair(transfer: Transfer, blob_data: None) -> None:
    done = transfer("run", *BLOBS, "source.classes=abcd", "target.classes=ab", "label_space=partial", "method=pada")
    assert done.code == 0, done.err
    assert "classes: 2 shared (a, b), 2 only in the source (c, d)" in done.out and "made for" not in done.out
    events = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    spread = [e["values"]["effective_classes"] for e in events if "effective_classes" in e["values"]]
    assert spread[-1] < spread[0] <= 4
    assert "hos" not in json.loads((done.run / "result.json").read_text())["metrics"]["target_test"]
    assert transfer("evaluate", str(done.run)).code == 0


def test_mme_needs_target_labels(transfer: Transfer, blob_data: None) -> None:
    same = [*BLOBS, "method=mme"]
    refused = transfer("run", *same)
    assert refused.code == 2 and "method mme needs target labels" in refused.err
    done = transfer("run", *same, "target_labels=2")
    assert done.code == 0, done.err
    events = [json.loads(line) for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    terms = next(set(e["values"]) for e in events if e["split"] == "train")
    assert terms == {"supervised", "entropy", "target_supervised"}
    assert transfer("evaluate", str(done.run)).code == 0


def test_osbp_on_a_closed_pair_is_refused_in_one_line(transfer: Transfer, blob_data: None) -> None:
    refused = transfer("run", *BLOBS, "method=osbp")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "method 'osbp': it needs label_space=open" in refused.err


# --- what is said before training -----------------------------------------------------------------


def opening(setting: str, source: str, target: str, *methods: str) -> list[str]:
    """The lines on classes that open a run of the methods, each after the other, on a pair with those classes."""
    from types import SimpleNamespace

    from transfer_cli.announce import opening_lines
    from transfer_cli.build import Problem
    from transfer_cli.config.schema import Config
    from transfer_cli.registry import component

    chosen = {
        group: component(group, yaml.safe_load((packaged_folder() / "method" / f"{name}.yaml").read_text()))
        for group, name in zip(("method", "then"), methods, strict=False)
    }
    named = {g: SimpleNamespace(name=g, parameters={}) for g in ("source", "target", "backbone")}
    space = LabelSpace(setting, tuple(source), tuple(target))
    task = SimpleNamespace(
        source=None,
        target_unlabelled="ab",
        target_labelled=None,
        target_calibration=None,
        kind="classification",
        label_space=space,
    )
    problem = Problem(task, SimpleNamespace(target_test="ab"), ())  # type: ignore[arg-type]
    lines = opening_lines(Config(), {**named, **chosen}, problem, torch.nn.Linear(1, 1), torch.device("cpu"))  # type: ignore[dict-item]
    return [lines[1].split(", ", 2)[2], *lines[2:]] if lines[1].count(", ") > 1 else lines[2:]


def test_the_opening_names_the_classes_of_each_domain() -> None:
    assert opening("closed", "abc", "cab", "dann") == ["3 classes shared"]
    assert opening("partial", "abcdefg", "ab", "pada") == [
        "classes: 2 shared (a, b), 5 only in the source (c, d, e, f, ...)"
    ]
    assert opening("open", "abc", "bcxy", "osbp") == [
        "classes: 2 shared (b, c), 1 only in the source (a), 2 only in the target (x, y)"
    ]
    assert opening("separate", "ab", "xyz", "finetune") == [
        "3 target classes, head of its own",
        "classes: 2 only in the source (a, b), 3 only in the target (x, y, z)",
    ]
    assert opening("separate", "", "xyz", "finetune") == ["3 target classes, head of its own"]


def test_the_opening_warns_of_methods_that_expect_the_same_classes() -> None:
    of_source = "does not expect classes that are only in the source: pada is made for that"
    of_target = (
        "does not expect classes that are only in the target, and predicts none as unknown: osbp is made for that"
    )
    assert opening("partial", "abc", "ab", "dann")[1:] == [f"dann {of_source}"]
    assert opening("open", "ab", "abc", "deep_coral")[1:] == [f"deep_coral {of_target}"]
    assert opening("open", "ab", "abc", "pada")[1:] == [f"pada {of_target}"]
    assert opening("partial", "abc", "ab", "simclr", "dann")[1:] == [f"dann {of_source}"], "not simclr"
    for quiet in ("source_only", "linear_probe", "pada"):
        assert opening("partial", "abc", "ab", quiet)[1:] == []
    assert opening("separate", "ab", "xy", "simclr", "finetune")[2:] == []


def test_every_method_says_which_label_spaces_it_is_made_for() -> None:
    from transfer_cli.config.schema import LABEL_SPACES
    from transfer_cli.registry import component

    for name in names_in("method", [packaged_folder()]):
        node = yaml.safe_load((packaged_folder() / "method" / f"{name}.yaml").read_text())
        spaces = component("method", node).implementation.label_spaces  # type: ignore[attr-defined]
        assert spaces and set(spaces) <= set(LABEL_SPACES), name
    assert replace(LabelSpace("open", ("a",), ("b",)), setting="separate").overlap() == (
        "1 only in the source (a), 1 only in the target (b)"
    )
