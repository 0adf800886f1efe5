"""What is said when training goes wrong, that healthy runs are silent, and how negative transfer is flagged."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Outcome
from test_report import result_of, write_run
from test_resume import assert_same, outcome_of, stop_at

from transfer_cli.commands import report
from transfer_cli.evaluation.health import effective_classes, prediction_health, proxy_a_distance
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.samples import evenly
from transfer_cli.evaluation.validators import View
from transfer_cli.loops.health import INTERVALS, Health
from transfer_cli.loops.metrics_log import StepRecord
from transfer_cli.report.closing import result_lines
from transfer_cli.report.negative import verdicts
from transfer_cli.report.runs import collect
from transfer_cli.report.tables import aggregate
from transfer_cli.run_folder import read_json, write_json

Transfer = Callable[..., Outcome]

# The figures


def test_effective_classes() -> None:
    assert effective_classes(torch.tensor([3, 3, 3])) == 1.0
    assert effective_classes(torch.tensor([0, 1, 2, 3])) == pytest.approx(4.0)
    assert effective_classes(torch.tensor([0, 0, 5, 7])) == pytest.approx(math.exp(1.5 * math.log(2)))


def one_hot(labels: torch.Tensor, classes: int) -> Prediction:
    return Prediction.from_probs(torch.nn.functional.one_hot(labels, classes).float())


def test_the_source_shows_its_classes_in_as_many_samples_as_the_target() -> None:
    """100 classes cannot show in 10 samples: without that, every small target would look collapsed."""
    source = torch.arange(100).repeat_interleave(5)  # sorted by class
    target = torch.full((10, 100), 0.01)
    figures = prediction_health(View("classification", one_hot(source, 100), source, Prediction.from_probs(target)))
    assert figures["source_classes"] == pytest.approx(10.0)
    assert figures["target_entropy"] == pytest.approx(math.log(100), rel=1e-5)
    assert figures["target_classes"] == 1.0
    assert prediction_health(View("regression", None, None, Prediction(mean=target, variance=target))) == {}
    assert evenly(3, 10).tolist() == [0, 1, 2] and evenly(101, 3).tolist() == [0, 50, 100]


def test_the_proxy_a_distance_of_shifted_gaussians() -> None:
    """The best linear classifier of N(0, 1) and N(d, 1) errs with probability Φ(-d / 2)."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2000, 3, generator=draw)
    shift = torch.tensor([1.0, 0.0, 0.0])
    error = 0.5 * math.erfc(0.5 / math.sqrt(2))
    assert proxy_a_distance(x[0], x[1] + shift) == pytest.approx(2 * (1 - 2 * error), abs=0.06)
    assert proxy_a_distance(x[0], x[1]) < 0.06  # type: ignore[operator]
    assert proxy_a_distance(100 * x[0], 100 * x[1] + 2000) == 2.0
    by_class = [domain[domain[:, 0].argsort()] for domain in x]
    assert proxy_a_distance(by_class[0], by_class[1].flip(0)) < 0.1  # type: ignore[operator]
    assert proxy_a_distance(x[0], x[1] + shift) == proxy_a_distance(x[0], x[1] + shift)


def test_the_proxy_a_distance_of_features_that_mean_nothing_is_that_of_chance() -> None:
    """As many features as samples: each half is separable, the other half tells."""
    x = torch.randn(2, 100, 200, generator=torch.Generator().manual_seed(1))
    assert proxy_a_distance(x[0], x[1]) < 0.5  # type: ignore[operator]
    assert proxy_a_distance(x[0, :19], x[1]) is None
    assert proxy_a_distance(x[0], x[1] / 0) is None


def test_a_diagnostic_that_is_not_finite_is_left_out() -> None:
    record = StepRecord()
    for value in (1.0, float("nan"), 3.0):
        record.add(0, {"accuracy": torch.tensor(value), "other": torch.tensor(float("inf"))})
    assert record.take({"supervised"}) == {"accuracy": 2.0}


# The watcher

Values = Callable[[float], dict[str, float]]


def watch(
    terms: Values = lambda p: {"supervised": 0.5, "domain": 0.6},
    diagnostics: Values = lambda p: {"gradient_norm_network": 1.0},
    figures: Values | None = None,
    *,
    steps: int = 1000,
    every: int = 20,
    classes: float = 10.0,
) -> tuple[list[str], list[str]]:
    """The kinds of warnings of one phase, and the lines said; the values are functions of progress."""
    said: list[str] = []
    health = Health(said.append, classes, math.log(10))
    health.begin(steps)
    for done in range(every, steps + 1, every):
        health.interval(done, "adapt", done, terms(done / steps), diagnostics(done / steps))
        if figures is not None and done % (5 * every) == 0:
            health.evaluation(done, "adapt", figures(done / steps))
    return [warning["kind"] for warning in health.warnings], said


def accuracy(p: float, start: float, end: float) -> dict[str, float]:
    return {"discriminator_accuracy": 0.995 if start < p <= end else 0.98}


@pytest.mark.parametrize(
    ("start", "end", "warned"), [(0.4, 0.61, True), (0.4, 0.58, False), (0.0, 0.25, False), (0.0, 0.35, True)]
)
def test_a_discriminator_that_is_certain_for_long(start: float, end: float, warned: bool) -> None:
    kinds, said = watch(diagnostics=lambda p: accuracy(p, start, end))
    assert kinds == ["discriminator_certain"] * warned
    assert len(said) == warned and all(
        "warning: the discriminator" in line and "usually helps" in line for line in said
    )


def test_a_discriminator_that_falters_has_not_been_certain() -> None:
    assert watch(diagnostics=lambda p: accuracy(p, 0.0, 0.0 if round(p * 50) % 8 == 0 else 1.0))[0] == []


def classes_of(target: float, source: float | None = 9.5, since: float = 0.0) -> Values:
    def figures(p: float) -> dict[str, float]:
        return {"target_classes": target if p >= since else 9.0} | (
            {} if source is None else {"source_classes": source}
        )

    return figures


@pytest.mark.parametrize(
    ("figures", "classes", "warned"),
    [
        (classes_of(4.0), 10.0, True),
        (classes_of(5.5), 10.0, False),
        (classes_of(4.0, source=7.0), 10.0, False),  # the source itself shows few
        (classes_of(4.0, source=None), 10.0, True),
        (classes_of(4.0), 7.0, False),  # partial: so many are shared
        (classes_of(4.0, since=0.9), 10.0, True),
        (classes_of(4.0, since=1.0), 10.0, False),  # once
        (lambda p: classes_of(4.0 if round(p * 10) % 2 else 8.0)(p), 10.0, False),  # never twice in a row
        (classes_of(1.0, source=2.0), 2.0, True),
        (classes_of(1.3, source=2.0), 2.0, False),
        (classes_of(1.0, source=1.0), 10.0, True),  # both collapsed
    ],
)
def test_predictions_that_collapse(figures: Values, classes: float, warned: bool) -> None:
    kinds, said = watch(figures=figures, classes=classes)
    assert kinds == ["predictions_collapsed"] * warned and len(said) == warned


def test_what_helps_against_a_collapse_depends_on_what_was_trained() -> None:
    (said,) = watch(figures=classes_of(4.0))[1]
    assert "A smaller transfer weight" in said
    (said,) = watch(terms=lambda p: {"supervised": 0.5}, figures=classes_of(4.0))[1]
    assert "A method that looks at the target" in said and "transfer weight" not in said


def test_a_phase_of_one_evaluation_can_collapse() -> None:
    assert watch(figures=classes_of(1.0), steps=100)[0] == ["predictions_collapsed"]
    assert watch(figures=classes_of(9.0), steps=100)[0] == []


def test_a_collapse_of_the_beginning_is_none() -> None:
    assert watch(figures=lambda p: classes_of(1.0 if p < 0.25 else 9.0)(p))[0] == []
    assert watch(figures=classes_of(1.0), steps=90, every=6)[0] == []


def test_a_closed_form_needs_one_look() -> None:
    said: list[str] = []
    health = Health(said.append, 10.0, 0.0)
    health.begin(0)
    health.evaluation(0, "fit", {"target_classes": 2.0, "source_classes": 9.0})
    assert len(said) == 1 and "use 2.0 classes, those on the source 9.0" in said[0]


@pytest.mark.parametrize(
    ("last", "kinds"),
    [
        (900.0, []),
        (1100.0, ["features_exploded"]),
        (math.inf, ["features_exploded"]),
        (0.09, ["features_vanished"]),
        (0.2, []),
    ],
)
def test_features_that_explode_or_vanish(last: float, kinds: list[str]) -> None:
    for domain in ("source", "target"):
        figures = {f"feature_norm_{domain}": 10.0}
        assert watch(figures=lambda p: figures if p < 0.8 else {f"feature_norm_{domain}": last})[0] == kinds  # noqa: B023


def test_a_transfer_term_that_is_zero() -> None:
    assert watch(terms=lambda p: {"supervised": 0.0, "domain": 0.0 if p > 0.45 else 0.6})[0] == ["term_zero:domain"]
    assert watch(terms=lambda p: {"supervised": 0.5, "domain": -1e-9})[0] == ["term_zero:domain"]
    assert watch(terms=lambda p: {"supervised": 0.5, "domain": 0.6 if p == 1 else 0.0})[0] == []
    assert watch(terms=lambda p: {"supervised": 0.5, "domain": 1e-7})[0] == []
    assert watch(terms=lambda p: {"target_supervised": 0.0})[0] == []


def test_a_source_that_is_not_learnt() -> None:
    assert watch(terms=lambda p: {"supervised": 2.31})[0] == ["source_not_learnt"]
    assert watch(terms=lambda p: {"supervised": 2.31 if p < 0.6 else 2.0})[0] == []


@pytest.mark.parametrize(
    ("norm", "kinds"),
    [
        (lambda p: 1.0, []),
        (lambda p: 0.0 if 0.3 < p < 0.55 else 1.0, ["no_gradient:critic"]),
        (lambda p: 0.0 if 0.3 < p < 0.45 else 1.0, []),
        (lambda p: 5000.0 if p > 0.5 else 1.0, ["gradient_exploded:critic"]),
        (lambda p: 5000.0 if 0.5 < p < 0.56 else 1.0, []),
        (lambda p: 5000.0 if p > 0.5 else 10.0 if p < 0.05 else 1.0, []),  # it began small, not that small
        (lambda p: 5000.0 if p > 0.5 else 10.0 if 0.015 < p < 0.05 else 1.0, []),  # the largest of its beginning counts
        (lambda p: 1e-20 if p < 0.15 else 1.0, ["gradient_exploded:critic"]),
    ],
)  # fmt: skip
def test_gradients_that_are_lost_or_explode(norm: Callable[[float], float], kinds: list[str]) -> None:
    assert watch(diagnostics=lambda p: {"gradient_norm_critic": norm(p)})[0] == kinds


def test_a_run_of_seconds_is_not_judged() -> None:
    """However bad: below so many intervals a stretch is chance."""
    bad = {"discriminator_accuracy": 1.0, "gradient_norm_critic": 0.0}
    steps = 2 * (INTERVALS - 1) * 10
    kinds, _ = watch(lambda p: {"supervised": 9.0, "domain": 0.0}, lambda p: bad, classes_of(1.0), steps=40, every=10)
    assert kinds == []
    assert watch(lambda p: {"domain": 0.0}, steps=steps, every=10)[0] == []


def test_the_watcher_goes_on_from_its_state(tmp_path: Path) -> None:
    """Interrupted anywhere, it warns of the same at the same step, and says nothing twice."""

    def feed(health: Health, first: int, last: int) -> None:
        for done in range(first, last, 10):
            p = done / 300
            terms = {"supervised": 2.4, "domain": 0.0}
            health.interval(
                done, "adapt", done, terms, {"gradient_norm_d": 0.0 if p > 0.5 else 1.0, **accuracy(p, 0.2, 0.9)}
            )
            if done % 30 == 0:
                figures = {"feature_norm_target": 1.0 if p < 0.7 else 1000.0, "source_classes": 9.0}
                health.evaluation(done, "adapt", {**figures, "target_classes": 2.0 if p > 0.4 else 9.0})

    whole: list[str] = []
    expected = Health(whole.append, 10.0, math.log(10))
    expected.begin(300)
    feed(expected, 10, 310)
    assert len(whole) == 6
    for cut in range(10, 310, 10):
        said: list[str] = []
        first, second = (Health(said.append, 10.0, math.log(10)) for _ in range(2))
        first.begin(300)
        feed(first, 10, cut)
        torch.save(first.state_dict(), tmp_path / "state.pt")
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        feed(second, cut, 310)
        assert second.warnings == expected.warnings and said == whole


# Runs

SICK = '''
"""A method with the illness of one's choice."""
from typing import Literal

import torch
from torch import nn

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.phases import Gradient, Losses, Moves, Update


class Sick(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(self, context: Context, *, illness: str = "collapse", weight: float = 1.0) -> None:
        super().__init__(context)
        self.illness, self.weight = illness, weight
        self.idle = nn.Linear(3, 3)
        self.critic = nn.Linear(self.network.feature_dim, 1)

    def phases(self):
        moves = [Moves.of(self.network), Moves.of(self.critic, player="critic")]
        if self.illness == "idle":
            moves.append(Moves.of(self.idle, player="idle"))
        return [Gradient("adapt", [Update(self.losses, moves)])]

    def losses(self, batch, progress):
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        scores = torch.cat([self.critic(source.features.detach())[:, 0], self.critic(target.features.detach())[:, 0]])
        domains = torch.cat([torch.ones(len(batch.source.y)), torch.zeros(len(batch.target))])
        terms = {"supervised": supervised, "critic": nn.functional.binary_cross_entropy_with_logits(scores, domains)}
        diagnostics = {}
        if self.illness == "collapse":
            terms["sick"] = self.weight * nn.functional.cross_entropy(target.logits, torch.zeros(len(batch.target)).long())
        elif self.illness == "certain":
            diagnostics["discriminator_accuracy"] = torch.ones(())
        elif self.illness == "zero":
            terms["sick"] = 0.0 * target.features.mean()
        elif self.illness == "explode":
            terms["sick"] = -self.weight * target.features.square().sum(1).mean()
        elif self.illness == "gradient":
            terms["sick"] = -(10 ** (10 * progress.p - 1)) * target.features.mean()
        elif self.illness == "undefined":
            terms["sick"] = (0.0 * target.features).sum().sqrt()
        return Losses(terms, diagnostics)
'''
SHORT = [
    *SMALL, "trainer.batch_size=16", "trainer.steps=200", "trainer.log_every=10", "trainer.eval_every=40",
    "trainer.checkpoint_every=50",
]  # fmt: skip


@pytest.fixture
def sick(tmp_path: Path) -> list[str]:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    node = "# sick\nname: sick\nimplementation: sick_method:Sick\nillness: collapse\nweight: 1.0\n"
    (tmp_path / "conf" / "method" / "sick.yaml").write_text(node)
    (tmp_path / "sick_method.py").write_text(SICK)
    moons = ["source=two_moons", "target=two_moons", "target.angle=20", "backbone=mlp", "augment=none"]
    return [*SHORT, *moons, "plugins=[sick_method]", "method=sick"]


def events(run: Path, split: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event["values"] for event in lines if event["split"] == split]


@pytest.mark.parametrize(
    ("illness", "extra", "kind"),
    [
        ("collapse", ["method.weight=30"], "predictions_collapsed"),
        ("certain", [], "discriminator_certain"),
        ("zero", [], "term_zero:sick"),
        ("idle", [], "no_gradient:idle"),
        ("explode", ["method.weight=0.01", "optimizer=adam", "optimizer.lr=0.1", "trainer.eval_every=5"], "features_exploded"),
        ("gradient", ["trainer.clip_norm=0.1"], "gradient_exploded:network"),
        ("none", ["optimizer.lr=1e-7"], "source_not_learnt"),
    ],
)  # fmt: skip
def test_a_sick_run_is_told_so_once(
    transfer: Transfer, sick: list[str], illness: str, extra: list[str], kind: str
) -> None:
    outcome = transfer("run", *sick, f"method.illness={illness}", *extra)
    assert outcome.code == 0, outcome.err
    warnings = read_json(outcome.run / "result.json")["health"]["warnings"]
    (found,) = [warning for warning in warnings if warning["kind"] == kind]
    assert found["phase"] == "adapt" and 0 < found["step"] <= 200
    for text in (outcome.out, (outcome.run / "run.log").read_text()):
        assert text.splitlines().count(f"warning: {found['text']}") == 1
    assert f"{found['text']}\n" in transfer("report").out


def test_a_run_that_was_interrupted_warns_once_and_ends_the_same(
    transfer: Transfer, sick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*sick, "method.illness=certain", "trainer.eval_every=50"]
    whole = transfer("run", *chosen)
    expected = outcome_of(whole.run)
    (warning,) = read_json(whole.run / "result.json")["health"]["warnings"]
    assert 60 < warning["step"] < 150
    for stop in (45, warning["step"] + 13):  # in the midst of its stretch, and after it was said
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            assert transfer("run", *chosen, "force=true").code == 143
        assert transfer("run", *chosen).code == 0
        assert_same(whole.run, expected)
        assert (whole.run / "run.log").read_text().count(warning["text"]) == 1


@pytest.mark.parametrize(
    "chosen",
    [
        ["method=source_only"],
        ["method=dann"],
        ["method=deep_coral"],
        ["method=coral", "backbone=hog", "augment=none"],
        ["method=finetune", "target_labels=4"],
        ["source=two_moons", "target=two_moons", "target.angle=30", "backbone=mlp", "augment=none", "method=dann"],
    ],
)
def test_a_healthy_run_is_silent(transfer: Transfer, chosen: list[str]) -> None:
    outcome = transfer("run", *SHORT, *chosen)
    assert outcome.code == 0 and "warning" not in outcome.out, outcome.out
    health = read_json(outcome.run / "result.json")["health"]
    assert health["warnings"] == [] and 0 <= health["proxy_a_distance"] <= 2
    values = events(outcome.run, "health")
    assert values and {"target_entropy", "target_classes", "source_classes"} < set(values[0])
    assert all(v["feature_norm_source"] > 0 and v["feature_norm_target"] > 0 for v in values)


def test_seconds_of_smoke_are_silent(transfer: Transfer, sick: list[str]) -> None:
    for chosen in ([*SMALL, "method=dann"], [*sick, "method.illness=zero", "trainer.steps=40"]):
        outcome = transfer("run", *chosen)
        assert outcome.code == 0 and "warning" not in outcome.out


def test_a_gradient_that_is_not_finite_stops_the_run(transfer: Transfer, sick: list[str]) -> None:
    outcome = transfer("run", *sick, "method.illness=undefined", "trainer.log_every=1")
    assert outcome.code == 2 and "the gradient of 'network' became nan at step 1 of phase 'adapt'" in outcome.err
    assert len(outcome.err.splitlines()) == 1


# Negative transfer


def scored(path: Path, accuracy: float, im: float | None, *, head: str | None = None, **keywords: Any) -> Path:
    """A finished run with a label-free score."""
    if head is not None:
        keywords["config"] = {"head": {"name": head}, **keywords.get("config", {})}
    write_run(path, accuracy, **keywords)
    result = read_json(path / "result.json")
    write_json(path / "result.json", result | ({} if im is None else {"validators": {"im": im}}))
    return path


def flags(folder: Path) -> dict[str, tuple[str, bool, bool | None]]:
    (table,) = aggregate(collect([folder]))
    return {str(row): tuple(verdict) for (row, _), verdict in verdicts(table.cells).items()}


def test_a_method_below_source_only_is_flagged(tmp_path: Path) -> None:
    for seed, (figure, im) in enumerate(((0.70, 1.5), (0.74, 1.7))):
        scored(tmp_path / f"base{seed}", figure, im, method="source_only", seed=seed)
    scored(tmp_path / "a", 0.71, 1.6, method="worse", seed=0)
    scored(tmp_path / "b", 0.73, 1.4, method="surer", seed=0)
    scored(tmp_path / "c", 0.72, 1.4, method="other", seed=7)  # no seed in common, and the same mean
    scored(tmp_path / "d", 0.60, None, method="old")
    assert flags(tmp_path) == {
        "worse": ("source_only", True, False),
        "surer": ("source_only", False, True),
        "other": ("source_only", False, None),
        "old": ("source_only", True, None),
    }


def test_only_the_same_settings_compare(tmp_path: Path) -> None:
    scored(tmp_path / "base", 0.7, 1.5, method="source_only")
    scored(tmp_path / "a", 0.6, 1.4, method="dann", config={"trainer.steps": 300})
    assert flags(tmp_path) == {}
    scored(tmp_path / "b", 0.6, 1.4, method="dann", config={"method.weight": 0.1})  # the method's own
    assert flags(tmp_path) == {"dann trainer.steps=800 method.weight=0.1": ("source_only", True, True)}
    scored(tmp_path / "c", 0.6, 1.4, method="mcd", pair=("mnist", "usps"))
    assert len(flags(tmp_path)) == 1


def test_regression_is_worse_where_its_error_is_larger(tmp_path: Path) -> None:
    scored(tmp_path / "base", 0.3, None, method="source_only", kind="regression")
    scored(tmp_path / "a", 0.4, None, method="worse", kind="regression")
    scored(tmp_path / "b", 0.2, None, method="better", kind="regression")
    assert flags(tmp_path) == {"worse": ("source_only", True, None), "better": ("source_only", False, None)}


def test_frozen_features_compare_with_no_adaptation_and_the_same_head(tmp_path: Path) -> None:
    scored(tmp_path / "trained", 0.8, 1.5, method="source_only")
    scored(tmp_path / "a", 0.6, 1.4, method="coral", head="knn")
    assert flags(tmp_path) == {"coral": ("source_only", True, True)}  # for want of a closer one
    scored(tmp_path / "knn", 0.5, 1.3, method="no_adaptation", head="knn")
    scored(tmp_path / "logistic", 0.7, 1.6, method="no_adaptation", head="logistic")
    assert flags(tmp_path) == {"coral head=knn": ("no_adaptation", False, False)}


@pytest.fixture
def flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pair = tmp_path / "outputs/runs/synth_digits-digits"
    scored(pair / "source_only-seed0-aaaaaaaa", 0.75, 1.9, method="source_only")
    scored(pair / "dann-seed0-bbbbbbbb", 0.90, 2.1)
    scored(pair / "deep_coral-seed0-cccccccc", 0.81, 1.7, method="deep_coral")
    scored(pair / "mmd-seed0-dddddddd", 0.71, 1.8, method="mmd")
    result = read_json(pair / "mmd-seed0-dddddddd" / "result.json")
    warning = {"kind": "term_zero:mmd", "phase": "adapt", "step": 800, "text": "the loss term 'mmd' was zero."}
    write_json(
        pair / "mmd-seed0-dddddddd" / "result.json",
        result | {"health": {"proxy_a_distance": 1.2, "warnings": [warning]}},
    )
    return pair


def test_the_text_marks_and_explains(flagged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([]) == 0
    assert capsys.readouterr().out.splitlines()[4:] == [
        "              synth_digits",
        "              -> digits",
        "source_only   75.0 (1)",
        "dann          90.0 (1)",
        "deep_coral    81.0 (1) ↓im",
        "mmd           71.0 (1) ↓ ↓im",
        "",
        "↓ worse than source_only with the same settings, by this figure: negative transfer",
        "",
        "↓im worse than source_only with the same settings, by im, without target labels: negative transfer, or only less "
        "sure predictions",
        "",
        "training went wrong (docs/health.md)",
        "  outputs/runs/synth_digits-digits/mmd-seed0-dddddddd  the loss term 'mmd' was zero.",
    ]


def test_markdown_and_csv_mark_too(flagged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main(["--format", "md"])
    text = capsys.readouterr().out
    assert "| mmd | 71.0 (1) ↓ ↓im |" in text and "\n\n↓ worse than source_only" in text
    report.main(["--format", "csv"])
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert [[row["baseline"], row["worse"], row["im_worse"]] for row in rows] == [
        ["", "", ""],
        ["source_only", "false", "false"],
        ["source_only", "false", "true"],
        ["source_only", "true", "true"],
    ]


def test_a_run_ends_with_a_word_on_the_baseline_beside_it(flagged: Path) -> None:
    def lines(name: str) -> list[str]:
        return result_lines(read_json(flagged / name / "result.json"), flagged / name)

    assert len(lines("dann-seed0-bbbbbbbb")) == len(lines("source_only-seed0-aaaaaaaa")) == 5
    assert lines("deep_coral-seed0-cccccccc")[4:] == [
        "im 1.700 is below the 1.900 of source_only (outputs/runs/synth_digits-digits/source_only-seed0-aaaaaaaa): "
        "negative transfer, or only less sure predictions",
        "outputs/runs/synth_digits-digits/deep_coral-seed0-cccccccc        next: transfer report",
    ]
    scored(flagged / "dann-seed1-ffffffff", 0.9, 1.0, seed=1)
    scored(flagged / "dann-seed0-eeeeeeee", 0.9, 1.0, config={"trainer.steps": 5})
    assert len(lines("dann-seed1-ffffffff")) == len(lines("dann-seed0-eeeeeeee")) == 5
    assert len(result_lines(result_of(), flagged / "new-seed0-99999999")) == 5
