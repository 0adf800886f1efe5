"""First moments of each feature: the source shifted, or shifted and scaled, to the target's (as AdaBN does inside a network;
Li et al., ICLR workshops 2017).

    mean      source  x - μ_s + μ_t                          zscore    source  (x - μ_s) / σ_s · σ_t + μ_t
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.logistic import standardising
from transfer_cli.methods.phases import FeatureTask


class MeanMatch(FeatureMethod):
    def __init__(self, context: Context, *, match: Literal["mean", "zscore"] = "zscore") -> None:
        super().__init__(context)
        self.match = match

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        (mean_s, scale_s), (mean_t, scale_t) = standardising(source.x), standardising(target.x)
        scale = scale_t / scale_s if self.match == "zscore" else torch.ones_like(scale_s)
        self.fitted.put(scale=scale, shift=mean_t - mean_s * scale)
        return {}

    def map_source(self, z: Tensor) -> Tensor:
        return z * self.fitted.scale + self.fitted.shift
