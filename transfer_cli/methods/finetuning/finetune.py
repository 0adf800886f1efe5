"""Fine-tuning on granted target labels, from pretrained weights or from a first phase on the source.

    source    min_{F,C_s}  CE(C_s(F(x_s)), y_s)                      where the task has a source
    head      min_C  CE(C(F(x_t)), y_t), F frozen                    `head_first`: a convex problem, solved to its optimum
    finetune  min_{F,C}  CE(C(F(x_t)), y_t) + (α/2) ‖w_F - w⁰_F‖² + (β/2) ‖w_C‖²

The last line's penalty is L2-SP (Li, Grandvalet & Davoine, ICML 2018): `l2_sp` is α, `l2_head` is β, w⁰ the weights when the
phase starts. The backbone learns at `backbone_lr` times the head's rate, and each stage below the last at `layer_decay`
times the one above it (Howard & Ruder, ACL 2018).
"""

from __future__ import annotations

from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.methods.base import Context, Needs, NetworkMethod
from transfer_cli.methods.feature_method import share
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.phases import Batch, ClosedForm, FeatureTask, Gradient, Losses, Moves, Phase, Progress, Update


class FineTune(NetworkMethod):
    needs = Needs(target_labels=True)
    version = 2  # layers without parameters no longer count as stages
    handles_target_labels = True

    def __init__(
        self,
        context: Context,
        *,
        head_first: bool = True,
        head_l2: float = 1e-2,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        l2_sp: float = 0.0,
        l2_head: float = 0.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context)
        self.head_first, self.head_l2 = head_first, head_l2
        self.backbone_lr, self.layer_decay = backbone_lr, layer_decay
        self.l2_sp, self.l2_head = l2_sp, l2_head
        self.source_steps = source_steps if context.has_source else 0
        self.source_head: nn.Linear = self.network.head
        if context.has_source and not context.source_labels_fit_head:
            self.source_head = nn.Linear(self.network.feature_dim, context.source_classes)
        self.start = Fitted()  # w⁰

    def phases(self) -> list[Phase]:
        phases: list[Phase] = []
        granted = ["target_labelled"]
        if self.source_steps != 0:
            moves = [Moves.of(self.network, self.source_head)]
            update = Update(self.source_losses, moves)
            phases.append(Gradient("source", [update], steps=self.source_steps, parts=["source"]))
        if self.head_first:
            phases.append(ClosedForm("head", self.fit_head, parts=granted))
        update = Update(self.losses, self.moves())
        return [*phases, Gradient("finetune", [update], parts=granted, on_start=self.remember_start)]

    def moves(self) -> list[Moves]:
        """The head at the full rate, the backbone's stages at decreasing ones from output to input."""
        backbone = self.network.backbone
        if isinstance(backbone, Backbone):
            stages = [stage for stage in backbone.stage_parameters().values() if stage]
        else:
            stages = [list(backbone.parameters())]
        below = {p for stage in stages for p in stage}
        moves = [Moves([p for p in self.network.parameters() if p not in below])]  # bottleneck, head, noise
        for depth, stage in enumerate(reversed(stages)):
            trainable = [p for p in stage if p.requires_grad]
            moves.append(Moves(trainable, lr_scale=self.backbone_lr * self.layer_decay**depth))
        return [m for m in moves if m.parameters]

    def fit_head(self, task: FeatureTask) -> None:
        assert task.target_labelled is not None
        x, y = task.target_labelled.x, task.target_labelled.y
        assert y is not None
        weights = share(x, None)
        if self.network.kind == "classification":
            w, b = fit_logistic(x, y, self.network.head.out_features, self.head_l2, weights)
        else:
            w, b, _ = fit_ridge(x, (y - self.network.label_mean) / self.network.label_std, self.head_l2, weights)
        self.network.head.weight.data.copy_(w)
        self.network.head.bias.data.copy_(b)

    def penalised(self) -> list[nn.Parameter]:
        return [p for p in self.network.backbone.parameters() if p.requires_grad]

    def remember_start(self) -> None:
        if self.l2_sp:
            self.start.put(**{f"w{i}": p.detach().clone() for i, p in enumerate(self.penalised())})

    def source_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        logits = self.source_head(self.network.features(batch.source.x, "source"))
        return Losses({"supervised": self.network.supervised(logits, batch.source.y)})

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.target_labelled is not None
        logits = self.network(batch.target_labelled.x).logits
        terms = {"target_supervised": self.network.supervised(logits, batch.target_labelled.y)}
        if self.l2_sp:
            drift: list[Tensor] = [
                (p - getattr(self.start, f"w{i}")).square().sum() for i, p in enumerate(self.penalised())
            ]
            terms["l2_sp"] = 0.5 * self.l2_sp * sum(drift[1:], drift[0])
        if self.l2_head:
            terms["l2_head"] = 0.5 * self.l2_head * self.network.head.weight.square().sum()
        return Losses(terms)
