"""Principal components of both domains together (Pearson 1901; Hotelling 1933), with a head on them.

    max_W  tr(Wᵀ Xᵀ H X W)    subject to   WᵀW = I                           X: the samples of both domains

`whiten` scales each component to variance one. The share of variance that is kept is logged.
"""

from __future__ import annotations

from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.principal import principal_components, project
from transfer_cli.methods.phases import FeatureTask


class PCA(FeatureMethod):
    def __init__(self, context: Context, *, components: int = 30, whiten: bool = False) -> None:
        super().__init__(context)
        self.components, self.whiten = components, whiten

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        basis, mean, variances = principal_components([source.x, target.x], self.components)
        kept = variances[: self.components]
        self.fitted.put(basis=basis / kept.sqrt() if self.whiten else basis, mean=mean)
        return {"explained_variance": float(kept.sum() / variances.sum())}

    def map_source(self, z: Tensor) -> Tensor:
        return project(z, self.fitted.mean, self.fitted.basis)

    def map_target(self, z: Tensor) -> Tensor:
        return self.map_source(z)
