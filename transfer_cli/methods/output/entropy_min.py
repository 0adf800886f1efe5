"""Entropy minimisation (Grandvalet & Bengio, NIPS 2004): decision boundaries where the target has few samples.

    min_{F,C}  CE(C(F(x_s)), y_s) + λ(p) · (mean_j H(p_j) - δ H(mean_j p_j))        p_j = softmax(C(F(x_j^t)))
    λ(p) = w (2 / (1 + exp(-γ p)) - 1), or w where `gamma` is null

The paper's objective has δ = 0; `diversity` is δ, which keeps predictions from falling on few classes (information
maximisation: Krause, Perona & Gomes, NIPS 2010). `weight` is w.
"""

from __future__ import annotations

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.entropies import entropies, marginal_entropy
from transfer_cli.methods.math.ramps import ramp
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class EntropyMin(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self, context: Context, *, weight: float = 0.1, diversity: float = 0.0, gamma: float | None = 10.0
    ) -> None:
        super().__init__(context)
        self.weight, self.diversity, self.gamma = weight, diversity, gamma

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        weight = self.weight * (1.0 if self.gamma is None else ramp(progress.p, self.gamma))
        certain, diverse = entropies(target.logits).mean(), marginal_entropy(target.logits)
        terms = {"supervised": supervised, "entropy": weight * certain}
        if self.diversity:
            terms["diversity"] = -weight * self.diversity * diverse
        return Losses(terms, {"target_entropy": certain.detach(), "target_marginal_entropy": diverse.detach()})
