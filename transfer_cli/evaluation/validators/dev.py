"""Deep embedded validation (You, Wang, Long & Jordan, ICML 2019): the importance-weighted risk with a control variate,

    - [ mean(L) + η mean(w) - η ],    L_i = w_i ℓ_i,    η = - Cov(L, w) / Var(w),

of less variance than `iwv`, whose weights it shares: the expectation of w is 1, so that what the weights' mean misses tells what
the risk's misses.
"""

from __future__ import annotations

from transfer_cli.evaluation.validators import View, needs, sampled


@needs("source_labels", "source_features", "target_features")
def dev(view: View) -> float:
    w = view.weights
    weighted = w * sampled(view.losses)
    spread = float((w - w.mean()).square().mean())
    eta = -float(((weighted - weighted.mean()) * (w - w.mean())).mean()) / spread if spread > 1e-24 else 0.0
    return -(float(weighted.mean()) + eta * float(w.mean()) - eta)
