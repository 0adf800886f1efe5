"""The contrastive loss of Khosla et al., and of Chen et al. as its special case."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.methods.math.precision import in_full_precision


@in_full_precision
def info_nce(z: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """`mean_i -1/|P(i)| Σ_{p ∈ P(i)} log(exp(z_i·z_p / τ) / Σ_{a ≠ i} exp(z_i·z_a / τ))`, z of unit length; float32 at least.

    `z` `(N, d)`; P(i) are the others of i's class, `classes` `(N,)`. One that has none contributes nothing, though others
    are told from it. This is L_out of Khosla et al. (NeurIPS 2020), eq. 2.
    """
    z = F.normalize(z, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_probs = (z @ z.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (classes[:, None] == classes) & ~itself
    counts = positive.sum(1)
    each = -log_probs.masked_fill(~positive, 0).sum(1) / counts.clamp_min(1)
    return each.sum() / (counts > 0).sum().clamp_min(1)


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al., ICML 2020), eq. 1: `z` `(2 N, d)`, row i and row N + i the two views of sample i."""
    n = len(z) // 2
    return info_nce(z, torch.arange(n, device=z.device).repeat(2), temperature)
