"""Adaptive batch normalisation (Li et al., ICLR workshops 2017; Pattern Recognition 80, 2018).

    source        min_{F,C}  CE(C(F(x_s)), y_s)
    statistics    in every BatchNorm layer   μ ← E[a_t],  σ² ← Var[a_t]        y = γ (a - μ) / σ + β

Nothing is trained on the target: each layer's mean and variance become those of its activations `a_t` on target batches, the
average over `statistics_steps` of them; scale γ and shift β are the source's. Source samples are predicted with the source's
statistics. Those of a frozen backbone are estimated too. Without BatchNorm layers there is nothing to adapt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transfer_cli.methods.base import Context
from transfer_cli.methods.phases import Batch, Gradient, Losses, Progress, Update
from transfer_cli.methods.source_first import SourceFirst


class AdaBN(SourceFirst):
    last_only = True

    def __init__(self, context: Context, *, statistics_steps: int = 50, source_steps: int | None = None) -> None:
        super().__init__(replace(context, domain_batches="domain_specific"), source_steps)
        assert self.network.switch is not None
        pairs = self.network.switch.layers
        if not pairs:
            raise ValueError("finds no BatchNorm layer to adapt: take a backbone that has some, or set bottleneck=256")
        if self.starts_trained and context.has_target_labels:
            raise ValueError("trains nothing after source_model, so target labels would go unused: set target_labels=0")
        self.layers: list[Any] = [pair.target for pair in pairs]
        for layer, pair in zip(self.layers, pairs, strict=True):
            layer.weight, layer.bias = pair.source.weight, pair.source.bias  # one γ and β for both domains
            layer.momentum = None  # the statistics average all batches alike
        self.statistics_steps = statistics_steps

    def phases(self) -> list[Gradient]:
        # Before the last phase the target's layers have no statistics to predict with.
        source = self.source_phases(parts=("source", "target_labelled"), predicts=False)
        estimate = Update(self.estimate, moves=[])
        steps = self.statistics_steps
        return [*source, Gradient("statistics", [estimate], steps, parts=("target",), on_start=self.forget)]

    def forget(self) -> None:
        for layer in self.layers:
            layer.reset_running_stats()

    def estimate(self, batch: Batch, progress: Progress) -> Losses:
        self.network.eval()  # without dropout
        for layer in self.layers:
            layer.train()
        self.network.features(batch.target)
        self.network.train()
        return Losses({})
