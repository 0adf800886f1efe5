"""L2-SP: fine-tuning with a penalty towards the starting point (Li, Grandvalet & Davoine, ICML 2018).

    min_{F,C}  CE(C(F(x_t)), y_t) + (α/2) ‖w_F - w⁰_F‖² + (β/2) ‖w_C‖²

w⁰ are the backbone's weights when the phase starts, frozen ones left out; w_C the head's. `alpha` is α, `beta` is β. They stand in
for weight decay, which the paper leaves out: `optimizer.weight_decay=0` does so here.
"""

from __future__ import annotations

from torch import Tensor

from transfer_cli.methods.base import Context, Outputs
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.phases import Batch
from transfer_cli.methods.teacher import FrozenTeacher


class L2SP(FineTune):
    def __init__(
        self,
        context: Context,
        *,
        alpha: float = 0.1,
        beta: float = 0.01,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        if min(alpha, beta) < 0:
            raise ValueError(f"alpha and beta are 0 or more, not {alpha} and {beta}")
        self.alpha, self.beta = alpha, beta
        self.start = FrozenTeacher(self.network.backbone)  # w⁰

    def begin(self) -> None:
        self.start.copy(self.network.backbone)

    def penalties(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        pairs = zip(self.network.backbone.parameters(), self.start.parameters(), strict=True)
        head = self.network.head.weight.square().sum()
        drift = sum(((w - start).square().sum() for w, start in pairs if w.requires_grad), head.new_zeros(()))
        return {"l2_sp": 0.5 * self.alpha * drift, "l2_head": 0.5 * self.beta * head}
