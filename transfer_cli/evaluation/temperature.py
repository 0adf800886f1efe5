"""Temperature scaling (Guo et al., ICML 2017): one number that makes scores into honest probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

LOWEST, HIGHEST = 1e-3, 1e3
PRIOR_STD = 0.5  # of a log temperature about its prior's centre


def fit_temperature(scores: Tensor, y: Tensor, weights: Tensor | None = None, centre: float | None = None) -> float:
    """The T that minimises the negative log-likelihood of `softmax(scores / T)`, summed.

    Args:
        scores, y, weights: `(N, K)` of samples that did not make the scores, `(N,)` and `(N,)`.
        centre: a T that is likely beforehand, `log T ~ N(log centre, ½²)`.
    """
    scores = scores.double()
    weights = torch.ones(len(y), dtype=torch.float64, device=scores.device) if weights is None else weights

    def loss(log_temperature: float) -> float:
        log_probs = torch.log_softmax(scores / math.exp(log_temperature), dim=1)
        return -float((weights * log_probs.gather(1, y[:, None])[:, 0]).sum())

    return minimise_log(loss, centre)


def minimise_log(loss: Callable[[float], float], centre: float | None = None) -> float:
    """The positive number at whose logarithm the loss, and the prior of a `centre`, have their minimum."""

    def whole(log_value: float) -> float:
        prior = 0.0 if centre is None else (log_value - math.log(centre)) ** 2 / (2 * PRIOR_STD**2)
        return loss(log_value) + prior

    found = minimize_scalar(whole, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded")
    return math.exp(float(found.x))
