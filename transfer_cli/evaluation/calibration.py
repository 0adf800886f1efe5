"""Recalibration of a fitted model's predictions: few numbers, fitted to labels that trained nothing.

    ts       one temperature:  p' ∝ p^(1/T)  (Guo et al., ICML 2017); in regression one factor of the standard deviations
    ts_map   the same by MAP:  min  NLL_target(T) + (log T - log T_source)² / (2 · ½²),  T_source in the same way
             that of source labels about 1: a source that is told without an error would make it zero
    vector   a factor and a bias a class (vector scaling, Guo et al. 2017), by MAP too:  log w_c ~ N(-log T_map, ½²),
             b_c ~ N(0, ½²);  in regression a factor an output

NLLs are sums. Log-probabilities stand for logits, from which they differ by a number a sample. None of `ts` and `ts_map` changes
which class is most probable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.evaluation.prediction import NO_SPREAD, Prediction
from transfer_cli.evaluation.temperature import PRIOR_STD, fit_temperature, minimise_log

STEPS = 200  # of L-BFGS, which needs some ten


@dataclass(frozen=True)
class LabelledPrediction:
    """Predictions with the labels `(N,)` or `(N, T)` that they were made without."""

    prediction: Prediction
    labels: Tensor


@dataclass(frozen=True)
class Calibration:
    """`log p' = log_softmax(factor · log p + bias)`; in regression `factor` stretches the standard deviations.

    `factor` `()`, `(K,)` or `(T,)`; `bias` `()` or `(K,)`; both float64 on the CPU.
    """

    factor: Tensor
    bias: Tensor

    def __call__(self, prediction: Prediction) -> Prediction:
        if prediction.log_probs is not None:
            log_probs = _finite(prediction.log_probs.double())
            factor, bias = self.factor.to(log_probs.device), self.bias.to(log_probs.device)
            scaled = F.log_softmax(factor * log_probs + bias, dim=1)
            epistemic = prediction.epistemic
            if epistemic is not None:  # the same share of the entropy as before
                before, after = (torch.special.entr(x.exp()).sum(1) for x in (log_probs, scaled))
                epistemic = (epistemic * after / before.clamp_min(1e-24)).to(epistemic.dtype)
            return Prediction(log_probs=scaled.to(prediction.log_probs.dtype), epistemic=epistemic)
        assert prediction.mean is not None and prediction.variance is not None
        square = self.factor.square().to(prediction.variance)
        epistemic = None if prediction.epistemic is None else square * prediction.epistemic
        return Prediction(mean=prediction.mean, variance=square * prediction.variance, epistemic=epistemic)


def fit_calibration(
    kind: str, data: LabelledPrediction, source: LabelledPrediction | None = None
) -> tuple[Calibration, dict[str, float | list[float]]]:
    """Of the `kind` (`ts`, `ts_map`, `vector`) to `data`, and its figures for people; `source`, of the prior's centre, for the
    last two."""
    centre = None if kind == "ts" else 1.0 if source is None else _temperature(source, 1.0)
    temperature = _temperature(data, centre)
    figures: dict[str, float | list[float]] = {"temperature": temperature}
    if source is not None and centre is not None:
        figures["temperature_source"] = centre
    one = torch.tensor(1.0, dtype=torch.float64)
    if data.prediction.log_probs is None:
        factor = temperature * one
        if kind == "vector":
            outputs = data.labels.shape[1]
            factor = torch.tensor([_temperature(_output(data, t), temperature) for t in range(outputs)]).double()
            figures["factors"] = factor.tolist()
        return Calibration(factor, 0 * one), figures
    if kind != "vector":
        return Calibration(one / temperature, 0 * one), figures
    factor, bias = _fit_vector(data, temperature)
    return Calibration(factor, bias), {**figures, "factors": factor.tolist(), "biases": bias.tolist()}


def _temperature(data: LabelledPrediction, centre: float | None = None) -> float:
    """That of the probabilities, or the factor of the standard deviations: `min Σ [z² / (2 s²) + log s]` and the prior."""
    if data.prediction.log_probs is not None:
        return fit_temperature(_finite(data.prediction.log_probs), data.labels, centre=centre)
    assert data.prediction.mean is not None and data.prediction.variance is not None
    error = data.labels.double() - data.prediction.mean.double()
    squares = (error.square() / data.prediction.variance.double().clamp_min(NO_SPREAD**2)).flatten()
    total, n = float(squares.sum()), len(squares)
    return minimise_log(lambda log_s: total / 2 * math.exp(-2 * log_s) + n * log_s, centre)


def _output(data: LabelledPrediction, t: int) -> LabelledPrediction:
    assert data.prediction.mean is not None and data.prediction.variance is not None
    one = slice(t, t + 1)
    return LabelledPrediction(
        Prediction(mean=data.prediction.mean[:, one], variance=data.prediction.variance[:, one]), data.labels[:, one]
    )


def _fit_vector(data: LabelledPrediction, temperature: float) -> tuple[Tensor, Tensor]:
    assert data.prediction.log_probs is not None
    log_probs = _finite(data.prediction.log_probs.double())
    classes = log_probs.shape[1]
    offset = torch.zeros(2, classes, dtype=torch.float64, requires_grad=True)  # of log factors, and biases
    optimizer = torch.optim.LBFGS(
        [offset], max_iter=STEPS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = log_probs * offset[0].exp() / temperature + offset[1]
        value = F.cross_entropy(scores, data.labels, reduction="sum") + offset.square().sum() / (2 * PRIOR_STD**2)
        value.backward()
        return value

    with torch.enable_grad(), torch.inference_mode(False):
        optimizer.step(loss)
    found = offset.detach()
    return found[0].exp() / temperature, found[1]


def _finite(log_probs: Tensor) -> Tensor:
    """A probability of zero as the smallest positive one: its multiples are defined."""
    return log_probs.clamp_min(math.log(torch.finfo(torch.float32).tiny))
