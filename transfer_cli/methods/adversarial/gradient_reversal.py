"""Gradient reversal and the domain discriminator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_cli.methods.adversarial.perceptron import perceptron


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, coefficient: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.coefficient = inputs[1]

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, coefficient: float) -> tuple[Tensor, int]:
        """Elementwise, so the same over a stack (`loops/stack.py`)."""
        return _Reverse.apply(x, coefficient), in_dims[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        return -ctx.coefficient * gradients[0], None


def reverse_gradient(x: Tensor, coefficient: float) -> Tensor:
    """The identity forward; backward, the gradient times `-coefficient` (Ganin & Lempitsky, ICML 2015)."""
    return _Reverse.apply(x, coefficient)


class DomainDiscriminator(nn.Module):
    """Features `(B, D)` to one logit a sample `(B,)`: positive for the source. `hidden_layers` of width `hidden`."""

    def __init__(self, width: int, hidden: int, hidden_layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = perceptron(width, hidden, 1, hidden_layers, dropout)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)[:, 0]


def domain_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    source_weights: Tensor | float = 1.0,
    target_weights: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy over both domains (each its own mean, halved), and the discriminator's accuracy.

    `source_weights` and `target_weights` `(B,)`: factors of the samples' losses.
    """
    on_source, on_target = F.softplus(-source_logits), F.softplus(target_logits)
    loss = 0.5 * ((source_weights * on_source).mean() + (target_weights * on_target).mean())
    accuracy = 0.5 * ((source_logits > 0).float().mean() + (target_logits <= 0).float().mean())
    return loss, accuracy.detach()
