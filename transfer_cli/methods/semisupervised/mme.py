"""Minimax entropy (Saito, Kim, Sclaroff, Darrell & Saenko, ICCV 2019).

    min_F  L + λ · H(p(x_u))        min_C  L - λ · H(p(x_u))        p(x) = softmax(Wᵀ F(x) / (T ‖F(x)‖))

L is the cross-entropy of source and granted target labels, H the mean entropy of predictions on unlabelled target samples. The
classifier C = W, without bias, raises H, which draws its prototypes W towards the target; F lowers it, which gathers the target's
features around them. One update moves both: a gradient reversal sits between F and C in the second term. `weight` is λ,
`temperature` is T.

The two sets of labels have a mean each, and these are added (the paper has one mean over a batch of both).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from transfer_cli.methods.adversarial.gradient_reversal import reverse_gradient
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.entropies import entropies
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class MME(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True, target_labels=True)
    kinds = ("classification",)
    is_game = True

    def __init__(self, context: Context, *, weight: float = 0.1, temperature: float = 0.05) -> None:
        super().__init__(context)
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, not {temperature}")
        self.weight = weight
        self.network.head = CosineHead(self.network.feature_dim, context.num_classes, temperature)

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        entropy = entropies(self.network.head(reverse_gradient(target.features, 1.0))).mean()
        return Losses({"supervised": supervised, "entropy": -self.weight * entropy}, {"entropy": entropy.detach()})


class CosineHead(nn.Linear):
    """`Wᵀ f / (T ‖f‖)`: features of length 1, `(B, D)` to `(B, K)`."""

    def __init__(self, width: int, classes: int, temperature: float) -> None:
        super().__init__(width, classes, bias=False)
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        unit = F.normalize(features.float(), dim=1)
        return super().forward(unit) / self.temperature
