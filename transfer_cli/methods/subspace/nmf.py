"""Non-negative matrix factorisation of both domains together (Lee & Seung, Nature 401, 1999), with a head on the codes.

min_{H,B >= 0}  ‖X - H B‖²_F                                             X: the samples of both domains, not negative
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.nmf import encode, factorise
from transfer_cli.methods.phases import FeatureTask


class NMF(FeatureMethod):
    def __init__(self, context: Context, *, components: int = 30, steps: int = 200) -> None:
        super().__init__(context)
        self.components, self.steps = components, steps

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        x = torch.cat([source.x, target.x])
        _, basis, errors = factorise(x, self.components, self.steps)
        self.fitted.put(basis=basis)
        return {"explained_variance": 1 - errors[-1] / float((x - x.mean(0)).square().sum())}

    def map_source(self, z: Tensor) -> Tensor:
        return encode(z, self.fitted.basis)

    def map_target(self, z: Tensor) -> Tensor:
        return self.map_source(z)
