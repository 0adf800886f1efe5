"""Translation between domains: its networks, its losses against formulas, who moves when, and images that it helps to classify."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Outcome
from test_methods import context
from test_resume import assert_same, outcome_of, stop_at
from torch import Tensor

from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.evaluator import PICTURED
from transfer_cli.methods.generative.cycada import CyCADA, judged
from transfer_cli.methods.generative.translator import GREY_LEVEL, PatchCritic, Translator, critic_loss, verdict
from transfer_cli.methods.phases import Batch, Labelled, Losses, Progress, Update
from transfer_cli.run_folder import RunFolder

Transfer = Callable[..., Outcome]
MIDDLE = Progress(50, 100)
SIDE, CLASSES = 12, 3


def cycada(channels: int = 1, seed: int = 0, changes: dict[str, Any] | None = None, **hyperparameters: Any) -> CyCADA:
    torch.manual_seed(seed)
    spec = InputSpec("image", (channels, SIDE, SIDE))
    built = context(SmallCNN(spec, widths=(8, 16), features=16), CLASSES, domain_batches="separate", input=spec)
    small = {"width": 16, "blocks": 1, "critic_width": 16, "hidden": 16, **hyperparameters}
    return CyCADA(replace(built, **(changes or {})), **small)


def away_from_the_start(method: CyCADA) -> CyCADA:
    """Translations that are not the identity, and a labeller that is its network's copy."""
    for translator in (method.to_target, method.to_source):
        torch.nn.init.normal_(translator.last.weight, std=0.05)
    method.keep_labeller()
    return method.train()


def batch_of(n: int = 8, m: int = 6, channels: int = 1, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x_s, x_t = (torch.rand(k, channels, SIDE, SIDE, generator=draw) for k in (n, m))
    return Batch(Labelled(x_s, torch.randint(CLASSES, (n,), generator=draw)), x_t, None)


def updates(method: CyCADA) -> dict[str, Update]:
    source, translate, adapt = method.phases()
    named = dict(zip(("translators", "critics"), translate.updates, strict=True))
    return {"source": source.updates[0], **named, "adapt": adapt.updates[0]}


# --- the networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 9, 14)])
def test_a_translator_starts_at_the_identity_but_for_a_grey_level(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    translator, x = Translator(shape[0], CLASSES, width=8, blocks=2), torch.rand(5, *shape)
    found = translator(x, F.one_hot(torch.arange(5) % CLASSES, CLASSES).float())
    torch.testing.assert_close(found, x.clamp(GREY_LEVEL, 1 - GREY_LEVEL))
    assert float((found - x).detach().abs().max()) <= GREY_LEVEL + 1e-6


def test_a_translation_depends_on_the_class_and_stays_an_image() -> None:
    torch.manual_seed(0)
    translator, x = Translator(1, CLASSES, width=8, blocks=1), torch.rand(1, 1, 16, 16).expand(3, -1, -1, -1)
    torch.nn.init.normal_(translator.last.weight, std=3.0)
    each = translator(x, torch.eye(CLASSES))
    assert float(each.detach().min()) >= 0 and float(each.detach().max()) <= 1
    assert not torch.allclose(each[0], each[1]) and not torch.allclose(each[1], each[2])
    probability = torch.tensor([[0.2, 0.3, 0.5]])
    torch.testing.assert_close(
        translator.embedding(probability)[0], probability[0] @ translator.embedding(torch.eye(CLASSES))
    )


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_a_critic_judges_patches_and_judged_leaves_its_weights_alone(norm: Any) -> None:
    torch.manual_seed(0)
    critic, x = PatchCritic(3, 8, norm).eval(), torch.rand(2, 3, 16, 20, requires_grad=True)
    logits = critic(x)
    assert logits.shape == (2, 1, 4, 5)
    (wanted,) = torch.autograd.grad(logits.square().sum(), x)
    judged(critic, x).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    assert all(p.grad is None for p in critic.parameters())


def test_a_patch_is_18_pixels_wide() -> None:
    critic = PatchCritic(1, 4, "spectral").eval()
    x = torch.rand(1, 1, 48, 48, requires_grad=True)
    critic(x)[0, 0, 6, 6].backward()
    assert x.grad is not None
    seen = x.grad[0, 0].abs().sum(0).nonzero()
    assert int(seen.max() - seen.min()) + 1 == 18


def test_verdicts_are_the_two_games() -> None:
    real, fake = torch.randn(4, 1, 2, 2), torch.randn(6, 1, 2, 2)
    ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
    found, accuracy = critic_loss(real, fake, "least_squares")
    torch.testing.assert_close(found, 0.5 * F.mse_loss(real, ones) + 0.5 * F.mse_loss(fake, zeros))
    assert float(accuracy) == pytest.approx(float((real > 0.5).sum()) / 32 + float((fake <= 0.5).sum()) / 48)
    torch.testing.assert_close(verdict(fake, True, "least_squares"), F.mse_loss(fake, torch.ones_like(fake)))

    found, accuracy = critic_loss(real, fake, "non_saturating")
    bce = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(found, 0.5 * bce(real, ones) + 0.5 * bce(fake, zeros))
    assert float(accuracy) == pytest.approx(float((real > 0).sum()) / 32 + float((fake <= 0).sum()) / 48)
    torch.testing.assert_close(verdict(fake, True, "non_saturating"), -fake.sigmoid().log().mean())


# --- the losses -----------------------------------------------------------------------------------


def test_the_translators_losses_are_their_formulas() -> None:
    method = away_from_the_start(cycada(adversarial=0.7, cycle=3.0, semantic=0.4))
    batch = batch_of()
    found = updates(method)["translators"].objective(batch, MIDDLE).terms
    assert batch.source is not None
    x_s, y_s, x_t = batch.source.x, batch.source.y, batch.target
    network = copy.deepcopy(method.network).eval()
    p_t, c_s = network(x_t).logits.softmax(1).detach(), torch.eye(CLASSES)[y_s]
    x_st, x_ts = method.to_target(x_s, c_s), method.to_source(x_t, p_t)
    game = (method.target_critic(x_st) - 1).square().mean() + (method.source_critic(x_ts) - 1).square().mean()
    back = (method.to_source(x_st, c_s) - x_s).abs().mean() + (method.to_target(x_ts, p_t) - x_t).abs().mean()
    log_s, log_t = network(x_st).logits.log_softmax(1), network(x_ts).logits.log_softmax(1)
    meaning = -log_s[range(8), y_s].mean() - log_t[range(6), p_t.argmax(1)].mean()
    wanted = {"adversarial": 0.7 * game, "cycle": 3 * back, "semantic": 0.4 * meaning}
    torch.testing.assert_close(found, wanted)
    translators = [*method.to_target.parameters(), *method.to_source.parameters()]
    for name, value in wanted.items():  # and so are their gradients
        slopes = (torch.autograd.grad(v, translators, retain_graph=True) for v in (found[name], value))
        for got, formula in zip(*slopes, strict=True):
            torch.testing.assert_close(got, formula, atol=1e-5, rtol=1e-3)


def test_the_task_network_learns_from_translations_with_their_labels() -> None:
    method, batch = away_from_the_start(cycada(feature_weight=0.0)), batch_of()
    assert batch.source is not None
    x_s, y_s = batch.source.x, batch.source.y
    found = updates(method)["adapt"].objective(batch, MIDDLE)
    translated = method.to_target(x_s, torch.eye(CLASSES)[y_s]).detach()
    wanted = F.cross_entropy(method.network(translated).logits, y_s)
    assert set(found.terms) == {"supervised"}
    torch.testing.assert_close(found.terms["supervised"], wanted)
    assert not torch.allclose(wanted, F.cross_entropy(method.network(x_s).logits, y_s))


def gradients(losses: Losses, term: str, method: CyCADA) -> dict[str, Tensor]:
    method.zero_grad(set_to_none=True)
    losses.terms[term].backward(retain_graph=True)
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("game", ["least_squares", "non_saturating"])
def test_critics_part_the_logits_and_translators_raise_those_of_translations(game: Any) -> None:
    """By a small step of either."""
    for player in ("critics", "translators"):
        method, batch = away_from_the_start(cycada(game=game, cycle=0.0, semantic=0.0)), batch_of()
        for critic in (method.target_critic, method.source_critic):
            assert critic.layers[-1].bias is not None
            torch.nn.init.constant_(critic.layers[-1].bias, 0.5)  # type: ignore[arg-type]

        def logits(method: CyCADA = method, batch: Batch = batch) -> tuple[float, float]:
            assert batch.source is not None and batch.target is not None
            x_s, y_s, x_t = batch.source.x, batch.source.y, batch.target
            with torch.no_grad():
                x_st = method.to_target(x_s, method.known(y_s))
                x_ts = method.to_source(x_t, method.believed(x_t))
                real = method.target_critic(x_t).mean() + method.source_critic(x_s).mean()
                return float(real), float(method.target_critic(x_st).mean() + method.source_critic(x_ts).mean())

        real, translated = logits()
        update = updates(method)[player]
        optimizer = torch.optim.SGD([p for move in update.moves for p in move.parameters], lr=1e-3)
        torch.stack(list(update.objective(batch, MIDDLE).terms.values())).sum().backward()
        optimizer.step()
        real_after, translated_after = logits()
        if player == "critics":
            assert real_after - translated_after > real - translated + 1e-5
        else:
            assert real_after == real and translated_after > translated + 1e-5


def test_features_of_translations_are_aligned_by_a_reversed_gradient() -> None:
    method, batch = away_from_the_start(cycada(feature_weight=0.5, gamma=4.0, dropout=0.0)), batch_of()
    assert batch.source is not None
    losses = updates(method)["adapt"].objective(batch, MIDDLE)
    found = gradients(losses, "domain", method)
    translated = method.to_target(batch.source.x, method.known(batch.source.y)).detach()
    source, target = method.network.both(translated, batch.target)
    logits = method.discriminator(source.features), method.discriminator(target.features)
    plain = 0.5 * (F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean())
    torch.testing.assert_close(losses.terms["domain"], plain)
    strength = 0.5 * (2 / (1 + np.exp(-4 * 0.5)) - 1)
    for name, p in method.named_parameters():
        if name.startswith(("network.backbone", "discriminator")):
            (direct,) = torch.autograd.grad(plain, p, retain_graph=True)
            factor = -strength if name.startswith("network") else 1.0
            torch.testing.assert_close(found[name], factor * direct, rtol=1e-3, atol=1e-6)
    assert not any(name.startswith(("to_", "labeller", "target_critic", "source_critic")) for name in found)


# --- who moves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_each_update_moves_its_players_alone(norm: str) -> None:
    method, batch = away_from_the_start(cycada(critic_norm=norm)), batch_of()
    players = {
        "source": {"network"},
        "translators": {"to_target", "to_source"},
        "critics": {"target_critic", "source_critic"},
        "adapt": {"network", "discriminator"},
    }
    for name, update in updates(method).items():
        before = {key: p.detach().clone() for key, p in method.named_parameters()}
        moved = {id(p) for move in update.moves for p in move.parameters}
        method.zero_grad(set_to_none=True)
        sum(update.objective(batch, MIDDLE).terms.values()).backward()  # type: ignore[union-attr]
        with_gradient = {key for key, p in method.named_parameters() if p.grad is not None}
        assert {key.split(".")[0] for key in with_gradient} == players[name], "gradients that no one needs cost time"
        assert {id(p) for key, p in method.named_parameters() if key in with_gradient} == moved
        torch.optim.SGD([p for move in update.moves for p in move.parameters], lr=0.1).step()
        changed = {key.split(".")[0] for key, p in method.named_parameters() if not torch.equal(p, before[key])}
        assert changed == players[name], name


def test_the_labeller_is_the_source_network_and_stays_it() -> None:
    method, batch = cycada(), batch_of()
    source, translate, adapt = method.phases()
    assert [p.name for p in (source, translate, adapt)] == ["source", "translate", "adapt"]
    assert not translate.predicts and translate.on_start is not None
    translate.on_start()
    kept = {name: value.clone() for name, value in method.labeller.state_dict().items()}
    for name, value in method.network.state_dict().items():
        assert torch.equal(kept[f"module.{name}"], value)
    method.train()
    for update in (*translate.updates, *adapt.updates):
        sum(update.objective(batch, MIDDLE).terms.values()).backward()  # type: ignore[union-attr]
    now = method.labeller.state_dict()
    assert all(torch.equal(now[name], value) for name, value in kept.items()), "its BatchNorm statistics too"
    skipped = cycada(changes={"source_model": method.network.state_dict()})
    assert [p.name for p in skipped.phases()] == ["translate", "adapt"]


def test_rates_and_steps_are_as_configured() -> None:
    method = cycada(generator_lr=0.3, critic_lr=0.4, feature_discriminator_lr=5.0, translate_steps=7, adapt_steps=9)
    scales = {name: [m.lr_scale for m in update.moves] for name, update in updates(method).items()}
    assert scales == {"source": [1.0], "translators": [0.3], "critics": [0.4], "adapt": [1.0, 5.0]}
    assert [phase.steps for phase in method.phases()] == [None, 7, 9]


# --- what batches may be --------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["least_squares", "non_saturating"])
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_absent_classes_unequal_batches_and_half_precision_are_finite(game: Any, precision: Any) -> None:
    method, batch = away_from_the_start(cycada(channels=3, game=game)), batch_of(2, 5, channels=3)
    assert batch.source is not None
    batch = replace(
        batch, source=Labelled(batch.source.x.round(), torch.zeros(2, dtype=torch.int64))
    )  # black and white
    for name, update in updates(method).items():
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            losses = update.objective(batch, MIDDLE)
        method.zero_grad(set_to_none=True)
        sum(losses.terms.values()).backward()  # type: ignore[union-attr]
        assert all(bool(torch.isfinite(value)) for value in losses.terms.values()), name
        assert name == "adapt" or all(value.dtype == torch.float32 for value in losses.terms.values()), name
        assert all(bool(torch.isfinite(p.grad).all()) for p in method.parameters() if p.grad is not None), name


def test_what_it_cannot_do_is_said() -> None:
    for spec in (InputSpec("vector", (2,)), InputSpec("image", (1, 4, 4)), None):
        with pytest.raises(TransferError, match="cycada translates images of at least 8 pixels a side"):
            CyCADA(context(input=spec))
    with pytest.raises(ValueError, match="width and critic_width"):
        cycada(width=0)
    with pytest.raises(ValueError, match="adapt_steps are at least 1"):
        cycada(adapt_steps=0)
    with pytest.raises(ValueError, match="BatchNorm"):
        cycada(changes={"domain_batches": "domain_specific"}, feature_weight=0.0)
    cycada(changes={"domain_batches": "domain_specific"})


# --- a pair that translation helps ----------------------------------------------------------------


def bars(n: int, ground: float, contrast: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lying and standing bars, somewhere, with a little noise."""
    y, rows = torch.arange(n) % 2, torch.arange(SIDE)
    middle = torch.randint(3, SIDE - 3, (2, n, 1), generator=draw)
    across = ((rows - middle[0]).abs() <= 3)[:, None, :] & ((rows - middle[1]).abs() <= 1)[:, :, None]
    shape = torch.where(y[:, None, None] == 0, across, across.mT).float()
    noise = 0.03 * torch.randn(n, 1, SIDE, SIDE, generator=draw)
    return (ground + contrast * shape[:, None] + noise).clamp(0, 1), y


def play(method: CyCADA, steps: dict[str, int], lr: float = 1e-3, size: int = 48) -> dict[str, float]:
    """The method's phases on bright bars on black and, as the target, on grey; the target accuracy after each."""
    draw = torch.Generator().manual_seed(0)
    (x_s, y_s), (x_t, y_t) = bars(192, 0.1, 0.8, draw), bars(192, 0.5, 0.35, draw)
    accuracy = {}
    for phase in method.phases():
        if phase.on_start is not None:
            phase.on_start()
        groups = [[{"params": m.parameters, "lr": lr * m.lr_scale} for m in update.moves] for update in phase.updates]
        optimizers = [torch.optim.Adam(group) for group in groups]
        method.train()
        for step in range(steps[phase.name]):
            i, j = torch.randint(192, (2, size), generator=draw)
            batch = Batch(Labelled(x_s[i], y_s[i]), x_t[j] if "target" in phase.parts else None, None)
            for update, optimizer in zip(phase.updates, optimizers, strict=True):
                terms = update.objective(batch, Progress(step, steps[phase.name])).terms
                method.zero_grad(set_to_none=True)
                torch.stack(list(terms.values())).sum().backward()
                optimizer.step()
        method.eval()
        with torch.no_grad():
            accuracy[phase.name] = float((method.predict(x_t).labels == y_t).float().mean())
            accuracy[f"{phase.name} on source"] = float((method.predict_source(x_s).labels == y_s).float().mean())
    return accuracy


def translated_bars(**changes: float) -> dict[str, float]:
    """Pixels alone. The labeller is at a loss on grey, so its term weighs little."""
    chosen = {"feature_weight": 0.0, "semantic": 0.1, "generator_lr": 2.0, "critic_lr": 1.0, **changes}
    return play(cycada(**chosen), {"source": 100, "translate": 150, "adapt": 80})


def test_translations_teach_what_the_source_does_not() -> None:
    accuracy = translated_bars()
    assert accuracy["source"] < 0.7, "the source alone"
    assert accuracy["adapt"] > 0.9 and accuracy["adapt on source"] > 0.95
    assert translated_bars(adversarial=0.0)["adapt"] < 0.7, "without critics to fool it stays the source"


# --- as a user meets it ---------------------------------------------------------------------------

QUICK = [*SMALL, "method=cycada", "method.width=8", "method.critic_width=8", "method.blocks=1"]
PHASES = ["method.source_steps=5", "method.translate_steps=6", "method.adapt_steps=7"]


def test_pictures_of_translations_are_kept_and_drawn(transfer: Transfer) -> None:
    run = transfer("run", *QUICK, *PHASES).run
    with np.load(run / "examples.npz") as arrays:
        pictures = {name: arrays[name] for name in arrays.files if "/" in name}
    assert list(pictures) == [
        *(f"source to target/{row}" for row in ("source", "translated", "and back")),
        *(f"target to source/{row}" for row in ("target", "translated", "and back")),
    ]
    assert all(x.shape == (PICTURED, 1, 16, 16) and x.dtype == np.uint8 for x in pictures.values())
    kept = torch.load(run / "checkpoints" / "best.pt", weights_only=True)["method"]
    translator = Translator(1, 10, width=8, blocks=1)
    translator.load_state_dict({k.removeprefix("to_target."): v for k, v in kept.items() if k.startswith("to_target.")})
    x = torch.from_numpy(pictures["source to target/source"]).float() / 255
    guessed = torch.from_numpy(pictures["source to target/translated"]).float() / 255
    with torch.no_grad():
        each = torch.stack([translator(x, F.one_hot(torch.full((PICTURED,), k), 10).float()) for k in range(10)])
    low, high = each.amin(0) - 0.05, each.amax(0) + 0.05  # of a mixture of classes
    assert float(((guessed >= low) & (guessed <= high)).float().mean()) > 0.9
    assert (run / "figures" / "translations.png").read_bytes().startswith(b"\x89PNG")
    other = transfer("run", *SMALL, "method=source_only").run
    assert not (other / "figures" / "translations.png").exists()


def test_the_picture_is_a_row_a_name_and_a_column_a_sample(tmp_path: Path) -> None:
    from transfer_cli.report.figures import _mosaic, _pictures

    red = np.zeros((3, 3, 8, 8), np.uint8)
    red[:, 0] = 200
    grey = np.full((3, 1, 8, 8), 7, np.uint8)
    np.savez(tmp_path / "examples.npz", target_test=grey, **{"a/one": red, "a/two": grey, "b/one": grey})
    panels = _pictures(RunFolder(tmp_path))
    assert {panel: list(rows) for panel, rows in panels.items()} == {"a": ["one", "two"], "b": ["one"]}
    mosaic, middles = _mosaic(list(panels["a"].values()))
    assert mosaic.shape == (8 + 1 + 8, 3 * 8 + 2, 3) and middles == [3.5, 12.5]
    assert mosaic[0, 0].tolist() == [200, 0, 0] and mosaic[16, 25].tolist() == [7, 7, 7]
    assert mosaic[8, 0].tolist() == mosaic[0, 8].tolist() == [255, 255, 255]


def test_it_resumes_exactly_in_the_middle_of_every_phase(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [*QUICK, *PHASES, "method.critic_norm=spectral", "trainer.log_every=4"]
    whole = transfer("run", *chosen).run
    expected, examples = outcome_of(whole), (whole / "examples.npz").read_bytes()
    places = []
    for call, extra in ((3, ["force=true"]), (5, []), (6, [])):
        with monkeypatch.context() as patch:
            stop_at(patch, call)
            assert transfer("run", *chosen, *extra).code == 143
        position = torch.load(whole / "checkpoints" / "last.pt", weights_only=True)["position"]
        places.append((position["phase"], position["step"]))
    assert [phase for phase, _ in places] == [0, 1, 2] and all(step > 0 for _, step in places)
    assert_same(transfer("run", *chosen).run, expected)
    assert (whole / "examples.npz").read_bytes() == examples


def test_vectors_are_refused_in_one_line(transfer: Transfer) -> None:
    outcome = transfer("run", "source=two_moons", "target=two_moons", "backbone=mlp", "method=cycada", "device=cpu")
    assert outcome.code == 2 and "cycada translates images" in outcome.err and len(outcome.err.splitlines()) == 1


def test_the_defaults_of_the_yaml_are_the_constructors() -> None:
    import inspect

    import yaml

    path = Path(__file__).parent.parent / "conf" / "method" / "cycada.yaml"
    keys = yaml.safe_load(path.read_text())
    defaults = {
        name: p.default
        for name, p in inspect.signature(CyCADA.__init__).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    assert {k: v for k, v in keys.items() if k not in ("name", "implementation", "search")} == defaults
    assert set(keys["search"]) <= set(defaults)
