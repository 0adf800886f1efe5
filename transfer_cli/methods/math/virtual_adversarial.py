"""Virtual adversarial training (Miyato, Maeda, Koyama & Ishii, TPAMI 41(8), 2019).

    L_v(x) = max_{‖r‖ ≤ ε}  KL(p(x) ‖ p(x + r))        p(x) held fixed

r is ε times the direction that one step of the power method finds: the gradient of KL(p(x) ‖ p(x + ξ d)) in d, a random
direction at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError


def virtual_adversarial(
    logits_of: Callable[..., Sequence[Tensor]], inputs: Sequence[Any], radius: float, step: float = 1e-3
) -> list[Tensor]:
    """`KL(p(x) ‖ p(x + r))` of each sample, `(B,)` for each of the `inputs` `(B, ...)`, which `logits_of(*inputs)` takes
    together, so that layers which normalise over a batch see clean and perturbed samples in the same company.

    `radius` and `step` are root mean squares over a sample's values: ε = radius · √D in the Euclidean norm, for any size D.
    A sample whose prediction no small step changes has r = 0. The directions are drawn from torch's global generator.

    Raises:
        TransferError: inputs that are no plain tensors, to which nothing can be added.
    """
    if not all(isinstance(x, Tensor) for x in inputs):
        raise TransferError(
            "virtual adversarial training perturbs its inputs: it takes images or vectors, not sequences."
        )
    with torch.autocast(inputs[0].device.type, enabled=False):  # half precision would not see so small a step
        with torch.no_grad():
            clean = logits_of(*inputs)
        with torch.enable_grad():
            directions = [_unit(torch.randn_like(x)).requires_grad_() for x in inputs]
            moved = logits_of(*(x + step * d for x, d in zip(inputs, directions, strict=True)))
            total = sum(kl_divergence(p, q).sum() for p, q in zip(clean, moved, strict=True))
            gradients = torch.autograd.grad(total, directions)  # type: ignore[arg-type]
    moved = logits_of(*(x + radius * _unit(g) for x, g in zip(inputs, gradients, strict=True)))
    return [kl_divergence(p, q) for p, q in zip(clean, moved, strict=True)]


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """`KL(p ‖ q)` of each sample, `(B,)`, from logits `(B, K)`, in float32 at least."""
    p, q = (x.log_softmax(1) if x.dtype == torch.float64 else x.float().log_softmax(1) for x in (p_logits, q_logits))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1)


def _unit(x: Tensor) -> Tensor:
    """Each sample's values scaled to a root mean square of 1; zeros stay."""
    flat = x.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # else small squares vanish
    return (F.normalize(flat, dim=1) * flat.shape[1] ** 0.5).view(x.shape)
