"""Transfer component analysis (Pan, Tsang, Kwok & Yang, IEEE TNN 22(2), 2011).

    min_A  tr(Aᵀ K M K A) + λ ‖A‖²_F    subject to   Aᵀ K H K A = I,    M = e eᵀ,  e_i = 1/n_s on the source, -1/n_t on the target

The MMD of the domains in the embedding, small, at a fixed spread. `components` is k, `ridge` λ; M is divided by its Frobenius norm,
as in the published figures. `unit` scales embedded samples to unit length (as Long et al.'s code does). New samples are
mapped through the kernel with the training samples.
"""

from __future__ import annotations

from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import both
from transfer_cli.methods.math.kernel_map import Approximation, Kernel
from transfer_cli.methods.math.mmd_subspace import domain_contrast
from transfer_cli.methods.phases import FeatureTask
from transfer_cli.methods.subspace.projection import Projection


class TCA(Projection):
    def __init__(
        self,
        context: Context,
        *,
        components: int = 30,
        ridge: float = 1.0,
        kernel: Kernel = "linear",
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
        unit: bool = True,
    ) -> None:
        super().__init__(context, components, ridge, (kernel, gamma, approximate, landmarks), unit)

    def projection(self, task: FeatureTask, x: Tensor) -> Tensor:
        source, target = both(task)
        contrast = domain_contrast(source.x, target.x).normalised()
        return self.span(x).solve(contrast, self.ridge, self.components)
