"""Conformal prediction: sets or intervals that hold the truth in a stated share of cases, whatever the model.

A score says how badly a value fits a prediction: `1 - p(y | x)` (Sadinle, Lei & Wasserman, JASA 2019), in regression
`|y - μ(x)| / σ(x)` (Lei et al., JASA 2018). A value belongs to the set of x if its score is at most the threshold

    q(x) = inf { q :  Σ_i w_i [s_i <= q]  >=  level · (Σ_i w_i + w(x)) }

of calibration scores s_i with weights w_i: all 1 if calibration and test samples are exchangeable (`split`, of the source's;
`target`, of granted labels), or the density ratio w(x) = p_target(x) / p_source(x) under covariate shift (`weighted`, Tibshirani
et al., NeurIPS 2019). The effective number of scores is (Σ w)² / Σ w²: where it is small, so is the trust in the sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transfer_cli.evaluation.calibration import LabelledPrediction
from transfer_cli.evaluation.prediction import NO_SPREAD, Prediction

ENOUGH = 100  # effective scores: with fewer, coverage varies by more than 3 points from one draw of them to another
FOLDS, STRENGTHS = 3, (1.0, 10.0, 100.0, 1000.0)  # divided by the number of samples
SLACK = 1e-12  # relative: level · (n + 1) may be a whole number that floating point misses


@dataclass(frozen=True)
class DensityRatio:
    """`log w(x) = weight · (x - mean) / scale + bias` of features `(N, D)`; all float64."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        x = features.double().flatten(1)
        return ((x - self.mean.to(x)) / self.scale.to(x)) @ self.weight.to(x) + self.bias.to(x)


def fit_density_ratio(
    source: Tensor, target: Tensor, strengths: Sequence[float] = STRENGTHS, tol: float = 1e-4
) -> DensityRatio:
    """From a logistic domain classifier on features `(N, D)` and `(M, D)`, whose strength cross-validation chooses.

    `tol`: of the classifier's gradient."""
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([source, target]).double().flatten(1)
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = torch.where(scale > 1e-10 * x.abs().amax(0), scale, 1.0)  # of constant ones; units do not matter
    z, domain = ((x - mean) / scale).numpy(), np.arange(len(x)) >= len(source)
    fold = np.arange(len(x)) % FOLDS

    def fit(kept: Any, strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000, tol=tol).fit(z[kept], domain[kept])

    def loss(strength: float) -> float:
        return sum(
            -float(np.log(probs[np.arange(len(probs)), domain[left].astype(int)].clip(1e-12)).sum())
            for left, probs in ((fold == f, fit(fold != f, strength).predict_proba(z[fold == f])) for f in range(FOLDS))
        )

    chosen = strengths[0] if len(strengths) == 1 else min(strengths, key=lambda c: loss(c / len(x)))
    found = fit(fold >= 0, chosen / len(x))
    bias = torch.tensor(float(found.intercept_[0]) + math.log(len(source) / len(target)), dtype=torch.float64)
    return DensityRatio(mean, scale, torch.from_numpy(found.coef_[0]), bias)


@dataclass(frozen=True)
class Conformal:
    """`scores` `(n, T)` in order, one column in classification, and `mass` `(n, T)`, the weights summed up to each."""

    level: float
    scores: Tensor
    mass: Tensor
    ratio: DensityRatio | None = None

    def thresholds(self, weights: Tensor) -> Tensor:
        """`(B, T)` of samples of weights `(B,)`; infinite where the level is out of reach."""
        wanted = self.level * (self.mass[-1][:, None] + weights.double().cpu()) * (1 - SLACK)  # (T, B)
        place = torch.searchsorted(self.mass.T.contiguous(), wanted)
        beyond = torch.full_like(self.scores[:1], math.inf)
        return torch.cat([self.scores, beyond]).gather(0, place.T)

    def __call__(self, prediction: Prediction, features: Tensor | None = None) -> Prediction:
        """The prediction with its set `members` `(B, K)`, or its interval `lower`, `upper` `(B, T)`. `features` `(B, D)` for
        weights."""
        n = len(prediction.log_probs if prediction.log_probs is not None else prediction.mean)  # type: ignore[arg-type]
        if self.ratio is None:
            weights = torch.ones(n, dtype=torch.float64)
        else:
            assert features is not None
            weights = self.ratio(features).exp()
        q = self.thresholds(weights)
        if prediction.log_probs is not None:
            return replace(
                prediction, members=1 - prediction.log_probs.double().exp() <= q.to(prediction.log_probs.device)
            )
        assert prediction.mean is not None and prediction.variance is not None
        half = q.to(prediction.mean.device) * prediction.variance.double().sqrt().clamp_min(NO_SPREAD)
        return replace(prediction, lower=prediction.mean - half, upper=prediction.mean + half)

    @property
    def effective(self) -> float:
        """The effective number of scores, of the first output."""
        weights = self.mass[:, 0].diff(prepend=torch.zeros(1, dtype=self.mass.dtype))
        return float(weights.sum().square() / weights.square().sum())


def fit_conformal(
    data: LabelledPrediction, level: float, ratio: DensityRatio | None = None, features: Tensor | None = None
) -> Conformal:
    """`data`: of samples that trained nothing; with a `ratio`, their `features` `(n, D)`."""
    scores = _scores(data)
    order = scores.argsort(dim=0, stable=True)
    weights = torch.ones(len(scores), dtype=torch.float64)
    if ratio is not None:
        assert features is not None
        weights = ratio(features).exp().cpu()
    return Conformal(level, scores.gather(0, order), weights[order].cumsum(0), ratio)


def fewest(level: float) -> int:
    """The number of scores below which the threshold of equal weights is infinite."""
    return math.ceil(level / (1 - level) * (1 - SLACK))


def _scores(data: LabelledPrediction) -> Tensor:
    prediction = data.prediction
    if prediction.log_probs is not None:
        return 1 - prediction.log_probs.double().exp().gather(1, data.labels[:, None])
    assert prediction.mean is not None and prediction.variance is not None
    return (data.labels - prediction.mean).abs().double() / prediction.variance.double().sqrt().clamp_min(NO_SPREAD)
