"""Geodesic flow kernel (Gong, Shi, Sha & Grauman, CVPR 2012), in closed form.

    k(x, y) = xᵀ G y,   G = ∫₀¹ Φ(t) Φ(t)ᵀ dt,   Φ the geodesic on the Grassmannian from P_s to P_t

With principal angles θ_i (`P_sᵀ P_t = U cos(θ) Vᵀ`), `A = P_s U` and `B` the unit directions of `P_t V - A cos(θ)`, the geodesic is
`Φ(t) = A cos(tθ) + B sin(tθ)`, and

    G = ½ Σ_i [a_i b_i] [[1 + sin 2θ_i / 2θ_i, (1 - cos 2θ_i) / 2θ_i], [(1 - cos 2θ_i) / 2θ_i, 1 - sin 2θ_i / 2θ_i]] [a_i b_i]ᵀ

The features are mapped by a factor L of `G = L Lᵀ`, so that inner products and distances are the kernel's: a linear SVM on them is
an SVM with the GFK kernel, a 1-NN one by its distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.principal import principal_components
from transfer_cli.methods.phases import FeatureTask

SMALL_ANGLE = 1e-7  # below it the subspaces share the direction, and the geodesic stays


class GFK(FeatureMethod):
    def __init__(self, context: Context, *, components: int = 20) -> None:
        super().__init__(context)
        self.components = components

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        if 2 * self.components > source.x.shape[1]:
            raise TransferError(
                f"method.components={self.components} must be at most half of the {source.x.shape[1]} features: the geodesic "
                "needs room for both subspaces."
            )
        bases = [principal_components(domain.x, self.components)[0] for domain in (source, target)]
        self.fitted.put(factor=geodesic_factor(*bases))
        return {}

    def map_source(self, z: Tensor) -> Tensor:
        return z @ self.fitted.factor

    def map_target(self, z: Tensor) -> Tensor:
        return z @ self.fitted.factor


def geodesic_factor(source: Tensor, target: Tensor) -> Tensor:
    """`L` `(D, 2 k)` with `L Lᵀ = G`, from orthonormal bases `(D, k)`."""
    u, cosines, vt = torch.linalg.svd(source.T @ target)
    a = source @ u
    rest = target @ vt.T - a * cosines
    sines = rest.norm(dim=0)
    b = torch.where(sines > SMALL_ANGLE, rest / sines.clamp_min(SMALL_ANGLE), 0.0)
    twice = 2 * torch.atan2(sines, cosines)  # exact for small angles too, where arccos is not
    safe = torch.where(sines > SMALL_ANGLE, twice, 1.0)
    aa = torch.where(sines > SMALL_ANGLE, 1 + safe.sin() / safe, 2.0) / 2
    ab = torch.where(sines > SMALL_ANGLE, (1 - safe.cos()) / safe, 0.0) / 2
    bb = torch.where(sines > SMALL_ANGLE, 1 - safe.sin() / safe, 0.0) / 2
    values, vectors = torch.linalg.eigh(torch.stack([torch.stack([aa, ab]), torch.stack([ab, bb])]).permute(2, 0, 1))
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :]  # (k, 2, 2): rows a and b
    return torch.cat([a * roots[:, 0, i] + b * roots[:, 1, i] for i in (0, 1)], dim=1)
