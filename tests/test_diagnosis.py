"""The figures of a diagnosis against closed forms, hand computations, brute force and simulations."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from torch import Tensor

from transfer_cli.config.folders import names_in, packaged_folder
from transfer_cli.data.inputs import ArrayInputs, SequenceInputs
from transfer_cli.diagnosis import advice
from transfer_cli.diagnosis.distances import a_distance, mmd_test, moments, principal, removed, standardised, wilson
from transfer_cli.diagnosis.duplicates import between, compare, own_share, prints
from transfer_cli.diagnosis.label_shift import bbse, condition, cross_fitted
from transfer_cli.diagnosis.statistics import describe, differences, regression_labels
from transfer_cli.diagnosis.transferability import h_score, leep, log_evidence, logme, nce
from transfer_cli.methods.math.mmd import mmd


def gaussian(n: int, width: int = 5, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


# ------------------------------------------------------------------------------------------------ distances


def test_the_a_distance_of_equal_domains_is_near_0_and_of_disjoint_ones_2() -> None:
    same = a_distance(gaussian(600), gaussian(600, seed=1))
    apart = a_distance(gaussian(600), gaussian(600, seed=1, shift=20))
    assert same is not None and same["low"] == 0 and same["value"] < 0.2 and same["high"] < 0.35
    assert apart is not None and apart["value"] == 2 and apart["low"] > 1.98
    assert a_distance(gaussian(10), gaussian(10, seed=1)) is None


def test_the_interval_of_the_a_distance_is_wilsons() -> None:
    from scipy.stats import binomtest

    known = binomtest(37, 200).proportion_ci(0.95, method="wilson")
    assert wilson(37, 200) == pytest.approx((known.low, known.high), abs=1e-12)
    found = a_distance(gaussian(300), gaussian(300, seed=1, shift=0.5))
    assert found is not None
    low, high = wilson(found["error"] * found["samples"], int(found["samples"]))
    assert (found["low"], found["high"]) == pytest.approx((2 * (1 - 2 * high), 2 * (1 - 2 * low)))


def test_mmd_is_that_of_the_methods_and_its_permutations_are_relabellings() -> None:
    s, t = gaussian(40), gaussian(30, seed=1, shift=0.3)
    found = mmd_test(s, t, permutations=20)
    assert found["value"] == pytest.approx(float(mmd([(s, t)])), abs=1e-10)
    assert mmd_test(gaussian(80), gaussian(60, seed=1, shift=1.0))["p"] == pytest.approx(1 / 501)


def test_the_permutation_test_keeps_its_level() -> None:
    """P(p <= 0.1) is 0.1 where the domains are equal; 300 tests leave it within four deviations of that."""
    p = torch.tensor([mmd_test(gaussian(30, 3, 2 * i), gaussian(20, 3, 2 * i + 1), i, 99)["p"] for i in range(300)])
    assert 0.03 < float((p <= 0.1).double().mean()) < 0.17
    assert 0.38 < float((p <= 0.5).double().mean()) < 0.62


def test_what_is_standardised_has_moments_0_and_1_and_no_constants() -> None:
    s, t = gaussian(50) * 7 + 3, gaussian(70, seed=1)
    s[:, 2] = t[:, 2] = 4.0
    one, other = standardised(s, t)
    both = torch.cat([one, other])
    assert both.shape == (120, 4)
    torch.testing.assert_close(both.mean(0), torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(both.std(0, correction=0), torch.ones(4).double())


@pytest.mark.parametrize("shape", [(60, 8), (12, 30)])
def test_principal_directions_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    x = gaussian(*shape) @ torch.diag(torch.linspace(1, 3, shape[1]).double())
    basis = principal(x, 4)
    known = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4].T
    torch.testing.assert_close((basis.T @ known).abs(), torch.eye(4).double(), atol=1e-9, rtol=0)
    assert principal(x[:3], 10).shape[1] == 2, "no more than there are"


def test_each_kind_of_shift_is_removed_by_what_undoes_it() -> None:
    x = gaussian(1200, 4)
    s, t = x[:600], x[600:]
    moved = removed(*standardised(s, t + 1.5))
    assert moved["means"] > 0.95
    stretch = torch.tensor([0.3, 1.0, 3.0, 1.0]).double()
    scaled = removed(*standardised(s, t * stretch))
    assert scaled["means"] < 0.2 < 0.8 < scaled["covariance"]
    base = torch.tensor([[1.0, 0.95], [0.95, 1.0]]).double()
    root, other = torch.linalg.cholesky(base), torch.linalg.cholesky(base * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    correlated = removed(*standardised(s[:, :2] @ root.T, t[:, :2] @ other.T))
    assert correlated["means"] < 0.2 < 0.8 < correlated["covariance"]


def test_class_shares_remove_a_label_shift_and_not_a_shift_of_inputs() -> None:
    draw = torch.Generator().manual_seed(0)
    y = [torch.multinomial(torch.tensor(p), 900, True, generator=draw) for p in ([0.5, 0.5], [0.9, 0.1])]
    s, t = (gaussian(900, 3, i) + 4 * labels[:, None] for i, labels in enumerate(y))
    weights = torch.tensor([0.9 / 0.5, 0.1 / 0.5]).double()
    assert removed(*standardised(s, t), y[0], weights)["class_shares"] > 0.95
    assert removed(*standardised(s, s + 2), y[0], weights)["class_shares"] < 0.3


def test_moments_know_what_chance_would_show() -> None:
    x = gaussian(1000, 6)
    equal = moments(x[:500], x[500:])
    assert equal["covariance_p"] > 0.01 and equal["mean_shift"] < 2 * equal["mean_shift_noise"]
    assert equal["covariance_distance"] == pytest.approx(equal["covariance_noise"], rel=0.5)
    turned = moments(x[:500], x[500:] * torch.linspace(0.2, 2, 6).double())
    assert turned["covariance_p"] < 0.01 and turned["covariance_distance"] > 3 * turned["covariance_noise"]
    s, t = x[:500], 2 * x[500:]
    gap = torch.from_numpy(np.cov(s.T.numpy()) - np.cov(t.T.numpy()))
    assert moments(s, t)["coral"] == pytest.approx(float(gap.square().sum()) / (4 * 36))


# ------------------------------------------------------------------------------------------------ label shift


@pytest.mark.parametrize("separation", [1.5, 4.0])
def test_bbse_recovers_a_known_shift(separation: float) -> None:
    draw = torch.Generator().manual_seed(1)
    centres = separation * torch.eye(3).double()
    shares = torch.tensor([0.6, 0.3, 0.1]).double()
    y_s = torch.randint(3, (3000,), generator=draw)
    y_t = torch.multinomial(shares, 3000, True, generator=draw)
    x_s, x_t = centres[y_s] + gaussian(3000, 3), centres[y_t] + gaussian(3000, 3, 1)
    guessed = cross_fitted(x_s, y_s, 3, x_t, x_t[:0])
    assert guessed is not None and guessed.target.shape == (3, 3000)
    found: Any = bbse(y_s, guessed.source, guessed.target, 3)
    assert found["shares"] == pytest.approx(shares.tolist(), abs=0.05)
    assert found["weights"] == pytest.approx((3 * shares).tolist(), abs=0.2)
    naive = torch.bincount(guessed.target.flatten()).double() / guessed.target.numel()
    if separation < 2:
        assert (naive - shares).abs().sum() > 2 * (torch.tensor(found["shares"]) - shares).abs().sum()
    assert found["low"] < found["distance"] < found["high"] and found["noise"] < 0.06
    unshifted: Any = bbse(y_s, guessed.source, guessed.source, 3)
    assert unshifted["distance"] == pytest.approx(0, abs=1e-9), "its own guesses give back its own shares"


def test_the_condition_number_tells_a_classifier_that_confuses_classes() -> None:
    assert condition(torch.eye(3).double()) == 1
    assert condition(torch.full((2, 2), 0.5).double()) == math.inf
    y = torch.randint(2, (400,))
    guessed = cross_fitted(gaussian(400), y, 2, gaussian(50, seed=1), gaussian(5, seed=2))
    assert guessed is not None
    blind: Any = bbse(y, guessed.source, guessed.target, 2)
    assert blind["condition"] > 5
    assert guessed.further.shape == (5, 2)
    assert cross_fitted(gaussian(5), torch.tensor([0, 0, 0, 1, 1]), 2, gaussian(5), gaussian(5)) is None


def test_source_classifiers_generalise_from_fewer_samples_than_features() -> None:
    """A class in three directions of 300. Whitened, each of 120 samples would be orthogonal to all others."""
    y = torch.arange(120) % 3
    x = torch.cat([2 * torch.eye(3).double()[y], torch.zeros(120, 297).double()], 1) @ gaussian(300, 300, 1)
    x = x + 3 * gaussian(120, 300, 2)
    guessed = cross_fitted(x, y, 3, x[:2], x)
    assert guessed is not None
    assert float((guessed.source == y).double().mean()) > 0.9
    assert float((guessed.further.argmax(1) == y).double().mean()) > 0.9


# ------------------------------------------------------------------------------------------------ transferability


@pytest.mark.parametrize("n, width", [(40, 5), (15, 30)])
def test_logme_is_the_largest_evidence(n: int, width: int) -> None:
    """Brute force over log α and log β of the Gaussian density N(y | 0, I/β + F Fᵀ/α)."""
    f = gaussian(n, width)
    y = f[:, :1] * 0.7 + gaussian(n, 1, 1)
    gram = (f @ f.T).numpy()

    def minus(log: np.ndarray) -> float:
        covariance = np.eye(n) / np.exp(log[1]) + gram / np.exp(log[0])
        return -float(multivariate_normal.logpdf(y[:, 0].numpy(), np.zeros(n), covariance))

    best = min(minimize(minus, start, method="Nelder-Mead").fun for start in ([0, 0], [2, 0], [4, 1]))
    assert float(log_evidence(f, y)) == pytest.approx(-best, abs=1e-3)


def test_logme_is_the_mean_over_classes_or_targets() -> None:
    f, labels = gaussian(60), torch.arange(60) % 3
    each = [float(log_evidence(f, (labels == c).double()[:, None])) for c in range(3)]
    assert logme(f, labels, 5) == pytest.approx(sum(each) / 3 / 60), "classes that do not occur do not count"
    y = torch.stack([f[:, 0], gaussian(60, 1, 1)[:, 0]], 1)
    assert logme(f, 9 * y + 4) == pytest.approx(logme(f, y)), "whatever the unit"
    assert logme(f, y[:, :1]) > logme(f, y[:, 1:])


def test_leep_by_hand() -> None:
    """θ of three samples over two source classes; labels a, a, b."""
    theta = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]]).double()
    given_a = (1.4 / 1.5, 0.6 / 1.5)
    given_b = (0.1 / 1.5, 0.9 / 1.5)
    by_hand = [
        0.8 * given_a[0] + 0.2 * given_a[1],
        0.6 * given_a[0] + 0.4 * given_a[1],
        0.1 * given_b[0] + 0.9 * given_b[1],
    ]
    assert leep(theta, torch.tensor([0, 0, 1]), 2) == pytest.approx(sum(map(math.log, by_hand)) / 3)
    assert leep(torch.eye(2).double()[[0, 1, 0]], torch.tensor([1, 0, 1]), 2) == pytest.approx(0), (
        "classes by other names"
    )


def test_nce_by_hand() -> None:
    """Guess 0: labels a, a, b; guess 1: label b alone. H(Y|Z) = 3/4 H(1/3)."""
    entropy = -(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)
    assert nce(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2, 2) == pytest.approx(-0.75 * entropy)


def test_the_h_score_is_the_trace_of_its_definition() -> None:
    f, y = gaussian(50, 4), torch.arange(50) % 3
    means = torch.stack([f[y == c].mean(0) for c in y.tolist()])
    known = np.trace(np.linalg.inv(np.cov(f.T.numpy())) @ np.cov(means.T.numpy()))
    assert h_score(f, y, shrunk=False) == pytest.approx(known)
    from sklearn.covariance import LedoitWolf

    fitted = LedoitWolf().fit(f.numpy())
    between_classes = np.cov(means.T.numpy(), bias=True)
    shrunk = (1 - fitted.shrinkage_) * np.trace(np.linalg.inv(fitted.covariance_) @ between_classes)
    assert h_score(f, y) == pytest.approx(shrunk)
    assert h_score(gaussian(4, 9), torch.tensor([0, 0, 1, 1]), shrunk=False) is None


def test_every_score_prefers_features_that_know_the_classes() -> None:
    y = torch.arange(90) % 3
    noise = gaussian(90, 6)
    knowing = noise + 2 * torch.eye(6).double()[y]
    assert logme(knowing, y, 3) > logme(noise, y, 3)
    assert (h_score(knowing, y) or 0) > (h_score(noise, y) or 0)


# ------------------------------------------------------------------------------------------------ duplicates, statistics


def pictures(n: int, seed: int = 0) -> Tensor:
    """Smooth random images `(n, 3, 32, 32)`."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)).byte()


def names(prefix: str, n: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(n))


def test_planted_duplicates_are_found_and_named() -> None:
    one, other = pictures(200), pictures(150, seed=1)
    other[7], other[8] = one[3], one[4]
    other[20] = (one[50].float() * 0.8 + 20 + 3 * torch.randn(3, 32, 32)).clamp(0, 255).byte()  # dimmed, with noise
    found = compare(prints(ArrayInputs(one), names("a", 200)), prints(ArrayInputs(other), names("b", 150)))
    assert (found["exact"], found["near"]) == (2, 1)
    assert found["exact_pairs"] == [("a3", "b7"), ("a4", "b8")]
    assert found["near_pairs"] == [("a50", "b20")]
    assert own_share(prints(ArrayInputs(torch.cat([one, one[:20]])), names("a", 220))) == pytest.approx(40 / 220)


def test_pictures_of_one_grey_are_not_called_alike() -> None:
    flat = torch.arange(10, dtype=torch.uint8)[:, None, None, None].expand(10, 1, 16, 16).contiguous()
    part = prints(ArrayInputs(flat), names("a", 10))
    assert own_share(part) == 0


def test_equal_rows_of_tables_and_equal_sequences_are_found() -> None:
    one, other = gaussian(100).float(), gaussian(80, seed=1).float()
    one[5], other[9] = 0.0, -0.0
    found = compare(prints(ArrayInputs(one), names("a", 100)), prints(ArrayInputs(other), names("b", 80)))
    assert found["exact_pairs"] == [("a5", "b9")] and "near" not in found
    a, b = [torch.ones(3, 2), torch.zeros(4, 2)], [torch.ones(3, 2), torch.zeros(3, 2), torch.ones(6, 2)]
    found = compare(
        prints(SequenceInputs(a), names("a", 2), longest=6), prints(SequenceInputs(b), names("b", 3), longest=6)
    )
    assert found["exact_pairs"] == [("a0", "b0")], "of equal length too"


def test_pairs_that_share_samples_by_design_are_left_out() -> None:
    parts = {name: prints(ArrayInputs(gaussian(30).float()), names(name, 30)) for name in ("x", "y", "z")}
    found = between(parts, {("x", "z")})
    assert list(found) == ["x / y", "y / z"] and found["x / y"]["exact"] == 30


def test_channels_columns_and_steps_are_described() -> None:
    images = pictures(300)
    found = describe(ArrayInputs(images))
    values = (images.double() / 255).movedim(1, 0).flatten(1)
    assert found["mean"] == pytest.approx(values.mean(1).tolist(), abs=1e-6)
    assert found["std"] == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-6)
    steps = describe(SequenceInputs([torch.ones(2, 1), 4 * torch.ones(4, 1)]))
    assert (steps["length"], steps["mean"]) == (3, pytest.approx([3.0]))
    table = describe(ArrayInputs(torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, 5.0]])))
    moved = describe(ArrayInputs(torch.tensor([[3.0, 1.0, 5.0], [5.0, 9.0, 5.0]])))
    worst = differences(table, moved)
    assert worst[0] == {"column": 0, "shift": pytest.approx(3.0), "std_ratio": pytest.approx(1.0)}
    assert next(d for d in worst if d["column"] == 1)["std_ratio"] is None
    labels = regression_labels(gaussian(200, 1), gaussian(50, 1, 1, shift=2))
    assert labels["p"] < 1e-6 and "p" not in regression_labels(gaussian(9, 1), None)


# ------------------------------------------------------------------------------------------------ advice


def figures(**changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "a_distance": {"value": 1.0, "low": 0.9, "high": 1.1},
        "mmd": {"value": 0.1, "p": 0.002},
        "moments": {"mean_shift": 0.5, "covariance_distance": 0.5, "covariance_noise": 0.1},
        "removed": {"means": 0.4, "scales": 0.4, "covariance": 0.5},
        "transferability": {"logme": 0.1},
    }
    return known | changes


def told(found: dict[str, Any] | None = None, **changes: Any) -> list[str]:
    base: dict[str, Any] = {
        "kind": "classification",
        "duplicates": {},
        "samples": {"source": 500, "target": 500, "granted": 0},
        "label_space": {"setting": "closed", "overlap": "3 shared"},
        "backbones": {"net": figures(**changes)},
    }
    given = base | (found or {})
    return [entry["rule"] for entry in advice.advise(given, "net")]


def shift(**changes: Any) -> dict[str, Any]:
    return {"distance": 0.4, "low": 0.3, "high": 0.5, "noise": 0.02, "condition": 2.0} | changes


def gone(means: float, scales: float, covariance: float, shares: float = 0.0) -> dict[str, float]:
    return {"means": means, "scales": scales, "covariance": covariance, "class_shares": shares}


@pytest.mark.parametrize(
    "changes, rules",
    [
        ({}, ["apart", "mixed"]),
        ({"a_distance": {"value": 0.1, "low": 0, "high": 0.2}, "mmd": {"value": 0, "p": 0.6}}, ["alike"]),
        ({"a_distance": {"value": 0.1, "low": 0, "high": 0.2}, "removed": {}}, ["not_linear"]),
        ({"a_distance": {"value": 1.9, "low": 1.8, "high": 2}, "removed": {}}, ["far"]),
        ({"a_distance": None}, ["too_few"]),
        ({"removed": gone(0.9, 0.9, 0.95)}, ["apart", "means"]),
        ({"removed": gone(0.1, 0.2, 0.9)}, ["apart", "covariance"]),
        ({"removed": gone(0.1, 0.1, 0.2)}, ["apart", "shape"]),
        ({"label_shift": shift(), "removed": gone(0.6, 0.6, 0.85, 0.8)}, ["apart", "label_shift"]),
        ({"label_shift": shift(), "removed": gone(0.1, 0.1, 0.9, 0.3)}, ["apart", "covariance", "label_shift"]),
        ({"label_shift": shift(), "removed": gone(0.1, 0.1, 0.2, 0.1)}, ["apart", "shape", "label_shift_doubtful"]),
        ({"label_shift": shift(condition=math.inf), "removed": {}}, ["apart", "label_shift_unknown"]),
        ({"label_shift": shift(distance=0.05), "removed": {}}, ["apart"]),
        ({"label_shift": shift(noise=0.3), "removed": {}}, ["apart"]),
        ({"source_classifier": {"accuracy": 0.4, "chance": 0.1}, "removed": {}}, ["weak_features", "apart"]),
    ],
)
def test_rules_apply_where_they_should(changes: dict[str, Any], rules: list[str]) -> None:
    assert told(**changes) == rules


def test_leaks_and_label_spaces_come_first() -> None:
    pair = {"compared": [100, 50], "exact": 3, "near": 5, "near_pairs": [("a", "b")], "own_share": 0.0}
    space = {"setting": "partial", "overlap": "2 shared, 1 only in the source (c)"}
    rules = told({"duplicates": {"source train / target test": pair}, "label_space": space})
    assert rules[:3] == ["duplicates", "near_duplicates", "label_space"]
    common = {**pair, "exact": 0, "own_share": 0.1}
    assert "near_duplicates" not in told({"duplicates": {"source train / target test": common}})


def test_granted_labels_and_backbones_are_weighed() -> None:
    good = {"logme": 0.4, "leep": -0.2, "h_score_shrunk": 1.0, "nce": -0.1, "label_entropy": 1.0}
    bad = {"logme": 0.1, "leep": -0.9, "h_score_shrunk": 0.5, "nce": -0.9, "label_entropy": 1.0}
    nets = {"net": figures(transferability=bad, removed={}), "other": figures(transferability=good, removed={})}
    found = {"backbones": nets, "samples": {"source": 500, "target": 500, "granted": 30}, "kind": "classification"}
    given = advice.advise({"duplicates": {}, "label_space": None, **found}, "net")
    assert [e["rule"] for e in given] == ["apart", "granted", "backbone"]
    assert "trust those more" in given[1]["says"] and "other" in given[2]["says"]
    assert "leep and h_score_shrunk agree" in given[2]["rests_on"]


def test_every_method_that_is_recommended_exists() -> None:
    text = Path(advice.__file__).read_text()
    methods = set(names_in("method", [packaged_folder()]))
    said = "dann cdan dsan mcc jdot ot linear_ot coral deep_coral dan adabn mean_match kmm kliep density_ratio gp pada osbp"
    for name in f"{said} bnm mme source_only no_adaptation finetune lp_ft linear_probe fixmatch".split():
        assert name in methods and re.search(rf"\b{name}\b", text), name


@pytest.mark.parametrize("module", ["advice", "text"])
def test_words_are_made_of_figures_alone(module: str) -> None:
    text = (Path(advice.__file__).parent / f"{module}.py").read_text()
    assert not re.search(r"^\s*(from|import) (torch|numpy|transfer_cli)", text, re.MULTILINE)
