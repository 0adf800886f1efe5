"""Joint distribution optimal transport (Courty, Flamary, Habrard & Rakotomamonjy, NIPS 2017).

    min_{f,γ}  Σ_ij γ_ij (α C_ij + L(y_i, f(z_j^t)))        γ 1 = 1/n_s,  γᵀ 1 = 1/n_t,  γ >= 0

C: squared distance of z_i and z_j^t over its median. From an f that is fitted on the source, plan and f are found in turn, the
other held, for `iterations` rounds or until what the plan brings to the target stays the same.

Classification: L is the cross-entropy. A target sample enters the head's fit once for each class that reaches it, with weight
`Σ_{i: y_i = c} γ_ij`: any head that heeds weights can be f, and under a logistic one the fit minimises the same objective.
Regression: L is the squared error in units of the labels' variance; by its bias-variance split the fit is to the barycentric label
`n_t Σ_i γ_ij y_i` of each target sample.

Granted target labels join every fit, weighing as much as all else together; no source sample is matched with a target sample of
another known class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both, share
from transfer_cli.methods.math.transport import exact_plan, forbid_other_classes, relative_cost, require_pot
from transfer_cli.methods.phases import Features, FeatureTask

LOWEST = -100.0  # logarithm of a probability


class JDOT(FeatureMethod):
    def __init__(self, context: Context, *, alpha: float = 1.0, iterations: int = 10) -> None:
        super().__init__(context)
        if alpha <= 0 or iterations < 1:
            raise TransferError(
                f"jdot needs method.alpha > 0 and method.iterations >= 1, not {alpha} and {iterations}."
            )
        if self.kind == "classification" and not self.head.takes_weights:
            raise TransferError(
                f"jdot weighs classes at each target sample, which head {type(self.head).__name__.lower()} cannot heed: set "
                "head=logistic, ridge or svm."
            )
        require_pot("method=jdot")
        self.alpha, self.iterations = alpha, iterations

    def learn(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        assert source.y is not None
        cost = self.alpha * relative_cost(source.x, target.x)
        if task.target_labelled is not None and self.kind == "classification":
            forbid_other_classes(cost, source.y, target.x, task.target_labelled)
        self.fit_head(task)
        labels, report = None, dict[str, float]()
        for rounds in range(1, self.iterations + 1):
            plan = exact_plan(cost + self.loss(source.y, target.x))
            found = self.transported(plan, source.y)
            if labels is not None and torch.equal(found, labels):
                break
            labels = found
            self.fit_to(target.x, labels, task.target_labelled)
            objective = float((plan * (cost + self.loss(source.y, target.x))).sum())
            report = {"objective": objective, "rounds": float(rounds)}
        return report

    def transported(self, plan: Tensor, y: Tensor) -> Tensor:
        """What arrives at each target sample: shares `(n_t, K)` of the classes, or its label `(n_t, T)`."""
        values = F.one_hot(y, self.num_classes) if self.kind == "classification" else y
        return plan.T @ values.to(plan) / plan.sum(0)[:, None]

    def fit_to(self, target: Tensor, labels: Tensor, granted: Features | None) -> None:
        """The head on target samples `(n_t, D)` with what arrived there, and on granted ones."""
        x, y, weights = target, labels, labels.new_ones(len(labels))
        if self.kind == "classification":
            rows, y = labels.nonzero(as_tuple=True)
            x, weights = target[rows], labels[rows, y]
        if granted is not None and granted.y is not None:
            x, y = torch.cat([x, granted.x]), torch.cat([y, granted.y.to(y)])
            weights = torch.cat([share(x, weights), share(granted.x, None)])
        self.head.fit(x, y, weights)

    def loss(self, y: Tensor, target: Tensor) -> Tensor:
        """`L(y_i, f(z_j))` `(n_s, n_t)`."""
        prediction = self.head.predict(target)
        if self.kind == "classification":
            assert prediction.log_probs is not None
            return -prediction.log_probs.double().clamp_min(LOWEST)[:, y].T
        assert prediction.mean is not None
        spread = y.double().std(0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0)
        return torch.cdist(y.double() / spread, prediction.mean.double() / spread).square() / y.shape[1]
