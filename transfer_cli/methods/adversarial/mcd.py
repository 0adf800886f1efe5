"""Maximum classifier discrepancy (Saito, Watanabe, Ushiku & Harada, CVPR 2018).

    A   min_{F,C1,C2}  CE(C1(F(x_s)), y_s) + CE(C2(F(x_s)), y_s)
    B   min_{C1,C2}    the same - w · d(x_t)
    C   min_F          w · d(x_t)                                   `generator_steps` times
    d(x) = mean_k |p1_k(x) - p2_k(x)|

Two heads that agree on the source look for target samples on which they differ (B); the features move these away from where they
differ (C). `weight` is w (1 in the paper). The heads start differently; they are perceptrons with `hidden_layers` of `hidden` units
and BatchNorm (the paper's on digits), or linear with `hidden: 0`. With `source_model` perceptrons start anew. A prediction
is the mean of the heads' probabilities (the authors' code adds their logits).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.adversarial.perceptron import perceptron
from transfer_cli.methods.base import Context, Needs, NetworkMethod, Outputs
from transfer_cli.methods.domain_batchnorm import DomainSwitch
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update
from transfer_cli.methods.running_statistics import keep_statistics


class MCD(NetworkMethod):
    version = 2
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        generator_steps: int = 4,
        hidden: int = 100,
        hidden_layers: int = 2,
    ) -> None:
        super().__init__(context)
        if generator_steps < 1:
            raise ValueError(f"generator_steps is at least 1, not {generator_steps}")
        self.weight, self.generator_steps = weight, generator_steps
        shape = (self.network.feature_dim, hidden, context.num_classes, hidden_layers)
        if hidden:
            self.network.head = perceptron(*shape, batchnorm=True)  # type: ignore[assignment]
        self.second_head = perceptron(*shape, batchnorm=True)
        own = context.domain_batches == "domain_specific"
        self.switch = DomainSwitch(self.network.head, self.second_head) if own else None

    def phases(self) -> list[Gradient]:
        heads = Moves.of(self.network.head, self.second_head, player="heads")
        features = Moves.of(self.network.backbone, self.network.bottleneck)
        updates = [
            Update(self.losses, [features, heads]),
            Update(self.heads_losses, [heads]),
            Update(self.features_losses, [features], repeats=self.generator_steps),
        ]
        return [Gradient("adapt", updates)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, _ = self.judge(*self.network.both(batch.source.x, batch.target))  # both, for BatchNorm's statistics
        return Losses({"supervised": cross_entropies(source, batch.source.y)})

    def heads_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        with keep_statistics(self):
            with torch.no_grad():
                features = self.network.both(batch.source.x, batch.target)
            source, target = self.judge(*features)
        apart = discrepancy(target)
        terms = {"heads_supervised": cross_entropies(source, batch.source.y), "heads_discrepancy": -self.weight * apart}
        return Losses(terms, {"discrepancy": apart.detach()})

    def features_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        with keep_statistics(self):
            if self.network.domain_batches == "joint":
                _, target = self.judge(*self.network.both(batch.source.x, batch.target))
            else:
                target = self.log_probs(self.network.features(batch.target))
        return Losses({"features_discrepancy": self.weight * discrepancy(target)})

    def judge(self, source: Outputs, target: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        """Both heads on the features of both domains, whose batches BatchNorm joins or parts as in the network."""
        if self.network.domain_batches != "joint":
            return self.log_probs(source.features, "source"), self.log_probs(target.features)
        first, second = self.log_probs(torch.cat([source.features, target.features]))
        n = len(source.features)
        return [first[:n], second[:n]], [first[n:], second[n:]]

    def log_probs(self, features: Tensor, domain: str = "target") -> list[Tensor]:
        if self.switch is not None:
            self.switch(domain)
        return [head(features).float().log_softmax(1) for head in (self.network.head, self.second_head)]

    def predict(self, x: Any, domain: str = "target") -> Prediction:
        both = torch.stack(self.log_probs(self.network.features(x, domain), domain))
        return Prediction(log_probs=both.logsumexp(0) - math.log(2))

    def predict_source(self, x: Any) -> Prediction:
        return self.predict(x, "source")

    def supervised_loss(self, x: Any, y: Tensor) -> Tensor:
        return cross_entropies(self.log_probs(self.network.features(x)), y)


def cross_entropies(log_probs: list[Tensor], y: Tensor) -> Tensor:
    first, second = log_probs
    return F.nll_loss(first, y) + F.nll_loss(second, y)


def discrepancy(log_probs: list[Tensor]) -> Tensor:
    first, second = log_probs
    return (first.exp() - second.exp()).abs().mean()
