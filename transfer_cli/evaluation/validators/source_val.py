"""Minus the mean negative log-likelihood of held-out source samples: blind to the target."""

from __future__ import annotations

from transfer_cli.evaluation.validators import View, needs


@needs("source_labels")
def source_val(view: View) -> float:
    return -float(view.losses.mean())
