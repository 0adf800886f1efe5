"""Optimal transport of the source samples onto the target (Courty, Flamary, Tuia & Rakotomamonjy, IEEE TPAMI 39(9), 2017).

    min_γ  <γ, C> + reg Σ_ij γ_ij log γ_ij + η / n_t Σ_j Σ_c (n_t Σ_{i: y_i = c} γ_ij + ε)^½         γ 1 = 1/n_s, γᵀ 1 = 1/n_t

`regularise: none` drops both terms after the first, `entropic` the last; `group_lasso` keeps all: each target sample should get its
mass from one class (in regression, which has no classes, it is `entropic`). C is the squared Euclidean distance over its median, so
`reg` and `eta` are relative to a typical cost and depend neither on the features' scale nor on the number of samples.

A training source sample moves to the mean of the target under its row of γ: the more entropy, the closer to the target's mean.
Another one moves by as much as the training source sample nearest to it (Ferradans, Papadakis, Peyre & Aujol, SIAM J. Imaging Sci.
7, 2014). The target stays. With granted target labels no source sample moves onto a target sample of another class.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.heads.knn import nearest
from transfer_cli.methods.math.transport import (
    TOLERANCE,
    Sinkhorn,
    entropic_plan,
    exact_plan,
    forbid_other_classes,
    relative_cost,
    require_pot,
)
from transfer_cli.methods.phases import FeatureTask

EPSILON = 1e-3  # keeps the slope of the square root finite
ROUNDS = 10  # of majorisation
ROUGH = 1e-4  # error of the marginals, of 1 in all, at which a round that is not the last ends


class OT(FeatureMethod):
    def __init__(
        self,
        context: Context,
        *,
        regularise: Literal["none", "entropic", "group_lasso"] = "group_lasso",
        reg: float = 0.1,
        eta: float = 0.3,
        max_iter: int = 1000,
    ) -> None:
        super().__init__(context)
        if regularise != "none" and reg <= 0:
            raise TransferError(f"method.reg must be positive, not {reg}: without entropy set method.regularise=none.")
        if eta < 0 or max_iter < 1:
            raise TransferError(f"ot needs method.eta >= 0 and method.max_iter >= 1, not {eta} and {max_iter}.")
        if regularise == "none":
            require_pot("method.regularise=none")
        self.regularise, self.reg, self.eta, self.max_iter = regularise, reg, eta, max_iter

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        assert source.y is not None
        cost = relative_cost(source.x, target.x)
        if task.target_labelled is not None and self.kind == "classification":
            forbid_other_classes(cost, source.y, target.x, task.target_labelled)
        error = 0.0
        if self.regularise == "none":
            plan = exact_plan(cost)
        elif self.regularise == "entropic" or self.kind == "regression":
            plan, _, error = entropic_plan(cost, self.reg, self.max_iter)
        else:
            one_hot = F.one_hot(source.y, self.num_classes).to(cost)
            plan, _, error = group_lasso_plan(cost, one_hot, self.reg, self.eta, self.max_iter)
        self.fitted.put(source=source.x, images=plan @ target.x / plan.sum(1, keepdim=True))
        return {"transport_cost": float((plan * cost).sum()), "marginal_error": error}

    def map_source(self, z: Tensor) -> Tensor:
        known = self.fitted.source
        if torch.equal(z, known):  # each its own image, where two samples are equal too
            return self.fitted.images
        found = nearest(z, known, 1)[:, 0]
        return z + self.fitted.images[found] - known[found]


def group_lasso_plan(
    cost: Tensor, one_hot: Tensor, reg: float, eta: float, max_iter: int, epsilon: float = EPSILON
) -> Sinkhorn:
    """The square roots are concave: each round replaces them by their tangents at the plan so far, an entropic problem again.

    Args:
        one_hot: the source's classes `(n_s, K)`.
    """
    found = entropic_plan(cost, reg, max_iter)
    for left in reversed(range(ROUNDS - 1)):
        mass = cost.shape[1] * (one_hot.T @ found.plan)  # of each class at each target sample, (K, n_t)
        tangent = one_hot @ (0.5 * eta * (mass + epsilon).rsqrt())
        enough = ROUGH if left else TOLERANCE
        found = entropic_plan(tangent.add_(cost), reg, max_iter, found.potentials, enough)
    return found
