"""Cross-entropy to the classes of confident predictions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def confident_cross_entropy(logits: Tensor, probs: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """`1/B Σ_i [max_k q_ik ≥ τ] CE(logits_i, argmax_k q_ik)` with predictions `probs` q `(B, K)`, which are held fixed; and the
    share of the batch that counts (Sohn et al., NeurIPS 2020, equation 4).
    """
    confidence, labels = probs.detach().max(1)
    used = (confidence >= threshold).float()
    loss = used * F.cross_entropy(logits.float(), labels, reduction="none")
    return loss.mean(), used.mean()


def check_threshold(threshold: float) -> None:
    """Raises:
    ValueError: not a probability that a prediction can reach."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability from 0 to 1, not {threshold}")
