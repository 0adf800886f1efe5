"""Soft neighbourhood density (Saito et al., ICCV 2021): the mean entropy of the neighbourhoods of target inputs,

    - 1/N Σ_i Σ_{j≠i} P_ij log P_ij,    P_ij = softmax_{j≠i}( <f_i, f_j> / τ ),    f = p / ||p||₂,  τ = 0.05,

high when each prediction has many others close to it. Blind to collapse on one class, where it is highest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfer_cli.evaluation.validators import View, needs, sampled

TEMPERATURE = 0.05


@needs("classification")
def snd(view: View) -> float:
    f = F.normalize(sampled(view.target.probs), dim=1)
    if len(f) < 2:
        return 0.0
    similarity = (f @ f.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return float(torch.special.entr(similarity.softmax(1)).sum(1).mean())
