"""Importance-weighted validation (Sugiyama, Krauledat & Müller, JMLR 2007): minus the source's validation risk with each sample
weighing as the target would have it,

    - 1/n Σ_i w(x_i) ℓ(f(x_i), y_i),        w(x) = p_target(x) / p_source(x),

an unbiased estimate of the target's risk if only the inputs' distribution differs, and of high variance where the domains are far
apart. ℓ is the negative log-likelihood, and w is found in the method's features by a logistic classifier of the domains
(Bickel, Brückner & Scheffer, ICML 2007): each half of the samples is weighed by the classifier of the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.evaluation.validators import View, needs, sampled

FEW = 20  # samples a domain, below which half of them say nothing about the other half: all then weigh the same
STRENGTH = 100.0  # of the classifier, divided by the number of samples: the second weakest of those of conformal sets
TOLERANCE = 1e-3  # of its gradient: the weights of a look need not be exact, and half the time is saved
LARGEST = 20.0  # of |log w|


def density_ratio(source: Tensor, target: Tensor) -> Tensor:
    """`p_target / p_source` `(N,)` at features `(N, D)`, where `(M, D)` are those of the target."""
    from transfer_cli.evaluation.conformal import fit_density_ratio

    if min(len(source), len(target)) < FEW:
        return torch.ones(len(source), dtype=torch.float64)
    log_ratio = torch.empty(len(source), dtype=torch.float64)
    for fold, other in ((0, 1), (1, 0)):
        found = fit_density_ratio(source[other::2], target[other::2], strengths=(STRENGTH,), tol=TOLERANCE)
        log_ratio[fold::2] = found(source[fold::2])
    return torch.nan_to_num(log_ratio, nan=0.0).clamp(-LARGEST, LARGEST).exp()


@needs("source_labels", "source_features", "target_features")
def iwv(view: View) -> float:
    return -float((view.weights * sampled(view.losses)).mean())
