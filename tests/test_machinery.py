"""What phases may ask for, what methods share, chains of methods and starting from another run: each as documented."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import Outcome
from test_identity import GOLDEN, identity_of
from test_methods import context
from test_resume import assert_same, outcome_of, stop_at
from torch import Tensor, nn

from transfer_cli import experiment
from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.backbones.torchvision import Torchvision
from transfer_cli.build import build_method, pose_problem
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.schema import Config
from transfer_cli.data.batching import in_order
from transfer_cli.data.inputs import InputSpec
from transfer_cli.methods.adversarial.mcd import MCD
from transfer_cli.methods.base import Context, Method, Needs, Network, NetworkMethod
from transfer_cli.methods.domain_batchnorm import DomainBatchNorm, DomainSwitch
from transfer_cli.methods.math.entropies import entropies, marginal_entropy
from transfer_cli.methods.math.ramps import gaussian_ramp, ramp
from transfer_cli.methods.phases import Batch, FeatureTask, Gradient, Losses, Moves, Progress, Refresh, Update
from transfer_cli.methods.teacher import FrozenTeacher, Teacher

Transfer = Callable[..., Outcome]

TINY = [
    "experiment=smoke", "device=cpu", "threads=1", "source.n=640", "source.n_test=100", "subset.source=200",
    "subset.target=150", "subset.test=60", "backbone.widths=[4,8]", "backbone.features=16", "trainer.steps=10",
    "trainer.batch_size=32", "trainer.eval_every=10", "trainer.log_every=2", "trainer.checkpoint_every=100",
]  # fmt: skip
CPU = torch.device("cpu")


# --- methods of a plugin: this module -------------------------------------------------------------

SEEN: list[Any] = []
"""What the methods below were given, in order; a test empties it."""


class Watched(NetworkMethod):
    """Two gradient-trained parts and a figure that is looked up anew from time to time, on which the loss depends."""

    needs = Needs(source_labels=True, target_inputs=True)
    handles_target_labels = True
    centre: Tensor

    def __init__(
        self,
        context: Context,
        *,
        every: int | None = None,
        parts: str = "target",
        pull: float = 0.1,
        first_steps: int = 0,
    ) -> None:
        super().__init__(context)
        self.every, self.parts, self.pull, self.first_steps = every, parts.split("+"), pull, first_steps
        self.register_buffer("centre", torch.zeros(self.network.feature_dim))

    def phases(self) -> list[Gradient]:
        update = Update(self.losses, [Moves.of(self.network)])
        refresh = Refresh(self.look, self.parts, self.every)
        adapt = Gradient("adapt", [update], refresh=refresh, on_start=lambda: SEEN.append("start"))
        first = Gradient(
            "first", [Update(self.losses, [Moves.of(self.network)])], steps=self.first_steps, predicts=False
        )
        return [first, adapt] if self.first_steps else [adapt]

    def look(self, task: FeatureTask) -> None:
        weights = {key: value.clone() for key, value in self.state_dict().items()}
        SEEN.append({"task": task, "training": self.training, "weights": weights})
        part = next(p for p in (task.target, task.source, task.target_labelled) if p is not None)
        self.centre.copy_(part.x.mean(0))

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None and self.training and self.network.backbone.training
        SEEN.append(progress.step)
        source, target = self.network.both(batch.source.x, batch.target)
        pulled = self.pull * (target.features.mean(0) - self.centre).square().sum()
        return Losses({"supervised": self.network.supervised(source.logits, batch.source.y), "pull": pulled})


class Statistics(NetworkMethod):
    """Trains nothing."""

    needs = Needs(target_inputs=True)

    def phases(self) -> list[Gradient]:
        return [Gradient("look", [Update(self.losses, [], repeats=2)], parts=("target",))]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        logits = self.network(batch.target).logits
        SEEN.append((torch.is_grad_enabled(), logits.requires_grad))
        return Losses({"entropy": entropies(logits).mean()})


class Viewed(NetworkMethod):
    """Asks for several views."""

    needs = Needs(source_labels=True, target_inputs=True)
    handles_target_labels = True
    uses_strong = True

    def phases(self) -> list[Gradient]:
        views = {"source": ("weak", "weak"), "target": ("weak", "strong", "weak"), "target_labelled": ("strong",)}
        return [Gradient("view", [Update(self.losses, [Moves.of(self.network)])], views=views)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        SEEN.append(batch)
        return Losses({"supervised": self.network.supervised(self.network(batch.source.x).logits, batch.source.y)})


class Slopes(NetworkMethod):
    """Gradients that are known: in step n (from 1) n · 3 for `network`, n · 4 for `critic`, and none for `idle`."""

    needs = Needs(target_inputs=True)

    def __init__(self, context: Context, *, scale: float = 1.0) -> None:
        super().__init__(context)
        self.scale = scale
        self.one, self.other = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.critic, self.idle = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(2))

    def phases(self) -> list[Gradient]:
        first = [
            Moves([self.one]),
            Moves([self.other], lr_scale=0.1),
            Moves([self.critic], player="critic"),
            Moves([self.idle], player="idle"),
        ]
        second = [Moves([self.critic], player="late")]
        return [
            Gradient("slide", [Update(self.slide, first), Update(self.again, second, repeats=3)], parts=("target",))
        ]

    def slide(self, batch: Batch, progress: Progress) -> Losses:
        n = self.scale * (progress.step + 1)
        total = n * (3 * math.sqrt(0.5) * (self.one - self.other) + self.critic.sum()).sum()
        return Losses({"slope": total})

    def again(self, batch: Batch, progress: Progress) -> Losses:
        return Losses({"late": self.scale * 0.25 * self.critic.sum()})


@pytest.fixture
def plugin(tmp_path: Path) -> list[str]:
    """Overrides under which the methods above have names of their own."""
    SEEN.clear()
    (tmp_path / "conf" / "method").mkdir(parents=True)
    for kind in (Watched, Statistics, Viewed, Slopes):
        node: dict[str, Any] = {"name": kind.__name__.lower(), "implementation": f"{__name__}:{kind.__name__}"}
        if kind is Watched:
            node |= {"every": None, "parts": "target", "pull": 0.1, "first_steps": 0}
        if kind is Slopes:
            node |= {"scale": 1.0}
        (tmp_path / "conf" / "method" / f"{node['name']}.yaml").write_text("# A plugin's\n" + yaml.safe_dump(node))
    return [*TINY, f"plugins=[{__name__}]"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(experiment, "draw_figures", lambda folder: None)
    monkeypatch.chdir(tmp_path)


def events(run: Path, split: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["split"] == split]


def state_of(run: Path, name: str = "last.pt") -> dict[str, Any]:
    kept = torch.load(run / "checkpoints" / name, weights_only=True)
    return kept["parts"]["method"] if name == "last.pt" else kept["method"]


def config_of(*overrides: str) -> Config:
    return typed(composed([*TINY, *overrides]))


def fresh(config: Config) -> Method:
    """The method as a run of the configuration begins with it."""
    components = resolve_components(config)
    shape = pose_problem(config, components).task.shape
    return build_method(config, components, shape, CPU)


def one_line(outcome: Outcome, *said: str) -> None:
    assert outcome.code == 2, outcome.out
    assert outcome.err.startswith("transfer: ") and len(outcome.err.splitlines()) == 1, outcome.err
    for words in said:
        assert words in outcome.err, outcome.err


# --- refreshes ------------------------------------------------------------------------------------


def test_a_refresh_comes_before_step_0_and_every_so_many(transfer: Transfer, plugin: list[str]) -> None:
    assert transfer("run", *plugin, "method=watched", "method.every=4").code == 0
    told = ["look" if isinstance(seen, dict) else seen for seen in SEEN]
    assert told == ["start", "look", 0, 1, 2, 3, "look", 4, 5, 6, 7, "look", 8, 9]


@pytest.mark.parametrize(("parts", "every"), [("target", 135 // 32), ("source+target", 180 // 32)])
def test_a_refresh_comes_once_a_pass_over_the_largest_part(
    transfer: Transfer, plugin: list[str], parts: str, every: int
) -> None:
    assert transfer("run", *plugin, "method=watched", f"method.parts={parts}").code == 0
    looks = [SEEN[i + 1] for i, seen in enumerate(SEEN) if isinstance(seen, dict)]
    assert looks == list(range(0, 10, every))


def test_a_refresh_sees_features_of_whole_parts_in_evaluation_mode_and_unaugmented(
    transfer: Transfer, plugin: list[str]
) -> None:
    chosen = [
        *plugin,
        "method=watched",
        "method.every=7",
        "method.parts=source+target+target_labelled",
        "target_labels=2",
    ]
    assert transfer("run", *chosen).code == 0
    config = typed(composed(chosen))
    components = resolve_components(config)
    task = pose_problem(config, components).task
    looks = [seen for seen in SEEN if isinstance(seen, dict)]
    assert len(looks) == 2 and not any(look["training"] for look in looks)
    method = build_method(config, components, task.shape, CPU)
    for look in looks:
        method.load_state_dict(look["weights"])
        method.eval()
        for name, part in (
            ("source", task.source),
            ("target", task.target_unlabelled),
            ("target_labelled", task.target_labelled),
        ):
            with torch.no_grad(), closing(in_order(part.inputs, 512, CPU, 0)) as batches:
                wanted = torch.cat([method.features(x).double() for x in batches])
            found = getattr(look["task"], name)
            assert found.x.dtype == torch.float64 and torch.equal(found.x, wanted)
            assert (found.y is None) if name == "target" else torch.equal(found.y, part.labels)


def test_a_refresh_is_given_only_the_parts_it_names(transfer: Transfer, plugin: list[str]) -> None:
    assert transfer("run", *plugin, "method=watched", "method.parts=source", "target_labels=1").code == 0
    task = next(seen for seen in SEEN if isinstance(seen, dict))["task"]
    assert task.source is not None and task.target is None and task.target_labelled is None


@pytest.mark.parametrize("stop", [3, 5, 8])  # at, right after, and long after a refresh before step 4
def test_a_run_interrupted_between_refreshes_goes_on_exactly(
    transfer: Transfer, plugin: list[str], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    chosen = [*plugin, "method=watched", "method.every=4"]
    expected = outcome_of(transfer("run", *chosen).run)
    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        assert transfer("run", *chosen, "force=true").code == 143
    SEEN.clear()
    assert_same(transfer("run", *chosen).run, expected)
    assert "start" not in SEEN, "a phase starts once"


def test_what_a_refresh_finds_decides_the_loss(transfer: Transfer, plugin: list[str]) -> None:
    """Or the tests above would hold for one that does nothing."""
    found = [
        events(transfer("run", *plugin, "method=watched", f"method.every={every}").run, "train")[-1]["values"]["pull"]
        for every in (2, 100)
    ]
    assert found[0] != found[1]


def test_numbers_of_steps_below_one_are_refused(transfer: Transfer, plugin: list[str]) -> None:
    one_line(transfer("run", *plugin, "method=watched", "method.every=0"), "phase 'adapt' is refreshed every 0 steps")
    one_line(transfer("run", *plugin, "method=watched", "method.first_steps=-3"), "phase 'first' runs for -3 steps")
    assert not SEEN


# --- updates that move nothing, phases that predict nothing, views -------------------------------


def test_an_update_without_moves_leaves_all_but_batchnorm_statistics(transfer: Transfer, plugin: list[str]) -> None:
    done = transfer("run", *plugin, "method=statistics", "trainer.clip_norm=1")
    assert done.code == 0, done.err
    assert SEEN == [(False, False)] * 20
    before, after = fresh(typed(composed([*plugin, "method=statistics"]))).state_dict(), state_of(done.run)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    statistics = {key for key in before if "running_" in key or key.endswith("num_batches_tracked")}
    assert changed == statistics and statistics
    assert all(int(after[key]) == 20 for key in statistics if key.endswith("num_batches_tracked"))
    assert events(done.run, "train") and not events(done.run, "diagnostics")


def test_a_phase_that_cannot_predict_is_not_evaluated(
    transfer: Transfer, plugin: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Watched.predict

    def predict(self: Watched, x: Any) -> Any:
        assert "start" in SEEN, "asked to predict before its last phase began"
        return original(self, x)

    monkeypatch.setattr(Watched, "predict", predict)
    done = transfer("run", *plugin, "method=watched", "method.first_steps=6", "trainer.eval_every=3")
    assert done.code == 0, done.err
    assert {event["phase"] for event in events(done.run, "train")} == {"first", "adapt"}
    for split in ("validators", "target_test", "health"):
        assert [(e["phase"], e["step"]) for e in events(done.run, split)] == [("adapt", 6 + n) for n in (3, 6, 9, 10)]


def test_views_are_what_the_phase_asked_for(transfer: Transfer, plugin: list[str]) -> None:
    chosen = [*plugin, "method=viewed", "target_labels=2", "trainer.steps=3"]
    assert transfer("run", *chosen).code == 0
    for batch in SEEN:
        assert set(batch.views) == {"source", "target"}, "one view alone is the batch itself"
        assert [len(views) for views in batch.views.values()] == [2, 3]
        assert batch.views["source"][0] is batch.source.x and batch.views["target"][0] is batch.target
        for views in batch.views.values():
            assert all(view.shape == views[0].shape for view in views)
            assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i]), "each its own draw"
    both = SEEN.copy()
    SEEN.clear()
    assert transfer("run", *chosen, "augment=none", "strong=none").code == 0
    for batch in SEEN:
        assert all(torch.equal(view, views[0]) for views in batch.views.values() for view in views), (
            "of the same samples"
        )
    assert not torch.equal(both[0].target_labelled.x, SEEN[0].target_labelled.x), (
        "a strong view, though it is one alone"
    )
    raw = SEEN.copy()
    SEEN.clear()
    assert transfer("run", *chosen, "augment=none").code == 0
    for plain, batch in zip(raw, SEEN, strict=True):
        weak, strong, last = batch.views["target"]
        assert torch.equal(weak, plain.target) and torch.equal(last, plain.target)
        assert not torch.equal(strong, plain.target)
        assert torch.equal(batch.source.x, plain.source.x)


@pytest.mark.parametrize("method", ["fixmatch", "dann"])
def test_strong_is_part_of_a_run_where_the_method_has_strong_views_and_only_there(method: str) -> None:
    used = method == "fixmatch"
    config = typed(composed([f"method={method}"]))
    assert ("strong" in resolve_components(config)) is used
    basis = identity_of(f"method={method}")
    assert (identity_of(f"method={method}", "strong=photo") != basis) is used
    assert (identity_of(f"method={method}", "strong.rotate=5") != basis) is used
    assert (
        identity_of("method=source_only", f"then={method}", "strong=photo")
        != identity_of("method=source_only", f"then={method}")
    ) is used


def test_a_runs_configuration_keeps_strong_only_where_it_is_used(transfer: Transfer, plugin: list[str]) -> None:
    for method, used in (("viewed", True), ("statistics", False)):
        done = transfer("run", *plugin, f"method={method}", "trainer.steps=2")
        kept = yaml.safe_load((done.run / "config.yaml").read_text())
        assert (
            bool(kept["strong"]) is used
            and bool(json.loads((done.run / "manifest.json").read_text())["components"].get("strong")) is used
        )
    one_line(
        transfer("run", *plugin, "method=viewed", "strong=digits_stong"),
        "no strong named 'digits_stong'. Did you mean 'digits_strong'?",
    )


# --- BatchNorm of each domain's own ---------------------------------------------------------------


def small_network(**changes: Any) -> Network:
    torch.manual_seed(0)
    backbone = SmallCNN(InputSpec("image", (1, 16, 16)), widths=(4, 8), features=8)
    return Network(context(backbone, classes=3, domain_batches="domain_specific", bottleneck=5, **changes))


def pairs(module: nn.Module) -> list[DomainBatchNorm]:
    return [m for m in module.modules() if isinstance(m, DomainBatchNorm)]


def test_each_domain_has_statistics_of_its_own() -> None:
    network = small_network()
    assert len(pairs(network)) == 4, "of both blocks, the projection and the bottleneck"
    plain = Network(
        context(SmallCNN(InputSpec("image", (1, 16, 16)), widths=(4, 8), features=8), classes=3, bottleneck=5)
    )
    assert not pairs(plain) and plain.switch is None
    layer = pairs(network)[0]
    start = layer.target.running_mean.clone()
    source, target = torch.rand(9, 1, 16, 16), torch.rand(7, 1, 16, 16) * 0.1
    network.train()
    network(source, "source")
    assert not torch.equal(layer.source.running_mean, start) and torch.equal(layer.target.running_mean, start)
    after_source = layer.source.running_mean.clone()
    network(target)
    assert torch.equal(layer.source.running_mean, after_source) and not torch.equal(layer.target.running_mean, start)
    for pair in pairs(network):
        assert not torch.equal(pair.source.running_mean, pair.target.running_mean)
    network.eval()
    x = torch.rand(4, 1, 16, 16)
    as_source, as_target = network.both(x, x)
    assert not torch.allclose(as_source.logits, as_target.logits)
    torch.testing.assert_close(as_target.logits, network(x).logits)
    torch.testing.assert_close(as_source.logits, network(x, "source").logits)
    assert torch.equal(network.predict(x, "source").log_probs, as_source.logits.log_softmax(1))


def test_each_domains_layers_are_plain_batchnorm_of_its_batches() -> None:
    network = small_network()
    source, target = torch.rand(9, 1, 16, 16), torch.rand(7, 1, 16, 16) * 0.1
    alone = copy.deepcopy(network)
    network.train()
    alone.train()
    network(source, "source")
    network(target, "target")
    network.eval()
    alone(target, "target")
    alone.eval()
    torch.testing.assert_close(network(target).logits, alone(target).logits)
    assert not torch.allclose(network(target, "source").logits, alone(target, "source").logits)


def test_a_copy_of_a_network_switches_itself_alone() -> None:
    network = small_network()
    copied = copy.deepcopy(network)
    copied(torch.rand(2, 1, 16, 16), "source")
    assert {pair.domain for pair in pairs(copied)} == {"source"}
    assert {pair.domain for pair in pairs(network)} == {"target"}


def test_domain_batchnorm_survives_a_checkpoint() -> None:
    network, other = small_network(), small_network()
    network.train()
    network(torch.rand(9, 1, 16, 16), "source")
    network(torch.rand(9, 1, 16, 16) * 0.2, "target")
    with torch.no_grad():
        pairs(network)[0].source.weight.mul_(3)
    other.load_state_dict(network.state_dict())
    x = torch.rand(4, 1, 16, 16)
    for domain in ("source", "target"):
        assert torch.equal(network.eval()(x, domain).logits, other.eval()(x, domain).logits)


def test_two_networks_on_one_backbone_share_its_pairs() -> None:
    torch.manual_seed(0)
    backbone = SmallCNN(InputSpec("image", (1, 16, 16)), widths=(4, 8), features=8)
    given = context(backbone, classes=3, domain_batches="domain_specific", bottleneck=5)
    first, second = Network(given), Network(given)
    assert pairs(first.backbone) == pairs(second.backbone) and len(pairs(backbone)) == 3
    assert not any(
        isinstance(inner, DomainBatchNorm) for pair in pairs(backbone) for inner in (pair.source, pair.target)
    )
    for network in (first, second):
        for domain in ("source", "target"):
            network.features(torch.rand(3, 1, 16, 16), domain)
            assert {pair.domain for pair in pairs(network)} == {domain}
    assert first.switch is not None and second.switch is not None
    assert len(first.switch.layers) == len(second.switch.layers) == 4


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_frozen_batchnorm_stays_frozen_in_the_copy(batchnorm: str) -> None:
    torch.manual_seed(0)
    backbone = Torchvision(InputSpec("image", (3, 32, 32)), model="resnet18", weights="none", batchnorm=batchnorm)
    switch = DomainSwitch(backbone)
    assert len(switch.layers) == 20
    before = {name: value.clone() for name, value in backbone.state_dict().items() if "running_" in name}
    backbone.train()
    for domain in ("source", "target"):
        switch(domain)
        backbone(torch.rand(4, 3, 32, 32))
    after = backbone.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved == (set() if batchnorm == "frozen" else set(before))
    assert {layer.target.training for layer in switch.layers} == {batchnorm == "train"}


def test_frozen_stages_stay_frozen_in_the_copy() -> None:
    spec = InputSpec("image", (1, 16, 16))
    backbone = SmallCNN(spec, widths=(4, 8), features=8, freeze="up-to-block1")
    network = Network(context(backbone, classes=3, domain_batches="domain_specific"))
    network.train()
    network.both(torch.rand(6, 1, 16, 16), torch.rand(6, 1, 16, 16))
    first, second, last = pairs(network)
    for layer in (first.source, first.target):
        assert not layer.training and not layer.weight.requires_grad and float(layer.running_mean.abs().max()) == 0
    assert all(layer.weight.requires_grad and layer.training for layer in (second.target, last.source))


def test_dann_runs_with_batchnorm_of_each_domains_own(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [*TINY, "method=dann", "trainer.domain_batches=domain_specific", "bottleneck=8"]
    done = transfer("run", *chosen)
    assert done.code == 0, done.err
    state = state_of(done.run)
    layer = "network.backbone.blocks.0.1"
    assert not torch.equal(state[f"{layer}.source.running_mean"], state[f"{layer}.target.running_mean"])
    assert not torch.equal(state[f"{layer}.source.weight"], state[f"{layer}.target.weight"]), "scales of their own, too"
    assert transfer("evaluate", str(done.run)).code == 0
    expected = outcome_of(done.run)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert transfer("run", *chosen, "force=true").code == 143
    assert_same(transfer("run", *chosen).run, expected)


def test_source_only_refuses_layers_that_no_target_sample_would_train(transfer: Transfer) -> None:
    one_line(
        transfer("run", *TINY, "method=source_only", "trainer.domain_batches=domain_specific"), "trainer.domain_batches"
    )


# --- teachers -------------------------------------------------------------------------------------


def student() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("buffers", [True, False])
def test_a_teacher_is_an_exponential_moving_average(buffers: bool) -> None:
    torch.manual_seed(0)
    learner = student()
    teacher = Teacher(learner)
    wanted = {name: value.detach().clone() for name, value in learner.named_parameters()}
    statistics = {name: value.clone() for name, value in learner.named_buffers()}
    for step in range(4):
        with torch.no_grad():
            for parameter in learner.parameters():
                parameter.add_(torch.randn_like(parameter))
            learner(torch.randn(8, 3) + step)
        teacher.follow(learner, 0.75, buffers=buffers)
        wanted = {n: 0.75 * wanted[n] + 0.25 * p.detach() for n, p in learner.named_parameters()}
        for name, value in teacher.module.named_parameters():
            torch.testing.assert_close(value, wanted[name])
        for name, value in teacher.module.named_buffers():
            assert torch.equal(value, dict(learner.named_buffers())[name] if buffers else statistics[name])


def test_a_teacher_copies_is_never_trained_and_lets_no_gradient_through() -> None:
    learner = student()
    teacher = Teacher(learner)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(1)
        learner(torch.randn(8, 3) + 4)
    assert not torch.equal(teacher.module[0].weight, learner[0].weight), "no memory in common"
    teacher.copy(learner)
    for key, value in learner.state_dict().items():
        assert torch.equal(teacher.module.state_dict()[key], value)
    assert Moves.of(teacher).parameters == [] and Moves.of(nn.ModuleList([learner, teacher])).parameters == list(
        learner.parameters()
    )
    x = torch.randn(5, 3, requires_grad=True)
    assert not teacher(x).requires_grad
    assert all(p.requires_grad for p in learner.parameters())


def test_a_teacher_with_parts_that_exist_only_in_its_student_of_another_shape_is_refused() -> None:
    with pytest.raises(RuntimeError):
        Teacher(student()).copy(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)))


def test_a_frozen_teacher_stays_in_evaluation_mode() -> None:
    holder = nn.ModuleDict({"student": student(), "teacher": FrozenTeacher(student()), "moving": Teacher(student())})
    holder.train()
    assert holder["student"].training and holder["moving"].module.training and not holder["teacher"].module.training


def test_a_teachers_state_is_saved_with_its_method(transfer: Transfer) -> None:
    done = transfer("run", *TINY, "method=mean_teacher", "method.decay=0.5")
    assert done.code == 0, done.err
    state = state_of(done.run)
    theirs = {key.removeprefix("teacher.module."): value for key, value in state.items() if key.startswith("teacher.")}
    own = {key.removeprefix("network."): value for key, value in state.items() if key.startswith("network.")}
    assert set(theirs) == set(own)
    weight = "backbone.blocks.0.0.weight"
    gap = float((theirs[weight] - own[weight]).abs().max())
    assert 0 < gap < float(own[weight].abs().max())


def test_the_running_average_is_of_the_teacher_as_the_step_left_it(transfer: Transfer) -> None:
    done = transfer("run", *TINY, "method=mean_teacher", "method.decay=0.5", "trainer.ema=1e-9", "optimizer.lr=0.1")
    parts = torch.load(done.run / "checkpoints" / "last.pt", weights_only=True)["parts"]
    key = "teacher.module.backbone.blocks.0.0.weight"
    torch.testing.assert_close(parts["average"][f"module.{key}"], parts["method"][key], rtol=1e-5, atol=1e-7)


# --- starting from another run's network ----------------------------------------------------------


@pytest.fixture
def trained(transfer: Transfer) -> Path:
    """A finished run of source_only."""
    done = transfer("run", *TINY, "method=source_only", "seed=7")
    assert done.code == 0, done.err
    return done.run


def test_a_source_model_is_a_folder_or_a_file_and_counts_by_content(
    transfer: Transfer, trained: Path, tmp_path: Path
) -> None:
    file = trained / "checkpoints" / "best.pt"
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained, moved)
    names = {identity_of(f"source_model={path}") for path in (trained, file, moved, moved / "checkpoints" / "best.pt")}
    assert len(names) == 1 and names != {identity_of()}
    (renamed := tmp_path / "model.pt").write_bytes(file.read_bytes())
    assert {identity_of(f"source_model={renamed}")} == names
    other = transfer("run", *TINY, "method=source_only", "seed=8").run
    assert {identity_of(f"source_model={other}")} != names
    first = transfer("run", *TINY, "method=dann", f"source_model={trained}")
    assert first.code == 0, first.err
    again = transfer("run", *TINY, "method=dann", f"source_model={moved}/checkpoints/best.pt")
    assert again.run == first.run and "finished before" in again.out


@pytest.mark.parametrize("method", ["dann", "mean_teacher", "shot", "finetune"])
def test_the_network_starts_from_the_source_model(trained: Path, method: str) -> None:
    kept = {k: v for k, v in state_of(trained, "best.pt").items() if k.startswith("network.")}
    config = config_of(f"method={method}", f"source_model={trained}", "target_labels=2")
    found = fresh(config).state_dict()
    for key, value in kept.items():
        assert torch.equal(found[key], value), key
    plain = fresh(replace(config, source_model=None)).state_dict()
    assert not torch.equal(plain["network.head.weight"], kept["network.head.weight"])


def test_without_a_learning_rate_a_run_ends_where_the_source_model_was(transfer: Transfer, trained: Path) -> None:
    done = transfer("run", *TINY, "method=dann", f"source_model={trained}", "optimizer.lr=0")
    kept, found = state_of(trained, "best.pt"), state_of(done.run)
    for key in (k for k in kept if not ("running_" in k or k.endswith("tracked"))):
        assert torch.equal(found[key], kept[key]), key


def test_methods_that_begin_on_the_source_skip_it_with_a_source_model(transfer: Transfer, trained: Path) -> None:
    without = transfer("run", *TINY, "method=shot")
    done = transfer("run", *TINY, "method=shot", f"source_model={trained}")
    assert [sorted({e["phase"] for e in events(o.run, "train")}) for o in (without, done)] == [
        ["adapt", "source"],
        ["adapt"],
    ]
    free = transfer("run", *source_free(), "method=shot", f"source_model={trained}")
    assert free.code == 0, free.err
    result = json.loads((free.run / "result.json").read_text())
    assert result["setting"]["source_free"] is True and result["source"] == "none"


def source_free() -> list[str]:
    return [*(o for o in TINY if not o.startswith("source.")), "source=none"]


def test_only_methods_that_say_so_do_without_a_source(transfer: Transfer, trained: Path) -> None:
    for method in ("dann", "adda"):
        one_line(
            transfer("run", *source_free(), f"method={method}", f"source_model={trained}"),
            f"{method} needs a labelled source",
        )
    one_line(transfer("run", *source_free(), "method=shot"), "source_model=RUN", "source=NAME")


def test_source_models_that_do_not_fit_are_one_line(
    transfer: Transfer, trained: Path, tmp_path: Path, plugin: list[str]
) -> None:
    def refused(model: Any, *said: str, more: tuple[str, ...] = ()) -> None:
        one_line(transfer("run", *TINY, "method=dann", f"source_model={model}", *more), "source_model", *said)

    refused("nowhere", "nowhere")
    refused(tmp_path, "there is no checkpoint")
    (cut := tmp_path / "cut.pt").write_bytes((trained / "checkpoints" / "best.pt").read_bytes()[:1000])
    refused(cut, "cut.pt", "not a whole checkpoint")
    (junk := tmp_path / "junk.pt").write_bytes(b"no checkpoint at all")
    refused(junk, "not a whole checkpoint")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    refused(tmp_path / "module.pt", "not a whole checkpoint")
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "not a whole checkpoint")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "foreign.pt")
    refused(tmp_path / "foreign.pt", "is not the checkpoints/best.pt of a run")
    refused(trained / "checkpoints" / "last.pt", "is not the checkpoints/best.pt of a run")
    on_features = transfer("run", *TINY, "method=tca", "method.components=5")
    refused(on_features.run, "holds no network")
    refused(trained, "does not fit", more=("backbone.features=24",))
    refused(trained, "does not fit", more=("bottleneck=8",))
    lenet = [o for o in TINY if not o.startswith("backbone.")]
    one_line(transfer("run", *lenet, "backbone=lenet", f"source_model={trained}"), "source_model", "does not fit")
    node = {"name": "few", "implementation": f"{__name__}:FewDigits"}
    (tmp_path / "conf" / "dataset").mkdir()
    (tmp_path / "conf" / "dataset" / "few.yaml").write_text(yaml.safe_dump(node))
    few = [*source_free()[:-1], f"plugins=[{__name__}]", "source=few", "target=few"]
    one_line(
        transfer("run", *few, "method=dann", f"source_model={trained}"),
        "source_model",
        "10 other classes than this task's 4",
    )


class FewDigits:
    """Four of the digits."""

    def __init__(self, place: Any) -> None:
        pass

    def fingerprint(self) -> str:
        return "four"

    def load(self) -> Any:
        from transfer_cli.data.readers.synth_digits import SynthDigits

        domain = SynthDigits(None, n=900, n_test=100).load()  # type: ignore[arg-type]
        train, test = (part.take((part.labels < 4).nonzero()[:, 0]) for part in (domain.train, domain.test))
        return replace(domain, classes=domain.classes[:4], train=train, test=test)


def test_a_method_on_features_has_no_network_to_start(transfer: Transfer, trained: Path) -> None:
    """It would go on with random weights, and say nothing."""
    file = trained / "checkpoints" / "best.pt"
    one_line(
        transfer("run", *TINY, "method=linear_probe", f"source_model={trained}"),
        "source_model",
        f"backbone.weights={file}",
    )
    done = transfer("run", *TINY, "method=linear_probe", f"backbone.weights={file}")
    assert done.code == 0, done.err
    weight = "backbone.blocks.0.0.weight"
    assert torch.equal(state_of(done.run)[weight], state_of(trained, "best.pt")[f"network.{weight}"])


def test_a_finished_run_outlives_its_source_model(transfer: Transfer, trained: Path) -> None:
    chosen = [*TINY, "method=dann", f"source_model={trained}"]
    done = transfer("run", *chosen)
    before = transfer("predict", str(done.run), "--dataset", "digits")
    shutil.rmtree(trained)
    for command in (["evaluate", str(done.run)], ["predict", str(done.run), "--dataset", "digits"]):
        outcome = transfer(*command)
        assert outcome.code == 0, outcome.err
    assert outcome.out == before.out
    one_line(transfer("run", *chosen), "source_model")


def test_a_chain_can_be_a_source_model_and_start_from_one(transfer: Transfer, trained: Path) -> None:
    chain = transfer("run", *TINY, "method=source_only", "then=dann", f"source_model={trained}", "optimizer.lr=0")
    assert chain.code == 0, chain.err
    kept, found = state_of(trained, "best.pt"), state_of(chain.run, "best.pt")
    weight = "network.backbone.blocks.0.0.weight"
    assert torch.equal(found[f"first.{weight}"], kept[weight]) and torch.equal(found[f"second.{weight}"], kept[weight])
    assert not torch.equal(found["second.network.head.weight"], kept["network.head.weight"]), (
        "the backbone alone passes on"
    )
    again = fresh(config_of("method=shot", f"source_model={chain.run}"))
    assert torch.equal(again.state_dict()["network.head.weight"], found["second.network.head.weight"])


# --- one method after another ---------------------------------------------------------------------


def test_nothing_follows_unless_asked() -> None:
    assert identity_of("then=none") == identity_of()
    assert "then" not in resolve_components(config_of())
    for overrides, name in GOLDEN.items():
        assert identity_of(*overrides.split(), "then=none") == name


def test_what_follows_is_part_of_the_identity() -> None:
    names = [identity_of("method=source_only", then) for then in ("then=none", "then=dann")]
    names += [
        identity_of("method=source_only", "then=dann", "then.weight=2"),
        identity_of("method=dann", "then=source_only"),
    ]
    assert len(set(names)) == 4
    assert names[1].split("/")[1].startswith("source_only+dann-seed0-")
    assert identity_of("method=source_only", "then=dann", "then.weight=1") == names[1]


def test_an_unknown_follower_gives_a_suggestion(transfer: Transfer) -> None:
    one_line(transfer("run", *TINY, "then=linear_prob"), "no then named 'linear_prob'. Did you mean 'linear_probe'?")
    one_line(transfer("run", *TINY, "then=dann", "then.weihgt=2"), "then.weihgt", "Did you mean 'weight'?")


def test_needs_are_united(transfer: Transfer) -> None:
    one_line(
        transfer("run", *TINY, "method=source_only", "then=finetune"),
        "finetune needs target labels: set target_labels=N",
    )
    one_line(
        transfer("run", *TINY, "method=finetune", "then=source_only"),
        "finetune needs target labels: set target_labels=N",
    )
    one_line(
        transfer("run", *source_free(), "method=simclr", "then=dann"), "dann needs a labelled source: set source=NAME"
    )


def test_a_representation_needs_a_follower_and_follows_none(transfer: Transfer) -> None:
    one_line(transfer("run", *TINY, "method=simclr"), "then=linear_probe")
    one_line(transfer("run", *TINY, "method=source_only", "then=simclr"), "simclr", "method=simclr")


def test_a_chain_trains_one_backbone_and_the_second_predicts(
    transfer: Transfer, plugin: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*plugin, "method=source_only", "then=watched", "then.every=4", "trainer.eval_every=5"]
    done = transfer("run", *chosen)
    assert done.code == 0, done.err
    state = state_of(done.run)
    backbone = [key for key in state if ".backbone." in key and key.startswith("first.")]
    assert backbone and all(torch.equal(state[key], state[key.replace("first.", "second.", 1)]) for key in backbone)
    train = [(e["phase"], e["step"]) for e in events(done.run, "train")]
    assert {phase for phase, _ in train} == {"train", "adapt"} and max(step for _, step in train) == 20
    assert {e["phase"] for e in events(done.run, "target_test")} == {"adapt"}
    method = fresh(typed(composed(chosen)))
    method.load_state_dict(state_of(done.run, "best.pt"))
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(method.eval().predict(x).log_probs, method.second.eval().predict(x).log_probs)
    assert transfer("evaluate", str(done.run)).code == 0
    predicted = transfer("predict", str(done.run), "--dataset", "digits")
    assert predicted.code == 0, predicted.err

    expected = outcome_of(done.run)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # in the first's phase
        assert transfer("run", *chosen, "force=true").code == 143
        stop_at(patch, 6 + 6)  # and the second's
        assert transfer("run", *chosen).code == 143
    assert_same(transfer("run", *chosen).run, expected)


def test_each_method_of_a_chain_has_its_own_word_on_granted_labels(transfer: Transfer) -> None:
    """dann leaves them to the loop, finetune handles them."""
    done = transfer("run", *TINY, "method=dann", "then=finetune", "target_labels=2", "then.source_steps=4")
    assert done.code == 0, done.err
    terms = {e["phase"]: set(e["values"]) for e in events(done.run, "train")}
    assert terms == {
        "adapt": {"supervised", "domain", "target_supervised"},
        "source": {"supervised"},
        "finetune": {"target_supervised"},
    }


def test_granted_labels_count_once_a_step_however_many_its_updates(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = [], MCD.supervised_loss
    monkeypatch.setattr(MCD, "supervised_loss", lambda self, x, y: calls.append(len(y)) or loss(self, x, y))
    done = transfer("run", *TINY, "method=mcd", "target_labels=2", "trainer.steps=5")
    assert done.code == 0 and calls == [20] * 5, done.err


def test_one_granted_sample_is_no_batch_for_batchnorm(transfer: Transfer, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=x.sum(1))
    pair = ["source=arrays", "target=arrays", f"source.path={tmp_path}/a.npz", f"target.path={tmp_path}/a.npz"]
    small = ["source.kind=regression", "target.kind=regression", "backbone=mlp", "augment=none", "trainer.batch_size=8"]
    few = transfer("run", *pair, *small, "method=dann", "target_labels=1", "bottleneck=4", "trainer.steps=3")
    assert few.code == 2 and "set target_labels or trainer.batch_size to 2 or more" in few.err
    assert transfer("run", *pair, *small, "method=dann", "target_labels=1", "trainer.steps=3").code == 0


def test_a_refresh_reads_the_features_of_its_own_method(transfer: Transfer) -> None:
    done = transfer("run", *TINY, "method=shot", "bottleneck=8", "then=linear_probe")
    assert done.code == 0, done.err


def test_backbones_with_layers_of_a_method_s_own_go_no_further(transfer: Transfer) -> None:
    one_line(transfer("run", *TINY, "method=adabn", "then=dann"), "no method can follow adabn")
    specific = "trainer.domain_batches=domain_specific"
    one_line(transfer("run", *TINY, "method=dann", "then=coral", specific), "set trainer.domain_batches=separate")
    trained = transfer("run", *TINY, "method=dann", specific)
    assert trained.code == 0, trained.err
    one_line(transfer("run", *TINY, "method=dann", f"source_model={trained.run}"), "take a run of another")


def test_a_closed_form_may_follow(transfer: Transfer) -> None:
    done = transfer("run", *TINY, "method=dann", "then=linear_probe")
    assert done.code == 0, done.err
    assert {e["phase"] for e in events(done.run, "target_test")} == {"probe"}
    before = {k: v for k, v in state_of(done.run).items() if k.startswith("first.network.backbone")}
    alone = state_of(transfer("run", *TINY, "method=dann").run)
    for key, value in before.items():
        assert torch.equal(value, alone[key.removeprefix("first.")]), "the first runs as it would by itself"


# --- norms of gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", [[], ["trainer.clip_norm=0.01"], ["trainer.precision=16"], ["trainer.precision=16", "trainer.clip_norm=0.01"],
            ["trainer.precision=bf16"]], ids=" ".join,
)  # fmt: skip
def test_norms_are_logged_for_each_player_once_an_interval_and_before_clipping(
    transfer: Transfer, plugin: list[str], how: list[str]
) -> None:
    done = transfer(
        "run", *plugin, "method=slopes", "trainer.log_every=4", "trainer.steps=12", "optimizer.lr=1e-6", *how
    )
    assert done.code == 0, done.err
    logged = events(done.run, "diagnostics")
    assert [event["step"] for event in logged] == [4, 8, 12]
    for event in logged:
        norms = {k.removeprefix("gradient_norm_"): v for k, v in event["values"].items()}
        n = event["step"]
        assert norms == pytest.approx({"network": 3 * n, "critic": 4 * n, "idle": 0.0, "late": 1.0}, rel=1e-3)


def test_clipping_bounds_what_all_players_of_an_update_move(transfer: Transfer, plugin: list[str]) -> None:
    """By one factor: the norm over everything that the update moves."""
    common = ["method=slopes", "trainer.steps=1", "trainer.log_every=1", "optimizer.lr=1", "optimizer.momentum=0"]
    common += ["optimizer.weight_decay=0", "schedule=constant"]
    done = transfer("run", *plugin, *common, "trainer.clip_norm=0.5")
    state = state_of(done.run)
    moved = float((state["one"].square() + (10 * state["other"]).square()).sum().sqrt())
    assert moved == pytest.approx(0.5 * 3 / 5, rel=1e-4)
    assert events(done.run, "diagnostics")[0]["values"]["gradient_norm_network"] == pytest.approx(3)


def test_a_gradient_that_is_not_finite_names_the_player_and_the_step(transfer: Transfer, plugin: list[str]) -> None:
    outcome = transfer(
        "run",
        *plugin,
        "method=slopes",
        "method.scale=1e37",
        "trainer.log_every=1",
        "optimizer.lr=0",
        "trainer.steps=20",
    )
    one_line(outcome, "the gradient of", "became inf at step")


# --- shared mathematics ---------------------------------------------------------------------------


def test_entropies_are_those_of_the_softmax() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64) * 3
    p = logits.softmax(1)
    torch.testing.assert_close(entropies(logits), torch.stack([-(row * row.log()).sum() for row in p]))
    mean = p.mean(0)
    torch.testing.assert_close(marginal_entropy(logits), -(mean * mean.log()).sum())
    assert float(entropies(torch.zeros(1, 4))) == pytest.approx(math.log(4))
    assert float(marginal_entropy(torch.eye(4) * 1e3)) == pytest.approx(math.log(4))
    assert float(entropies(torch.tensor([[1e4, 0.0, -1e4]]))) == 0.0


def test_entropies_have_right_and_finite_gradients_in_full_precision() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entropies, (logits,)) and torch.autograd.gradcheck(marginal_entropy, (logits,))
    extreme = torch.tensor(
        [[500.0, 0.0, -500.0], [400.0, 0.0, -300.0]], requires_grad=True
    )  # classes that underflow in all rows
    (entropies(extreme).sum() + marginal_entropy(extreme)).backward()
    assert extreme.grad is not None and bool(torch.isfinite(extreme.grad).all())
    half = torch.randn(8, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert entropies(half).dtype == marginal_entropy(half).dtype == torch.float32
    torch.testing.assert_close(entropies(half), entropies(half.float()))
    torch.testing.assert_close(F.cross_entropy(half.float(), half.float().softmax(1)), entropies(half).mean())


def test_ramps() -> None:
    for p in (0.0, 0.2, 0.7, 1.0):
        assert ramp(p, 4.0) == pytest.approx((1 - math.exp(-4 * p)) / (1 + math.exp(-4 * p)))
        assert gaussian_ramp(p, 0.5) == pytest.approx(math.exp(-5 * (1 - min(1, p / 0.5)) ** 2))
        assert gaussian_ramp(p, 0.0) == 1.0
    assert gaussian_ramp(0.0) == pytest.approx(math.exp(-5)) and gaussian_ramp(1.0) == 1.0
