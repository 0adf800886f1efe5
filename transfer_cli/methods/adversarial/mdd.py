"""Margin disparity discrepancy (Zhang, Liu, Long & Jordan, ICML 2019).

    min_{F,C} max_C'  CE(C(F(x_s)), y_s) + η λ(p) · D        λ(p) = 2 / (1 + exp(-κ p)) - 1
    D = E_t log(1 - σ_ŷ(C'(F(x_t)))) + γ · E_s log σ_ŷ(C'(F(x_s)))        ŷ = argmax C(F(x))

σ is the softmax. The adversary C', a second head, agrees with C on the source and disagrees on the target; F brings the target to
where it cannot. One update moves all three: a gradient reversal of strength η λ(p) sits between F and C', which itself learns at
full rate; ŷ carries no gradient. `weight` is η, `margin` γ (exp of the margin; 2 to 4 in the paper), `gamma` is κ. C and
C' are perceptrons with one layer of `hidden` units and `dropout`, or linear with `hidden: 0`. With `source_model` perceptrons start
anew. Logged: `disagreement`, the share of target samples on which C' and C predict different classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.adversarial.gradient_reversal import reverse_gradient
from transfer_cli.methods.adversarial.perceptron import perceptron
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class MDD(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        weight: float = 0.1,
        margin: float = 4.0,
        gamma: float = 10.0,
        hidden: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(context)
        self.weight, self.margin, self.gamma = weight, margin, gamma
        shape = (self.network.feature_dim, hidden, context.num_classes)
        if hidden:
            self.network.head = perceptron(*shape, dropout=dropout)  # type: ignore[assignment]
        self.adversary = perceptron(*shape, dropout=dropout)

    def phases(self) -> list[Gradient]:
        moves = [Moves.of(self.network), Moves.of(self.adversary, player="heads")]
        return [Gradient("adapt", [Update(self.losses, moves)])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        outputs = self.network.both(batch.source.x, batch.target)
        strength = self.weight * ramp(progress.p, self.gamma)
        source, target = (self.adversary(reverse_gradient(o.features, strength)).float() for o in outputs)
        of_source, of_target = (o.logits.argmax(1) for o in outputs)  # ŷ
        disparity = self.margin * F.cross_entropy(source, of_source) - log_complement(target, of_target).mean()
        supervised = self.network.supervised(outputs[0].logits, batch.source.y)
        disagreement = (target.argmax(1) != of_target).float().mean()
        return Losses({"supervised": supervised, "disparity": disparity}, {"disagreement": disagreement})


def log_complement(logits: Tensor, y: Tensor) -> Tensor:
    """`log(1 - softmax(logits)_y)` of each sample, `(B,)`, from logits `(B, K)`: finite however certain of y they are."""
    others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -torch.inf)
    return others.logsumexp(1) - logits.logsumexp(1)
