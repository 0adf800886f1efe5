"""Semi-supervised transfer component analysis (Pan, Tsang, Kwok & Yang, IEEE TNN 22(2), 2011, section IV).

    min_A  tr(Aᵀ K M K A) + (μ / n²) tr(Aᵀ K L K A) + λ ‖A‖²_F    subject to   Aᵀ K H K̃ H K A = I,    K̃ = γ K_yy + (1 - γ) I

TCA that also keeps the labels and the neighbourhoods: the constraint fixes the dependence (HSIC) on the labels' kernel K_yy, one
for two labelled samples of a class and zero otherwise (`label_weight` γ; the labels are the source's and the granted target ones),
and L is the Laplacian of the graph of `neighbours` nearest neighbours (`locality` μ).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import both
from transfer_cli.methods.heads.knn import nearest
from transfer_cli.methods.math.kernel_map import Approximation, Kernel
from transfer_cli.methods.math.mmd_subspace import Span, domain_contrast
from transfer_cli.methods.phases import FeatureTask
from transfer_cli.methods.subspace.projection import Projection


class SSTCA(Projection):
    kinds = ("classification",)
    inner_products = True

    def __init__(
        self,
        context: Context,
        *,
        components: int = 30,
        ridge: float = 1.0,
        label_weight: float = 0.5,
        locality: float = 1.0,
        neighbours: int = 10,
        kernel: Kernel = "linear",
        gamma: float | None = None,
        approximate: Approximation = "none",
        landmarks: int = 500,
        unit: bool = True,
    ) -> None:
        super().__init__(context, components, ridge, (kernel, gamma, approximate, landmarks), unit)
        if not 0 <= label_weight <= 1 or locality < 0 or neighbours < 1:
            raise TransferError(
                "method.label_weight is between 0 and 1, method.locality not negative, method.neighbours positive."
            )
        self.label_weight, self.locality, self.neighbours = label_weight, locality, neighbours

    def projection(self, task: FeatureTask, x: Tensor) -> Tensor:
        source, target = both(task)
        assert source.y is not None
        labels = [source.y]
        if task.target_labelled is not None and task.target_labelled.y is not None:  # once more, with their labels
            x, labels = torch.cat([task.target_labelled.x, x]), [task.target_labelled.y, *labels]
        span = Span.of(x, self.components)
        contrast = domain_contrast(source.x, target.x).normalised()
        smooth = span.inside(laplacian_form(x, self.neighbours)) * (self.locality / len(x) ** 2)
        one_hot = F.one_hot(torch.cat(labels), self.num_classes).to(x.dtype)
        dependence = x[: len(one_hot)].T @ one_hot - torch.outer(x.mean(0), one_hot.sum(0))  # Xᵀ H Y
        spread = (1 - self.label_weight) * span.spread + self.label_weight * span.inside(dependence @ dependence.T)
        return span.solve(contrast, self.ridge, self.components, spread=spread, penalty=smooth)


def laplacian_form(x: Tensor, neighbours: int) -> Tensor:
    """`Xᵀ L X = Σ_ij w_ij (x_i - x_j)(x_i - x_j)ᵀ / 2` `(D, D)` of the symmetrised graph of nearest neighbours of samples `(N, D)`.

    The graph is sparse, k entries a sample; nothing of N x N is formed.
    """
    found = nearest(x, x, min(neighbours + 1, len(x)))
    rows = torch.arange(len(x), device=x.device).repeat_interleave(found.shape[1])
    columns = found.flatten()
    weights = x.new_full((len(rows),), 0.5)  # half for each direction: a mutual pair weighs one
    weights = torch.where(rows == columns, 0.0, weights)
    there = torch.sparse_coo_tensor(torch.stack([rows, columns]), weights, (len(x), len(x)), check_invariants=False)
    product = x.T @ torch.sparse.mm(there, x)
    degree = (
        torch.zeros(len(x), dtype=x.dtype, device=x.device).index_add_(0, rows, weights).index_add_(0, columns, weights)
    )
    return (x * degree[:, None]).T @ x - product - product.T
