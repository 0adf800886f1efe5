"""Config groups `optimizer` (from parameter groups) and `schedule` (a factor of the learning rate as a function of progress)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

from transfer_cli.loops.second_order import LBFGS, SAM, NewtonCG

Groups = list[dict[str, Any]]


def sgd(
    groups: Groups, *, lr: float = 0.02, momentum: float = 0.9, weight_decay: float = 1e-3, nesterov: bool = True
) -> Optimizer:
    nesterov = nesterov and momentum > 0
    return _at_rest(
        torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    )


def _at_rest(optimizer: torch.optim.SGD) -> Optimizer:
    """With momentum of zero. The first step's buffer is its gradient either way; but where a loss scale makes that step be skipped,
    the fused kernel would leave the buffer as it found it in memory."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def sam(
    groups: Groups,
    *,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    nesterov: bool = True,
    rho: float = 0.05,
) -> Optimizer:
    nesterov = nesterov and momentum > 0
    return _at_rest(
        SAM(groups, rho=rho, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=True)
    )


def lbfgs(groups: Groups, *, history: int = 10, weight_decay: float = 0.0) -> Optimizer:
    return LBFGS(groups, history=history, weight_decay=weight_decay)


def newton(groups: Groups, *, damping: float = 0.01, iterations: int = 50, weight_decay: float = 0.0) -> Optimizer:
    return NewtonCG(groups, damping=damping, iterations=iterations, weight_decay=weight_decay)


def adam(
    groups: Groups, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
) -> Optimizer:
    return torch.optim.Adam(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)


def adamw(
    groups: Groups, *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01
) -> Optimizer:
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, fused=True)


class Schedule:
    """`schedule(p)` for progress p in [0, 1): the factor of the learning rate. `warmup`: share of the phase with a linear rise.

    Stateless, so nothing of it has to be saved or restored."""

    def __init__(self, warmup: float) -> None:
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share between 0 and 1, not {warmup}")
        self.warmup = warmup

    def __call__(self, p: float) -> float:
        rise = min(1.0, (p + 1e-3) / self.warmup) if self.warmup else 1.0
        return rise * self.decay(p)

    def decay(self, p: float) -> float:
        raise NotImplementedError


class Constant(Schedule):
    def __init__(self, *, warmup: float = 0.0) -> None:
        super().__init__(warmup)

    def decay(self, p: float) -> float:
        return 1.0


class Cosine(Schedule):
    def __init__(self, *, warmup: float = 0.0, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.final = final

    def decay(self, p: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * p))


class InverseDecay(Schedule):
    def __init__(self, *, warmup: float = 0.0, alpha: float = 10.0, beta: float = 0.75) -> None:
        super().__init__(warmup)
        self.alpha, self.beta = alpha, beta

    def decay(self, p: float) -> float:
        return (1 + self.alpha * p) ** -self.beta
