"""Entropies of predicted class probabilities, from logits `(B, K)`, in float32 at least and in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropies(logits: Tensor) -> Tensor:
    """Of each sample, `(B,)`."""
    log_probs = _precise(logits).log_softmax(1)
    return -(log_probs.exp() * log_probs).sum(1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Of the mean prediction, 0-dim: low where a batch falls on few classes."""
    # In logarithms: at a class whose every probability underflows, the entropy's slope would be infinite.
    log_mean = _precise(logits).log_softmax(1).logsumexp(0) - math.log(len(logits))
    return -(log_mean.exp() * log_mean).sum()


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
