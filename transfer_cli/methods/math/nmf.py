"""Non-negative matrix factorisation `X ≈ H B`, `H, B >= 0`, by hierarchical alternating least squares.

    min_{H,B >= 0}  ‖X - H B‖²_F          (Lee & Seung, Nature 401, 1999; HALS: Cichocki & Phan, IEICE Trans. E92-A, 2009)

Each column of H and each row of B in turn is set to its exact minimiser, the others held, so the objective never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.errors import TransferError

TINY = 1e-12
BLOCK = 3000  # samples that are in the processor's cache while their codes are found and used


def factorise(
    x: Tensor, k: int, steps: int = 200, tolerance: float = 1e-5, seed: int = 0
) -> tuple[Tensor, Tensor, list[float]]:
    """`H` `(N, k)`, `B` `(k, D)`, and the objective after each step.

    Stops when a step lowers the objective by less than `tolerance` of its first value.

    Raises:
        TransferError: negative features, or more components than samples or features.
    """
    lowest = float(x.min())
    if lowest < 0:
        raise TransferError(
            f"nmf needs features that are not negative, and one is {lowest:.3g}: use pca, or another normalisation."
        )
    if not 1 <= k <= min(x.shape):
        raise TransferError(
            f"nmf of {k} components needs at least as many samples and features; there are {tuple(x.shape)}."
        )
    draw = torch.Generator().manual_seed(seed)
    scale = (x.mean() / k).sqrt()
    codes = (scale * torch.rand(len(x), k, generator=draw, dtype=torch.float64)).to(x)
    basis = (scale * torch.rand(k, x.shape[1], generator=draw, dtype=torch.float64)).to(x)
    parts = [(rows, part.T.contiguous()) for rows, part in zip(x.split(BLOCK), codes.split(BLOCK), strict=True)]
    total, errors = x.square().sum(), list[float]()
    for _ in range(steps):
        inner, products, gram = basis @ basis.T, torch.zeros_like(basis), basis.new_zeros(k, k)
        for rows, part in parts:
            _sweep(part, basis @ rows.T, inner)
            products.addmm_(part, rows)
            gram.addmm_(part, part.T)
        _sweep(basis, products, gram)
        errors.append(float((total - 2 * (products * basis).sum() + (gram * (basis @ basis.T)).sum()).clamp_min(0)))
        if len(errors) > 1 and errors[-2] - errors[-1] < tolerance * errors[0]:
            break
    return torch.cat([part for _, part in parts], dim=1).T, basis, errors


def encode(x: Tensor, basis: Tensor, steps: int = 100) -> Tensor:
    """The codes `(N, k)` of new samples `(N, D)` under a basis `(k, D)`."""
    products, gram = basis @ x.T, basis @ basis.T
    codes = (products / gram.diagonal().clamp_min(TINY)[:, None]).clamp_min(0) / len(basis)
    for _ in range(steps):
        before = codes.clone()
        _sweep(codes, products, gram)
        if float((codes - before).abs().max()) < 1e-8 * float(codes.abs().max().clamp_min(TINY)):
            break
    return codes.T


def _sweep(codes: Tensor, products: Tensor, gram: Tensor) -> None:
    """Each row of `codes` `(k, N)`, in place, to its minimiser, given `B Xᵀ` `(k, N)` and `B Bᵀ` `(k, k)`."""
    own = gram.diagonal().clone()
    solid = own > TINY
    own[~solid] = 1.0
    others = gram / own[:, None] - torch.eye(len(gram)).to(gram)  # without the row itself, whose share is one
    alone, samples = (products / own[:, None]).unbind(), codes.T
    for row, start, coefficients, there in zip(codes.unbind(), alone, others.unbind(), solid.tolist(), strict=True):
        if there:
            torch.clamp_min(torch.addmv(start, samples, coefficients, alpha=-1), 0, out=row)
