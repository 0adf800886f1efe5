"""SHOT: source hypothesis transfer (Liang, Hu & Feng, ICML 2020).

    source    min_{F,C}  CE with smoothed labels
    adapt     min_F  E_t[H(p(x_t))] - H(E_t[p(x_t)]) + β · CE(C(F(x_t)), ŷ_t)        p = softmax(C(F(x)))

The classifier C (the "hypothesis") stays the source's; only the features move. ŷ_t is the class of the nearest centroid by
cosine, where once a pass over the target

    c⁰_k = Σ p_k(x) F(x) / Σ p_k(x),    ŷ⁰ = nearest c⁰,    c_k = mean of F(x) with ŷ⁰ = k

`pseudo_weight` is β (0.3 in the paper, 0.1 on digits), `diversity_weight` that of the marginal entropy (1), `label_smoothing` 0.1.
The paper has a layer of 256 units with BatchNorm before the classifier: `bottleneck=256`. It normalises C's weights; here C is the
plain linear head. There the labels are fixed for a whole pass; here the centroids are, and a sample takes the one that is nearest
now. A class without samples takes none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.math.entropies import entropies, marginal_entropy
from transfer_cli.methods.phases import Batch, FeatureTask, Gradient, Losses, Moves, Progress, Refresh, Update
from transfer_cli.methods.source_first import SourceFirst, refuse_domain_batchnorm


class SHOT(SourceFirst):
    kinds = ("classification",)
    centroids: Tensor

    def __init__(
        self,
        context: Context,
        *,
        pseudo_weight: float = 0.3,
        diversity_weight: float = 1.0,
        label_smoothing: float = 0.1,
        source_steps: int | None = None,
    ) -> None:
        refuse_domain_batchnorm(context)
        super().__init__(context, source_steps, label_smoothing)
        self.pseudo_weight, self.diversity_weight = pseudo_weight, diversity_weight
        self.register_buffer("centroids", torch.zeros(context.num_classes, self.network.feature_dim))

    def phases(self) -> list[Gradient]:
        update = Update(self.losses, [Moves.of(self.network.backbone, self.network.bottleneck)])
        refresh = Refresh(self.find_centroids, ["target"])
        parts = ("target", "target_labelled")
        return [*self.source_phases(), Gradient("adapt", [update], parts=parts, refresh=refresh)]

    @torch.no_grad()
    def find_centroids(self, task: FeatureTask) -> None:
        assert task.target is not None
        features = task.target.x.to(self.centroids)  # (N, D)
        probs = self.network.head(features).softmax(1)
        labels = nearest(features, class_means(features, probs))
        self.centroids.copy_(class_means(features, F.one_hot(labels, len(self.centroids)).to(features)))

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        features, logits = self.network(batch.target)
        labels = nearest(features.detach(), self.centroids)
        terms = {
            "entropy": entropies(logits).mean(),
            "diversity": -self.diversity_weight * marginal_entropy(logits),
            "pseudo_label": self.pseudo_weight * F.cross_entropy(logits, labels),
        }
        return Losses(terms)


def class_means(features: Tensor, weights: Tensor) -> Tensor:
    """Means `(K, D)` of features `(N, D)` by weights `(N, K)`; zero for a class without weight."""
    return weights.T @ features / weights.sum(0).clamp_min(1e-8)[:, None]


def nearest(features: Tensor, centroids: Tensor) -> Tensor:
    """The class `(N,)` whose centroid has the largest cosine with the sample; never one at zero."""
    with torch.autocast(features.device.type, enabled=False):
        cosines = F.normalize(features.float(), dim=1) @ F.normalize(centroids, dim=1).T
    return cosines.masked_fill((centroids == 0).all(1), -2).argmax(1)
