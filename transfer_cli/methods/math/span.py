"""Softmax regression of fewer samples than features, seen in the span of its samples: exactly the same problem, and a small one.

    f(W) = Σ_i CE(W z_i, y_i) + ½ tr((W - M) Q (W - M)ᵀ)        W (K, D),  Q = L Lᵀ,  L⁻¹ Zᵀ = O R,  G = L⁻ᵀ O  (D, r)

Only what W does to samples moves it away from M (representer theorem), so W = M + (W' - M') Gᵀ with W', M' = M L O of `(K, r)`,
samples Gᵀ z and the prior I. In the directions that no sample has, the posterior is the prior:

    covariance between classes of S' in the span  →  Q⁻¹ + G (S' - I) Gᵀ
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transfer_cli.methods.math.softmax import Precision, Softmax


@dataclass(frozen=True)
class Span:
    """`problem`: the small one. `mean` M `(K, D)`, `half` L `(D, D)`, `basis` G `(D, r)`."""

    problem: Softmax
    mean: Tensor
    half: Tensor
    basis: Tensor

    @classmethod
    def of(cls, problem: Softmax) -> Span | None:
        """None where there are as many samples as features, or where classes have different priors."""
        block = centred_block(problem.precision)
        if len(problem.x) >= problem.x.shape[1] or block is None:
            return None
        half = torch.linalg.cholesky(block)
        directions, parts = torch.linalg.qr(torch.linalg.solve_triangular(half, problem.x.T, upper=False))
        basis = torch.linalg.solve_triangular(half.T, directions, upper=True)
        mean = problem.mean @ half @ directions
        small = replace(problem, x=parts.T.contiguous(), mean=mean, precision=Precision(torch.ones_like(mean)))
        return cls(small, problem.mean, half, basis)

    def weights(self, w: Tensor) -> Tensor:
        """W `(K, D)` of W' `(K, r)`."""
        return self.mean + (w - self.problem.mean) @ self.basis.T

    def covariance(self, small: Tensor) -> Tensor:
        """Of `(r, r)`, or of all weights, `(K, r, K, r)`."""
        prior, one = torch.cholesky_inverse(self.half), torch.eye(small.shape[-1]).to(small)
        if small.ndim == 2:
            return prior + self.basis @ (small - one) @ self.basis.T
        classes = torch.eye(len(small)).to(small)
        known = small - torch.einsum("kl,de->kdle", classes, one)
        moved = torch.einsum("dr,krls,es->kdle", self.basis, known, self.basis)
        return torch.einsum("kl,de->kdle", classes, prior) + moved


def centred_block(precision: Precision) -> Tensor | None:
    """Q `(D, D)`, of which the precision is I ⊗ Q as far as softmax can tell; None where classes differ in more.

    What is added to all classes alike changes no probability, so A = a I + b 11ᵀ between classes is a I.
    """
    if precision.full is not None or bool((precision.diagonal != precision.diagonal[0]).any()):
        return None
    block = torch.diag(precision.diagonal[0])
    if precision.kron is None:
        return block
    between, within = precision.kron
    apart = between - between[0, -1]
    own = apart.diagonal()
    if len(own) < 2 or bool((apart - torch.diag(own)).any()) or not torch.allclose(own, own[0].expand_as(own)):
        return None
    return block + own[0] * within
