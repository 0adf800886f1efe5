"""Black box shift estimation (Lipton, Wang & Smola, ICML 2018): the target's class shares from a source classifier's guesses.

    C p_t = q,    C_ij = P_s(guess i | class j),    q_i = P_t(guess i)

in which classes look the same in both domains, p_s(x | y) = p_t(x | y), and only their shares differ. Shares below zero are set to
zero. The classifier is cross-fitted: C and q are means over folds, the guesses of each fold's C being of samples that its
classifier was not fitted to. The larger the condition number of C, the more errors of q are magnified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.diagnosis.distances import principal
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.logistic import fit_logistic, standardising

FOLDS = 3
L2, TOLERANCE = 1e-2, 1e-5
COMPONENTS = (
    256  # of the source's standardised features, in which classifiers are fitted: a turned view, each as wide as it is
)
REPLICATES = 200  # bootstrap samples; fewer where there are many classes
ENTRIES = 2e7  # of all replicates' matrices together


@dataclass(frozen=True)
class Guesses:
    """What cross-fitted classifiers say: of source samples `(N,)`, each by a classifier that has not seen it; of target samples
    `(FOLDS, M)`; and the probabilities `(L, K)` of further samples, the mean over the classifiers."""

    source: Tensor
    target: Tensor
    further: Tensor


def cross_fitted(x: Tensor, y: Tensor, classes: int, target: Tensor, further: Tensor) -> Guesses | None:
    """None where a class has too few samples to be in every fold."""
    fold = folds_of(y, FOLDS)
    if classes < 2 or fold is None or int(torch.bincount(y, minlength=classes).min()) < FOLDS:
        return None
    mean, scale = standardising(x)
    basis = principal((x - mean) / scale, COMPONENTS)
    x, target, further = (((z - mean) / scale) @ basis for z in (x, target, further))
    own, others, probs = torch.empty_like(y), [], []
    for k in range(FOLDS):
        train = x[fold != k]
        w, b = fit_logistic(train, y[fold != k], classes, L2, torch.full_like(train[:, 0], 1 / len(train)), TOLERANCE)
        own[fold == k] = (x[fold == k] @ w.T + b).argmax(1)
        others.append((target @ w.T + b).argmax(1))
        probs.append((further @ w.T + b).softmax(1))
    return Guesses(own, torch.stack(others), torch.stack(probs).mean(0))


def bbse(y: Tensor, guesses: Tensor, target_guesses: Tensor, classes: int, seed: int = 0) -> dict[str, object]:
    """`shares` of the target `(K,)`, those of the source, the `weights` p_t / p_s, and how far to trust them.

    `distance`: total variation between the shares; `noise`: between the estimate and its bootstrap replicates, on average.
    `condition`: of C. `clipped`: the mass below zero that was cut away: much of it speaks against the assumption.

    Args:
        y, guesses: of source samples, `(N,)`, guesses of classifiers that have not seen them.
        target_guesses: `(M,)`, or `(F, M)` of several classifiers.
    """
    target_guesses = target_guesses.reshape(-1, target_guesses.shape[-1])
    one_hot, told = F.one_hot(y, classes).double(), F.one_hot(guesses, classes).double()
    of_target = F.one_hot(target_guesses, classes).double().mean(0)
    share = one_hot.mean(0)
    confusion = told.T @ one_hot / one_hot.sum(0)
    estimate, raw = _solve(confusion[None], of_target.mean(0)[None])
    draw = torch.Generator().manual_seed(seed)
    replicates = int(max(20, min(REPLICATES, ENTRIES // classes**2)))
    counts = [_resample(replicates, n, draw) for n in (len(y), len(of_target))]
    # (B, K, K): within each class the guesses of a bootstrap sample; a class that it lacks keeps its own
    cells = torch.stack([(counts[0] * told[:, i]) @ one_hot for i in range(classes)], 1)
    totals = cells.sum(1, keepdim=True)
    again = torch.where(totals > 0, cells / totals.clamp_min(1), confusion)
    replicate, _ = _solve(again, counts[1] @ of_target / len(of_target))
    distance = 0.5 * (replicate - share).abs().sum(1)
    return {
        "shares": estimate[0].tolist(),
        "source_shares": share.tolist(),
        "weights": (estimate[0] / share.clamp_min(1e-12)).tolist(),
        "distance": float(0.5 * (estimate[0] - share).abs().sum()),
        "low": float(distance.quantile(0.025)),
        "high": float(distance.quantile(0.975)),
        "noise": float(0.5 * (replicate - estimate).abs().sum(1).mean()),
        "condition": condition(confusion),
        "clipped": float((-raw[0]).clamp_min(0).sum()),
    }


def condition(confusion: Tensor) -> float:
    """The largest over the smallest singular value; infinite where a class is never told from others."""
    values = torch.linalg.svdvals(confusion)
    return float(values[0] / values[-1]) if float(values[-1]) > 1e-12 * float(values[0]) else float("inf")


def _solve(confusion: Tensor, guessed: Tensor) -> tuple[Tensor, Tensor]:
    """Shares `(B, K)` without what is below zero, scaled to sum to one, and as they were solved."""
    raw = (torch.linalg.pinv(confusion, rtol=1e-10) @ guessed[:, :, None])[:, :, 0]
    positive = raw.clamp_min(0)
    return positive / positive.sum(1, keepdim=True).clamp_min(1e-12), raw


def _resample(replicates: int, n: int, draw: torch.Generator) -> Tensor:
    """How often each of n samples is in each bootstrap sample, `(B, n)`."""
    drawn = torch.randint(n, (replicates, n), generator=draw)
    return torch.zeros(replicates, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(replicates, n).double())
