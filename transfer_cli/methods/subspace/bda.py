"""Balanced distribution adaptation, and its class-weighted form (Wang, Chen, Hao, Feng & Shen, ICDM 2017).

    min_A  tr(Aᵀ K ((1 - μ) M_0 + μ Σ_c M_c) K A) + λ ‖A‖²_F    subject to   Aᵀ K H K A = I

JDA with the weight of the classes against the domains as a whole, `balance` μ. With `weighted` (W-BDA) each side's part of M_c is
weighted by the root of the class's share on that side, for domains whose classes are of different size.
"""

from __future__ import annotations

from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import both
from transfer_cli.methods.math.kernel_map import Approximation, Kernel
from transfer_cli.methods.math.mmd_subspace import Contrast, domain_contrast, joint_contrast
from transfer_cli.methods.phases import FeatureTask
from transfer_cli.methods.subspace.jda import JDA


class BDA(JDA):
    def __init__(
        self,
        context: Context,
        *,
        balance: float = 0.5,
        weighted: bool = False,
        components: int = 30,
        ridge: float = 1.0,
        iterations: int = 10,
        kernel: Kernel = "linear",
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
        unit: bool = True,
    ) -> None:
        super().__init__(
            context,
            components=components,
            ridge=ridge,
            iterations=iterations,
            kernel=kernel,
            gamma=gamma,
            approximate=approximate,
            landmarks=landmarks,
            unit=unit,
        )
        if not 0 <= balance <= 1:
            raise TransferError(f"method.balance is between 0 (domains alone) and 1 (classes alone), not {balance}.")
        self.balance, self.weighted = balance, weighted

    def contrast(self, task: FeatureTask, target_labels: Tensor | None) -> Contrast:
        source, target = both(task)
        if target_labels is None:
            return domain_contrast(source.x, target.x)
        assert source.y is not None
        return joint_contrast(
            source.x,
            source.y,
            target.x,
            target_labels,
            self.num_classes,
            marginal=(1 - self.balance) * self.num_classes,
            conditional=self.balance,
            by_prior=self.weighted,
        )
