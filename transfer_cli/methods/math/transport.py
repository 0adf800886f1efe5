"""Optimal transport between the samples of two domains, each sample of a domain weighing the same.

    min_γ  <γ, C> + reg Σ_ij γ_ij log γ_ij    subject to   γ 1 = 1/n_s,   γᵀ 1 = 1/n_t,   γ >= 0

Without the entropy by POT's network simplex; with it by Sinkhorn's scalings (Cuturi, NIPS 2013), stabilised as in Schmitzer
(SIAM J. Sci. Comput. 41, 2019): scalings act on the kernel `exp((f + g - C) / reg)`, into which their logarithms are moved before
they overflow, and a small reg is come down to in steps.
"""

from __future__ import annotations

import math
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.kernel_map import square_distances
from transfer_cli.methods.phases import Features

LARGEST_PLAN = 200_000_000  # entries; one matrix of them takes 1.6 GB, and several are held
FORBIDDEN = 1000.0  # the cost, in medians, of moving a sample onto one of another class
PAIRS = 1000  # samples of each domain whose costs give the median
TOLERANCE = 1e-7  # error of the marginals, of 1 in all
BLOCK = 100  # scalings between two looks at the potentials
STEEP = 100.0  # largest cost over reg, of the first reg
RANGE = 1e100  # of scalings, before they are moved into the potentials


def require_pot(method: str) -> None:
    """Raises:
    TransferError: POT is not installed."""
    if find_spec("ot") is None:
        raise TransferError(f"{method} needs the package POT: pip install 'transfer-cli[transport]'.")


def relative_cost(source: Tensor, target: Tensor) -> Tensor:
    """`‖x_i - y_j‖²` `(n_s, n_t)` over its median, so that costs are near 1 whatever the features' scale.

    Raises:
        TransferError: more entries than memory should hold, or constant features.
    """
    if len(source) * len(target) > LARGEST_PLAN:
        raise TransferError(
            f"a transport plan of {len(source)} x {len(target)} samples is too large: set method=linear_ot, or fewer samples "
            "by subset.source and subset.target."
        )
    cost = square_distances(source, target)
    some = cost[:: -(-len(source) // PAIRS), :: -(-len(target) // PAIRS)]
    median = float(some.median())
    if median <= 0:
        raise TransferError(
            "more than half of the source and target features are equal: there is nothing to transport."
        )
    return cost.div_(median)


def forbid_other_classes(cost: Tensor, labels: Tensor, target: Tensor, labelled: Features) -> None:
    """Make moves of a source sample onto a target sample of another known class too dear.

    Args:
        cost: `(n_s, n_t)`, changed in place.
        labels: `(n_s,)` of the source samples.
        labelled: samples that are among `target` too.
    """
    assert labelled.y is not None
    known = square_distances(labelled.x, target).argmin(1)
    cost[:, known] = torch.where(labels[:, None] != labelled.y, FORBIDDEN, cost[:, known])


def exact_plan(cost: Tensor) -> Tensor:
    """The plan `(n_s, n_t)` without entropy.

    Raises:
        TransferError: POT gives up.
    """
    n, m = cost.shape
    ot, values = import_module("ot"), cost.cpu().numpy()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plan = ot.emd([], [], values, numItermax=1_000_000_000)
    if said:
        raise TransferError(f"POT found no transport plan of {n} x {m} samples: {said[0].message}")
    return torch.from_numpy(plan).to(cost)


class Sinkhorn(NamedTuple):
    plan: Tensor  # (n_s, n_t); its rows are exact
    potentials: tuple[Tensor, Tensor]  # f (n_s,), g (n_t,): plan = exp((f + g - C) / reg)
    error: float  # Σ_j |Σ_i γ_ij - 1/n_t|, at most 2


def entropic_plan(
    cost: Tensor, reg: float, max_iter: int, start: tuple[Tensor, Tensor] | None = None, tolerance: float = TOLERANCE
) -> Sinkhorn:
    """The plan with entropy: at most `max_iter` scalings at each level of reg, until the columns err by `tolerance` in all.

    Args:
        start: potentials of a problem nearby.
    """
    f, g = (cost.new_zeros(len(cost)), cost.new_zeros(cost.shape[1])) if start is None else start
    levels = 0 if start is not None else max(0, math.ceil(math.log(float(cost.max()) / (STEEP * reg), 4)))
    plain = start is None and levels == 0  # exp(-C / reg) does not underflow
    for level in range(levels, -1, -1):
        at, enough = reg * 4.0**level, tolerance if level == 0 else 1e-2
        left = max_iter
        while left > 0:
            plan, f, g, error, used = _scale(cost, at, f, g, min(BLOCK, left), enough, plain)
            left, plain = left - used, False
            if error <= enough:
                break
    return Sinkhorn(plan, (f, g), error)


def _scale(
    cost: Tensor, reg: float, f: Tensor, g: Tensor, steps: int, enough: float, plain: bool
) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """One step of both potentials in logarithms, which nothing can upset, then scalings of that kernel while they stay in range.

    `plain`: no potentials yet, and none needed: the kernel is `exp(-C / reg)`.
    """
    n, m = cost.shape
    if plain:
        kernel = torch.mul(cost, -1 / reg).exp_()
        u, v, used = 1 / (n * kernel.sum(1)), torch.ones_like(g), 1
        columns = u @ kernel
    else:
        g = -reg * (math.log(m) + torch.sub(f[:, None], cost).div_(reg).logsumexp(0))
        f = -reg * (math.log(n) + torch.sub(g, cost).div_(reg).logsumexp(1))
        kernel = torch.sub(f[:, None], cost).add_(g).div_(reg).exp_()
        u, v, columns, used = torch.ones_like(f), torch.ones_like(g), kernel.sum(0), 1
    while True:
        error = float((v * columns - 1 / m).abs().sum())
        if error <= enough or used >= steps:
            break
        next_v = 1 / (m * columns)
        next_u = 1 / (n * (kernel @ next_v))
        if not (float(next_u.max()) < RANGE and float(next_v.max()) < RANGE):  # or not a number
            break
        u, v, used = next_u, next_v, used + 1
        columns = u @ kernel
    return kernel.mul_(u[:, None]).mul_(v), f + reg * u.log(), g + reg * v.log(), error, used
