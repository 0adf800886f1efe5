"""Central moment discrepancy (Zellinger, Grubinger, Lughofer, Natschlaeger & Saminger-Platz, ICLR 2017).

    min_{F,C}  CE(C(F(x_s)), y_s) + λ CMD_K(A_s, A_t)
    CMD_K(X, Y) = ‖E X - E Y‖ / |b - a| + Σ_{k=2..K} ‖c_k(X) - c_k(Y)‖ / |b - a|^k        c_k(X) = E (X - E X)^k, by coordinate

for activations in [a, b]. Those of a backbone have no bounds, so they pass through a sigmoid on their way into the distance,
not into the classifier: [a, b] = [0, 1], and every |b - a|^k is 1. (tanh of half the activation in [-1, 1] gives the same
distance.) Where activations are large the sigmoid is flat, and with it the distance. `weight` is λ, `moments` is K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class CMD(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)

    def __init__(self, context: Context, *, weight: float = 1.0, moments: int = 5) -> None:
        super().__init__(context)
        if moments < 1:
            raise ValueError(f"method.moments must be at least 1; it is {moments}.")
        self.weight, self.moments = weight, moments

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        distance = central_moment_discrepancy(source.features, target.features, self.moments)
        return Losses({"supervised": supervised, "cmd": self.weight * distance}, {"cmd_distance": distance.detach()})


@in_full_precision
def central_moment_discrepancy(source: Tensor, target: Tensor, moments: int) -> Tensor:
    """CMD of the sigmoids of `(n, D)` and `(m, D)`, 0-dim."""
    source, target = source.sigmoid(), target.sigmoid()
    means = source.mean(0), target.mean(0)
    source, target = source - means[0], target - means[1]
    gaps = [means[0] - means[1]]
    gaps += [source.pow(k).mean(0) - target.pow(k).mean(0) for k in range(2, moments + 1)]
    return torch.stack(gaps).norm(dim=1).sum()
