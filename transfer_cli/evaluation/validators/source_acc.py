"""The accuracy on held-out source samples: blind to the target, and to how sure the predictions are."""

from __future__ import annotations

from transfer_cli.evaluation.validators import View, needs


@needs("classification", "source_labels")
def source_acc(view: View) -> float:
    assert view.source is not None and view.source_labels is not None
    return float((view.source.labels.cpu() == view.source_labels.cpu()).double().mean())
