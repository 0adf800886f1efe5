"""LP-FT: a linear probe, then fine-tuning from it (Kumar et al., ICLR 2022).

    source    as in `finetune`
    head      min_C  CE(C(F(x_t)), y_t) + (l2 / 2) ‖W_C‖², F frozen: convex, solved to its optimum (in regression, ridge)
    finetune  min_{F,C}  CE(C(F(x_t)), y_t)

A new head's first gradients distort features that were good; from the head's optimum they are small. `head_l2` is l2, which the
paper chooses on validation data. The paper has one low rate for all: `backbone_lr` 1 and a low `optimizer.lr`.
"""

from __future__ import annotations

from transfer_cli.methods.base import Context
from transfer_cli.methods.feature_method import share
from transfer_cli.methods.finetuning.finetune import FineTune
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.phases import ClosedForm, FeatureTask, Phase


class LPFT(FineTune):
    version = 4  # another solver of the head

    def __init__(
        self,
        context: Context,
        *,
        head_l2: float = 1e-2,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context, backbone_lr=backbone_lr, layer_decay=layer_decay, source_steps=source_steps)
        self.head_l2 = head_l2

    def preparation(self) -> list[Phase]:
        return [ClosedForm("head", self.fit_head, parts=("target_labelled",))]

    def fit_head(self, task: FeatureTask) -> None:
        assert task.target_labelled is not None
        x, y = task.target_labelled.x, task.target_labelled.y
        assert y is not None
        weights = share(x, None)
        if self.network.kind == "classification":
            w, b = fit_logistic(x, y, self.network.head.out_features, self.head_l2, weights)
        else:
            w, b = fit_ridge(x, (y - self.network.label_mean) / self.network.label_std, self.head_l2, weights)
        self.network.head.weight.data.copy_(w)
        self.network.head.bias.data.copy_(b)
