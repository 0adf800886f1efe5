"""Weights from a classifier that tells the domains apart (Bickel, Brueckner & Scheffer, JMLR 10, 2009).

    w(x) = p(x | target) / p(x | source) = (n_s / n_t) · p(target | x) / p(source | x)

with p by logistic regression on standardised features:  `min_{W,b}  mean CE(W z + b, domain) + (l2 / 2) ‖W‖²`. The more the domains
differ, the better it tells them apart and the fewer samples keep any weight: a larger `l2` evens them out. Weights are clipped at
`max_weight`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.importance import effective_share
from transfer_cli.methods.math.logistic import fit_logistic, standardising
from transfer_cli.methods.phases import FeatureTask


class DensityRatio(FeatureMethod):
    version = 2  # another solver

    def __init__(self, context: Context, *, l2: float = 0.1, max_weight: float = 20.0) -> None:
        super().__init__(context)
        if l2 <= 0:
            raise TransferError(
                f"method.l2 must be positive, not {l2}: domains that can be told apart have no other optimum."
            )
        if max_weight <= 0:
            raise TransferError(f"method.max_weight must be positive, not {max_weight}.")
        self.l2, self.max_weight = l2, max_weight

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        self.weights = log_ratio(source.x, target.x, self.l2).exp().clamp_max(self.max_weight)
        return {"effective_share": effective_share(self.weights)}


def log_ratio(source: Tensor, target: Tensor, l2: float) -> Tensor:
    """`log w(x)` `(n_s,)` of the source samples."""
    x = torch.cat([source, target])
    domain = (torch.arange(len(x), device=x.device) >= len(source)).long()
    mean, scale = standardising(x)
    w, b = fit_logistic((x - mean) / scale, domain, 2, l2, torch.full_like(x[:, 0], 1 / len(x)))
    logits = (source - mean) / scale @ w.T + b
    return logits[:, 1] - logits[:, 0] + math.log(len(source) / len(target))
