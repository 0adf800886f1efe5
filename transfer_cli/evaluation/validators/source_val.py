"""Negative log-likelihood on held-out source samples: blind to the target."""

from __future__ import annotations

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.metrics import score
from transfer_cli.evaluation.validators import View


def source_val(view: View) -> float:
    if view.source is None or view.source_labels is None:
        raise TransferError(
            "selection=source_val needs source validation samples that fit the head: raise split.validation."
        )
    return -score(view.kind, view.source, view.source_labels)["nll"]
