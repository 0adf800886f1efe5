"""BitFit: fine-tuning of the biases and the head alone (Ben Zaken, Goldberg & Ravfogel, ACL 2022).

    min_{b_F,C}  CE(C(F(x_t)), y_t)

b_F are all biases of the backbone, those of normalisation layers among them; its weights stay as they are. So few parameters stand
a high rate: `backbone_lr` is 1. With a source all is trained there first, and the biases alone in the target.
"""

from __future__ import annotations

from torch import nn

from transfer_cli.methods.base import Context
from transfer_cli.methods.finetuning.finetune import FineTune


class BitFit(FineTune):
    def __init__(
        self,
        context: Context,
        *,
        backbone_lr: float = 1.0,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        if not self.tuned():
            raise ValueError(
                "moves biases, and the backbone has none that may move: take method=linear_probe or finetune"
            )

    def tuned(self) -> list[nn.Parameter]:
        named = self.network.backbone.named_parameters()
        return [p for name, p in named if p.requires_grad and name.endswith("bias")]
