"""SWAG: a Gaussian over a network's weights from the end of its training (Maddox et al., NeurIPS 2019).

    train        min_θ  CE(C(F(x)), y); from the share `start` of the steps on, a snapshot of θ every `every` steps
    draw         θ_s ~ N(θ̄, scale (½ Σ + Z Zᵀ / (2 (K - 1))))        s = 1..draws
    statistics   the running statistics of each draw's BatchNorm layers, over `statistics_steps` batches
    predict      mean over s of p(y | x, θ_s)

θ̄ is the snapshots' mean, Σ the diagonal of their variances, Z the last K = `rank` deviations from the mean so far. Frozen
weights stay. The paper's constant learning rate at the end is `schedule=constant`. Memory: rank + draws times the network.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.supervised import Supervised, labelled_parts
from transfer_cli.methods.bayes.weight_moments import WeightMoments, assign, flat
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.phases import Batch, ClosedForm, FeatureTask, Gradient, Losses, Phase, Progress, Update
from transfer_cli.methods.teacher import FrozenTeacher


class SWAG(Supervised):
    def __init__(
        self,
        context: Context,
        *,
        start: float = 0.75,
        every: int = 10,
        rank: int = 20,
        scale: float = 1.0,
        draws: int = 10,
        statistics_steps: int = 50,
    ) -> None:
        super().__init__(context)
        check_snapshots(start, every, rank)
        if scale < 0 or draws < 1:
            raise ValueError("scale is not negative, and draws at least 1")
        self.start, self.every, self.scale, self.statistics_steps = start, every, scale, statistics_steps
        self.moments = WeightMoments(sum(p.numel() for p in self.weights()), rank)
        self.drawn: Any = nn.ModuleList(FrozenTeacher(self.network) for _ in range(draws))
        self.layers = [batchnorms(drawn.module) for drawn in self.drawn]
        for layer in sum(self.layers, []):
            layer.momentum = None  # the statistics average all batches alike
        self.state = Fitted()

    def weights(self) -> list[nn.Parameter]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def phases(self) -> list[Phase]:
        train = self.train_phase(after_step=self.collect)
        if not any(self.layers):
            return [train, ClosedForm("draw", self.draw, parts=())]
        estimate = Update(self.estimate, moves=[])
        last = Gradient("statistics", [estimate], self.statistics_steps, parts=self.parts)
        return [train, ClosedForm("draw", self.draw, parts=(), predicts=False), last]

    def collect(self, progress: Progress) -> None:
        n = snapshot(progress, self.start, self.every)
        if n:
            self.moments.add(flat(self.weights()), n)

    def draw(self, task: FeatureTask) -> dict[str, float]:
        for drawn, layers in zip(self.drawn, self.layers, strict=True):
            drawn.copy(self.network)
            moved = [
                p for p, own in zip(drawn.parameters(), self.network.parameters(), strict=True) if own.requires_grad
            ]
            assign(moved, self.moments.draw(self.scale))
            for layer in layers:
                layer.reset_running_stats()
        self.state.put(drawn=self.moments.count.clone())
        return {"snapshots": float(self.moments.count)}

    def estimate(self, batch: Batch, progress: Progress) -> Losses:
        for drawn, layers in zip(self.drawn, self.layers, strict=True):
            for layer in layers:
                layer.train()
            for part, domain in labelled_parts(batch):
                drawn(part.x, domain)
            for layer in layers:
                layer.eval()
        return Losses({})

    def predict(self, x: Any) -> Prediction:
        return self.averaged(x, "target")

    def predict_source(self, x: Any) -> Prediction:
        return self.averaged(x, "source")

    def averaged(self, x: Any, domain: str) -> Prediction:
        if not hasattr(self.state, "drawn"):  # still training
            return self.network.predict(x, domain)
        return Prediction.mixture([drawn.module.predict(x, domain) for drawn in self.drawn])


def check_snapshots(start: float, every: int, rank: int) -> None:
    if not 0 <= start < 1 or every < 1 or rank < 2:
        raise ValueError("start is a share of the steps from 0 to below 1; every is at least 1, and rank at least 2")


def snapshot(progress: Progress, start: float, every: int) -> int:
    """The number, from 1, of the snapshot that is due after this step, or 0."""
    since = progress.step - math.ceil(start * progress.steps)
    return 0 if since < 0 or since % every else since // every + 1


def batchnorms(network: Any) -> list[Any]:
    """The BatchNorm layers whose statistics are not frozen."""
    network.train()
    kinds = nn.modules.batchnorm._BatchNorm
    found = [m for m in network.modules() if isinstance(m, kinds) and m.training and m.track_running_stats]
    network.eval()
    return found
