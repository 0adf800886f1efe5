"""Deep joint distribution optimal transport (Damodaran, Kellenberger, Flamary, Tuia & Courty, ECCV 2018).

    min_{γ,F,C}  CE(C(F(x_s)), y_s) + Σ_ij γ_ij (α ‖f_i^s - f_j^t‖² + λ_t CE(y_i^s, C(f_j^t)))    γ 1 = 1/n, γᵀ 1 = 1/m

In each step γ is found for the batch with the network held, then the network moves with γ held. `alpha` is α, `label_weight` is
λ_t; the defaults are the paper's, for a network that starts from a model of the source (`source_model`).

`solver: exact` is the paper's plan: by POT's network simplex, on the processor, so that every step waits for a GPU. `solver:
sinkhorn` adds entropy, `reg` times the mean cost, and makes `iterations` scalings in logarithms where the features lie.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.math.kernel_map import square_distances
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.math.transport import exact_plan, require_pot
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class DeepJDOT(NetworkMethod):
    needs = Needs(source_labels=True, target_inputs=True)
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        alpha: float = 0.001,
        label_weight: float = 0.0001,
        solver: Literal["sinkhorn", "exact"] = "sinkhorn",
        reg: float = 0.05,
        iterations: int = 50,
    ) -> None:
        super().__init__(context)
        if reg <= 0 or iterations < 1:
            raise ValueError(
                f"method.reg must be positive and method.iterations at least 1; they are {reg} and {iterations}."
            )
        if solver == "exact":
            require_pot("method.solver=exact")
        self.alpha, self.label_weight = alpha, label_weight
        self.solver, self.reg, self.iterations = solver, reg, iterations

    def phases(self) -> list[Gradient]:
        return [Gradient("adapt", [Update(self.losses, [Moves.of(self.network)])])]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        source, target = self.network.both(batch.source.x, batch.target)
        supervised = self.network.supervised(source.logits, batch.source.y)
        features = self.alpha * feature_costs(source.features, target.features)
        labels = self.label_weight * label_costs(batch.source.y, target.logits)
        plan = self.plan((features + labels).detach())
        terms = {
            "supervised": supervised,
            "transport": (plan * features).sum(),
            "label_transport": (plan * labels).sum(),
        }
        return Losses(terms)

    def plan(self, cost: Tensor) -> Tensor:
        return exact_plan(cost) if self.solver == "exact" else sinkhorn_plan(cost, self.reg, self.iterations)


@in_full_precision
def feature_costs(source: Tensor, target: Tensor) -> Tensor:
    """`‖f_i - f_j‖²`, `(n, m)`."""
    centre = target.mean(0).detach()  # far from the origin they would be differences of large numbers
    return square_distances(source - centre, target - centre)


@in_full_precision
def label_costs(y: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of the prediction at each target sample with each source label, `(n, m)`."""
    return -F.one_hot(y, target_logits.shape[1]).to(target_logits) @ target_logits.log_softmax(1).T


@in_full_precision
def sinkhorn_plan(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """The entropic plan `(n, m)` of costs `(n, m)`: always as many scalings, so that nothing waits for the device.

    Potentials are in logarithms, which neither overflow nor underflow. The columns' sums are exact, the rows' nearly.
    """
    log_kernel = -cost / (reg * cost.mean().clamp_min(1e-12))
    n, m = cost.shape
    g = cost.new_zeros(m)
    for _ in range(iterations):
        f = -math.log(n) - torch.logsumexp(log_kernel + g, 1)
        g = -math.log(m) - torch.logsumexp(log_kernel + f[:, None], 0)
    return torch.exp(log_kernel + f[:, None] + g)
