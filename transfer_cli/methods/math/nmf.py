"""Non-negative matrix factorisation `X ≈ H B`, `H, B >= 0`, by hierarchical alternating least squares.

    min_{H,B >= 0}  ‖X - H B‖²_F          (Lee & Seung, Nature 401, 1999; HALS: Cichocki & Phan, IEICE Trans. E92-A, 2009)

Each column of H and each row of B in turn is set to its exact minimiser, the others held, so the objective never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.errors import TransferError

TINY = 1e-12


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
    total, errors = x.square().sum(), list[float]()
    for _ in range(steps):
        codes = _sweep(codes, x @ basis.T, basis @ basis.T)
        products, gram = codes.T @ x, codes.T @ codes
        basis = _sweep(basis.T, products.T, gram).T
        errors.append(float((total - 2 * (products * basis).sum() + (gram * (basis @ basis.T)).sum()).clamp_min(0)))
        if len(errors) > 1 and errors[-2] - errors[-1] < tolerance * errors[0]:
            break
    return codes, basis, errors


def encode(x: Tensor, basis: Tensor, steps: int = 100) -> Tensor:
    """The codes `(N, k)` of new samples `(N, D)` under a basis `(k, D)`."""
    products, gram = x @ basis.T, basis @ basis.T
    codes = (products / gram.diagonal().clamp_min(TINY)).clamp_min(0) / len(basis)
    for _ in range(steps):
        before = codes.clone()
        codes = _sweep(codes, products, gram)
        if float((codes - before).abs().max()) < 1e-8 * float(codes.abs().max().clamp_min(TINY)):
            break
    return codes


def _sweep(codes: Tensor, products: Tensor, gram: Tensor) -> Tensor:
    """Each column of `codes` `(N, k)` to its minimiser, given `X Bᵀ` `(N, k)` and `B Bᵀ` `(k, k)`."""
    columns, own = codes.T.contiguous(), gram.diagonal().clone()
    solid = own > TINY
    own[~solid] = 1.0
    others = gram / own[:, None] - torch.eye(len(gram)).to(gram)  # without the column itself, whose share is one
    wanted = (products / own).T.contiguous()
    for j, there in enumerate(solid.tolist()):
        if there:
            columns[j] = torch.addmv(wanted[j], columns.T, others[j], alpha=-1).clamp_min_(0)
    return columns.T
