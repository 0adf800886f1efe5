"""Joint adaptation network (Long, Zhu, Wang & Jordan, ICML 2017).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ(p) · MMD²(P, Q)        k((f, p), (f', p')) = k_1(f, f') k_2(p, p')
    λ(p) = w (2 / (1 + exp(-γ p)) - 1)

P and Q are the joint distributions of features f and class probabilities p = softmax(C(f)): the product of the layers' kernels
makes their maximum mean discrepancy the joint one. k_1 is a sum of Gaussian kernels, k_2 one Gaussian whose width is the mean
squared distance, where the paper takes the median. `weight` is w; `estimator: linear` is the paper's, at a larger variance.
"""

from __future__ import annotations

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.mmd import WIDTHS, Estimator, mmd
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class JAN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self, context: Context, *, weight: float = 1.0, gamma: float = 10.0, estimator: Estimator = "unbiased"
    ) -> None:
        super().__init__(context)
        self.weight, self.gamma, self.estimator = weight, gamma, estimator

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        layers = [(source.features, target.features), (source.logits.softmax(1), target.logits.softmax(1))]
        distance = mmd(layers, self.estimator, [WIDTHS, (1.0,)])
        weight = self.weight * ramp(progress.p, self.gamma)
        return Losses(
            {"supervised": supervised, "joint_mmd": weight * distance}, {"joint_mmd_distance": distance.detach()}
        )
