"""Joint distribution adaptation (Long, Wang, Ding, Sun & Yu, ICCV 2013).

    min_A  tr(Aᵀ K (M_0 + Σ_c M_c) K A) + λ ‖A‖²_F    subject to   Aᵀ K H K A = I

TCA with a further MMD between the domains for each class c; the target's classes are those that the head predicts, and both are
refined in turn for `iterations` rounds (the first has no classes). M_0 is scaled by the number of classes and the sum divided by
its Frobenius norm, as in the published code. Granted target labels teach the head that predicts the classes.
"""

from __future__ import annotations

from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import both, fit_jointly
from transfer_cli.methods.math.kernel_map import Approximation, Kernel
from transfer_cli.methods.math.mmd_subspace import Contrast, domain_contrast, joint_contrast
from transfer_cli.methods.phases import FeatureTask
from transfer_cli.methods.subspace.projection import Projection


class JDA(Projection):
    kinds = ("classification",)

    def __init__(
        self,
        context: Context,
        *,
        components: int = 30,
        ridge: float = 1.0,
        iterations: int = 10,
        kernel: Kernel = "linear",
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
        unit: bool = True,
    ) -> None:
        super().__init__(context, components, ridge, (kernel, gamma, approximate, landmarks), unit)
        self.iterations = iterations

    def projection(self, task: FeatureTask, x: Tensor) -> Tensor:
        span, found = self.span(x), None
        for _ in range(self.iterations):
            contrast = self.contrast(task, None if found is None else self.pseudo_labels(task, found))
            found = span.solve(contrast.normalised(), self.ridge, self.components)
        assert found is not None
        return found

    def contrast(self, task: FeatureTask, target_labels: Tensor | None) -> Contrast:
        source, target = both(task)
        if target_labels is None:
            return domain_contrast(source.x, target.x)
        assert source.y is not None
        return joint_contrast(
            source.x, source.y, target.x, target_labels, self.num_classes, marginal=float(self.num_classes)
        )

    def pseudo_labels(self, task: FeatureTask, projection: Tensor) -> Tensor:
        """Of the target samples, by the head on the embedding so far."""
        self.fitted.put(projection=projection)
        source, target = both(task)
        labelled = [
            (self.embed(p.x), p.y, None) for p in (source, task.target_labelled) if p is not None and p.y is not None
        ]
        fit_jointly(self.head, labelled)
        return self.head.predict(self.embed(target.x)).labels
