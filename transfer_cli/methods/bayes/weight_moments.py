"""Moments of a network's weights along its training, and the Gaussian that they make (Maddox et al., NeurIPS 2019).

θ ~ N(θ̄, s (½ Σ + Z Zᵀ / (2 (K - 1))))        Σ the diagonal of variances, Z (P, K) the last K deviations from the mean so far
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from transfer_cli.methods.math.precision import in_full_precision


class WeightMoments(nn.Module):
    """`mean` and `variance` `(P,)`, `deviations` `(K, P)`, `count` of the snapshots."""

    mean: Tensor
    variance: Tensor
    deviations: Tensor
    count: Tensor

    def __init__(self, weights: int, rank: int) -> None:
        super().__init__()
        for name, shape in (
            ("mean", (weights,)),
            ("variance", (weights,)),
            ("deviations", (rank, weights)),
            ("count", ()),
        ):
            self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def add(self, weights: Tensor, n: int) -> None:
        """The `n`-th snapshot `(P,)`, counted from 1."""
        away = weights - self.mean
        self.mean.add_(away / n)
        left = weights - self.mean
        self.variance.add_((away * left - self.variance) / n)
        self.deviations[(n - 1) % len(self.deviations)] = left
        self.count.fill_(n)

    def factor(self) -> Tensor:
        """`(K, P)`: Z / √(2 (K - 1)), of the deviations that there are."""
        kept = self.count.clamp_max(len(self.deviations))
        return self.deviations / (2 * (kept - 1).clamp_min(1)).sqrt()

    def draw(self, scale: float = 1.0) -> Tensor:
        """Weights `(P,)`; `scale` is of the covariance."""
        own, shared = torch.randn_like(self.mean), torch.randn_like(self.deviations[:, 0])
        return self.mean + scale**0.5 * ((0.5 * self.variance).sqrt() * own + shared @ self.factor())


def flat(parameters: Iterable[Tensor]) -> Tensor:
    """`(P,)`, with their gradients."""
    return torch.cat([p.reshape(-1) for p in parameters])


@torch.no_grad()
def assign(parameters: Iterable[Tensor], weights: Tensor) -> None:
    """Set parameters to the values of `flat`."""
    at = 0
    for p in parameters:
        p.copy_(weights[at : at + p.numel()].view(p.shape))
        at += p.numel()


def woodbury(diagonal: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Of Σ = diag d + FᵀF, with F `(K, P)`: d⁻¹ `(P,)` and the Cholesky factor `(K, K)` of I + F d⁻¹ Fᵀ, in float64."""
    inverse, factor = 1 / diagonal.double(), factor.double()
    inner = (factor * inverse) @ factor.T
    inner.diagonal().add_(1)
    return inverse, torch.linalg.cholesky(inner)


@in_full_precision
def mahalanobis(away: Tensor, inverse: Tensor, factor: Tensor, half: Tensor) -> Tensor:
    """vᵀ Σ⁻¹ v of `(P,)` = Σ v² / d - ‖L⁻¹ F (v / d)‖²."""
    scaled = away * inverse
    along = torch.linalg.solve_triangular(half, (factor @ scaled)[:, None], upper=False)
    return (away * scaled).sum() - along.square().sum()
