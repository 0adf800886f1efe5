"""Gaussian classes with one covariance under a normal-inverse-Wishart prior: conjugate, so posteriors compose.

    Σ ~ IW(ν, Λ)        μ_c | Σ ~ N(m_c, Σ / κ_c)        x | c ~ N(μ_c, Σ)

(Gelman et al., Bayesian Data Analysis, 3rd ed., section 3.6; Murphy, Machine Learning, section 4.6.3.) All in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from torch import Tensor


@dataclass(frozen=True)
class NIW:
    """`mean` `(K, D)`, `kappa` `(K,)`, `nu` above D + 1 and `scale` Λ `(D, D)`."""

    mean: Tensor
    kappa: Tensor
    nu: float
    scale: Tensor

    def update(self, x: Tensor, y: Tensor) -> NIW:
        """The posterior after samples `(N, D)` of classes `(N,)`; of any order and in any number of parts the same."""
        own = F.one_hot(y, len(self.kappa)).to(x)
        kappa = self.kappa + own.sum(0)
        mean = (self.kappa[:, None] * self.mean + own.T @ x) / kappa[:, None]
        return NIW(mean, kappa, self.nu + len(x), self.scale + scatter(x, y, self.mean, self.kappa))

    def log_density(self, x: Tensor) -> Tensor:
        """Posterior predictive `(B, K)` at `(B, D)`: Student's t with ν - D + 1 degrees of freedom."""
        width = x.shape[1]
        dof = self.nu - width + 1
        factor = (self.kappa + 1) / (self.kappa * dof)  # of Λ, class by class
        half = torch.linalg.cholesky(self.scale)
        z, centres = (torch.linalg.solve_triangular(half, v.T, upper=False).T for v in (x, self.mean))
        distance = torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").square() / factor
        log_det = 2 * half.diagonal().log().sum() + width * factor.log()
        constant = math.lgamma((dof + width) / 2) - math.lgamma(dof / 2) - width / 2 * math.log(dof * math.pi)
        return constant - 0.5 * log_det - (dof + width) / 2 * torch.log1p(distance / dof)


def scatter(x: Tensor, y: Tensor, mean: Tensor, kappa: Tensor) -> Tensor:
    """What samples add to Λ under prior means `(K, D)` of weight `(K,)`: their scatter about their own means, and that of
    the means about the prior's."""
    own = F.one_hot(y, len(kappa)).to(x)
    counts = own.sum(0)
    means = own.T @ x / counts.clamp_min(1)[:, None]
    inner, moved = x - means[y], (means - mean) * (kappa * counts / (kappa + counts)).sqrt()[:, None]
    return inner.T @ inner + moved.T @ moved


def log_evidence(x: Tensor, y: Tensor, mean: Tensor, kappa: Tensor, within: Tensor, spare: Tensor) -> Tensor:
    """Log marginal likelihoods `(G,)` of samples under ν = D + 1 + s and Λ = s · `within`, for each s of `spare` `(G,)`.

    Under such a prior `within` is the mean of Σ, whatever s.
    """
    (n, width), counts = x.shape, F.one_hot(y, len(kappa)).sum(0)
    found = eigh(scatter(x, y, mean, kappa).cpu().numpy(), within.cpu().numpy(), eigvals_only=True)
    ratios = torch.from_numpy(found).to(x).clamp_min(0)  # |s W + A| = |W| Π (s + r)
    nu = width + 1 + spare
    log_det_within = torch.linalg.slogdet(within).logabsdet
    return (
        -0.5 * n * width * math.log(math.pi)
        + torch.mvlgamma((nu + n) / 2, width)
        - torch.mvlgamma(nu / 2, width)
        + 0.5 * nu * width * spare.log()
        - 0.5 * (nu + n) * (spare[:, None] + ratios).log().sum(1)
        - 0.5 * n * log_det_within
        + 0.5 * width * (kappa / (kappa + counts)).log().sum()
    )
