"""Figures of merit against scikit-learn, scipy, simulation and values worked by hand; label-free validators in closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_absolute_error, mean_squared_error, r2_score
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.metrics import (
    classification,
    epistemic_share,
    expected_calibration_error,
    macro_f1,
    regression,
    sample_nll,
    score,
)
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.validators import VALIDATORS, View, applicable, load_validator
from transfer_cli.evaluation.validators.entropy import entropy
from transfer_cli.evaluation.validators.im import im
from transfer_cli.evaluation.validators.source_val import source_val


def random_probs(n: int = 200, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(n, classes, generator=draw, dtype=torch.float64)).softmax(1)
    return probs, torch.randint(classes, (n,), generator=draw)


# --- classification -------------------------------------------------------------------------------


def test_classification_against_scikit_learn() -> None:
    probs, labels = random_probs()
    figures = classification(probs.log(), labels)
    guesses = probs.argmax(1)
    assert figures["accuracy"] == pytest.approx(accuracy_score(labels, guesses))
    assert figures["macro_f1"] == pytest.approx(f1_score(labels, guesses, average="macro"))
    assert figures["nll"] == pytest.approx(log_loss(labels, probs.numpy(), labels=range(5)))
    one_hot = np.eye(5)[labels.numpy()]
    assert figures["brier"] == pytest.approx(((probs.numpy() - one_hot) ** 2).sum(1).mean())
    assert set(figures) == {"accuracy", "macro_f1", "nll", "brier", "ece", "ece_equal_mass"}


def test_the_brier_score_of_two_classes_is_twice_scikit_learns() -> None:
    from sklearn.metrics import brier_score_loss

    probs, labels = random_probs(classes=2)
    assert classification(probs.log(), labels)["brier"] == pytest.approx(2 * brier_score_loss(labels, probs[:, 1]))


@pytest.mark.parametrize(
    ("guesses", "labels"),
    [([0, 0, 1], [0, 1, 1]), ([2, 2, 2], [0, 0, 2]), ([0, 0], [0, 0]), ([3, 3], [1, 1]), ([0, 1, 4], [0, 1, 1])],
)
def test_macro_f1_is_over_the_classes_that_occur(guesses: list[int], labels: list[int]) -> None:
    wanted = f1_score(labels, guesses, average="macro", zero_division=0.0)
    assert macro_f1(torch.tensor(guesses), torch.tensor(labels)) == pytest.approx(wanted)


def test_classes_that_no_label_has_do_not_dilute_macro_f1() -> None:
    probs = torch.eye(10, dtype=torch.float64)[:2].clamp_min(1e-9)
    assert classification(probs.log(), torch.tensor([0, 1]))["macro_f1"] == 1.0


def test_labels_beyond_the_head_are_wrong_and_have_no_probability() -> None:
    probs, _ = random_probs(4, classes=3)
    guesses = probs.argmax(1)
    labels = torch.tensor([int(guesses[0]), int(guesses[1]), 3, 3])  # 3: `unknown`, which the method cannot name
    figures = classification(probs.log(), labels)
    assert figures["accuracy"] == 0.5
    floor = -math.log(torch.finfo(torch.float32).tiny)
    known = [-math.log(probs[i, labels[i]]) for i in (0, 1)]
    assert figures["nll"] == pytest.approx((sum(known) + 2 * floor) / 4)
    brier = [float((probs[i] - torch.eye(3)[labels[i]]).square().sum()) for i in (0, 1)]
    brier += [float(probs[i].square().sum()) + 1 for i in (2, 3)]
    assert figures["brier"] == pytest.approx(sum(brier) / 4)


def test_metrics_are_computed_in_float64() -> None:
    probs, labels = random_probs(20_000)
    single = classification(probs.log().float(), labels)
    assert single["nll"] == pytest.approx(classification(probs.log(), labels)["nll"], rel=1e-7)


# --- calibration ----------------------------------------------------------------------------------


def ece(confidence: list[float], right: list[int], **options: bool | int) -> float:
    return expected_calibration_error(
        torch.tensor(confidence, dtype=torch.float64), torch.tensor(right, dtype=torch.float64), **options
    )  # type: ignore[arg-type]


def test_ece_by_hand() -> None:
    assert ece([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1]) == 0.0
    assert ece([1.0, 1.0, 1.0, 1.0], [1, 1, 0, 0]) == pytest.approx(0.5)
    assert ece([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0.0)
    # (0.90, right), (0.91, wrong) share the bin (13/15, 14/15]; (0.55, right) is alone in (8/15, 9/15]
    assert ece([0.9, 0.91, 0.55], [1, 0, 1]) == pytest.approx((abs(1 - 0.9 - 0.91) + abs(1 - 0.55)) / 3)
    # within a bin, over- and underconfidence cancel; across bins they do not
    assert ece([0.61, 0.65], [1, 0]) == pytest.approx(abs(1 - 0.61 - 0.65) / 2)
    assert ece([0.61, 0.75], [1, 0]) == pytest.approx((0.39 + 0.75) / 2)


@pytest.mark.parametrize("k", range(1, 16))
def test_a_confidence_on_an_edge_belongs_to_the_bin_below_it(k: int) -> None:
    edge = k / 15
    below, above = edge - 1e-6, edge + 1e-6
    together = abs(1 - edge - below) / 2
    assert ece([edge, below], [1, 0]) == pytest.approx(together, abs=1e-9)
    if k < 15:
        assert ece([edge, above], [1, 0]) == pytest.approx(((1 - edge) + above) / 2, abs=1e-9)


def test_a_confidence_of_exactly_one_or_zero_is_counted() -> None:
    assert ece([1.0, 0.99], [0, 0]) == pytest.approx((1.0 + 0.99) / 2)
    assert ece([0.0, 0.01], [1, 1]) == pytest.approx((1.0 + 0.99) / 2)


def test_equal_mass_bins_by_hand() -> None:
    confidence, right = [0.3, 0.9, 0.5, 0.7], [0, 1, 1, 0]
    # in order: (0.3, 0) (0.5, 1) | (0.7, 0) (0.9, 1)
    wanted = (abs(1 - 0.8) + abs(1 - 1.6)) / 4
    assert ece(confidence, right, bins=2, equal_mass=True) == pytest.approx(wanted)
    each = sum(abs(r - c) for c, r in zip(confidence, right, strict=True)) / 4
    assert ece(confidence, right, bins=15, equal_mass=True) == pytest.approx(each), "fewer samples than bins"


@pytest.mark.parametrize("equal_mass", [False, True])
def test_a_calibrated_forecast_has_little_error_and_an_overconfident_one_its_gap(equal_mass: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    confidence = 0.5 + 0.5 * torch.rand(100_000, generator=draw, dtype=torch.float64)
    right = (torch.rand(100_000, generator=draw, dtype=torch.float64) < confidence).double()
    assert expected_calibration_error(confidence, right, equal_mass=equal_mass) < 0.01
    right = (torch.rand(100_000, generator=draw, dtype=torch.float64) < confidence - 0.2).double()
    assert expected_calibration_error(confidence, right, equal_mass=equal_mass) == pytest.approx(0.2, abs=0.01)


def test_ece_of_a_prediction_is_that_of_its_top_class() -> None:
    probs, labels = random_probs()
    confidence, guesses = probs.max(1)
    figures = classification(probs.log(), labels)
    assert figures["ece"] == pytest.approx(expected_calibration_error(confidence, (guesses == labels).double()))
    assert figures["ece_equal_mass"] == pytest.approx(
        expected_calibration_error(confidence, (guesses == labels).double(), equal_mass=True)
    )
    edges = np.linspace(0, 1, 16)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        inside = ((confidence > low) & (confidence <= high)).numpy()
        if inside.any():
            gap = (guesses == labels).numpy()[inside].mean() - confidence.numpy()[inside].mean()
            total += inside.mean() * abs(gap)
    assert figures["ece"] == pytest.approx(total)


# --- regression -----------------------------------------------------------------------------------


def random_regression(n: int = 50, targets: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    mean = torch.randn(n, targets, generator=draw, dtype=torch.float64) * 3
    variance = 0.1 + torch.rand(n, targets, generator=draw, dtype=torch.float64)
    return mean, variance, mean + torch.randn(n, targets, generator=draw, dtype=torch.float64)


def test_regression_against_scikit_learn_and_scipy() -> None:
    mean, variance, labels = random_regression()
    figures = regression(mean, variance, labels)
    assert figures["rmse"] == pytest.approx(math.sqrt(mean_squared_error(labels, mean)))
    assert figures["mae"] == pytest.approx(mean_absolute_error(labels, mean))
    assert figures["r2"] == pytest.approx(r2_score(labels, mean))
    assert figures["nll"] == pytest.approx(-stats.norm.logpdf(labels, mean, variance.sqrt()).mean())


def test_crps_is_the_integral_of_squared_differences_of_distribution_functions() -> None:
    for mean, sigma, label in [(0.0, 1.0, 0.3), (1.0, 0.2, 3.0), (-2.0, 2.5, -2.0)]:

        def below(t: float, mean: float = mean, sigma: float = sigma) -> float:
            return float(stats.norm.cdf(t, mean, sigma)) ** 2

        def above(t: float, mean: float = mean, sigma: float = sigma) -> float:
            return (1 - float(stats.norm.cdf(t, mean, sigma))) ** 2

        wanted = quad(below, mean - 12 * sigma, label)[0] + quad(above, label, max(mean, label) + 12 * sigma)[0]
        found = regression(*(torch.tensor([[v]], dtype=torch.float64) for v in (mean, sigma**2, label)))["crps"]
        assert found == pytest.approx(wanted, rel=1e-5)


def test_coverage_and_width_by_simulation() -> None:
    draw = torch.Generator().manual_seed(0)
    sigma = 0.5 + torch.rand(100_000, 1, generator=draw, dtype=torch.float64)
    labels = 2 + sigma * torch.randn(100_000, 1, generator=draw, dtype=torch.float64)
    figures = regression(torch.full_like(labels, 2), sigma.square(), labels)
    for level in (50, 80, 95):
        assert figures[f"coverage_{level}"] == pytest.approx(level / 100, abs=0.005)
        half = stats.norm.ppf(0.5 + level / 200)
        assert figures[f"width_{level}"] == pytest.approx(2 * half * float(sigma.mean()))
    narrow = regression(torch.full_like(labels, 2), sigma.square() / 4, labels)
    assert narrow["coverage_95"] == pytest.approx(2 * stats.norm.cdf(1.959964 / 2) - 1, abs=0.005)


def test_several_targets_are_averaged() -> None:
    mean, variance, labels = random_regression(targets=3)
    figures = regression(mean, variance, labels)
    each = [regression(mean[:, [i]], variance[:, [i]], labels[:, [i]]) for i in range(3)]
    for name in ("mae", "nll", "crps", "coverage_80", "width_50"):
        assert figures[name] == pytest.approx(sum(e[name] for e in each) / 3)
    assert figures["rmse"] == pytest.approx(math.sqrt(sum(e["rmse"] ** 2 for e in each) / 3))


def test_degenerate_regressions_stay_finite() -> None:
    labels = torch.full((4, 1), 3.0)
    figures = regression(labels, torch.zeros(4, 1), labels)
    assert all(math.isfinite(v) for v in figures.values())
    assert figures["r2"] == 0.0 and figures["rmse"] == 0.0 and figures["coverage_50"] == 1.0


def test_score_dispatches_on_the_kind() -> None:
    probs, labels = random_probs()
    assert score("classification", Prediction(log_probs=probs.log()), labels) == classification(probs.log(), labels)
    mean, variance, targets = random_regression()
    assert score("regression", Prediction(mean=mean, variance=variance), targets) == regression(mean, variance, targets)


# --- predictions ----------------------------------------------------------------------------------


def test_predictions_from_logits_and_probabilities() -> None:
    logits = torch.randn(4, 3)
    prediction = Prediction.from_logits(logits)
    torch.testing.assert_close(prediction.probs, logits.softmax(1))
    assert torch.equal(prediction.labels, logits.argmax(1))
    certain = Prediction.from_probs(torch.tensor([[1.0, 0.0]]))
    assert certain.log_probs is not None and bool(certain.log_probs.isfinite().all())
    assert certain.probs.tolist()[0][0] == 1.0
    half = Prediction.from_logits(torch.zeros(1, 2, dtype=torch.bfloat16))
    assert half.probs.dtype == torch.float32


def test_batches_of_predictions_join() -> None:
    parts = [Prediction(mean=torch.full((n, 1), float(n)), variance=torch.ones(n, 1)) for n in (2, 3)]
    whole = Prediction.concatenate(parts)
    assert whole.mean is not None and whole.mean[:, 0].tolist() == [2, 2, 3, 3, 3]
    assert whole.log_probs is None and whole.epistemic is None


# --- validators -----------------------------------------------------------------------------------


def view(probs: list[list[float]]) -> View:
    target = Prediction.from_probs(torch.tensor(probs, dtype=torch.float64))
    return View("classification", None, None, target)


def test_information_maximisation_in_closed_form() -> None:
    assert im(view([[1, 0], [0, 1]])) == pytest.approx(math.log(2), abs=1e-9)  # sure, and all classes used
    assert im(view([[1, 0], [1, 0]])) == pytest.approx(0, abs=1e-9)  # collapsed
    assert im(view([[0.5, 0.5], [0.5, 0.5]])) == pytest.approx(0, abs=1e-9)  # unsure
    rows = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]
    wanted = stats.entropy(np.mean(rows, 0)) - np.mean([stats.entropy(r) for r in rows])
    assert im(view(rows)) == pytest.approx(wanted)


def test_entropy_in_closed_form() -> None:
    rows = [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]
    assert entropy(view(rows)) == pytest.approx(-np.mean([stats.entropy(r) for r in rows]))
    assert entropy(view([[1, 0], [1, 0]])) == pytest.approx(0, abs=1e-9)
    assert entropy(view([[0.25] * 4])) == pytest.approx(-math.log(4))


def test_source_validation_is_minus_the_nll() -> None:
    probs, labels = random_probs()
    source = Prediction(log_probs=probs.log())
    seen = View("classification", source, labels, source)
    assert source_val(seen) == pytest.approx(-log_loss(labels, probs.numpy(), labels=range(5)))
    with pytest.raises(TransferError, match=r"selection=source_val needs source validation.*split\.validation"):
        source_val(view([[1, 0]]))


def test_validators_load_by_name_and_apply_where_they_can() -> None:
    assert load_validator("im", []) is im
    assert load_validator("transfer_cli.evaluation.validators.entropy:entropy", []) is entropy
    with pytest.raises(TransferError, match=r"not 'imm'. Did you mean 'im'\?"):
        load_validator("imm", [])
    known = {name: load_validator(name, []) for name in VALIDATORS}
    unlabelled = view([[1.0, 0.0]])
    of_predictions = ["im", "entropy", "diversity", "snd", "bnm"]
    assert [name for name in known if applicable(unlabelled, known[name])] == of_predictions
    mean = Prediction(mean=torch.zeros(1, 1), variance=torch.ones(1, 1))
    plain = View("regression", mean, torch.zeros(1, 1), mean)
    assert [name for name in known if applicable(plain, known[name])] == ["source_val"]
    seen = View("regression", mean, torch.zeros(1, 1), mean, lambda domain: torch.zeros(1, 3))
    assert [name for name in known if applicable(seen, known[name])] == ["source_val", "iwv", "dev", "rankme", "mmd"]
    assert applicable(plain, lambda view: 0.0), "a plugin's need not say what it needs"


@pytest.mark.parametrize("unit", [1e-15, 1e15])
def test_figures_of_a_regression_do_not_depend_on_the_unit_of_its_targets(unit: float) -> None:
    mean, variance, labels = random_regression()
    plain = regression(mean, variance, labels, 0.3 * variance)
    scaled = regression(unit * mean, unit**2 * variance, unit * labels, 0.3 * unit**2 * variance)
    lengths = {"rmse", "mae", "crps", "width_50", "width_80", "width_95"}
    assert lengths < set(plain)
    for name, value in plain.items():
        wanted = unit * value if name in lengths else value + math.log(unit) if name == "nll" else value
        assert scaled[name] == pytest.approx(wanted, rel=1e-9), name
    prediction = Prediction(mean=unit * mean, variance=unit**2 * variance, epistemic=0.3 * unit**2 * variance)
    assert float(sample_nll(prediction, unit * labels).mean()) == pytest.approx(scaled["nll"], rel=1e-9)
    assert float(epistemic_share(prediction).mean()) == pytest.approx(0.3, rel=1e-9)
