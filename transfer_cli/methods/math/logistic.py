"""Convex heads on features, in float64: multinomial logistic regression by L-BFGS, ridge regression in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor

from transfer_cli.errors import TransferError


def standardising(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation `(D,)` of each feature; a constant one stays as it is."""
    scale = x.std(0, correction=0)
    return x.mean(0), torch.where(scale > 1e-8, scale, 1.0)


def fit_logistic(
    x: Tensor, y: Tensor, num_classes: int, l2: float, weights: Tensor, tolerance: float = 1e-6, max_steps: int = 2000
) -> tuple[Tensor, Tensor]:
    """Minimise `Σ_i w_i CE(W x_i + b, y_i) + (l2 / 2) ‖W‖²` until no gradient component exceeds `tolerance`.

    Args:
        x, y, weights: `(N, D)`, `(N,)`, `(N,)`; the weights of all samples should sum to about one.
    Returns:
        `W` `(K, D)` and `b` `(K,)`, float64, on the device of `x`.
    Raises:
        TransferError: a negative penalty, which has no optimum.
    """
    _check_penalty(l2)
    x, weights = x.double(), weights.double()
    n_weights = num_classes * x.shape[1]
    own = (F.one_hot(y, num_classes) * weights[:, None]).T.contiguous()  # (K, N): products are fastest this way round

    def value_and_gradient(flat: Any) -> tuple[float, Any]:
        theta = torch.from_numpy(flat).to(x.device)
        w, b = theta[:n_weights].view(num_classes, -1), theta[n_weights:]
        log_probs = F.log_softmax(torch.addmm(b[:, None], w, x.T), dim=0)
        value = -(own * log_probs).sum() + 0.5 * l2 * w.square().sum()
        residual = log_probs.exp_().mul_(weights).sub_(own)
        gradient = torch.cat([(residual @ x + l2 * w).flatten(), residual.sum(1)])
        return float(value), gradient.cpu().numpy()

    start = np.zeros(n_weights + num_classes)
    options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "gtol": tolerance, "ftol": 0.0, "maxcor": 20}
    solution = torch.from_numpy(minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options).x).to(
        x.device
    )
    return solution[:n_weights].view(num_classes, -1), solution[n_weights:]


def fit_ridge(x: Tensor, y: Tensor, l2: float, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise `½ Σ_i w_i ‖W x_i + b - y_i‖² + (l2 / 2) ‖W‖²`.

    Returns:
        `W` `(T, D)`, `b` `(T,)` and the weighted residual variance `(T,)`.
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
    b = mean_y - w @ mean_x
    variance = weights @ (y - x @ w.T - b).square()
    return w, b, variance


def _check_penalty(l2: float) -> None:
    if l2 < 0:
        raise TransferError(f"a head's l2 penalty is not negative: {l2} has no optimum.")
