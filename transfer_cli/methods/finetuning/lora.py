"""LoRA: fine-tuning by low-rank updates (Hu et al., ICLR 2022).

    min_{A,B,C}  CE(C(F_{W + (α/r) B A}(x_t)), y_t)        B (out, r) = 0 and A (r, in) ~ N(0, 1 / in) at the start

There is an update of each weight matrix of the backbone's linear layers and attention (whose query, key and value maps torch keeps
as one matrix, so that they share A); frozen layers have none. W and all else in the backbone stay as they are. `rank` is r, `alpha`
is α. The paper updates some of the attention's matrices alone. With a source W is trained there first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from transfer_cli.methods.base import Context
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.phases import Moves


class LoRA(FineTune):
    def __init__(
        self,
        context: Context,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        backbone_lr: float = 1.0,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        if rank < 1:
            raise ValueError(f"rank is 1 or more, not {rank}")
        self.updates: list[LowRank] = []  # registered where they act, in the backbone
        for layer, name in linear_maps(self.network.backbone):
            update = LowRank(getattr(layer, name), rank, alpha / rank)
            register_parametrization(layer, name, update)
            self.updates.append(update)
        if not self.updates:
            raise ValueError(
                "updates linear layers, and the backbone has none that may move: take method=bitfit or finetune"
            )

    def tuned(self) -> list[nn.Parameter]:
        return [p for update in self.updates for p in (update.a, update.b)]

    def source_moves(self) -> Moves:
        tuned = set(self.tuned())
        return Moves([p for p in super().source_moves().parameters if p not in tuned])


class LowRank(nn.Module):
    """`W + scale · B A` in the place of W `(out, in)`."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def linear_maps(backbone: nn.Module) -> list[tuple[nn.Module, str]]:
    """Modules and the names of their weight matrices that may move."""
    found: list[tuple[nn.Module, str]] = []
    for module in backbone.modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append((module, "in_proj_weight"))
        elif isinstance(module, nn.Linear):
            found.append((module, "weight"))
    return [(module, name) for module, name in found if getattr(module, name).requires_grad]
