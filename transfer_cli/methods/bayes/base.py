"""What heads with a prior from the source share: which parts of the task they read, and the source's summary.

The source is there itself, or its posterior stands for it (`prior=PATH`).
"""

from __future__ import annotations

from typing import ClassVar

from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.source_head import SourceHead
from transfer_cli.methods.bayes.summary import Summary
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.phases import FeatureTask


class SourceInformed(FeatureMethod):
    """The source's classes may be the target's or others; `folds`: of the cross-validation on granted labels."""

    kinds = ("classification",)
    uses_head: ClassVar[bool] = False  # each brings its own
    parts: ClassVar[tuple[str, ...]] = ("source", "target_labelled")
    label_spaces: ClassVar[tuple[str, ...]] = ("closed", "partial", "separate")
    takes_prior: ClassVar[tuple[str, ...]] = ("head",)

    def __init__(self, context: Context, head: Head, folds: int) -> None:
        super().__init__(context, head=head)
        if folds < 2:
            raise ValueError(f"folds is at least 2, not {folds}")
        self.folds, self.source_classes = folds, context.source_classes
        self.known = None if context.prior is None else SourceHead.read(context.prior, context)

    def summary(self, task: FeatureTask) -> Summary:
        if self.known is not None:
            return self.known.summary(self.head.fitted.place.device)
        assert task.source is not None and task.source.y is not None
        return Summary.of(task.source.x, task.source.y, self.source_classes)
