"""Convex heads on features, in float64: multinomial logistic regression at its optimum, ridge regression in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.math.softmax import Precision, Softmax, Solver


def standardising(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation `(D,)` of each feature; a constant one stays as it is."""
    return x.mean(0), deviation(x)


def deviation(x: Tensor) -> Tensor:
    """Population standard deviations `(D,)`; one for columns that are constant, whatever their size."""
    scale = x.std(0, correction=0)
    return torch.where(scale > 1e-10 * x.abs().amax(0), scale, 1.0)


def fit_logistic(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    l2: float,
    weights: Tensor,
    tolerance: float = 1e-6,
    solver: Solver = "auto",
) -> tuple[Tensor, Tensor]:
    """Minimise `Σ_i w_i CE(W x_i + b, y_i) + (l2 / 2) ‖W‖²` until no gradient component exceeds `tolerance`.

    Args:
        x, y, weights: `(N, D)`, `(N,)`, `(N,)`; the weights of all samples should sum to about one.
    Returns:
        `W` `(K, D)` and `b` `(K,)` of mean zero, float64, on the device of `x`.
    Raises:
        TransferError: a negative penalty, which has no optimum; or one so small that none is reached.
    """
    _check_penalty(l2)
    x, weights = x.double(), weights.double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    diagonal = x.new_full((num_classes, x.shape[1]), l2)
    diagonal[:, -1] = 0  # the bias is free
    problem = Softmax(x, y, weights, torch.zeros_like(diagonal), Precision(diagonal))
    solution = problem.minimise(tolerance=tolerance, solver=solver)
    return solution[:, :-1], solution[:, -1] - solution[:, -1].mean()


def fit_ridge(x: Tensor, y: Tensor, l2: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise `½ Σ_i w_i ‖W x_i + b - y_i‖² + (l2 / 2) ‖W‖²`.

    Returns:
        `W` `(T, D)` and `b` `(T,)`.
    Raises:
        TransferError: a negative penalty.
    """
    _check_penalty(l2)
    x, y = x.double(), y.double()
    l2, weights = l2 / float(weights.sum()), weights.double() / weights.sum()
    mean_x, mean_y = weights @ x, weights @ y
    xc, yc = x - mean_x, y - mean_y
    gram = (xc * weights[:, None]).T @ xc + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    w = torch.linalg.solve(gram, (xc * weights[:, None]).T @ yc).T
    return w, mean_y - w @ mean_x


def _check_penalty(l2: float) -> None:
    if l2 < 0:
        raise TransferError(f"a head's l2 penalty is not negative: {l2} has no optimum.")
