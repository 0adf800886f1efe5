"""Priors over two related functions, f_s of the source and f_t of the target, as Gaussian processes.

    Plain            f ~ GP(0, k + c²)                                  one function; c² is the variance of an unknown constant
    Coregional       cov(f_i(x), f_j(z)) = B_ij k(x, z) + [i = j] c²    ICM, noise by task (Bonilla et al., NIPS 2008)
    Autoregressive   f_t = ρ f_s + δ,   δ ~ GP(0, k_δ + c²)             f_s the source's posterior (Kennedy & O'Hagan 2000)

The last is sequential Bayes: the source's data come in through the posterior (m̃_s, k̃_s) alone, and
f_t ~ GP(ρ m̃_s, ρ² k̃_s + k_δ + c²) is what the joint model of both gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from transfer_cli.methods.math.gp import OfTheta, Posterior
from transfer_cli.methods.math.kernels import Kernel

CONSTANT = 1.0  # c², in units of the standardised outputs


@dataclass(frozen=True)
class Plain:
    """Hyperparameters: the kernel's, log σ²."""

    kernel: Kernel

    def between(self, x: Tensor, z: Tensor) -> OfTheta:
        kernel = self.kernel.between(x, z)
        return lambda theta: kernel(theta) + CONSTANT

    def diagonal(self, x: Tensor) -> OfTheta:
        return lambda theta: self.kernel.diagonal(theta, x) + CONSTANT

    def mean(self, x: Tensor) -> OfTheta:
        return lambda theta: x.new_zeros(len(x))

    def noise(self, x: Tensor) -> OfTheta:
        return lambda theta: theta[-1].exp().expand(len(x))


@dataclass(frozen=True)
class Coregional:
    """The last column of inputs is the task, 0 or 1. Hyperparameters: the kernel's, log a, η, log σ_0², log σ_1².

    B = [[1, a r], [a r, a²]] with r = tanh η.
    """

    kernel: Kernel

    def between(self, x: Tensor, z: Tensor) -> OfTheta:
        kernel, same = self.kernel.between(x[:, :-1], z[:, :-1]), x[:, -1:] == z[:, -1]

        def covariance(theta: Tensor) -> Tensor:
            a, r = theta[-4], theta[-3].tanh()
            tasks = torch.exp(a * (x[:, -1:] + z[:, -1])) * torch.where(same, 1.0, r)
            return tasks * kernel(theta) + CONSTANT * same

        return covariance

    def diagonal(self, x: Tensor) -> OfTheta:
        return lambda theta: torch.exp(2 * theta[-4] * x[:, -1]) * self.kernel.diagonal(theta, x[:, :-1]) + CONSTANT

    def mean(self, x: Tensor) -> OfTheta:
        return lambda theta: x.new_zeros(len(x))

    def noise(self, x: Tensor) -> OfTheta:
        return lambda theta: torch.where(x[:, -1] > 0, theta[-1].exp(), theta[-2].exp())


@dataclass(frozen=True)
class Autoregressive:
    """Hyperparameters: ρ, those of the difference's kernel, log σ²."""

    source: Posterior
    kernel: Kernel

    def between(self, x: Tensor, z: Tensor) -> OfTheta:
        known, kernel = self.source.covariance(x, z), self.kernel.between(x, z)
        return lambda theta: theta[0].square() * known + kernel(theta[1:]) + CONSTANT

    def diagonal(self, x: Tensor) -> OfTheta:
        known = self.source.variance(x)
        return lambda theta: theta[0].square() * known + self.kernel.diagonal(theta[1:], x) + CONSTANT

    def mean(self, x: Tensor) -> OfTheta:
        known = self.source.mean(x)
        return lambda theta: theta[0] * known

    def noise(self, x: Tensor) -> OfTheta:
        return lambda theta: theta[-1].exp().expand(len(x))
