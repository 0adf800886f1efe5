"""Kernel principal components of both domains together (Schoelkopf, Smola & Mueller, Neural Computation 10, 1998).

PCA of the kernel's features: `z = (φ(x) - mean φ) W`, W the top eigenvectors of their covariance; equal to the eigenvectors of the
centred kernel matrix, scaled by the root of their eigenvalues. Nystroem or random features for many samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.kernel_map import Approximation, Kernel, KernelMap
from transfer_cli.methods.math.principal import kernel_components, principal_components
from transfer_cli.methods.phases import FeatureTask


class KPCA(FeatureMethod):
    def __init__(
        self,
        context: Context,
        *,
        components: int = 30,
        kernel: Kernel = "rbf",
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
    ) -> None:
        super().__init__(context)
        self.components = components
        self.kernel = KernelMap(kernel, gamma, approximate, landmarks)

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        features = self.kernel.fit(torch.cat([source.x, target.x]), whiten=False)
        components = kernel_components if self.kernel.exact else principal_components
        basis, mean, variances = components(features, self.components)
        self.fitted.put(basis=basis, mean=mean)
        return {"explained_variance": float(variances[: self.components].sum() / variances.sum())}

    def map_source(self, z: Tensor) -> Tensor:
        return (self.kernel(z) - self.fitted.mean) @ self.fitted.basis

    def map_target(self, z: Tensor) -> Tensor:
        return self.map_source(z)
