"""Deep adaptation network (Long, Cao, Wang & Jordan, ICML 2015).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ Σ_l MMD²_k(D_s^l, D_t^l)

MMD under a sum of Gaussian kernels at each layer l that is adapted: the features, the logits or both. `weight` is λ. The paper
learns the kernels' shares; here each counts 1. `estimator: linear` is the paper's of linear cost, but its variance is larger;
see `methods/math/mmd.py`.
"""

from __future__ import annotations

from typing import Literal

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.mmd import Estimator, mmd
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class DAN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        layer: Literal["features", "logits", "both"] = "features",
        estimator: Estimator = "unbiased",
    ) -> None:
        super().__init__(context)
        self.weight, self.estimator = weight, estimator
        self.layers = ("features", "logits") if layer == "both" else (layer,)

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        distances = [mmd([(getattr(source, name), getattr(target, name))], self.estimator) for name in self.layers]
        distance = sum(distances[1:], distances[0])
        return Losses({"supervised": supervised, "mmd": self.weight * distance}, {"mmd_distance": distance.detach()})
