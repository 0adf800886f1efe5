"""BSS: batch spectral shrinkage against negative transfer (Chen, Wang, Fu, Long & Wang, NeurIPS 2019).

    min_{F,C}  CE(C(F(x_t)), y_t) + η Σ_{i=1..k} σ²_{-i}

σ_{-i} is the i-th smallest singular value of the batch's features `(B, D)`: directions that carry little in the start and are the
least likely to transfer. `weight` is η, `k` is k; with fewer samples than features there are B singular values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_cli.methods.base import Context, Outputs
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch


class BSS(FineTune):
    def __init__(
        self,
        context: Context,
        *,
        weight: float = 0.001,
        k: int = 1,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        if k < 1:
            raise ValueError(f"k is 1 or more, not {k}")
        if weight < 0:
            raise ValueError(f"weight is not negative: {weight} would reward what it is to shrink")
        self.weight, self.k = weight, k

    def penalties(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        return {"spectral_shrinkage": self.weight * smallest_squares(outputs.features, k=self.k)}


@in_full_precision
def smallest_squares(features: Tensor, *, k: int) -> Tensor:
    """The sum of the k smallest squared singular values of `(B, D)`, 0-dim; of all where there are fewer."""
    return torch.linalg.svdvals(features)[-k:].square().sum()
