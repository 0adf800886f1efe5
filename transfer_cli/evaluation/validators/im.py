"""Information maximisation on target inputs: `H(mean p) - mean H(p)`, the mutual information of input and predicted class

(Bridle et al. 1991; as a validator Musgrave et al. 2022). High when each prediction is sure and the classes are all used.
"""

from __future__ import annotations

import torch

from transfer_cli.evaluation.validators import View, needs


@needs("classification")
def im(view: View) -> float:
    probs = view.target.probs.double()
    marginal = probs.mean(0)
    return float(torch.special.entr(marginal).sum() - torch.special.entr(probs).sum(1).mean())
