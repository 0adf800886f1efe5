"""Kullback-Leibler importance estimation (Sugiyama, Nakajima, Kashima, von Buenau & Kawanabe, NIPS 2007).

    w(x) = Σ_l α_l exp(-γ ‖x - c_l‖²)
    max_α  mean_j log w(x_j^t)    subject to   mean_i w(x_i) = 1,   α >= 0

The `centres` c_l are target samples drawn at random. `gamma` is a number, or a list of which the one with the greatest likelihood
`mean log w` of left-out target samples is taken, in `folds`-fold cross-validation; null: of 0.01 to 100 over the median squared
distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.importance import effective_share
from transfer_cli.methods.math.kernel_map import median_square, rbf
from transfer_cli.methods.phases import FeatureTask

MULTIPLES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TINY = 1e-100  # a kernel below it has underflowed


class KLIEP(FeatureMethod):
    def __init__(
        self,
        context: Context,
        *,
        gamma: float | Sequence[float] | None = None,
        centres: int = 100,
        folds: int = 5,
    ) -> None:
        super().__init__(context)
        self.choices = (
            None if gamma is None else [float(g) for g in (gamma if isinstance(gamma, Sequence) else [gamma])]
        )
        if self.choices is not None and (not self.choices or min(self.choices) <= 0):
            raise TransferError(
                f"method.gamma is null, a positive number, or a list of them to choose from; not {gamma}."
            )
        if centres < 1 or folds < 2:
            raise TransferError(
                f"kliep needs method.centres of 1 or more and method.folds of 2 or more, not {centres} and {folds}."
            )
        self.centres, self.folds = centres, folds

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        draw = torch.Generator().manual_seed(0)
        choices = self.choices
        if choices is None:
            choices = [multiple / median_square(torch.cat([source.x, target.x]), draw) for multiple in MULTIPLES]
        shuffled = target.x[torch.randperm(len(target.x), generator=draw).to(target.x.device)]
        gamma = choices[0]
        if len(choices) > 1:
            gamma = choices[int(np.argmax([self.left_out_likelihood(source.x, shuffled, g) for g in choices]))]
        found = self.estimate(source.x, shuffled, gamma)
        if found is None:
            raise TransferError(
                f"at gamma={gamma:.3g} no kernel around a target sample reaches a source sample: set a smaller method.gamma."
            )
        centres, alpha = found
        self.weights = rbf(source.x, centres, gamma) @ alpha
        return {
            "gamma": gamma,
            "likelihood": float((rbf(target.x, centres, gamma) @ alpha).clamp_min(TINY).log().mean()),
            "effective_share": effective_share(self.weights),
        }

    def estimate(self, source: Tensor, target: Tensor, gamma: float) -> tuple[Tensor, Tensor] | None:
        """Centres `(b, D)`, the first of the target, and α `(b,)`; None where no centre is near any source sample."""
        centres = target[: self.centres]
        means = rbf(source, centres, gamma).mean(0)
        near = means > TINY
        if not near.any():
            return None
        return centres[near], fit_mixture(rbf(target, centres[near], gamma), means[near])

    def left_out_likelihood(self, source: Tensor, target: Tensor, gamma: float) -> float:
        folds = torch.arange(len(target), device=target.device) % self.folds
        total = 0.0
        for fold in range(min(self.folds, len(target))):
            found = self.estimate(source, target[folds != fold], gamma)
            if found is None:
                return -math.inf
            centres, alpha = found
            total += float((rbf(target[folds == fold], centres, gamma) @ alpha).clamp_min(TINY).log().mean())
        return total


def fit_mixture(on_target: Tensor, source_means: Tensor) -> Tensor:
    """α `(b,)` that maximises `mean log(on_target α)` subject to `source_meansᵀ α = 1`, `α >= 0`.

    With `θ = α source_means` on the simplex. As the logarithm turns scaling into a shift, the constraint's multiplier is one:
    `max_{θ >= 0} mean log(A θ) - Σ θ`, A `(n, b)`, has its optimum on the simplex, and only bounds are left (L-BFGS-B). Where no
    component of the projected gradient exceeds 1e-5, the likelihood is within 1e-5 of the greatest.
    """
    scaled = on_target / source_means

    def value_and_gradient(flat: Any) -> tuple[float, Any]:
        theta = torch.from_numpy(flat).to(scaled)
        ratio = (scaled @ theta).clamp_min(TINY)
        gradient = 1 - (1 / ratio) @ scaled / len(scaled)
        return float(theta.sum() - ratio.log().mean()), gradient.cpu().numpy()

    start = np.full(len(source_means), 1 / len(source_means))
    options = {"maxiter": 2000, "maxfun": 5000, "gtol": 1e-5, "ftol": 0.0, "maxcor": 20}
    solution = minimize(
        value_and_gradient, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(start), options=options
    )
    theta = torch.from_numpy(solution.x).to(scaled)
    return theta / theta.sum() / source_means
