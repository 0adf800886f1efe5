"""Fine-tuning on granted target labels, from pretrained weights or from a first phase on the source.

    source    min_{F,C_s}  CE(C_s(F(x_s)), y_s)                      where the task has a source that no `source_model` stands for
    finetune  min_{F,C}  CE(C(F(x_t)), y_t)

Where source and target share their classes, C starts as the source's head C_s; elsewhere it is new. The backbone learns at
`backbone_lr` times the head's rate, and each stage below the last at `layer_decay` times the one above it (Howard & Ruder,
ACL 2018). `source_steps`: of the first phase (null: `trainer.steps`, 0: none).

The methods of this family differ in what goes before the last phase, what it adds to the loss, and what it moves.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context, Needs, NetworkMethod, Outputs
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Phase, Progress, Update
from transfer_cli.methods.source_first import refuse_domain_batchnorm


class FineTune(NetworkMethod):
    needs = Needs(target_labels=True)
    version = 3  # the head is no longer fitted first: that is lp_ft
    handles_target_labels = True
    parts: ClassVar[tuple[str, ...]] = ("target_labelled",)  # that the last phase reads
    needs_trained_start: ClassVar[bool] = False  # True: a source's training must come first, whatever its classes

    def __init__(
        self,
        context: Context,
        *,
        backbone_lr: float = 0.1,
        layer_decay: float = 1.0,
        source_steps: int | None = None,
    ) -> None:
        super().__init__(context)
        refuse_domain_batchnorm(context)
        self.backbone_lr, self.layer_decay = backbone_lr, layer_decay
        starts_there = context.source_model is not None
        self.source_steps = source_steps if context.has_source and not starts_there else 0
        self.starts_trained = starts_there or self.source_steps != 0
        self.source_head: nn.Linear = self.network.head
        if context.has_source and not context.source_labels_fit_head:
            if self.needs_trained_start and starts_there:
                raise ValueError("needs the head of the source's classes, which source_model has not: leave that out")
            self.source_head = nn.Linear(self.network.feature_dim, context.source_classes)

    def phases(self) -> list[Phase]:
        if self.needs_trained_start and not self.starts_trained:
            raise TransferError(
                "a method that starts from a source's training needs one: set source=NAME (and not method.source_steps=0), or "
                "source_model=RUN."
            )
        update = Update(self.losses, self.moves())
        finetune = Gradient("finetune", [update], parts=self.parts, on_start=self.begin)
        return [*self.source_phases(), *self.preparation(), finetune]

    def source_phases(self) -> list[Gradient]:
        if self.source_steps == 0:
            return []
        update = Update(self.source_losses, [self.source_moves()])
        fits = self.source_head is self.network.head
        return [Gradient("source", [update], steps=self.source_steps, parts=("source",), predicts=fits)]

    def preparation(self) -> list[Phase]:
        """Phases between the source's and the last."""
        return []

    def begin(self) -> None:
        """At the last phase's start."""

    def penalties(self, batch: Batch, outputs: Outputs) -> dict[str, Tensor]:
        """Terms of the last phase beside the cross-entropy. `outputs`: of the granted target samples."""
        return {}

    def tuned(self) -> list[nn.Parameter]:
        """Of the backbone, what the last phase moves."""
        return [p for p in self.network.backbone.parameters() if p.requires_grad]

    def source_moves(self) -> Moves:
        return Moves.of(self.network, self.source_head)

    def moves(self) -> list[Moves]:
        """The head at the full rate, the backbone's stages at decreasing ones from output to input."""
        backbone, tuned = self.network.backbone, set(self.tuned())
        if isinstance(backbone, Backbone):
            stages = [stage for stage in backbone.stage_parameters().values() if stage]
        else:
            stages = [list(backbone.parameters())]
        below = {p for stage in stages for p in stage}
        moves = [Moves([p for p in self.network.parameters() if p not in below])]  # bottleneck, head, noise
        for depth, stage in enumerate(reversed(stages)):
            moves.append(Moves([p for p in stage if p in tuned], lr_scale=self.backbone_lr * self.layer_decay**depth))
        return [m for m in moves if m.parameters]

    def source_losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.source is not None
        logits = self.source_head(self.network.features(batch.source.x, "source"))
        return Losses({"supervised": self.network.supervised(logits, batch.source.y)})

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        assert batch.target_labelled is not None
        outputs = self.network(batch.target_labelled.x)
        supervised = self.network.supervised(outputs.logits, batch.target_labelled.y)
        return Losses({"target_supervised": supervised, **self.penalties(batch, outputs)})
