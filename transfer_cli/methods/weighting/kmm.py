"""Kernel mean matching (Huang, Smola, Gretton, Borgwardt & Schoelkopf, NIPS 2006).

    min_β  ½ βᵀ K β - κᵀ β    subject to   0 <= β_i <= B,   |Σ_i β_i - n_s| <= n_s ε
    K_ij = k(x_i, x_j),   κ_i = (n_s / n_t) Σ_j k(x_i, x_j^t),   k(x, y) = exp(-γ ‖x - y‖²)

which is `½ n_s² ‖Σ_i β_i φ(x_i) / n_s - mean_j φ(x_j^t)‖²` up to a constant: the source is weighed so that its mean in the kernel's
space is the target's. B is `max_weight`; ε is `slack`, null: the paper's `(√n_s - 1) / √n_s`. `gamma: null` is one over the median
squared distance. With `approximate` set, `K = Φ Φᵀ` for explicit features Φ and is never formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.importance import effective_share
from transfer_cli.methods.math.kernel_map import LARGEST_EXACT, Approximation, KernelMap, median_square, rbf
from transfer_cli.methods.phases import FeatureTask

TOLERANCE = 1e-4  # of κᵀ 1, the size of the objective
MAX_STEPS = 20_000


class KMM(FeatureMethod):
    def __init__(
        self,
        context: Context,
        *,
        max_weight: float = 1000.0,
        slack: float | None = None,
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
    ) -> None:
        super().__init__(context)
        if max_weight < 1:
            raise TransferError(f"method.max_weight must be at least 1, the mean of the weights; it is {max_weight}.")
        if slack is not None and not 0 <= slack < 1:
            raise TransferError(f"method.slack must be between 0 and 1 (1 excluded); it is {slack}.")
        if gamma is not None and gamma <= 0:
            raise TransferError(f"method.gamma must be positive, or null for the median; it is {gamma}.")
        self.max_weight, self.slack, self.gamma, self.approximate = max_weight, slack, gamma, approximate
        self.kernel = KernelMap("rbf", gamma, approximate, landmarks)

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        n = len(source.x)
        slack = 1 - n**-0.5 if self.slack is None else self.slack
        multiply, linear, curvature = self.problem(source.x, target.x)
        low, high = n * (1 - slack), n * (1 + slack)
        self.weights = solve(multiply, linear, curvature, min(self.max_weight, high), low, high)
        return {"effective_share": effective_share(self.weights)}

    def problem(self, source: Tensor, target: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
        """`β -> K β`, κ `(n_s,)`, and a bound of K's largest eigenvalue."""
        n, pooled = len(source), torch.cat([source, target])
        if self.approximate == "none":
            if len(pooled) > LARGEST_EXACT:
                raise TransferError(
                    f"exact kernels of {len(pooled)} samples need {8e-9 * n * len(pooled):.0f} GB: set "
                    "method.approximate=nystroem or random_features."
                )
            gamma = self.gamma or 1 / median_square(pooled, torch.Generator().manual_seed(0))
            kernel = rbf(source, source, gamma)
            # the largest row sum: no eigenvalue of a matrix without negative entries exceeds it
            return kernel.__matmul__, n * rbf(source, target, gamma).mean(1), float(kernel.sum(1).max())
        phi, phi_t = self.kernel.fit(pooled).split([n, len(target)])
        largest = float(torch.linalg.eigvalsh(phi.T @ phi)[-1])
        return lambda beta: phi @ (phi.T @ beta), n * (phi @ phi_t.mean(0)), largest


def solve(
    multiply: Callable[[Tensor], Tensor],
    linear: Tensor,
    curvature: float,
    upper: float,
    low: float,
    high: float,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """β `(N,)` by accelerated projected gradients, restarted where momentum points uphill (O'Donoghue & Candes, FoCM 15, 2015).

    Stops once the objective is proven within `tolerance` times `linearᵀ 1` of the optimum: by convexity it lies at most
    `gᵀ (β - s)` above it, g being its gradient and s the feasible point with the least `gᵀ s`.
    """
    beta = torch.ones_like(linear)
    allowed = tolerance * float(linear.sum())
    ahead, pace = beta, 1.0
    for step in range(MAX_STEPS):
        new = project(ahead - (multiply(ahead) - linear) / curvature, upper, low, high)
        if step % 20 == 0:
            gradient = multiply(new) - linear
            if float(gradient @ new) - least(gradient, upper, low, high) <= allowed:
                return new
        if float((ahead - new) @ (new - beta)) > 0:
            pace = 1.0
        faster = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        ahead, beta, pace = new + (pace - 1) / faster * (new - beta), new, faster
    return beta


def project(point: Tensor, upper: float, low: float, high: float) -> Tensor:
    """The nearest `(N,)` with `0 <= β <= upper` and `low <= Σ β <= high`: `clip(point - λ)`, λ where the sum is met."""
    inside = point.clamp(0, upper)
    total = float(inside.sum())
    if low <= total <= high:
        return inside
    wanted = low if total < low else high
    # Σ clip(point - λ) falls piecewise linearly in λ, from N upper; an entry starts to shrink at point - upper and ends at point
    breaks, order = torch.cat([point - upper, point]).sort()
    ones = torch.ones_like(point)
    falling = torch.cat([ones, -ones])[order].cumsum(0)
    sums = len(point) * upper - torch.cat([ones[:1] * 0, (falling[:-1] * breaks.diff()).cumsum(0)])
    last = int((sums >= wanted).sum()) - 1
    return (point - breaks[last] - (sums[last] - wanted) / falling[last].clamp_min(1)).clamp(0, upper)


def least(gradient: Tensor, upper: float, low: float, high: float) -> float:
    """The least `gᵀ s` of feasible s: as much as is allowed on the lowest entries, and no more than `low` on those above zero."""
    values = gradient.sort().values
    filled = torch.arange(len(values), dtype=values.dtype, device=values.device) * upper
    share = torch.where(values < 0, high - filled, low - filled).clamp(0, upper)
    return float(values @ share)
