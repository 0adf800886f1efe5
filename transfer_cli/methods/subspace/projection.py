"""What TCA and its kin share: kernel, one linear map of both domains from its features, embedded samples of unit length."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import FeatureMethod, both
from transfer_cli.methods.math.kernel_map import Approximation, Kernel, KernelMap
from transfer_cli.methods.math.mmd_subspace import KernelSpan, Span
from transfer_cli.methods.phases import FeatureTask
from transfer_cli.methods.preprocessing import unit_rows


class Projection(FeatureMethod):
    """`kernel`: name, gamma, approximation, number of landmarks."""

    inner_products: ClassVar[bool] = False  # True: it needs features whose inner products are an exact kernel's too

    def __init__(
        self,
        context: Context,
        components: int,
        ridge: float,
        kernel: tuple[Kernel, float | None, Approximation, int],
        unit: bool,
    ) -> None:
        super().__init__(context)
        if ridge <= 0:
            raise TransferError(
                f"method.ridge must be positive, not {ridge}: without it the problem has no unique solution."
            )
        self.components, self.ridge, self.unit = components, ridge, unit
        self.kernel = KernelMap(*kernel)

    def projection(self, task: FeatureTask, x: Tensor) -> Tensor:
        """The map `(m, k)` from the kernel's features. The task's are those already; `x` `(N, m)` are source and target."""
        raise NotImplementedError

    def adapt(self, task: FeatureTask) -> dict[str, float]:
        source, target = both(task)
        x = self.kernel.fit(torch.cat([source.x, target.x]), whiten=self.inner_products)
        parts = x.split([len(source.x), len(target.x)])
        labelled = task.target_labelled
        mapped = FeatureTask(
            replace(source, x=parts[0]),
            replace(target, x=parts[1]),
            None if labelled is None else replace(labelled, x=self.kernel(labelled.x)),
        )
        self.fitted.put(projection=self.projection(mapped, x))
        return {}

    def span(self, x: Tensor) -> Span | KernelSpan:
        return KernelSpan(x) if self.kernel.exact else Span.of(x, self.components)

    def embed(self, z: Tensor) -> Tensor:
        """Kernel features `(B, m)` to the embedding `(B, k)`."""
        embedded = z @ self.fitted.projection
        return unit_rows(embedded) if self.unit else embedded

    def map_source(self, z: Tensor) -> Tensor:
        return self.embed(self.kernel(z))

    def map_target(self, z: Tensor) -> Tensor:
        return self.map_source(z)
