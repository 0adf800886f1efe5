"""Domain-adversarial training (Ganin et al., JMLR 17(59), 2016).

    min_{F,C} max_D  CE(C(F(x_s)), y_s) - λ(p) · w · BCE(D(F(x)), domain)        λ(p) = 2 / (1 + exp(-γ p)) - 1

One update moves all three: a gradient reversal of strength λ(p) · w sits between F and D, which itself learns at full rate.
`weight` is w (1 in the paper), `gamma` is γ; D learns at `discriminator_lr` times the configured rate (10 for new layers in the
paper's experiments on photographs).
"""

from __future__ import annotations

from transfer_cli.methods.adversarial.gradient_reversal import DomainDiscriminator, domain_loss, reverse_gradient
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class DANN(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 1.0,
        gamma: float = 10.0,
        hidden: int = 512,
        dropout: float = 0.5,
        discriminator_lr: float = 10.0,
    ) -> None:
        super().__init__(context)
        self.weight, self.gamma, self.discriminator_lr = weight, gamma, discriminator_lr
        self.discriminator = DomainDiscriminator(self.network.feature_dim, hidden, dropout=dropout)

    def phases(self) -> list[Gradient]:
        moves = [
            Moves.of(self.network),
            Moves.of(self.discriminator, lr_scale=self.discriminator_lr, player="discriminator"),
        ]
        return [Gradient("adapt", [Update(self.losses, moves)])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        strength = self.weight * ramp(progress.p, self.gamma)
        domain, accuracy = domain_loss(
            self.discriminator(reverse_gradient(source.features, strength)),
            self.discriminator(reverse_gradient(target.features, strength)),
        )
        supervised = self.network.supervised(source.logits, batch.source.y)
        return Losses({"supervised": supervised, "domain": domain}, {"discriminator_accuracy": accuracy})
