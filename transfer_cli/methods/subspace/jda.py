"""Joint distribution adaptation (Long, Wang, Ding, Sun & Yu, ICCV 2013).

    min_A  tr(Aᵀ K (M_0 + Σ_c M_c) K A) + λ ‖A‖²_F    subject to   Aᵀ K H K A = I

TCA with a further MMD between the domains for each class c; the target's classes are those that the head predicts, and both are
refined in turn for `iterations` rounds (the first has no classes). M_0 is scaled by the number of classes and the sum divided by
its Frobenius norm, as in the published code. Granted target labels take the place of predictions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import both
from transfer_cli.methods.math.kernel_map import Approximation, Kernel
from transfer_cli.methods.math.mmd_subspace import class_contrasts, domain_contrast
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

    def projection(self, task: FeatureTask) -> Tensor:
        span, found = self.span(task), None
        for _ in range(self.iterations):
            contrast = self.contrast(task, None if found is None else self.pseudo_labels(task, found))
            found = span.solve(contrast, self.ridge, self.components)
        assert found is not None
        return found

    def contrast(self, task: FeatureTask, target_labels: Tensor | None) -> Tensor:
        """`Xᵀ E` `(D, m)` with `E Eᵀ` the MMD matrix, divided by its norm."""
        source, target = both(task)
        length = 1 / len(source.x) + 1 / len(target.x)
        columns = domain_contrast(source.x, target.x)[:, None] * self.num_classes**0.5
        lengths = torch.tensor([length * self.num_classes], dtype=columns.dtype, device=columns.device)
        overlaps = None
        if target_labels is not None:
            assert source.y is not None
            by_class, class_lengths = class_contrasts(source.x, source.y, target.x, target_labels, self.num_classes)
            columns, lengths = torch.cat([columns, by_class], 1), torch.cat([lengths, class_lengths])
            overlaps = self._overlaps(source.y, target_labels, class_lengths)
        return columns / frobenius(lengths, overlaps) ** 0.5

    def _overlaps(self, source_labels: Tensor, target_labels: Tensor, class_lengths: Tensor) -> Tensor:
        """Inner products `(C,)` of the scaled e_0 with each e_c."""
        n_s, n_t = len(source_labels), len(target_labels)
        return (class_lengths > 0) * (1 / n_s + 1 / n_t) * self.num_classes**0.5

    def pseudo_labels(self, task: FeatureTask, projection: Tensor) -> Tensor:
        """Of the target samples, by the head on the embedding so far."""
        self.fitted.put(projection=projection)
        source, target = both(task)
        assert source.y is not None
        x, y = self.embed(source.x), source.y
        if task.target_labelled is not None and task.target_labelled.y is not None:
            x, y = torch.cat([x, self.embed(task.target_labelled.x)]), torch.cat([y, task.target_labelled.y])
        self.head.fit(x, y)
        return self.head.predict(self.embed(target.x)).labels


def frobenius(lengths: Tensor, overlaps: Tensor | None) -> float:
    """`‖E Eᵀ‖_F = ‖EᵀE‖_F`: squared lengths of the columns, of which only the first overlaps with the others."""
    total = lengths.square().sum()
    if overlaps is not None:
        total = total + 2 * overlaps.square().sum()
    return float(total.sqrt())
