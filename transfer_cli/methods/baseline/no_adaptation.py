"""A head on frozen features, nothing adapted: what every method on features is compared with."""

from __future__ import annotations

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.phases import ClosedForm


class NoAdaptation(FeatureMethod):
    needs = Needs(any_labels=True)

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.use_source = context.source_labels_fit_head
        if not self.use_source and not context.has_target_labels:
            raise TransferError("no_adaptation finds no labels for its head: set source=NAME or target_labels=N.")

    def phases(self) -> list[ClosedForm]:
        # The target inputs matter to the normalisation alone.
        parts = ["source", "target", "target_labelled"] if self.use_source else ["target", "target_labelled"]
        return [ClosedForm("fit", self.fit, parts=parts)]
