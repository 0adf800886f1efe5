"""Recalibration, prediction sets, abstaining and out-of-distribution figures: against closed forms, brute force and simulation."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome
from sklearn.metrics import roc_auc_score
from torch import Tensor

from transfer_cli.commands.predict import _finite, _rows
from transfer_cli.data.domain import Domain, Part
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.task import deal, match_labels, split_pair
from transfer_cli.evaluation.calibration import Calibration, LabelledPrediction, fit_calibration
from transfer_cli.evaluation.conformal import fewest, fit_conformal, fit_density_ratio
from transfer_cli.evaluation.metrics import area_under_risk_coverage, final_score, out_of_distribution
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.feature_method import FeatureMethod

Transfer = Callable[..., Outcome]


def labelled(
    n: int, temperature: float = 1.0, classes: int = 4, seed: int = 0, bias: Tensor | None = None
) -> LabelledPrediction:
    """Labels drawn from `softmax(logits / temperature + bias)`, of predictions `softmax(logits)`."""
    draw = torch.Generator().manual_seed(seed)
    log_probs = torch.log_softmax(3 * torch.randn(n, classes, generator=draw, dtype=torch.float64), 1)
    truth = torch.softmax(log_probs / temperature + (0 if bias is None else bias), 1)
    return LabelledPrediction(Prediction(log_probs=log_probs), torch.multinomial(truth, 1, generator=draw)[:, 0])


def gaussian(n: int, stretch: float, outputs: int = 2, seed: int = 0) -> LabelledPrediction:
    """Labels whose deviations are `stretch` times those predicted."""
    draw = torch.Generator().manual_seed(seed)
    mean, noise = (torch.randn(n, outputs, generator=draw, dtype=torch.float64) for _ in range(2))
    variance = torch.rand(n, outputs, generator=draw, dtype=torch.float64) + 0.1
    return LabelledPrediction(Prediction(mean=mean, variance=variance), mean + stretch * variance.sqrt() * noise)


def nll(calibration: Calibration, data: LabelledPrediction) -> float:
    log_probs = calibration(data.prediction).log_probs
    assert log_probs is not None
    return float(torch.nn.functional.nll_loss(log_probs, data.labels, reduction="sum"))


def test_ts_recovers_the_temperature_and_leaves_the_guesses_alone() -> None:
    data = labelled(20000, temperature=2.5)
    calibration, figures = fit_calibration("ts", data)
    assert figures["temperature"] == pytest.approx(2.5, rel=0.05)
    after = calibration(data.prediction)
    assert torch.equal(after.labels, data.prediction.labels)
    found = calibration.factor
    for factor in (0.99, 1.01):  # a minimum
        assert nll(Calibration(factor * found, calibration.bias), data) > nll(calibration, data)


def test_ts_map_lies_between_the_source_and_the_target() -> None:
    source, few, many = labelled(4000, 2.0), labelled(15, 6.0, seed=1), labelled(20000, 6.0, seed=1)
    (centre, alone) = (
        fit_calibration(kind, data)[1]["temperature"] for kind, data in (("ts_map", source), ("ts", few))
    )
    _, figures = fit_calibration("ts_map", few, source)
    assert figures["temperature_source"] == centre
    assert min(centre, alone) < figures["temperature"] < max(centre, alone)
    assert fit_calibration("ts_map", many, source)[1]["temperature"] == pytest.approx(6.0, rel=0.05)
    # The stationary point of  NLL(T) + (log T - log T_source)² / (2 · ½²), by finite differences of the formula.
    log_probs = few.prediction.log_probs
    assert log_probs is not None

    def objective(log_t: float) -> float:
        loss = torch.nn.functional.cross_entropy(log_probs / math.exp(log_t), few.labels, reduction="sum")
        return float(loss) + (log_t - math.log(centre)) ** 2 / (2 * 0.25)

    at = math.log(figures["temperature"])
    assert (objective(at + 1e-3) - objective(at - 1e-3)) / 2e-3 == pytest.approx(0, abs=2e-3)


def test_ts_map_of_labels_that_are_all_right_stays_finite() -> None:
    """Plain temperature scaling of separable labels runs to its bound; the prior keeps the other."""
    log_probs = torch.log_softmax(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]]).double(), 1)
    data = LabelledPrediction(Prediction(log_probs=log_probs), torch.arange(3))
    assert fit_calibration("ts", data)[1]["temperature"] < 0.1
    assert 0.3 < fit_calibration("ts_map", data)[1]["temperature"] < 1
    perfect = labelled(100, 0.01)  # nor does a source without an error draw the target's temperature to zero
    assert fit_calibration("ts_map", labelled(15, 1.0), perfect)[1]["temperature"] > 0.2


def test_vector_recovers_what_a_temperature_cannot() -> None:
    bias = torch.tensor([1.5, -1.0, 0.0, -0.5]).double()
    data = labelled(20000, 1.5, bias=bias)
    calibration, _ = fit_calibration("vector", data)
    found = calibration.bias - calibration.bias.mean()
    assert torch.allclose(found, bias - bias.mean(), atol=0.1)
    assert nll(calibration, data) < nll(fit_calibration("ts", data)[0], data) - 100
    few = fit_calibration("vector", labelled(8, 1.5, bias=bias))[0]  # more numbers than labels
    assert bool(few.factor.isfinite().all()) and float(few.bias.abs().max()) < 2


def test_regression_is_scaled_in_closed_form() -> None:
    data = gaussian(300, 1.7)
    z = (data.labels - data.prediction.mean) / data.prediction.variance.sqrt()  # type: ignore[operator, union-attr]
    _, figures = fit_calibration("ts", data)
    assert figures["temperature"] == pytest.approx(float(z.square().mean().sqrt()), rel=1e-4)
    calibration, _ = fit_calibration("vector", data)
    assert calibration.factor.shape == (2,)
    after = calibration(
        Prediction(mean=data.prediction.mean, variance=data.prediction.variance, epistemic=data.prediction.variance)
    )
    assert torch.allclose(after.variance, after.epistemic)  # type: ignore[arg-type]
    assert torch.equal(after.mean, data.prediction.mean)  # type: ignore[arg-type]
    alone = float(z.square().mean(0).sqrt()[0])
    assert float(calibration.factor[0]) == pytest.approx(alone, rel=0.02)


@pytest.mark.parametrize("level", [0.8, 0.9])
def test_sets_cover_as_stated_whatever_the_model(level: float) -> None:
    """Mean coverage over many draws of 39 scores lies between the level and the level + 1 / 40 (Vovk et al., 2005)."""
    everything = labelled(40 * 400, temperature=4.0)  # a model that is much too sure
    covered = []
    for i in range(400):
        rows = slice(40 * i, 40 * i + 39)
        part = LabelledPrediction(Prediction(log_probs=everything.prediction.log_probs[rows]), everything.labels[rows])  # type: ignore[index]
        one = slice(40 * i + 39, 40 * i + 40)
        found = fit_conformal(part, level)(Prediction(log_probs=everything.prediction.log_probs[one]))  # type: ignore[index]
        assert found.members is not None
        covered.append(float(found.members[0, everything.labels[one][0]]))
    wide = 3 * math.sqrt(level * (1 - level) / 400)
    assert level - wide <= np.mean(covered) <= level + 1 / 40 + wide


def test_intervals_cover_as_stated() -> None:
    calibration, test = gaussian(199, 2.0), gaussian(20000, 2.0, seed=1)
    found = fit_conformal(calibration, 0.9)(test.prediction)
    figures = final_score(found, test.labels)
    assert figures["conformal_coverage"] == pytest.approx(0.9, abs=0.04)
    assert figures["conformal_unbounded"] == 0
    inside = (found.lower <= test.labels) & (test.labels <= found.upper)  # type: ignore[operator]
    assert figures["conformal_coverage"] == float(inside.double().mean())
    assert figures["conformal_size"] == pytest.approx(float((found.upper - found.lower).mean()))  # type: ignore[operator]


def test_thresholds_against_their_definition() -> None:
    data = gaussian(30, 1.0, outputs=1)
    source, target = torch.randn(50, 3), torch.randn(60, 3) + 0.7
    features, ratio = torch.randn(30, 3), fit_density_ratio(source, target)
    conformal = fit_conformal(data, 0.8, ratio, features)
    scores = ((data.labels - data.prediction.mean).abs() / data.prediction.variance.sqrt())[:, 0]  # type: ignore[operator, union-attr]
    weights = ratio(features).exp()
    for x in torch.tensor([0.0, 0.3, 5.0, 1e4]).double():
        reach = [q for q in scores.tolist() if float(weights[scores <= q].sum()) >= 0.8 * float(weights.sum() + x)]
        expected = min(reach) if reach else math.inf
        assert float(conformal.thresholds(x[None])[0, 0]) == pytest.approx(expected, rel=1e-12)
    assert conformal.effective == pytest.approx(float(weights.sum() ** 2 / weights.square().sum()))


def test_too_few_labels_for_a_level() -> None:
    assert [fewest(level) for level in (0.5, 0.8, 0.9, 0.95)] == [1, 4, 9, 19]
    for level, n in ((0.9, 9), (0.9, 8)):
        threshold = fit_conformal(gaussian(n, 1.0, outputs=1), level).thresholds(torch.ones(1))
        assert bool(threshold.isinf()) == (n < fewest(level))


def test_the_density_ratio_is_that_of_gaussians() -> None:
    """N(0, 1) and N(1, 1) in the first of two dimensions:  log w = x - ½."""
    draw = torch.Generator().manual_seed(0)
    source, target = (torch.randn(4000, 2, generator=draw).double() for _ in range(2))
    target[:, 0] += 1
    grid = torch.tensor([[-1.0, 0], [0, 1], [1, -1], [2, 0]]).double()
    assert torch.allclose(fit_density_ratio(source, target)(grid), grid[:, 0] - 0.5, atol=0.15)
    fewer = fit_density_ratio(source[:400], target)(grid)  # the numbers of samples do not count
    assert torch.allclose(fewer, grid[:, 0] - 0.5, atol=0.5)
    for unit in (1e-12, 1e12):  # nor does the unit; the third feature is constant
        of_unit = fit_density_ratio(*(torch.cat([unit * x, torch.full((len(x), 1), 0.1)], 1) for x in (source, target)))
        at = torch.cat([unit * grid, torch.full((4, 1), 0.1)], 1)
        assert torch.allclose(of_unit(at), grid[:, 0] - 0.5, atol=0.15)


@pytest.mark.parametrize("unit", [1e-15, 1e15])
def test_the_unit_of_targets_changes_neither_factors_nor_coverage(unit: float) -> None:
    plain, data = (gaussian(200, 1.7), gaussian(200, 1.7))
    scaled = LabelledPrediction(
        Prediction(mean=unit * data.prediction.mean, variance=unit**2 * data.prediction.variance), unit * data.labels
    )
    for kind in ("ts", "ts_map", "vector"):
        factors = [fit_calibration(kind, one)[0].factor for one in (plain, scaled)]
        torch.testing.assert_close(*factors, rtol=1e-6, atol=0)
        assert float(factors[0].max()) > 1.3
    found = [fit_conformal(one, 0.9)(one.prediction) for one in (plain, scaled)]
    torch.testing.assert_close(unit * found[0].upper, found[1].upper)
    assert final_score(found[1], scaled.labels)["conformal_coverage"] == pytest.approx(0.9, abs=0.02)


def test_weights_mend_the_coverage_under_covariate_shift() -> None:
    """Noise grows with x, and the target has larger x: source scores are too small for it, weighted ones right."""
    draw = torch.Generator().manual_seed(0)

    def part(n: int, centre: float) -> tuple[LabelledPrediction, Tensor]:
        x = torch.randn(n, 1, generator=draw).double() + centre
        y = (1 + x.clamp_min(0)).square() * torch.randn(n, 1, generator=draw).double()
        return LabelledPrediction(Prediction(mean=torch.zeros(n, 1).double(), variance=torch.ones(n, 1).double()), y), x

    (calibration, x_source), (test, x_target) = part(3000, 0.0), part(3000, 1.0)
    coverage = {}
    for name, ratio in (("split", None), ("weighted", fit_density_ratio(part(3000, 0.0)[1], part(3000, 1.0)[1]))):
        found = fit_conformal(calibration, 0.9, ratio, x_source)(test.prediction, x_target)
        coverage[name] = final_score(found, test.labels)["conformal_coverage"]
    assert coverage["split"] < 0.84
    assert coverage["weighted"] == pytest.approx(0.9, abs=0.025)


def test_risk_coverage_and_strangers_against_brute_force() -> None:
    draw = torch.Generator().manual_seed(0)
    confidence, wrong = torch.rand(50, generator=draw).double(), torch.rand(50, generator=draw) < 0.3
    order = sorted(range(50), key=lambda i: -float(confidence[i]))
    risks = [np.mean([float(wrong[i]) for i in order[:n]]) for n in range(1, 51)]
    assert area_under_risk_coverage(confidence, wrong) == pytest.approx(np.mean(risks))

    known, strange = (torch.softmax(s * torch.randn(80, 3, generator=draw), 1) for s in (4.0, 1.0))
    known[:5] = strange[:5]  # ties
    figures = out_of_distribution(Prediction(log_probs=known.log()), Prediction(log_probs=strange.log()))
    u, v = (-(p.double() * p.double().log()).sum(1) for p in (known, strange))
    assert figures["auroc"] == pytest.approx(roc_auc_score(np.r_[np.zeros(80), np.ones(80)], torch.cat([u, v]).numpy()))
    accepted = min(t for t in u.tolist() if float((u <= t).double().mean()) >= 0.95)
    assert figures["fpr95"] == pytest.approx(float((v <= accepted).double().mean()))
    variances = [torch.full((3, 1), s) for s in (1.0, 2.0)]
    unsure = [Prediction(mean=v, variance=v) for v in variances]
    assert out_of_distribution(*unsure) == {"auroc": 1.0, "fpr95": 0.0}


def test_the_nll_at_its_best_temperature() -> None:
    data = labelled(500, 3.0)
    figures = final_score(data.prediction, data.labels)
    assert figures["nll_best_temperature"] == pytest.approx(nll(fit_calibration("ts", data)[0], data) / 500, rel=1e-6)
    beyond = final_score(Prediction(log_probs=torch.log_softmax(torch.eye(3), 1)), torch.tensor([0, 1, 4]))
    assert all(map(math.isfinite, beyond.values()))  # a class that the method cannot name


def posed(**changes: Any) -> tuple[Any, Any]:
    labels = torch.arange(90) % 3
    part = Part(ArrayInputs(torch.arange(90.0)[:, None]), labels, tuple(map(str, range(90))))
    domain = Domain("toy", "classification", ("a", "b", "c"), part)
    options: dict[str, Any] = {
        "protocol": "inductive",
        "target_labels": 6,
        "test_share": 1 / 3,
        "validation_share": 0.1,
        "subset": {"source": None, "target": None, "test": None},
        "data_seed": 0,
    }
    return split_pair(None, domain, match_labels(None, domain, "closed"), **{**options, **changes})


def test_labels_kept_back_train_nothing_and_are_of_every_class() -> None:
    plain, _ = posed()
    for share, kept in ((0.5, 3), (1.0, 6), (1 / 3, 2)):
        task, heldout = posed(reserve=share)
        assert torch.bincount(task.target_calibration.labels).tolist() == [kept] * 3
        ids = set() if task.target_labelled is None else set(task.target_labelled.ids)
        back = set(task.target_calibration.ids)
        assert not ids & back and ids | back == set(plain.target_labelled.ids)
        assert not back & set(heldout.target_test.ids)
    assert posed(reserve=1.0)[0].target_labelled is None
    odd, _ = posed(target_labels=1, reserve=0.5)
    assert len(odd.target_calibration) == 2 and len(odd.target_labelled) == 1


def test_a_share_is_of_rare_classes_too() -> None:
    for counts in ((90, 10), (14, 10, 6), (40, 1)):
        labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        part = Part(ArrayInputs(torch.zeros(len(labels), 1)), labels, tuple(map(str, range(len(labels)))))
        halves = deal(part, 0.5, torch.Generator().manual_seed(0))
        for half in halves:
            found = torch.bincount(half.labels, minlength=len(counts)).tolist()
            assert all(abs(n - whole / 2) <= 1 for n, whole in zip(found, counts, strict=True))


def sets_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_a_calibrated_run_from_training_to_new_samples(transfer: Transfer) -> None:
    options = [
        "target_labels=6",
        "calibration=ts_map",
        "conformal=target",
        "conformal_level=0.8",
        "ood=digits",
        "subset.test=60",
    ]
    plain = transfer("run", *SMALL, "method=dann", "target_labels=6", "subset.test=60")
    shown = transfer("run", *SMALL, "method=dann", *options)
    assert shown.code == 0, shown.err
    assert "60 target labels granted (30 kept back for calibration)" in shown.out
    assert "calibration ts_map on 15 target labels: temperature" in shown.out
    assert "conformal target at 80.0 % on 15 target labels" in shown.out and "so few labels" in shown.out
    result = sets_of(shown.run)
    assert result["calibration"]["before"]["target_test"]["accuracy"] == result["metrics"]["target_test"]["accuracy"]
    assert result["calibration"]["before"]["target_test"]["nll"] != result["metrics"]["target_test"]["nll"]
    assert 0 <= result["metrics"]["ood"]["auroc"] <= 1
    assert sets_of(plain.run)["calibration"] is None and plain.run != shown.run
    assert (shown.run / "figures" / "reliability.png").stat().st_size > 10000

    report = transfer("report", str(shown.run.parent)).out
    figures = result["metrics"]["target_test"]
    assert f"{figures['nll']:.3f}, {figures['ece']:.3f}" in report  # a table of scores, for a run was calibrated
    assert f"{100 * figures['conformal_coverage']:.1f}, {figures['conformal_size']:.3g}" in report
    assert "NLL and ECE" not in transfer("report", str(plain.run)).out
    assert transfer("evaluate", str(shown.run)).code == 0
    written = transfer("predict", str(shown.run), "--dataset", "digits", "--risk", "0.3")
    rows = list(csv.DictReader(io.StringIO(written.out)))
    assert all((row["abstains"] == "True") == (float(row["probability"]) < 0.7) for row in rows)
    for row in rows:
        assert row["set"] == "" or row["set"].split("|")[0] == row["class"]
    with np.load(shown.run / "predictions.npz") as arrays:
        assert arrays["target_test_members"].shape == arrays["target_test_probs"].shape
    (shown.run / "checkpoints" / "calibration.pt").unlink()
    assert "calibration.pt is missing" in transfer("predict", str(shown.run), "--dataset", "digits").err


@pytest.mark.parametrize("conformal", ["none", "split", "weighted"])
def test_a_calibrated_run_predicts_its_test_sets_once(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, conformal: str
) -> None:
    """And its figures are those of the recalibrated model asked from the start."""
    asked: list[int] = []
    for name in ("predict", "predict_source"):
        plain = getattr(FeatureMethod, name)

        def counted(self: Any, x: Any, plain: Any = plain) -> Prediction:
            asked.append(len((found := plain(self, x)).labels))
            return found

        monkeypatch.setattr(FeatureMethod, name, counted)
    kinds = ["calibration=ts", f"conformal={conformal}", "conformal_level=0.5", "ood=digits"]
    counts = []
    for options in ([], kinds):
        asked.clear()
        shown = transfer("run", *SMALL, "method=coral", "split.validation=0.3", *options)
        assert shown.code == 0, shown.err
        counts.append(sum(asked))
    strangers = 200  # subset.test of those
    result = sets_of(shown.run)
    kept = result["calibration"]["labels"] + (result["conformal"]["labels"] if result["conformal"] else 0)
    assert counts[1] - counts[0] - strangers == kept  # to fit what follows
    assert transfer("evaluate", str(shown.run)).code == 0


@pytest.mark.parametrize("conformal", ["split", "weighted"])
def test_sets_from_the_source_s_scores(transfer: Transfer, conformal: str) -> None:
    shown = transfer("run", *SMALL, "method=coral", f"conformal={conformal}", "calibration=ts", "split.validation=0.3")
    assert shown.code == 0, shown.err
    found = sets_of(shown.run)["conformal"]
    assert found["domain"] == "source" and found["kind"] == conformal
    assert (found["effective_labels"] < 0.99 * found["labels"]) == (conformal == "weighted")
    assert transfer("evaluate", str(shown.run)).code == 0


@pytest.mark.parametrize("calibration", ["ts", "ts_map", "vector"])
@pytest.mark.parametrize("conformal", ["split", "target"])
def test_every_calibration_beside_every_kind_of_sets(transfer: Transfer, calibration: str, conformal: str) -> None:
    both = [f"calibration={calibration}", f"conformal={conformal}", "target_labels=6", "conformal_level=0.8"]
    shown = transfer("run", *SMALL, "method=coral", *both)
    assert shown.code == 0, shown.err
    result = sets_of(shown.run)
    assert result["calibration"]["domain"] == "target"
    half = 15 if conformal == "target" else 30  # what both would use is halved
    assert result["calibration"]["labels"] == half


@pytest.mark.parametrize("method", ["niw_lda", "dirichlet_gp", "coral"])
def test_strangers_among_features(transfer: Transfer, tmp_path: Path, method: str) -> None:
    """Of files of features: more of the target's own are no strangers; a cloud between the classes and far off them is."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3

    def cloud() -> Any:
        return 4 * np.eye(3, 5)[y] + rng.normal(size=(120, 5))

    for name, x in (
        ("source", cloud()),
        ("target", cloud()),
        ("more", cloud()),
        ("strange", 20 * rng.normal(size=(120, 5))),
    ):
        np.savez(tmp_path / f"{name}.npz", x=x.astype(np.float32), y=y)
    arrays = ["source=arrays", "target=arrays"]
    paths = [f"{domain}.path={tmp_path / domain}.npz" for domain in ("source", "target")]
    own = ["backbone=identity", f"method={method}", "target_labels=5", "threads=1", "device=cpu", "ood=arrays"]
    found = {}
    for name in ("more", "strange"):
        shown = transfer("run", *arrays, *paths, *own, f"ood.path={tmp_path / name}.npz")
        assert shown.code == 0, shown.err
        found[name] = sets_of(shown.run)["metrics"]["ood"]["auroc"]
    assert abs(found["more"] - 0.5) < 0.15
    assert found["strange"] > 0.7 if method == "dirichlet_gp" else np.isfinite(found["strange"])


def test_strangers_to_extracted_features(transfer: Transfer) -> None:
    """Images of a third data set go through the backbone whose features of the others were kept."""
    shown = transfer("run", *SMALL, "method=niw_lda", "target_labels=5", "ood=digits")  # the target itself
    assert shown.code == 0, shown.err
    assert abs(sets_of(shown.run)["metrics"]["ood"]["auroc"] - 0.5) < 0.1


def test_bounds_that_are_none_are_null_in_json() -> None:
    endless = torch.tensor([[math.inf]])
    prediction = Prediction(mean=torch.zeros(1, 1), variance=torch.ones(1, 1), lower=-endless, upper=endless)
    row = next(_rows(prediction, (), False, None, 1.0))
    assert row["abstains"] and json.loads(json.dumps(_finite(row), allow_nan=False))["upper_0"] is None


def test_regression_intervals_of_new_samples_are_the_conformal_ones(transfer: Transfer) -> None:
    pair = [
        "source=friedman",
        "target=friedman",
        "target.domain=close",
        "backbone=identity",
        "method=no_adaptation",
        "head=ridge",
    ]
    shown = transfer("run", *pair, "target_labels=40", "conformal=target", "calibration=vector", "threads=1")
    assert shown.code == 0, shown.err
    data = ["--dataset", "friedman", "domain=close"]
    rows = list(csv.DictReader(io.StringIO(transfer("predict", str(shown.run), *data, "--risk", "1e9").out)))
    assert {row["abstains"] for row in rows} == {"False"}
    row = {name: float(value) for name, value in rows[0].items() if name.endswith("_0")}
    half = (row["upper_0"] - row["lower_0"]) / 2
    assert row["mean_0"] == pytest.approx(row["lower_0"] + half, rel=1e-5)
    assert half / row["std_0"] != pytest.approx(1.644854, rel=1e-3)  # not the Gaussian's
    assert "conformal at 0.9" in transfer("predict", str(shown.run), *data, "--level", "0.5").err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["calibration=tsmap"], "ts_map"),
        (["calibration=ts", "split.validation=0"], "needs labels that train nothing"),
        (["conformal=target"], "set target_labels=N"),
        (
            ["conformal=target", "target_labels=1", "calibration_share=1", "conformal_level=0.95"],
            "needs 19 labels at conformal_level=0.95, and has 10",
        ),
        (["conformal=split", "split.validation=0"], "needs validation samples"),
        (["target_labels=1", "calibration_share=0.01", "calibration=ts"], "has no target label"),
        (["target_labels=1", "calibration=ts"], "leaves 5 classes without a target label to learn"),
        (["method=finetune", "target_labels=5", "calibration_share=1", "calibration=ts"], "keeps back all of them"),
        (
            ["method=osbp", "label_space=open", "subset.source_classes=['0','1','2']", "conformal=split"],
            "label_space=open has classes of which no label can be granted",
        ),
        (["conformal=split", "conformal_level=1.5"], "conformal_level is a share"),
        (["conformal=split", "conformal_level=0.999"], "needs 999 labels"),
        (["calibration=ts", "calibration_share=0"], "calibration_share"),
        (["ood=two_moons"], "two_moons is vector of 2"),
        (["ood=two_moon"], "Did you mean"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    transfer: Transfer, options: list[str], says: str, tmp_path: Path
) -> None:
    shown = transfer("run", *SMALL, *options)
    assert shown.code == 2 and says in shown.err and shown.err.count("\n") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
