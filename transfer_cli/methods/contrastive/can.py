"""Contrastive adaptation network (Kang, Jiang, Yang & Hauptmann, CVPR 2019).

    min_{F,C}  CE(C(F(x_s)), y_s) + β(p) Σ_l (1/|M| Σ_c D_cc - 1/(|M| (|M| - 1)) Σ_{c ≠ c'} D_cc')        c, c' in M
    D_cc' = ‖mean_{i: y_i = c} φ(s_i) - mean_{j: ŷ_j = c'} φ(t_j)‖²        β(p) = w (2 / (1 + exp(-γ p)) - 1)

the contrastive domain discrepancy of two layers l, features and class probabilities: samples of one class should be alike in
both domains, those of two classes should not. φ belongs to a sum of Gaussian kernels (`methods/math/mmd.py`).

The labels ŷ come from spherical k-means on the whole target's features, started from the source's class centres and renewed
every `every` steps (null: once an epoch). A sample of a batch takes the class of the nearest centre, if (1 - cos) / 2 is at
most `distance` (D_0). Classes with fewer than `samples` (N_0) target samples that near are left out until the next look. M: the
classes that then have samples of both domains in the batch.

`weight` is w. Other than in the paper batches are drawn at random, not by class, so a batch may hold few classes or none of M,
which then contribute nothing; and β rises from 0, since a network that does not know the source has no clusters worth
following.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.mmd import class_mmd
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, FeatureTask, Gradient, Losses, Moves, Progress, Refresh, Update

ROUNDS = 100  # of k-means, at most


class CAN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)
    centres: Tensor
    kept: Tensor

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 0.3,
        gamma: float = 10.0,
        distance: float = 0.05,
        samples: int = 3,
        every: int | None = None,
    ) -> None:
        super().__init__(context)
        if every is not None and every < 1:
            raise ValueError(f"method.every must be at least 1, or null; it is {every}.")
        self.weight, self.gamma, self.num_classes = weight, gamma, context.num_classes
        self.distance, self.samples, self.every = distance, samples, every
        # Buffers of a fixed shape, not `Fitted`: a running average of the weights pairs them by order.
        self.register_buffer("centres", torch.zeros(self.num_classes, self.network.feature_dim))
        self.register_buffer("kept", torch.zeros(self.num_classes))  # 1: the class takes part

    def phases(self) -> list[Gradient]:
        refresh = Refresh(self.cluster, ("source", "target"), self.every)
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])], refresh=refresh)]

    def cluster(self, task: FeatureTask) -> None:
        assert task.source is not None and task.source.y is not None and task.target is not None
        labels = F.one_hot(task.source.y, self.num_classes).to(task.source.x)
        centres = spherical_k_means(task.target.x, F.normalize(labels.T @ F.normalize(task.source.x)))
        self.centres.copy_(centres)
        self.kept.copy_(self.assign(task.target.x).sum(0) >= self.samples)

    def assign(self, features: Tensor) -> Tensor:
        """One-hot labels `(B, K)` of target features `(B, D)`; all zeros where no centre is near enough."""
        nearness, nearest = (F.normalize(features) @ self.centres.to(features).T).max(1)
        near = (1 - nearness) / 2 <= self.distance
        return F.one_hot(nearest, self.num_classes) * near[:, None]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        with torch.autocast(target.features.device.type, enabled=False):
            assigned = self.assign(target.features.detach().float()) * self.kept
        labels = F.one_hot(batch.source.y, self.num_classes)
        layers = [(source.features, target.features), (source.logits.softmax(1), target.logits.softmax(1))]
        contrast = [contrastive_discrepancy(class_mmd(s, t, labels, assigned), labels, assigned) for s, t in layers]
        weight = self.weight * ramp(progress.p, self.gamma)
        return Losses(
            {"supervised": supervised, "contrastive": weight * sum(contrast[1:], contrast[0])},
            {"target_share": assigned.sum() / len(assigned)},
        )


def contrastive_discrepancy(distances: Tensor, source_weights: Tensor, target_weights: Tensor) -> Tensor:
    """Mean of the diagonal less the mean of the rest, of D_cc' `(K, K)`, over classes that both weights `(n, K)`, `(m, K)` have."""
    present = (source_weights.sum(0) > 0) & (target_weights.sum(0) > 0)
    pairs = present[:, None] & present
    same = torch.eye(len(present), dtype=torch.bool, device=present.device)
    means = [
        torch.where(chosen, distances, 0).sum() / chosen.sum().clamp_min(1) for chosen in (pairs & same, pairs & ~same)
    ]
    return means[0] - means[1]


def spherical_k_means(x: Tensor, centres: Tensor) -> Tensor:
    """Centres `(K, D)` of length 1 that samples `(N, D)` are nearest to by cosine, found from given ones.

    A centre that is zero, of a class without samples, stays; so does one that no sample is nearest to.
    """
    x = F.normalize(x)
    labels = None
    for _ in range(ROUNDS):
        cosines = (x @ centres.T).masked_fill(centres.square().sum(1) == 0, -torch.inf)
        found = cosines.argmax(1)
        if labels is not None and torch.equal(found, labels):
            break
        labels = found
        sums = F.one_hot(labels, len(centres)).to(x).T @ x
        centres = torch.where(sums.square().sum(1, keepdim=True) > 0, F.normalize(sums), centres)
    return centres
