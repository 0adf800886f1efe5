"""Class probabilities from independent normal logits."""

from __future__ import annotations

from torch import Tensor

from transfer_cli.methods.bayes.bayes_head import normal_draws


def class_probs(mean: Tensor, variance: Tensor, draws: int) -> Tensor:
    """E softmax(f) `(B, K)`, f_k ~ N(`mean`, `variance`) `(B, K)`, over antithetic draws; without any, softmax of the mean.

    Each axis has its one place: samples are never taken for classes, be there as many of the ones as of the others.
    """
    if not draws:
        return mean.softmax(1)
    noise = normal_draws(draws, mean.shape[1], mean)[:, None]
    return (mean + variance.sqrt() * noise).softmax(2).mean(0)
