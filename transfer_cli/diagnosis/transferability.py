"""How well frozen features suit a few labels, without training a network; higher is better. Features `(N, D)`, float64.

    logme    max_{α,β} log p(y | F, α, β) / N, of the linear model y = F w + e, w ~ N(0, I/α), e ~ N(0, I/β); the mean over one-hot
             classes, or over regression targets                                                         (You et al., ICML 2021)
    h_score  tr(C⁻¹ C_z), C of the features, C_z of their class means                                    (Bao et al., ICIP 2019)
             shrunk: (1 - δ) tr(C_δ⁻¹ C_z), C_δ = (1 - δ) C + δ tr(C)/D I, δ by Ledoit & Wolf (2004)      (Ibrahim et al., 2021)
    leep     1/N Σ_i log Σ_z P(y_i | z) θ_iz,    P(y, z) = 1/N Σ_{i: y_i = y} θ_iz,
             θ `(N, Z)` a source classifier's probabilities                                              (Nguyen et al., ICML 2020)
    nce      -H(Y | Z) = Σ_{y,z} P(y, z) log P(y | z), Z the source classifier's guesses                  (Tran et al., ICCV 2019)

All four are of the samples they are given: with as many features as samples or more, `h_score` without shrinkage says nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ITERATIONS, TOLERANCE = 2000, 1e-10


def logme(features: Tensor, labels: Tensor, classes: int = 0) -> float:
    """`labels`: class indices `(N,)`, of which those that occur count, or regression targets `(N, T)`, standardised here."""
    if labels.ndim == 1:
        y = F.one_hot(labels, classes).double()
        y = y[:, y.sum(0) > 0]
    else:
        y = labels.double()
        y = (y - y.mean(0)) / y.std(0, correction=0).clamp_min(1e-12)
    return float(log_evidence(features, y).mean() / len(y))


def log_evidence(features: Tensor, y: Tensor) -> Tensor:
    """`(T,)`: the largest log evidence over α and β of each column of `y` `(N, T)`, by MacKay's fixed point:

    γ = Σ_j β s_j / (α + β s_j),  α = γ / ‖m‖²,  β = (N - γ) / ‖y - F m‖²      s_j: eigenvalues of FᵀF, m: posterior mean
    """
    n, width = features.shape
    u, root, _ = torch.linalg.svd(features.double(), full_matrices=False)
    s = root.square()[:, None]  # (R, 1)
    z = u.T @ y  # (R, T)
    rest = (y.square().sum(0) - z.square().sum(0)).clamp_min(0)  # what no weights reach
    alpha = beta = torch.ones(y.shape[1], dtype=torch.float64)
    for _ in range(ITERATIONS):
        lam = alpha / beta
        gamma = (s / (s + lam)).sum(0)
        length, residual = _of_mean(s, z, rest, lam)
        new_alpha = gamma / length.clamp_min(1e-12)
        new_beta = (n - gamma).clamp_min(1e-12) / residual.clamp_min(1e-12)
        done = bool(((new_alpha / new_beta - lam).abs() <= TOLERANCE * lam).all())
        alpha, beta = new_alpha, new_beta
        if done:
            break
    return _evidence(s, z, rest, alpha, beta, n, width)


def _of_mean(s: Tensor, z: Tensor, rest: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """`‖m‖²` and `‖y - F m‖²`, `(T,)`."""
    return (s * z.square() / (s + lam).square()).sum(0), (z * lam / (s + lam)).square().sum(0) + rest


def _evidence(s: Tensor, z: Tensor, rest: Tensor, alpha: Tensor, beta: Tensor, n: int, width: int) -> Tensor:
    length, residual = _of_mean(s, z, rest, alpha / beta)
    logdet = (alpha + beta * s).log().sum(0) + (width - len(s)) * alpha.log()
    fit = -0.5 * (beta * residual + alpha * length)
    return 0.5 * (n * beta.log() + width * alpha.log() - logdet - n * math.log(2 * math.pi)) + fit


def leep(probs: Tensor, labels: Tensor, classes: int) -> float:
    """`probs` `(N, Z)`."""
    joint = F.one_hot(labels, classes).double().T @ probs.double() / len(labels)  # (Y, Z)
    given = joint / joint.sum(0).clamp_min(1e-300)
    return float((probs.double() * given[labels]).sum(1).log().mean())


def nce(guesses: Tensor, labels: Tensor, source_classes: int, classes: int) -> float:
    """`guesses` `(N,)` of source classes, `labels` `(N,)`."""
    joint = F.one_hot(labels, classes).double().T @ F.one_hot(guesses, source_classes).double() / len(labels)
    return float(torch.special.entr(joint.sum(0)).sum() - torch.special.entr(joint).sum())


def h_score(features: Tensor, labels: Tensor, shrunk: bool = True) -> float | None:
    """None without shrinkage where there are not more samples than features."""
    n, width = features.shape
    if not shrunk and n <= width:
        return None
    x = features.double() - features.double().mean(0)
    covariance, shrinkage = x.T @ x / n, 0.0
    if shrunk:
        from sklearn.covariance import ledoit_wolf_shrinkage

        shrinkage = float(ledoit_wolf_shrinkage(x.numpy(), assume_centered=True))
        level = covariance.diagonal().mean()
        covariance = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(width, dtype=x.dtype)
    own = F.one_hot(labels).double()
    means = (own.T @ x) / own.sum(0).clamp_min(1)[:, None]  # (Y, D)
    weighted = means * (own.sum(0) / n).sqrt()[:, None]  # C_z = weightedᵀ weighted
    inverse = torch.linalg.pinv(covariance, hermitian=True)
    return (1 - shrinkage) * float(((weighted @ inverse) * weighted).sum())
