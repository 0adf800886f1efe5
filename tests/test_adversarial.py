"""The adversarial methods: each objective against its formula, who moves what and which way, and toys that the key term solves."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Outcome
from test_methods import MIDDLE, START, Toy, batch_of, context, gradients, moons, regression, shortcut
from torch import Tensor, nn

from transfer_cli.backbones.vectors import MLP, Identity
from transfer_cli.data.inputs import InputSpec, Padded
from transfer_cli.errors import TransferError
from transfer_cli.methods.adversarial.adda import ADDA
from transfer_cli.methods.adversarial.cdan import CDAN, WIDEST, MultilinearMap, certainty
from transfer_cli.methods.adversarial.dann import DANN
from transfer_cli.methods.adversarial.gradient_reversal import domain_loss, reverse_gradient
from transfer_cli.methods.adversarial.mcd import MCD, discrepancy
from transfer_cli.methods.adversarial.mdd import MDD, log_complement
from transfer_cli.methods.adversarial.perceptron import perceptron
from transfer_cli.methods.adversarial.vada import VADA
from transfer_cli.methods.adversarial.wdgrl import WDGRL, gradient_penalty, wasserstein
from transfer_cli.methods.base import Context, NetworkMethod
from transfer_cli.methods.math.entropies import entropies
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.math.virtual_adversarial import kl_divergence, virtual_adversarial
from transfer_cli.methods.phases import Batch, Gradient, Labelled, Losses, Progress, Update
from transfer_cli.methods.running_statistics import keep_statistics

Build = Callable[[Context], NetworkMethod]

EVERY: dict[str, Build] = {
    "cdan": lambda c: CDAN(c, entropy_weighting=False, hidden=8),
    "cdan_randomised": lambda c: CDAN(replace(c, bottleneck=WIDEST), entropy_weighting=False, hidden=8, random_dim=16),
    "cdan_e": lambda c: CDAN(c, entropy_weighting=True, hidden=8),
    "adda": lambda c: ADDA(c, hidden=8, source_steps=3),
    "mcd": lambda c: MCD(c, hidden=8),
    "mcd_linear": lambda c: MCD(c, hidden=0),
    "mdd": lambda c: MDD(c, hidden=8),
    "wdgrl": lambda c: WDGRL(c, hidden=8),
    "vada": lambda c: VADA(c, hidden=8),
}


def gap(seed: int, n: int = 200) -> Toy:
    """Two blobs 4 apart; the target's are shifted by 1.5, so that one reaches into the gap where no source sample says anything."""
    draw, y = torch.Generator().manual_seed(seed), torch.arange(n) % 2

    def sample(shift: float, spread: float) -> Tensor:
        x = spread * torch.randn(n, 2, generator=draw)
        x[:, 0] += 4.0 * y - 2 + shift
        return x

    return sample(0.0, 0.3), y, sample(1.5, 0.5), y


def step(update: Update, method: nn.Module, batch: Batch, progress: Progress = MIDDLE) -> Losses:
    """One backward pass of an update, as the loop makes it."""
    losses = update.objective(batch, progress)
    method.zero_grad()
    torch.stack(list(losses.terms.values())).sum().backward()
    return losses


def play(method: NetworkMethod, batch: Batch, steps: int, lr: float) -> None:
    """All phases by momentum SGD on one batch: updates in order and with their repeats, an optimiser each."""
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
            for update in phase.updates
        ]
        method.train()
        for i in range(phase.steps or steps):
            for update, optimizer in zip(phase.updates, optimizers, strict=True):
                for _ in range(update.repeats):
                    step(update, method, batch, Progress(i, steps))
                    optimizer.step()
    method.eval()


def accuracies(build: Build, toy: Callable[[int], Toy], steps: int, seeds: int = 3) -> list[float]:
    """On the toy's target, from that many initialisations, at a rate of 0.05."""
    found, (xs, ys, xt, yt) = [], toy(0)
    for seed in range(seeds):
        torch.manual_seed(seed)
        method = build(context(MLP(InputSpec("vector", (2,)), hidden=(15,)), has_target_labels=False))
        play(method, Batch(Labelled(xs, ys), xt, None), steps, 0.05)
        with torch.no_grad():
            found.append(float((method.predict(xt).labels == yt).float().mean()))
    return found


def moved(update: Update) -> set[nn.Parameter]:
    return {p for m in update.moves for p in m.parameters}


def reached(method: nn.Module) -> set[nn.Parameter]:
    """Parameters that the last backward pass gave a gradient other than zero."""
    return {p for p in method.parameters() if p.grad is not None and float(p.grad.abs().max()) > 0}


def adapt(method: NetworkMethod) -> Gradient:
    phase = method.phases()[-1]
    assert isinstance(phase, Gradient) and phase.name == "adapt"
    return phase


def encoder(method: NetworkMethod) -> set[nn.Parameter]:
    return {*method.network.backbone.parameters(), *method.network.bottleneck.parameters()}


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name or "tracked" in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# --- every one of them ----------------------------------------------------------------------------


def updates_of(method: NetworkMethod) -> Iterator[Update]:
    for phase in method.phases():
        assert isinstance(phase, Gradient)
        if phase.on_start is not None:
            phase.on_start()
        yield from phase.updates


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_losses_and_gradients_are_finite_without_a_class_in_unequal_batches(
    name: str, precision: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    method, batch = EVERY[name](context(bottleneck=6, classes=4)), batch_of(9)
    assert batch.source is not None
    batch = replace(batch, source=Labelled(batch.source.x[:5], batch.source.y[:5]))  # classes 2 and 3 are absent
    method.train()
    for update in updates_of(method):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            losses = update.objective(batch, MIDDLE)
        method.zero_grad()
        torch.stack(list(losses.terms.values())).sum().backward()
        for value in (*losses.terms.values(), *losses.diagnostics.values()):
            assert value.ndim == 0 and bool(torch.isfinite(value))
        assert not any(value.requires_grad for value in losses.diagnostics.values())
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in method.parameters())
        trained = reached(method) & moved(update)
        assert trained and all(reached(method) & {*m.parameters} for m in update.moves), "no player stands still"


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_is_trained_once_in_an_update_and_what_is_trained_is_restored(name: str) -> None:
    torch.manual_seed(0)
    given = context(bottleneck=6)
    method, batch = EVERY[name](given), batch_of()
    trainable = {p for p in method.parameters() if p.requires_grad}
    listed = [[p for m in update.moves for p in m.parameters] for update in updates_of(method)]
    assert all(len(parameters) == len(set(parameters)) for parameters in listed)
    assert set(itertools.chain(*listed)) == trainable
    play(method, batch, 3, 0.05)
    other = EVERY[name](context(bottleneck=6))
    other.load_state_dict(method.state_dict())
    other.eval()
    assert batch.source is not None
    for predict in ("predict", "predict_source"):
        wanted, found = (getattr(m, predict)(batch.source.x).log_probs for m in (method, other))
        assert torch.equal(wanted, found)
        torch.testing.assert_close(found.exp().sum(1), torch.ones(12))


@pytest.mark.parametrize("name", EVERY)
def test_granted_target_labels_teach_the_network(name: str) -> None:
    """The loop adds them to the first update, which must then move the encoder; or the method has a term of its own."""
    method, batch = EVERY[name](context()), batch_of()
    assert batch.target_labelled is not None
    phase = adapt(method)
    assert "target_labelled" in phase.parts
    if not method.handles_target_labels:
        assert encoder(method) <= moved(phase.updates[0])
        method.supervised_loss(batch.target_labelled.x, batch.target_labelled.y).backward()
        assert encoder(method) <= reached(method)
    else:
        named = [set(update.objective(batch, MIDDLE).terms) for update in phase.updates]
        (i,) = [i for i, names in enumerate(named) if "target_supervised" in names]
        assert encoder(method) <= moved(phase.updates[i])
        without = phase.updates[i].objective(replace(batch, target_labelled=None), MIDDLE)
        assert set(without.terms) == named[i] - {"target_supervised"}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("domain_batches", ["joint", "separate"])
def test_a_step_counts_its_batch_once_in_the_running_statistics(name: str, domain_batches: str) -> None:
    method = EVERY[name](context(bottleneck=6, domain_batches=domain_batches))
    batch = replace(batch_of(), target_labelled=None)
    phase = adapt(method)
    method.train()
    for update in phase.updates:
        for _ in range(update.repeats):
            update.objective(batch, MIDDLE)
    assert isinstance(method.network.bottleneck, nn.Sequential)
    seen = int(method.network.bottleneck[1].num_batches_tracked)  # type: ignore[arg-type]
    # ADDA's encoder and discriminator each see the target, and no source sample
    assert seen == (1 if domain_batches == "joint" and name != "adda" else 2)


@pytest.mark.parametrize("name", ["adda", "wdgrl"])
def test_those_that_need_no_classes_do_regression(name: str) -> None:
    method, batch = EVERY[name](regression()), batch_of()
    assert batch.source is not None
    batch = replace(batch, source=Labelled(batch.source.x, torch.randn(12, 1)), target_labelled=None)
    play(method, batch, 3, 0.01)
    mean = method.predict(batch.target).mean
    assert mean is not None and bool(torch.isfinite(mean).all())


@pytest.mark.parametrize("name", ["adda", "wdgrl"])
def test_those_of_several_updates_run(name: str, transfer: Callable[..., Outcome]) -> None:
    outcome = transfer("run", f"method={name}", *SMALL)
    assert outcome.code == 0, outcome.err
    result = json.loads((outcome.run / "result.json").read_text())
    assert result["method"] == name and "source_test" in result["metrics"]


# --- what they share ------------------------------------------------------------------------------


def test_a_perceptron_without_hidden_units_is_linear() -> None:
    layers = perceptron(5, 0, 3, hidden_layers=2, dropout=0.5)
    assert [type(m) for m in layers] == [nn.Linear]
    deep = perceptron(5, 7, 3, hidden_layers=2)
    assert [(m.in_features, m.out_features) for m in deep if isinstance(m, nn.Linear)] == [(5, 7), (7, 7), (7, 3)]


def test_the_domain_loss_takes_weights_of_both_domains() -> None:
    source, target, a, b = torch.randn(6), torch.randn(4), torch.rand(6), torch.rand(4)
    found, _ = domain_loss(source, target, a, b)
    wanted = -(a * source.sigmoid().log()).mean() / 2 - (b * (1 - target.sigmoid()).log()).mean() / 2
    torch.testing.assert_close(found, wanted)


def test_running_statistics_can_be_left_alone() -> None:
    network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
    x, before = torch.randn(8, 2) * 3 + 1, statistics(network)
    with keep_statistics(network):
        kept = network(x)
    assert same(before, statistics(network))
    assert torch.equal(kept, network(x)) and not same(before, statistics(network)), "the batch's own either way"
    network.eval()
    with keep_statistics(network):
        evaluated = network(x)
    assert torch.equal(evaluated, network(x)), "in evaluation mode the running ones"
    with pytest.raises(RuntimeError), keep_statistics(network):
        raise RuntimeError
    assert network[1].track_running_stats


# --- CDAN -----------------------------------------------------------------------------------------


def test_the_multilinear_map_is_the_outer_product_or_its_projection() -> None:
    f, g = torch.randn(5, 3), torch.rand(5, 4)
    plain = MultilinearMap(3, 4, 7)
    wanted = np.stack([np.outer(q, p).ravel() for p, q in zip(f.numpy(), g.numpy(), strict=True)])
    assert plain.width == 12
    np.testing.assert_allclose(plain(f, g), wanted, rtol=1e-6)
    assert not MultilinearMap(WIDEST // 4, 4, 7).randomised
    wide = MultilinearMap(WIDEST // 4 + 1, 4, 20_000)
    assert wide.randomised and wide.width == 20_000
    assert set(wide.state_dict()) == {"features", "classes"} and not list(wide.parameters())
    f = torch.randn(2, WIDEST // 4 + 1)
    projected = wide(f, g[:2])
    products = (f @ f.T) * (g[:2] @ g[:2].T)  # of the outer products, which the projection keeps on average
    np.testing.assert_allclose(projected @ projected.T, products, rtol=0, atol=0.06 * float(products.max()))


def test_entropy_weights_favour_certain_samples_and_average_one() -> None:
    entropy = torch.tensor([0.0, 0.3, 1.0])
    weights = certainty(entropy)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights[0] / weights[2], 2 / (1 + torch.exp(torch.tensor(-1.0))))
    # the reversed gradient: descending it makes predictions certain
    entropy.requires_grad_()
    (certainty(reverse_gradient(entropy, 1.0)) * torch.tensor([0.4, 0.7, 2.0])).mean().backward()
    assert entropy.grad is not None and bool((entropy.grad > 0).all())


@pytest.mark.parametrize("entropy_weighting", [False, True])
def test_cdan_plays_against_its_discriminator(entropy_weighting: bool) -> None:
    torch.manual_seed(0)
    given = context(classes=3)
    method = CDAN(given, entropy_weighting=entropy_weighting, weight=3.0, gamma=4.0, hidden=8, dropout=0.0)
    batch = batch_of(classes=3)
    assert batch.source is not None
    losses = method.losses(batch, MIDDLE)

    logits, weights = [], []
    for x in (batch.source.x, batch.target):
        f, out = method.network(x)
        g = out.softmax(1)
        logits.append(method.discriminator(torch.einsum("bk,bd->bkd", g.detach(), f).flatten(1)))
        h = -(g * g.log()).sum(1)
        w = 1 + torch.exp(-h) if entropy_weighting else torch.ones(12)
        weights.append(w / w.detach().mean())
    every = torch.cat([torch.ones(12), torch.zeros(12)])
    each = F.binary_cross_entropy_with_logits(torch.cat(logits), every, reduction="none")
    plain = (torch.cat(weights) * each).mean()
    torch.testing.assert_close(losses.terms["domain"], plain)
    strength = 3.0 * ramp(0.5, 4.0)
    shared, critic = list(method.network.backbone.parameters()), list(method.discriminator.parameters())
    for found, wanted in zip(gradients(losses.terms["domain"], shared), gradients(plain, shared), strict=True):
        torch.testing.assert_close(found, -strength * wanted)
    for found, wanted in zip(gradients(losses.terms["domain"], critic), gradients(plain, critic), strict=True):
        torch.testing.assert_close(found, wanted)
    head = torch.autograd.grad(losses.terms["domain"], [method.network.head.weight], allow_unused=True)[0]
    if entropy_weighting:
        (wanted,) = gradients(plain, [method.network.head.weight])
        torch.testing.assert_close(head, -strength * wanted)
    else:
        assert head is None, "g is held fixed in the map"


@pytest.mark.parametrize("entropy_weighting", [False, True])
def test_cdan_leaves_the_shortcut(entropy_weighting: bool) -> None:
    def cdan(weight: float) -> Build:
        return lambda c: CDAN(
            c, entropy_weighting=entropy_weighting, weight=weight, hidden=32, dropout=0.0, discriminator_lr=1.0
        )

    assert min(accuracies(cdan(1.0), shortcut, 200, 2)) > 0.9
    assert max(accuracies(cdan(0.0), shortcut, 200, 2)) < 0.75
    assert max(accuracies(cdan(-1.0), shortcut, 200, 1)) < 0.75


# --- ADDA -----------------------------------------------------------------------------------------


def test_addas_phases_follow_the_setting() -> None:
    assert [(p.name, p.predicts) for p in ADDA(context()).phases()] == [("source", False), ("adapt", True)]
    trained = copy.deepcopy(ADDA(context()).network.state_dict())
    method = ADDA(context(source_model=trained))
    assert [p.name for p in method.phases()] == ["adapt"]
    with pytest.raises(ValueError, match="BatchNorm"):
        ADDA(context(domain_batches="domain_specific"))


def test_addas_losses_are_cross_entropies_with_true_and_inverted_labels() -> None:
    method, batch = ADDA(context(), hidden=8), batch_of()
    assert batch.source is not None
    encode, discriminate = adapt(method).updates
    d = [method.discriminator(method.network(x).features) for x in (batch.source.x, batch.target)]
    labels = torch.cat([torch.ones(12), torch.zeros(12)])
    found = discriminate.objective(batch, MIDDLE).terms["domain"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(torch.cat(d), labels))
    found = encode.objective(batch, MIDDLE).terms["encoder"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(d[1], torch.ones(12)))


def test_addas_players_move_themselves_alone_and_against_each_other() -> None:
    torch.manual_seed(0)
    method, batch = ADDA(context(bottleneck=6), hidden=8), batch_of()
    encode, discriminate = adapt(method).updates
    assert moved(encode) == encoder(method) and moved(discriminate) == set(method.discriminator.parameters())
    step(discriminate, method, batch)
    assert reached(method) == set(method.discriminator.parameters())

    assert batch.source is not None

    def logits() -> tuple[float, float]:
        features = [method.source(batch.source.x, "source").features, method.network.features(batch.target)]
        return tuple(float(method.discriminator(f).mean().detach()) for f in features)

    def descend(update: Update) -> None:
        step(update, method, batch)
        with torch.no_grad():
            for p in moved(update):
                p -= 0.01 * p.grad

    start = logits()
    descend(encode)
    assert logits()[1] > start[1], "the target is to pass for the source"
    start = logits()
    descend(discriminate)
    assert logits()[0] - logits()[1] > start[0] - start[1], "the discriminator parts them"


def test_addas_source_network_stays_as_the_first_phase_left_it() -> None:
    torch.manual_seed(0)
    method, batch = ADDA(context(bottleneck=6), hidden=8, source_steps=4, encoder_lr=1.0), batch_of()
    play(method, batch, 5, 0.05)
    torch.manual_seed(0)
    alone = ADDA(context(bottleneck=6), hidden=8, source_steps=4)
    source = alone.phases()[0]
    alone.phases = lambda: [source]  # type: ignore[method-assign]
    play(alone, batch, 5, 0.05)
    kept, wanted, now = method.source.module.state_dict(), alone.network.state_dict(), method.network.state_dict()
    assert same(dict(kept), dict(wanted)), "weights and BatchNorm statistics"
    assert not method.source.train().module.training
    changed = {name for name in now if not torch.equal(now[name], kept[name])}
    assert {"backbone.layers.0.0.weight", "bottleneck.1.running_mean"} <= changed
    assert not changed & {"head.weight", "head.bias"}
    assert batch.source is not None
    wanted_there = alone.network.predict(batch.source.x, "source").log_probs
    assert torch.equal(method.predict_source(batch.source.x).log_probs, wanted_there)


def test_adda_brings_the_shifted_blobs_back() -> None:
    def adda(encoder_lr: float) -> Build:
        return lambda c: ADDA(c, hidden=32, encoder_lr=encoder_lr, source_steps=100)

    assert min(accuracies(adda(0.1), gap, 300)) > 0.98
    assert max(accuracies(adda(0.0), gap, 300)) < 0.96


@pytest.mark.parametrize(
    ("build", "player"),
    [
        (lambda c: DANN(c, discriminator_lr=3.0), "discriminator"),
        (lambda c: CDAN(c, entropy_weighting=True, discriminator_lr=3.0), "discriminator"),
        (lambda c: ADDA(c, discriminator_lr=3.0), "discriminator"), (lambda c: VADA(c, discriminator_lr=3.0), "discriminator"),
        (lambda c: WDGRL(c, critic_lr=3.0), "critic"),
    ],
)  # fmt: skip
def test_the_adversary_has_a_rate_of_its_own(build: Build, player: str) -> None:
    scales = {m.player: m.lr_scale for u in adapt(build(context())).updates for m in u.moves}
    assert scales[player] == 3.0 and len(scales) == 2


@pytest.mark.parametrize("build", [lambda c: DANN(c, dropout=0.3), lambda c: MDD(c, dropout=0.3)])
def test_dropout_is_the_adversarys(build: Build) -> None:
    found = [m.p for m in build(context()).modules() if isinstance(m, nn.Dropout)]
    assert 0.3 in found


# --- MCD ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [0, 8])
def test_mcds_updates_are_those_of_the_paper(hidden: int) -> None:
    torch.manual_seed(0)
    method, batch = MCD(context(classes=3), weight=2.0, generator_steps=3, hidden=hidden), batch_of(classes=3)
    assert batch.source is not None
    first, second = method.network.head, method.second_head
    heads = {*first.parameters(), *second.parameters()}
    weights = zip(first.parameters(), second.parameters(), strict=True)
    assert not any(torch.equal(p, q) for p, q in weights if p.ndim > 1)
    a, b, c = adapt(method).updates
    assert [u.repeats for u in (a, b, c)] == [1, 1, 3]
    assert moved(a) == heads | encoder(method) and moved(b) == heads and moved(c) == encoder(method)

    f_s, f_t = (method.network.features(x) for x in (batch.source.x, batch.target))
    on_s, on_t = zip(
        *(head(torch.cat([f_s, f_t])).split([len(f_s), len(f_t)]) for head in (first, second)), strict=True
    )
    supervised = sum(F.cross_entropy(logits, batch.source.y) for logits in on_s)
    p, q = (logits.detach().softmax(1).numpy() for logits in on_t)
    apart = torch.tensor(np.abs(p - q).sum() / p.size)
    torch.testing.assert_close(step(a, method, batch).terms, {"supervised": supervised})
    losses = step(b, method, batch)
    torch.testing.assert_close(losses.terms, {"heads_supervised": supervised, "heads_discrepancy": -2 * apart})
    torch.testing.assert_close(losses.diagnostics, {"discrepancy": apart})
    assert reached(method) == heads, "features are not even differentiated"
    torch.testing.assert_close(step(c, method, batch).terms, {"features_discrepancy": 2 * apart})


def test_mcds_heads_part_and_its_features_bring_them_together() -> None:
    torch.manual_seed(0)
    method, batch = MCD(context(), weight=5.0, hidden=8), batch_of()

    def apart() -> Tensor:
        return discrepancy(method.log_probs(method.network.features(batch.target))).detach()

    for update, direction in zip(adapt(method).updates[1:], (1, -1), strict=True):
        before, losses = apart(), update.objective(batch, MIDDLE).terms
        method.zero_grad()
        next(value for name, value in losses.items() if "discrepancy" in name).backward()
        with torch.no_grad():
            for p in moved(update):
                p -= 0.01 * p.grad
        assert direction * (apart() - before) > 0


def test_mcd_predicts_the_mean_of_both_heads_and_labels_teach_both() -> None:
    method, x, y = MCD(context(classes=3), hidden=4), torch.randn(7, 2), torch.arange(7) % 3
    method.eval()
    features = method.network.features(x)
    logits = [head(features) for head in (method.network.head, method.second_head)]
    mean = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    torch.testing.assert_close(method.predict(x).probs, mean)
    torch.testing.assert_close(method.supervised_loss(x, y), sum(F.cross_entropy(z, y) for z in logits))


def test_mcd_draws_the_target_out_of_the_gap() -> None:
    def mcd(weight: float) -> Build:
        return lambda c: MCD(c, weight=weight, hidden=0)

    assert min(accuracies(mcd(1.0), gap, 150)) > 0.98
    assert max(accuracies(mcd(0.0), gap, 150)) < 0.96
    assert max(accuracies(mcd(-1.0), gap, 150, 1)) < 0.96
    with pytest.raises(ValueError, match="generator_steps"):
        MCD(context(), generator_steps=0)


@pytest.mark.parametrize("domain_batches", ["joint", "separate", "domain_specific"])
def test_mcds_heads_normalise_as_the_network_does(domain_batches: str) -> None:
    torch.manual_seed(0)
    method, batch = MCD(context(classes=3, domain_batches=domain_batches), hidden=8), batch_of(classes=3)
    assert batch.source is not None
    norms = [m for m in method.second_head.modules() if isinstance(m, nn.BatchNorm1d)]
    assert len(norms) == (4 if domain_batches == "domain_specific" else 2)
    a, b, c = adapt(method).updates
    before = [n.running_mean.clone() for n in norms]  # type: ignore[union-attr]
    for update in (b, c):
        step(update, method, batch)
    assert all(torch.equal(n.running_mean, old) for n, old in zip(norms, before, strict=True))  # type: ignore[arg-type]
    with torch.no_grad():
        f_s, f_t = (method.network.features(x) for x in (batch.source.x, batch.target))
        seen = [method.second_head[0](f) for f in (f_s, f_t)]
    step(a, method, batch)
    means = {"joint": [0.1 * torch.cat(seen).mean(0)], "separate": [0.09 * seen[0].mean(0) + 0.1 * seen[1].mean(0)]}
    wanted = means.get(domain_batches, [0.1 * z.mean(0) for z in seen])
    firsts = [n for n in norms if n.num_features == 8][:: 2 if domain_batches != "domain_specific" else 1][
        : len(wanted)
    ]
    for norm, mean in zip(firsts, wanted, strict=True):
        torch.testing.assert_close(norm.running_mean, mean)
    method.eval()
    by_domain = [method.predict(batch.target, domain).probs for domain in ("source", "target")]
    assert torch.equal(*by_domain) == (domain_batches != "domain_specific")


# --- MDD ------------------------------------------------------------------------------------------


def test_the_log_of_the_complement_is_exact_and_finite_for_any_certainty() -> None:
    logits, y = 4 * torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5
    wanted = torch.log(1 - logits.softmax(1)[torch.arange(6), y])
    torch.testing.assert_close(log_complement(logits, y), wanted)
    assert torch.autograd.gradcheck(lambda z: log_complement(z, y), logits.requires_grad_())
    certain = torch.tensor([[1e4, 0.0, 0.0], [-1e4, 0.0, 0.0]], requires_grad=True)
    found = log_complement(certain, torch.tensor([0, 0]))
    found.sum().backward()
    torch.testing.assert_close(found, torch.tensor([-1e4 + np.log(2), 0.0], dtype=torch.float32))
    assert certain.grad is not None and bool(torch.isfinite(certain.grad).all())


def test_mdd_plays_against_its_adversary() -> None:
    torch.manual_seed(0)
    method, batch = (
        MDD(context(classes=3), weight=3.0, margin=2.5, gamma=4.0, hidden=8, dropout=0.0),
        batch_of(classes=3),
    )
    assert batch.source is not None
    losses = method.losses(batch, MIDDLE)
    source, target = (method.network(x) for x in (batch.source.x, batch.target))
    rows = torch.arange(12)
    on_source = method.adversary(source.features).softmax(1)[rows, source.logits.argmax(1)]
    on_target = method.adversary(target.features).softmax(1)[rows, target.logits.argmax(1)]
    disparity = torch.log(1 - on_target).mean() + 2.5 * torch.log(on_source).mean()  # D, which the adversary raises
    torch.testing.assert_close(losses.terms["disparity"], -disparity)
    strength = 3.0 * ramp(0.5, 4.0)
    shared, adversary = list(method.network.backbone.parameters()), list(method.adversary.parameters())
    term = losses.terms["disparity"]
    for found, wanted in zip(gradients(term, shared), gradients(disparity, shared), strict=True):
        torch.testing.assert_close(found, strength * wanted)
    for found, wanted in zip(gradients(term, adversary), gradients(disparity, adversary), strict=True):
        torch.testing.assert_close(found, -wanted)
    head = torch.autograd.grad(term, list(method.network.head.parameters()), allow_unused=True)
    assert all(g is None for g in head), "its labels carry no gradient"
    share = (method.adversary(target.features).argmax(1) != target.logits.argmax(1)).float().mean()
    torch.testing.assert_close(losses.diagnostics["disagreement"], share)
    at_start = gradients(method.losses(batch, START).terms["disparity"], shared)
    assert all(float(g.abs().max()) == 0 for g in at_start)


def test_mdd_draws_the_target_out_of_the_gap() -> None:
    def mdd(weight: float) -> Build:
        return lambda c: MDD(c, weight=weight, hidden=16, dropout=0.0)

    assert min(accuracies(mdd(1.0), gap, 300)) > 0.97
    assert max(accuracies(mdd(0.0), gap, 300)) < 0.96
    assert max(accuracies(mdd(-1.0), gap, 300, 1)) < 0.96


# --- WDGRL ----------------------------------------------------------------------------------------


class LinearCritic(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def test_the_penalty_and_the_distance_of_a_linear_critic() -> None:
    critic = LinearCritic(torch.tensor([3.0, 4.0]))
    source, target = torch.randn(7, 2), torch.randn(4, 2)
    penalty = gradient_penalty(source, target, critic)
    assert float(penalty.detach()) == pytest.approx((5 - 1) ** 2)
    (found,) = torch.autograd.grad(penalty, critic.w)
    torch.testing.assert_close(found, 2 * (5 - 1) * critic.w.detach() / 5)
    gap = (source.mean(0) - target.mean(0)) @ critic.w
    torch.testing.assert_close(wasserstein(source, target, critic), gap)
    half = [x.bfloat16() for x in (source, target)]
    with torch.autocast("cpu", torch.bfloat16):
        assert wasserstein(*half, critic).dtype == gradient_penalty(*half, critic).dtype == torch.float32


def test_the_penalty_looks_at_the_features_and_between_pairs_and_can_be_differentiated_twice() -> None:
    seen: list[Tensor] = []
    critic = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    critic[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    source = torch.randn(7, 2, dtype=torch.float64)
    target = source[:4] + torch.tensor([1.0, 0.0], dtype=torch.float64)

    def penalty() -> Tensor:
        torch.manual_seed(3)  # the same points between the pairs
        return gradient_penalty(source, target, critic)

    (found,) = torch.autograd.grad(penalty(), critic[0].weight)
    between = seen[0][11:] - source[:4]
    assert torch.equal(seen[0][:11], torch.cat([source, target])) and len(between) == 4
    assert bool((between[:, 0] > 0).all() and (between[:, 0] < 1).all()) and float(between[:, 1].abs().max()) < 1e-12
    with torch.no_grad():
        for i in range(critic[0].weight.numel()):
            flat, values = critic[0].weight.view(-1), []
            for change in (1e-6, -2e-6):
                flat[i] += change
                with torch.enable_grad():
                    values.append(float(penalty().detach()))
            flat[i] += 1e-6
            assert float(found.view(-1)[i]) == pytest.approx((values[0] - values[1]) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("penalty", [10.0, 100.0])
def test_the_critic_finds_the_wasserstein_distance_of_a_shift(penalty: float) -> None:
    torch.manual_seed(0)
    source = torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
    target = source + torch.tensor([2.0, -1.0, 2.0])  # moved by 3, and no plan of transport is cheaper
    method = WDGRL(context(Identity(InputSpec("vector", (3,)))), hidden=32, penalty=penalty)
    update = adapt(method).updates[0]
    optimizer = torch.optim.Adam(method.critic.parameters(), lr=0.01)
    batch = Batch(Labelled(source, torch.zeros(128).long()), target, None)
    for _ in range(250):
        losses = step(update, method, batch)
        optimizer.step()
    # a slope of s gives 3 s - γ (s - 1)², which is largest at s = 1 + 3 / (2 γ)
    assert -float(losses.terms["critic"].detach()) == pytest.approx(3 * (1 + 3 / (2 * penalty)), rel=0.03)


def test_wdgrls_players_move_themselves_alone_and_against_each_other() -> None:
    torch.manual_seed(0)
    method, batch = WDGRL(context(bottleneck=6), weight=0.7, penalty=4.0, critic_steps=3, hidden=8), batch_of()
    assert batch.source is not None
    critic, network = adapt(method).updates
    assert critic.repeats == 3 and network.repeats == 1
    assert moved(critic) == set(method.critic.parameters()) and moved(network) == set(method.network.parameters())
    losses = step(critic, method, batch)
    assert reached(method) <= set(method.critic.parameters())
    source, target = method.network.both(batch.source.x, batch.target)
    distance = method.critic(source.features).mean() - method.critic(target.features).mean()
    torch.testing.assert_close(losses.terms["critic"], -distance)
    losses = network.objective(batch, MIDDLE)
    torch.testing.assert_close(losses.terms["wasserstein"], 0.7 * distance)
    torch.testing.assert_close(losses.diagnostics["wasserstein_distance"], distance)
    torch.testing.assert_close(losses.terms["supervised"], F.cross_entropy(source.logits, batch.source.y))


def test_wdgrl_leaves_the_shortcut() -> None:
    def wdgrl(weight: float) -> Build:
        return lambda c: WDGRL(c, weight=weight, hidden=16)

    assert min(accuracies(wdgrl(0.1), shortcut, 150, 2)) > 0.9
    assert max(accuracies(wdgrl(0.0), shortcut, 150, 2)) < 0.75
    assert max(accuracies(wdgrl(-0.1), shortcut, 150, 1)) < 0.75
    with pytest.raises(ValueError, match="critic_steps"):
        WDGRL(context(), critic_steps=0)


# --- VADA -----------------------------------------------------------------------------------------


def test_the_kl_divergence() -> None:
    p, q = torch.randn(5, 4), torch.randn(5, 4)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    torch.testing.assert_close(kl_divergence(p, q), wanted)
    assert float(kl_divergence(p, p).abs().max()) < 1e-6


def test_the_adversarial_direction_of_a_logistic_model_is_its_weight() -> None:
    w, radius = torch.tensor([0.6, -0.8, 0.0, 2.0], dtype=torch.float64), 0.3

    def logits_of(*inputs: Tensor) -> list[Tensor]:
        seen.append([x.detach() for x in inputs])
        return [torch.stack([x @ w, torch.zeros(len(x), dtype=x.dtype)], 1) for x in inputs]

    seen: list[list[Tensor]] = []
    inputs = [torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)]
    losses = virtual_adversarial(logits_of, inputs, radius)
    for x, moved_to, loss in zip(inputs, seen[-1], losses, strict=True):
        r = moved_to - x
        torch.testing.assert_close(r.square().mean(1).sqrt(), torch.full((len(x),), radius, dtype=x.dtype))
        torch.testing.assert_close((r @ w).abs(), r.norm(dim=1) * w.norm())  # along w, one way or the other
        torch.testing.assert_close(loss, kl_divergence(logits_of(x)[0], logits_of(x + r)[0]))


def test_the_adversarial_direction_is_worse_than_chance_and_only_the_perturbed_pass_is_trained() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 4))
    x, passes = torch.randn(64, 20), []

    def logits_of(x: Tensor) -> list[Tensor]:
        passes.append(x.detach())
        return [network(x)]

    (loss,) = virtual_adversarial(logits_of, [x], 0.1)
    noise = F.normalize(torch.randn_like(x)) * 0.1 * 20**0.5
    by_chance = kl_divergence(network(x), network(x + noise))
    assert loss.detach().mean() > 5 * by_chance.detach().mean()
    wanted = kl_divergence(network(x).detach(), network(passes[-1]))
    torch.testing.assert_close(loss, wanted)
    parameters = list(network.parameters())
    for a, b in zip(gradients(loss.mean(), parameters), gradients(wanted.mean(), parameters), strict=True):
        torch.testing.assert_close(a, b)
    assert all(p.grad is None for p in parameters)


def test_a_prediction_that_nothing_changes_is_not_perturbed() -> None:
    passes: list[Tensor] = []

    def logits_of(x: Tensor) -> list[Tensor]:
        passes.append(x.detach())
        return [x * 0 + torch.tensor([1e4, 0.0])]

    x = torch.randn(3, 2)
    (loss,) = virtual_adversarial(logits_of, [x], 0.5)
    assert torch.equal(passes[-1], x) and float(loss.abs().max()) == 0


def test_half_precision_still_sees_the_small_step() -> None:
    torch.manual_seed(0)
    network, x = nn.Linear(20, 4), torch.randn(64, 20)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(virtual_adversarial(lambda x: [network(x)], [x], 0.1)[0].detach().mean())
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_clean_and_perturbed_samples_are_normalised_in_the_same_company() -> None:
    torch.manual_seed(0)
    for domain_batches in ("joint", "separate"):
        method, batch = VADA(context(bottleneck=6, domain_batches=domain_batches), radius=0.0, hidden=8), batch_of()
        terms = method.losses(batch, MIDDLE).terms
        assert float(terms["source_smoothness"].detach()) == pytest.approx(0, abs=1e-6)
        assert float(terms["target_smoothness"].detach()) == pytest.approx(0, abs=1e-6)


def test_sequences_cannot_be_perturbed() -> None:
    padded = Padded(torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TransferError, match="sequences"):
        virtual_adversarial(lambda x: [x.values.sum(1)], [padded], 0.1)


def test_vadas_terms_and_players() -> None:
    torch.manual_seed(0)
    weights = {"domain_weight": 0.3, "source_weight": 0.5, "target_weight": 0.7}
    method, batch = VADA(context(), hidden=8, radius=0.2, **weights), batch_of()
    assert batch.source is not None
    network, discriminate = adapt(method).updates
    assert moved(network) == set(method.network.parameters())
    assert moved(discriminate) == set(method.discriminator.parameters())
    torch.manual_seed(1)
    terms = network.objective(batch, MIDDLE).terms
    torch.manual_seed(1)
    on_source, on_target = virtual_adversarial(method.logits, (batch.source.x, batch.target), 0.2)
    source, target = (method.network(x) for x in (batch.source.x, batch.target))
    d = torch.cat([method.discriminator(o.features) for o in (source, target)])
    labels = torch.cat([torch.ones(12), torch.zeros(12)])
    torch.testing.assert_close(
        terms,
        {
            "supervised": F.cross_entropy(source.logits, batch.source.y),
            "domain": 0.3 * F.binary_cross_entropy_with_logits(d, 1 - labels),
            "source_smoothness": 0.5 * on_source.mean(),
            "target_smoothness": 0.7 * on_target.mean(),
            "target_entropy": 0.7 * entropies(target.logits).mean(),
        },
    )
    losses = step(discriminate, method, batch)
    torch.testing.assert_close(losses.terms, {"discriminator": F.binary_cross_entropy_with_logits(d, labels)})
    assert reached(method) == set(method.discriminator.parameters())


def test_vada_turns_the_moons_back_and_drives_the_boundary_out_of_the_blobs() -> None:
    def vada(domain: float, target: float, radius: float = 0.1) -> Build:
        return lambda c: VADA(
            c, domain_weight=domain, source_weight=target, target_weight=target, radius=radius, hidden=32
        )

    assert accuracies(vada(1.0, 0.1), moons, 400, 1)[0] > 0.87
    assert accuracies(vada(0.0, 0.1), moons, 300, 1)[0] < 0.82
    assert min(accuracies(vada(0.0, 0.3), gap, 200)) > 0.97
    assert max(accuracies(vada(0.0, 0.0), gap, 200)) < 0.96
    assert max(accuracies(vada(0.0, -0.3), gap, 100, 1)) < 0.96
