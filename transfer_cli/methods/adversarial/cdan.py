"""Conditional domain-adversarial training (Long, Cao, Wang & Jordan, NeurIPS 2018).

    min_{F,C} max_D  CE(C(F(x_s)), y_s) - λ(p) · w · BCE(D(T(f, g)), domain)        λ(p) = 2 / (1 + exp(-γ p)) - 1
    T(f, g) = f ⊗ g,  or where that has more than 4,096 entries  (R_f f) ⊙ (R_g g) / √d
    CDAN+E: a sample's BCE is multiplied by  1 + exp(-H(g)),  over its domain's mean

f are the features and g the class probabilities, so D compares the domains class by class. R_f and R_g are fixed standard Gaussian
matrices, d is `random_dim`. As in the authors' code g is held fixed inside T. `entropy_weighting` (CDAN+E) makes D attend to
samples of certain prediction; the game is played through H as well (its gradient is reversed, the mean held fixed), so that F and C
make predictions certain. `weight` is w, `gamma` γ; D has two layers of `hidden` units with `dropout`, and learns at
`discriminator_lr` times the configured rate (10 for new layers in the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator, domain_loss, reverse_gradient
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.entropies import entropies
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update

WIDEST = 4096  # outer product, in entries


class CDAN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        entropy_weighting: bool,
        weight: float = 1.0,
        gamma: float = 10.0,
        hidden: int = 1024,
        dropout: float = 0.5,
        discriminator_lr: float = 10.0,
        random_dim: int = 1024,
    ) -> None:
        super().__init__(context)
        self.entropy_weighting, self.weight, self.gamma = entropy_weighting, weight, gamma
        self.discriminator_lr = discriminator_lr
        self.map = MultilinearMap(self.network.feature_dim, context.num_classes, random_dim)
        self.discriminator = DomainDiscriminator(self.map.width, hidden, dropout=dropout)

    def phases(self) -> list[Gradient]:
        moves = [
            Moves.of(self.network),
            Moves.of(self.discriminator, lr_scale=self.discriminator_lr, player="discriminator"),
        ]
        return [Gradient("adapt", [Update(self.losses, moves)])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        outputs = self.network.both(batch.source.x, batch.target)
        strength = self.weight * ramp(progress.p, self.gamma)
        joint = [self.map(f, logits.detach().softmax(1)) for f, logits in outputs]
        domains = [self.discriminator(reverse_gradient(h, strength)) for h in joint]
        if self.entropy_weighting:
            weights = [certainty(reverse_gradient(entropies(logits), strength)) for _, logits in outputs]
            domain, accuracy = domain_loss(*domains, *weights)
        else:
            domain, accuracy = domain_loss(*domains)
        supervised = self.network.supervised(outputs[0].logits, batch.source.y)
        return Losses({"supervised": supervised, "domain": domain}, {"discriminator_accuracy": accuracy})


def certainty(entropy: Tensor) -> Tensor:
    """`1 + exp(-H)` over its mean, of the entropies `(B,)` of one domain."""
    weights = 1 + torch.exp(-entropy)
    return weights / weights.mean().detach()


class MultilinearMap(nn.Module):
    """Features `(B, D)` and probabilities `(B, K)` to `(B, width)`: their outer product, or its random projection."""

    features: Tensor
    classes: Tensor

    def __init__(self, features: int, classes: int, random_dim: int) -> None:
        super().__init__()
        self.randomised = features * classes > WIDEST
        self.width = random_dim if self.randomised else features * classes
        if self.randomised:
            self.register_buffer("features", torch.randn(features, random_dim))
            self.register_buffer("classes", torch.randn(classes, random_dim))

    def forward(self, f: Tensor, g: Tensor) -> Tensor:
        if self.randomised:
            return (f @ self.features) * (g @ self.classes) / self.width**0.5
        return (g[:, :, None] * f[:, None, :]).flatten(1)
