"""Subspace alignment (Fernando, Habrard, Sebban & Tuytelaars, ICCV 2013).

    min_M  ‖P_s M - P_t‖²_F   =>   M = P_sᵀ P_t;     source  (x - μ_s) P_s M,     target  (x - μ_t) P_t

`P_s`, `P_t` `(D, k)`: the domains' principal components.
"""

from __future__ import annotations

from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.principal import principal_components, project
from transfer_cli.methods.phases import FeatureTask


class SubspaceAlignment(FeatureMethod):
    def __init__(self, context: Context, *, components: int = 20) -> None:
        super().__init__(context)
        self.components = components

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        basis_s, mean_s, _ = principal_components(source.x, self.components)
        basis_t, mean_t, _ = principal_components(target.x, self.components)
        aligned = basis_s @ (basis_s.T @ basis_t)
        self.fitted.put(source=aligned, target=basis_t, mean_s=mean_s, mean_t=mean_t)
        return {}

    def map_source(self, z: Tensor) -> Tensor:
        return project(z, self.fitted.mean_s, self.fitted.source)

    def map_target(self, z: Tensor) -> Tensor:
        return project(z, self.fitted.mean_t, self.fitted.target)
