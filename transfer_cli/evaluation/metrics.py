"""Figures of merit of predicted distributions, in float64 on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfer_cli.evaluation.prediction import NO_SPREAD, Prediction
from transfer_cli.evaluation.temperature import fit_temperature


def score(kind: str, prediction: Prediction, labels: Tensor, known: int | None = None) -> dict[str, float]:
    """All metrics of the task's kind; with an open label space, `known` is the number of classes before `unknown`."""
    if kind == "classification":
        assert prediction.log_probs is not None
        figures = classification(prediction.log_probs, labels)
        return figures if known is None else figures | open_set(prediction.labels.cpu(), labels.cpu(), known)
    assert prediction.mean is not None and prediction.variance is not None
    return regression(prediction.mean, prediction.variance, labels, prediction.epistemic)


def final_score(prediction: Prediction, labels: Tensor) -> dict[str, float]:
    """What is told of the final predictions alone: in classification `aurc` and `nll_best_temperature`, the NLL at the
    temperature that fits these very labels best (Ashukha et al., ICLR 2020: models compare there, whatever their calibration);
    of sets or intervals their coverage and mean size, `conformal_unbounded` the share of infinite intervals, left out of the mean.
    """
    figures: dict[str, float] = {}
    if prediction.log_probs is not None:
        log_probs, labels = padded(prediction.log_probs, labels), labels.cpu()
        figures["aurc"] = area_under_risk_coverage(log_probs.max(1).values, log_probs.argmax(1) != labels)
        best = fit_temperature(log_probs, labels)
        figures["nll_best_temperature"] = float(torch.nn.functional.cross_entropy(log_probs / best, labels))
        if prediction.epistemic is not None:
            figures["epistemic_share"] = float(epistemic_share(prediction).mean())
    if prediction.members is not None:
        members = torch.nn.functional.pad(
            prediction.members.cpu(), (0, max(0, int(labels.max()) + 1 - prediction.members.shape[1]))
        )
        figures["conformal_coverage"] = float(members.gather(1, labels[:, None]).double().mean())
        figures["conformal_size"] = float(members.sum(1).double().mean())
    if prediction.lower is not None and prediction.upper is not None:
        lower, upper, y = prediction.lower.double().cpu(), prediction.upper.double().cpu(), labels.double().cpu()
        width = upper - lower
        bounded = width.isfinite()
        figures["conformal_coverage"] = float(((lower <= y) & (y <= upper)).double().mean())
        if bool(bounded.any()):
            figures["conformal_size"] = float(width[bounded].mean())
        figures["conformal_unbounded"] = float((~bounded).double().mean())
    return figures


def area_under_risk_coverage(confidence: Tensor, wrong: Tensor) -> float:
    """The mean over n of the share of errors among the n most confident samples (Geifman, Uziel & El-Yaniv, ICLR 2019)."""
    errors = wrong.double()[confidence.argsort(descending=True, stable=True)].cumsum(0)
    return float((errors / torch.arange(1, len(errors) + 1)).mean())


def out_of_distribution(known: Prediction, strange: Prediction) -> dict[str, float]:
    """How well uncertainty tells strange samples from known ones (Hendrycks & Gimpel, ICLR 2017): `auroc`, the share of pairs in
    which the strange one is the more uncertain, and `fpr95`, the share of strange ones accepted where 95 % of the known ones are.

    The uncertainty is the entropy of the classes; in regression the mean variance, its epistemic part where that is known.
    """
    u, v = (uncertainty(p) for p in (known, strange))
    ranks = torch.searchsorted(u.sort().values, v, side="left") + torch.searchsorted(u.sort().values, v, side="right")
    accepted = u.sort().values[math.ceil(0.95 * len(u)) - 1]
    return {"auroc": float(ranks.double().mean()) / (2 * len(u)), "fpr95": float((v <= accepted).double().mean())}


def uncertainty(prediction: Prediction) -> Tensor:
    """`(N,)`, in float64 on the CPU."""
    if prediction.log_probs is not None:
        return torch.special.entr(prediction.probs.double().cpu()).sum(1)
    assert prediction.variance is not None
    spread = prediction.variance if prediction.epistemic is None else prediction.epistemic
    return spread.double().cpu().mean(1)


def epistemic_share(prediction: Prediction) -> Tensor:
    """Of the variance `(N, T)`, or of the classes' entropy `(N,)`, the share that more data would remove; float64 on the CPU."""
    assert prediction.epistemic is not None
    if prediction.log_probs is not None:
        return (prediction.epistemic.double().cpu() / uncertainty(prediction).clamp_min(1e-24)).clamp(0, 1)
    assert prediction.variance is not None
    return prediction.epistemic.double().cpu() / prediction.variance.double().cpu().clamp_min(NO_SPREAD**2)


def sample_nll(prediction: Prediction, labels: Tensor) -> Tensor:
    """The negative log-likelihood `(N,)` of labels, in nats, in float64 on the CPU; in regression the mean over outputs."""
    if prediction.log_probs is not None:
        labels = labels.cpu()
        return -padded(prediction.log_probs, labels).gather(1, labels[:, None])[:, 0]
    assert prediction.mean is not None and prediction.variance is not None
    sigma = prediction.variance.double().cpu().sqrt().clamp_min(NO_SPREAD)
    z = (labels.double().cpu() - prediction.mean.double().cpu()) / sigma
    return (0.5 * z.square() + sigma.log() + 0.5 * math.log(2 * math.pi)).mean(1)


def padded(log_probs: Tensor, labels: Tensor) -> Tensor:
    """`(N, K')` in float64 on the CPU: classes beyond K, which the method cannot name, have probability zero."""
    log_probs = log_probs.double().cpu()
    extra = int(labels.max()) + 1 - log_probs.shape[1]
    if extra <= 0:
        return log_probs
    floor = math.log(torch.finfo(torch.float32).tiny)
    return torch.cat([log_probs, torch.full((len(log_probs), extra), floor, dtype=torch.float64)], 1)


def classification(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro-F1, NLL (nats), Brier score (summed over classes), ECE (15 equal-width bins) and its equal-mass form.

    `log_probs` `(N, K)`, `labels` `(N,)`; a label beyond K (a class that the method cannot name) has probability zero.
    """
    log_probs, labels = padded(log_probs, labels), labels.cpu()
    probs, guesses = log_probs.exp(), log_probs.argmax(1)
    confidence = probs.gather(1, guesses[:, None])[:, 0]
    right = (guesses == labels).double()
    one_hot = torch.nn.functional.one_hot(labels, log_probs.shape[1])
    return {
        "accuracy": float(right.mean()),
        "macro_f1": macro_f1(guesses, labels),
        "nll": float(-log_probs.gather(1, labels[:, None]).mean()),
        "brier": float((probs - one_hot).square().sum(1).mean()),
        "ece": expected_calibration_error(confidence, right),
        "ece_equal_mass": expected_calibration_error(confidence, right, equal_mass=True),
    }


def open_set(guesses: Tensor, labels: Tensor, known: int) -> dict[str, float]:
    """OS* (mean of the known classes' accuracies), the accuracy on `unknown` (class `known`), and their harmonic mean HOS

    (Bucci, Loghmani & Tommasi, ECCV 2020). Classes without a sample are left out, and figures that need them too.
    """
    accuracies = {c: float((guesses[labels == c] == c).double().mean()) for c in labels.unique().tolist()}
    unknown = accuracies.pop(known, None)
    figures = {} if unknown is None else {"unknown_accuracy": unknown}
    if accuracies:
        figures["os_star"] = os_star = sum(accuracies.values()) / len(accuracies)
        if unknown is not None:
            figures["hos"] = 2 * os_star * unknown / (os_star + unknown) if unknown else 0.0
    return figures


def macro_f1(guesses: Tensor, labels: Tensor) -> float:
    """Mean F1 over the classes that occur among labels or guesses."""
    scores = []
    for c in torch.cat([guesses, labels]).unique():
        hits = float(((guesses == c) & (labels == c)).sum())
        scores.append(2 * hits / float((guesses == c).sum() + (labels == c).sum()))
    return sum(scores) / len(scores)


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = 15, equal_mass: bool = False) -> float:
    """`Σ_b (n_b / N) |accuracy_b - confidence_b|` (Naeini et al. 2015); bins closed on the right, so 1.0 is in the last."""
    if equal_mass:
        order = confidence.argsort(stable=True)
        groups = [g for g in order.tensor_split(bins) if len(g)]
        return sum(len(g) * abs(float(right[g].mean() - confidence[g].mean())) for g in groups) / len(right)
    index = (torch.ceil(confidence * bins) - 1).clamp(0, bins - 1).long()
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    return float(gap.abs().sum() / len(right))


def regression(mean: Tensor, variance: Tensor, labels: Tensor, epistemic: Tensor | None = None) -> dict[str, float]:
    """RMSE, MAE, R², marginal Gaussian NLL, CRPS; for 50, 80 and 95 % intervals coverage, its error and the mean width.

    `mean`, `variance`, `labels` `(N, T)`, averaged over samples and targets. The error of coverage is signed: below zero,
    intervals are too narrow. Coverage says nothing without the width: guessing the mean covers perfectly. `epistemic_share`
    is the mean share of the variance that more data would remove, where `epistemic` `(N, T)` is known.
    """
    mean, variance, labels = mean.double().cpu(), variance.double().cpu(), labels.double().cpu()
    sigma = variance.sqrt().clamp_min(NO_SPREAD)
    error = labels - mean
    z = error / sigma
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    crps = sigma * (
        z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi)
    )  # Gneiting & Raftery 2007, eq. 21
    spread = (labels - labels.mean(0)).square().sum()
    figures = {
        "rmse": float(error.square().mean().sqrt()),
        "mae": float(error.abs().mean()),
        "r2": float(1 - error.square().sum() / spread) if float(spread) > 0 else 0.0,
        "nll": float((0.5 * z.square() + sigma.log() + 0.5 * math.log(2 * math.pi)).mean()),
        "crps": float(crps.mean()),
    }
    for level in (50, 80, 95):
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level / 100, dtype=torch.float64)))
        figures[f"coverage_{level}"] = covered = float((z.abs() <= half).double().mean())
        figures[f"coverage_error_{level}"] = covered - level / 100
        figures[f"width_{level}"] = float((2 * half * sigma).mean())
    if epistemic is not None:
        figures["epistemic_share"] = float((epistemic.double().cpu() / variance.clamp_min(NO_SPREAD**2)).mean())
    return figures
