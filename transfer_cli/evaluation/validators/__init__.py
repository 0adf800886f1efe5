"""Validators: scores of a checkpoint, higher is better, that choose one without target labels (`oracle` apart).

One file each: a function of a `View`, in the table below or, from a plugin, named as `module:function`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from transfer_cli.errors import TransferError, suggest
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.registry import resolve


@dataclass(frozen=True)
class View:
    """What a validator may look at: predictions on source validation data with labels, and on unlabelled target inputs."""

    kind: str
    source: Prediction | None
    source_labels: Tensor | None
    target: Prediction


Validator = Callable[[View], float]

VALIDATORS = {
    "source_val": "transfer_cli.evaluation.validators.source_val:source_val",
    "im": "transfer_cli.evaluation.validators.im:im",
    "entropy": "transfer_cli.evaluation.validators.entropy:entropy",
}
WITHOUT_A_SCORE = ("last", "oracle")  # the newest checkpoint; the best on target test labels


def load_validator(name: str, plugins: Sequence[str]) -> Validator:
    """Raises:
    TransferError: no validator of that name."""
    if ":" not in name and name not in VALIDATORS:
        options = [*VALIDATORS, *WITHOUT_A_SCORE]
        raise TransferError(
            f"selection must be one of auto, {', '.join(options)}; not '{name}'.{suggest(name, options)}"
        )
    validator: Validator = resolve(VALIDATORS.get(name, name), plugins, where="selection")
    return validator


def applicable(view: View, name: str) -> bool:
    """Whether a packaged validator has what it needs."""
    if name == "source_val":
        return view.source is not None
    return view.kind == "classification"
