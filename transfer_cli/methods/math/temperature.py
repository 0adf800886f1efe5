"""Temperature scaling (Guo et al., ICML 2017): one number that makes scores into honest probabilities."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

LOWEST, HIGHEST = 1e-3, 1e3


def fit_temperature(scores: Tensor, y: Tensor, weights: Tensor | None = None) -> float:
    """The T that minimises the negative log-likelihood of `softmax(scores / T)`.

    Args:
        scores, y, weights: `(N, K)` of samples that did not make the scores, `(N,)` and `(N,)`.
    """
    scores = scores.double()
    weights = torch.ones(len(y), dtype=torch.float64, device=scores.device) if weights is None else weights

    def loss(log_temperature: float) -> float:
        log_probs = torch.log_softmax(scores / math.exp(log_temperature), dim=1)
        return -float((weights * log_probs.gather(1, y[:, None])[:, 0]).sum())

    found = minimize_scalar(loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    return math.exp(float(found.x))


def folds_of(y: Tensor, folds: int) -> Tensor | None:
    """The fold `(N,)` of each sample, the samples of a class dealt out in turn; None where no class has two."""
    counts = torch.bincount(y)
    if not len(y) or int(counts.max()) < 2:
        return None
    own = torch.nn.functional.one_hot(y)
    turn = (own.cumsum(0) * own).sum(1) - 1  # the how many-th of its class
    return turn % min(folds, int(counts.max()))
