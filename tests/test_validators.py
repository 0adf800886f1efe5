"""Each validator against an independent reference: scikit-learn, a formula worked by hand, or numbers of another implementation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome
from scipy.stats import norm
from sklearn.metrics import davies_bouldin_score, silhouette_score
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.validators import OF_RUNS, SAMPLED, VALIDATORS, View, applicable, load_validator, sampled
from transfer_cli.evaluation.validators.iwv import density_ratio

Transfer = Callable[..., Outcome]
LOADED = {name: load_validator(name, []) for name in VALIDATORS}


def waves() -> Tensor:
    """Logits `(40, 4)` that any program can make again."""
    i, k = torch.arange(40.0)[:, None], torch.arange(4.0)[None]
    return 2 * torch.sin(1.3 * i + 2.1 * k) + 0.5 * torch.cos(0.7 * i * k)


def view_of(
    target: Tensor | None = None,
    source: Tensor | None = None,
    labels: Tensor | None = None,
    features: dict[str, Tensor] | None = None,
) -> View:
    """Of logits."""
    target = waves() if target is None else target
    there = None if source is None else Prediction.from_logits(source)
    return View("classification", there, labels, Prediction.from_logits(target), (features or {}).get)


def blobs(n: int, shift: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 0, 0, 0], [3, 1, 0, 0], [0, 2, 2, 0]])
    return centres[labels] + torch.randn(n, 4, generator=draw) + shift, labels


# --- predictions on the target --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("snd", 2.1691126823425293),
        ("bnm", 0.20709677040576935),
        ("entropy", -0.8337047696113586),
        ("diversity", 1.368229866027832),
        ("im", 0.5345250964164734),
    ],
)
def test_as_pytorch_adapt_has_it(name: str, wanted: float) -> None:
    """Made by pytorch_adapt 0.0.83: SNDValidator(), BNMValidator(layer="logits"), and with layer="preds" EntropyValidator,
    DiversityValidator and IMValidator, of the logits `waves()` and their softmax."""
    assert LOADED[name](view_of()) == pytest.approx(wanted, rel=1e-5)


def test_the_soft_neighbourhood_by_hand() -> None:
    """Two pairs of equal, one-hot predictions: the neighbour's similarity is 1 / 0.05, that of the two others 0."""
    seen = View("classification", None, None, Prediction.from_probs(torch.eye(2, dtype=torch.float64)[[0, 0, 1, 1]]))
    p = np.exp([20.0, 0, 0]) / np.exp([20.0, 0, 0]).sum()
    assert LOADED["snd"](seen) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-6)


def test_the_nuclear_norm_by_hand() -> None:
    """One-hot rows of n_k samples of class k have the singular values sqrt(n_k)."""
    rows = torch.eye(3, dtype=torch.float64)[[0] * 4 + [1] * 9 + [2] * 1]
    seen = View("classification", None, None, Prediction.from_probs(rows))
    assert LOADED["bnm"](seen) == pytest.approx((2 + 3 + 1) / 14)


# --- features of the target -----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "reference", "sign"), [
    ("silhouette", silhouette_score, 1), ("dbi", davies_bouldin_score, -1),
])  # fmt: skip
def test_clusters_as_scikit_learn_has_them(name: str, reference: Callable[..., float], sign: int) -> None:
    features, labels = blobs(100)
    labels[7] = 4  # alone in its class; class 3 is empty
    logits = 5 * torch.nn.functional.one_hot(labels, 6).float()
    found = LOADED[name](view_of(logits, features={"target": features}))
    assert found == pytest.approx(sign * reference(features.numpy().astype(np.float64), labels.numpy()), rel=1e-9)
    shuffled = view_of(logits.roll(1, 0), features={"target": features})
    assert LOADED[name](shuffled) < found


def test_large_sets_are_sampled_evenly_and_always_in_the_same_way() -> None:
    features, labels = blobs(1000)
    logits = 5 * torch.nn.functional.one_hot(labels, 3).float()
    few = torch.linspace(0, 999, SAMPLED, dtype=torch.float64).round().long()
    wanted = silhouette_score(features[few].numpy().astype(np.float64), labels[few].numpy())
    assert LOADED["silhouette"](view_of(logits, features={"target": features[few]})) == pytest.approx(wanted)
    assert torch.equal(sampled(labels), labels[few].double())


def test_the_effective_rank_of_known_spectra() -> None:
    orthogonal = torch.linalg.qr(torch.randn(50, 4, dtype=torch.float64)).Q
    for spectrum in ([1.0, 1, 1, 1], [4.0, 2, 1, 1], [1.0, 0, 0, 0]):
        p = np.array(spectrum) / sum(spectrum) + 1e-7
        seen = view_of(features={"target": orthogonal @ torch.diag(torch.tensor(spectrum).double())})
        assert LOADED["rankme"](seen) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-5)


# --- both domains ---------------------------------------------------------------------------------


def test_the_mmd_by_hand() -> None:
    (s, _), (t, _) = blobs(30), blobs(20, 0.5, seed=1)
    x = np.concatenate([s.numpy(), t.numpy()]).astype(np.float64)
    squared = ((x[:, None] - x[None]) ** 2).sum(2)
    kernel = np.exp(-squared / (2 * np.sort(squared.ravel())[(squared.size - 1) // 2]))
    wanted = kernel[:30, :30].mean() + kernel[30:, 30:].mean() - 2 * kernel[:30, 30:].mean()
    for scale in (1.0, 1e-6, 1e6):
        found = LOADED["mmd"](view_of(features={"source": scale * s, "target": scale * t}))
        assert found == pytest.approx(-wanted, rel=1e-4)
    assert LOADED["mmd"](view_of(features={"source": s, "target": s})) == pytest.approx(0, abs=1e-7)


def test_the_density_ratio_of_shifted_gaussians() -> None:
    """N(0, 1) and N(1, 1): w(x) = exp(x - 1/2)."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4000, 1, generator=draw, dtype=torch.float64)
    found = density_ratio(x[0], x[1] + 1)
    wanted = torch.exp(x[0, :, 0] - 0.5)
    middle = x[0, :, 0].abs() < 1
    assert float((found.log() - wanted.log())[middle].abs().max()) < 0.25, "it shrinks a little"
    assert density_ratio(x[0, :10], x[1]).tolist() == [1.0] * 10, "too few samples to say anything"


def test_a_source_sample_is_weighed_by_a_classifier_that_has_not_seen_it() -> None:
    """In more dimensions than samples any domains can be told apart by who has seen them."""
    draw = torch.Generator().manual_seed(0)
    same = torch.randn(2, 60, 300, generator=draw, dtype=torch.float64)
    assert float(density_ratio(*same).log().mean()) > -1.5
    seen = density_ratio(same[0].repeat_interleave(2, 0), same[1].repeat_interleave(2, 0))  # a copy in either half
    assert float(seen.log().mean()) < -2.5


def weighted(w: Tensor, losses: Tensor) -> View:
    """With these weights and losses as they would have been found."""
    n = len(w)
    seen = view_of(
        source=torch.zeros(n, 2), labels=torch.zeros(n).long(), features=dict.fromkeys(("source", "target"), w[:, None])
    )
    vars(seen).update(weights=w, losses=losses)
    return seen


def test_deep_embedded_validation_as_its_authors_have_it() -> None:
    """Made by `get_dev_risk(w, l, None)` of the authors' code, as in pytorch_adapt 0.0.83."""
    at = torch.arange(40).double()
    w, losses = 1 + 0.8 * torch.sin(at), 1.5 + torch.cos(1.7 * at)
    seen = weighted(w, losses)
    assert LOADED["dev"](seen) == pytest.approx(-1.469631327457124, rel=1e-12)
    assert LOADED["iwv"](seen) == pytest.approx(-float((w * losses).mean()))
    equal = weighted(torch.ones(40).double(), losses)
    assert LOADED["dev"](equal) == LOADED["iwv"](equal) == pytest.approx(-float(losses.mean()))


def test_the_importance_weighted_risk_is_the_targets_under_covariate_shift() -> None:
    """y = 1 with probability Φ(x) in both; a model that says 1/2 where the target lies and is right where the source lies."""
    draw = torch.Generator().manual_seed(3)
    n = 4000
    x = [torch.randn(n, 1, generator=draw) + shift for shift in (0.0, 1.0)]
    y = [(torch.rand(n, generator=draw) < torch.from_numpy(norm.cdf(v[:, 0].numpy()))).long() for v in x]
    logits = [torch.stack([torch.zeros(n), 3 * v[:, 0].clamp_max(0.5)], 1) for v in x]
    few = torch.linspace(0, n - 1, SAMPLED, dtype=torch.float64).round().long()
    scores: dict[str, list[float]] = {"iwv": [], "dev": [], "source_val": []}
    for part in torch.arange(n).split(SAMPLED)[:-1]:
        seen = view_of(logits[1][part], logits[0][part], y[0][part], {"source": x[0][part], "target": x[1][part]})
        for name, values in scores.items():
            values.append(LOADED[name](seen))
    assert len(few) == SAMPLED
    truth = -float(torch.nn.functional.cross_entropy(logits[1], y[1]))
    gaps = {name: abs(float(np.mean(values)) - truth) for name, values in scores.items()}
    assert gaps["iwv"] < 0.05 and gaps["dev"] < 0.05 < gaps["source_val"], gaps
    assert np.std(scores["dev"]) < np.std(scores["iwv"])


def test_accuracy_is_predicted_from_confidence() -> None:
    """By the definition: of all thresholds between, the share below it in the source is the error's."""
    draw = torch.Generator().manual_seed(1)
    source, target = 2 * torch.randn(80, 3, generator=draw), torch.randn(90, 3, generator=draw)
    labels = torch.where(torch.rand(80, generator=draw) < 0.7, source.argmax(1), 0)
    confidence = source.softmax(1).max(1).values.numpy()
    error = float((source.argmax(1) != labels).double().mean())
    threshold = next(t for t in np.sort(confidence) if (confidence < t).mean() >= error - 1e-12)
    wanted = float((target.softmax(1).max(1).values.numpy() >= threshold).mean())
    assert 0.1 < wanted < 0.9
    assert LOADED["atc"](view_of(target, source, labels)) == pytest.approx(wanted)
    assert LOADED["atc"](view_of(source, source, labels)) == pytest.approx(1 - error)
    assert LOADED["atc"](view_of(target, source, (source.argmax(1) + 1) % 3)) == 0.0
    assert LOADED["source_acc"](view_of(target, source, labels)) == pytest.approx(1 - error)


# --- whatever a model may predict -----------------------------------------------------------------

BROKEN = {
    "collapsed": torch.tensor([[50.0, -50, -50]]).repeat(30, 1),
    "certain": torch.tensor([[0.0, -math.inf, -math.inf]]).repeat(30, 1),
    "uniform": torch.zeros(30, 3),
    "one sample": torch.zeros(1, 3),
}


@pytest.mark.parametrize("logits", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("spread", [0.0, 1.0, 1e30], ids=["one point", "spread", "huge"])
def test_a_collapsed_model_has_finite_scores(logits: Tensor, spread: float) -> None:
    n = len(logits)
    features = {d: spread * torch.randn(n, 5) for d in ("source", "target")}
    seen = view_of(logits, logits, torch.arange(n) % 3, features)
    assert all(applicable(seen, validator) for validator in LOADED.values())
    scores = {name: validator(seen) for name, validator in LOADED.items()}
    assert all(type(score) is float and math.isfinite(score) for score in scores.values()), scores
    if len(logits.argmax(1).unique()) == 1:
        assert scores["silhouette"] == -1 and scores["dbi"] == -1000


def test_scores_of_collapse_are_below_those_of_a_model_that_works() -> None:
    features, labels = blobs(90)
    right = view_of(5 * torch.nn.functional.one_hot(labels, 3).float(), features={"target": features})
    wrong = view_of(torch.tensor([[5.0, 0, 0]]).repeat(90, 1), features={"target": torch.zeros(90, 4)})
    for name in ("im", "diversity", "bnm", "silhouette", "dbi", "rankme"):
        assert LOADED[name](wrong) < LOADED[name](right), name


# --- in a run -------------------------------------------------------------------------------------


def events(run: Path, split: str) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [event["values"] for line in lines if (event := json.loads(line))["split"] == split]


def test_every_look_has_every_score_and_any_of_them_may_choose(transfer: Transfer) -> None:
    done = transfer("run", *SMALL, "method=source_only", "selection=rankme")
    assert done.code == 0, done.err
    result, looks = json.loads((done.run / "result.json").read_text()), events(done.run, "validators")
    assert len(looks) == 2 and all(set(look) == set(VALIDATORS) for look in [*looks, result["validators"]])
    assert all(math.isfinite(score) for look in looks for score in look.values())
    selection = result["selection"]
    assert selection["validator"] == "rankme" and selection["uses_target_labels"] is False
    assert selection["score"] == max(look["rankme"] for look in looks)
    assert result["validators"]["rankme"] == pytest.approx(selection["score"])
    kept = torch.load(done.run / "checkpoints" / "best.pt", weights_only=True)
    assert kept["step"] == selection["step"]


def test_regression_has_those_that_make_sense(transfer: Transfer) -> None:
    done = transfer(
        "run",
        "experiment=friedman_close",
        "method=no_adaptation",
        "head=ridge",
        "selection=dev",
        "threads=1",
        "device=cpu",
    )
    assert done.code == 0, done.err
    result = json.loads((done.run / "result.json").read_text())
    assert set(result["validators"]) == {"source_val", "iwv", "dev", "rankme", "mmd"}
    assert result["selection"]["validator"] == "dev"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=friedman_close", "head=ridge", "selection=snd"], "selection=snd is for classification"),
        (["split.validation=0", "selection=dev"], "selection=dev needs source validation samples"),
        (["split.validation=0", "selection=mmd"], "selection=mmd needs source validation samples"),
        (["selection=reverse"], "selection=reverse: it compares finished runs"),
    ],
)
def test_what_a_choice_lacks_is_said_before_any_work(
    transfer: Transfer, tmp_path: Path, overrides: list[str], said: str
) -> None:
    refused = transfer("run", "method=no_adaptation", "threads=1", "device=cpu", *overrides)
    assert refused.code == 2 and refused.err.startswith(f"transfer: {said}") and len(refused.err.splitlines()) == 1
    assert not list(tmp_path.glob("outputs/runs/*/*/metrics.jsonl"))


def own_score(view: View) -> float:
    """A plugin's validator: by the features, which it may ask for."""
    assert view.target_features is not None and view.source_labels is not None
    return float(view.target_features.mean())


def test_a_plugins_validator_chooses_as_before(transfer: Transfer) -> None:
    done = transfer("run", *SMALL, "method=source_only", f"selection={__name__}:own_score", f"plugins=[{__name__}]")
    assert done.code == 0, done.err
    result = json.loads((done.run / "result.json").read_text())
    assert result["selection"]["score"] == max(look[f"{__name__}:own_score"] for look in events(done.run, "validators"))


def no_score(view: View) -> float:
    return math.nan


def test_a_score_that_is_no_number_chooses_nothing(transfer: Transfer) -> None:
    done = transfer("run", *SMALL, "method=source_only", f"selection={__name__}:no_score", f"plugins=[{__name__}]")
    assert done.code == 2 and "no_score says nan, which chooses nothing" in done.err, done.err


def test_names_of_scores_of_runs_are_no_names_of_these() -> None:
    assert not set(OF_RUNS) & set(VALIDATORS)
    with pytest.raises(TransferError, match="transfer validate"):
        load_validator("agreement", [])
