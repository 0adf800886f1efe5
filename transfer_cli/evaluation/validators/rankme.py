"""RankMe (Garrido et al., ICML 2023): the effective rank of target features `(N, D)` (Roy & Vetterli, EUSIPCO 2007),

    exp( - Σ_k p_k log p_k ),    p_k = σ_k / Σ_j σ_j + 1e-7,    σ the singular values:

1 where the features have collapsed to a line, min(N, D) where all directions matter the same. It says nothing of classes.
"""

from __future__ import annotations

import math

import torch

from transfer_cli.evaluation.validators import View, needs

EPSILON = 1e-7


@needs("target_features")
def rankme(view: View) -> float:
    assert view.target_features is not None
    singular = torch.linalg.svdvals(view.target_features)
    shares = singular / singular.sum().clamp_min(1e-300) + EPSILON
    return math.exp(float(torch.special.entr(shares).sum()))
