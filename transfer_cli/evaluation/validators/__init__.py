"""Validators: scores of a checkpoint, higher is better, that choose one without target labels (`oracle` apart).

One file each: a function of a `View` in the table below or, from a plugin, named as `module:function`. What a packaged one
cannot do without it says in its decorator, `needs`; where that is there, its score is finite, of collapsed predictions too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Literal

import torch
from torch import Tensor

from transfer_cli.errors import TransferError, suggest
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.evaluation.samples import evenly
from transfer_cli.registry import resolve

SAMPLED = 256  # samples a domain, evenly spread: whose features are looked at, and that are compared in pairs
WORST_LOSS = 1e6  # nats: a probability of zero counts as this

Need = Literal["classification", "source_labels", "source_features", "target_features"]


def _no_features(domain: str) -> Tensor | None:
    return None


@dataclass(frozen=True)
class View:
    """What a validator may look at: predictions on source validation samples with their labels (None where there are none, or they
    do not fit the head), predictions on unlabelled target inputs, and the features of both.

    `extract`: of `source` or `target`, the features `(n, D)` of its `sampled` samples, or None; asked once at most.
    """

    kind: str
    source: Prediction | None
    source_labels: Tensor | None
    target: Prediction
    extract: Callable[[str], Tensor | None] = _no_features

    @cached_property
    def source_features(self) -> Tensor | None:
        """`(n, D)` float64 on the CPU."""
        return _finite(self.extract("source"))

    @cached_property
    def target_features(self) -> Tensor | None:
        return _finite(self.extract("target"))

    @cached_property
    def losses(self) -> Tensor:
        """The negative log-likelihood `(N,)` of each source validation sample, float64 on the CPU, in nats; in regression the mean
        over outputs."""
        from transfer_cli.evaluation.metrics import sample_nll

        assert self.source is not None and self.source_labels is not None
        return sample_nll(self.source, self.source_labels).clamp_max(WORST_LOSS)

    @cached_property
    def weights(self) -> Tensor:
        """The density ratio `p_target / p_source` `(n,)` of the features of the `sampled` source validation samples."""
        from transfer_cli.evaluation.validators.iwv import density_ratio

        assert self.source_features is not None and self.target_features is not None
        return density_ratio(self.source_features, self.target_features)

    def has(self, need: str) -> bool:
        if need == "classification":
            return self.kind == "classification"
        if need == "source_labels":
            return self.source is not None and self.source_labels is not None
        return (self.source_features if need == "source_features" else self.target_features) is not None


Validator = Callable[[View], float]

REFUSED = {
    "classification": "is for classification: set selection=source_val or last",
    "source_labels": "needs source validation samples that fit the head: raise split.validation",
    "source_features": "needs source validation samples: raise split.validation",
    "target_features": "needs features of target inputs",
}


def needs(*what: Need) -> Callable[[Validator], Validator]:
    """Of a packaged validator: what it cannot do without, which it is then sure to have."""

    def declared(validator: Validator) -> Validator:
        @wraps(validator)
        def checked(view: View) -> float:
            refuse(validator.__name__, [need for need in what if not view.has(need)])
            return validator(view)

        checked.needs = what  # type: ignore[attr-defined]
        return checked

    return declared


def refuse(name: str, lacking: Sequence[str]) -> None:
    """Raises:
    TransferError: something is lacking."""
    if lacking:
        raise TransferError(f"selection={name} {REFUSED[lacking[0]]}.")


def sampled(x: Tensor) -> Tensor:
    """At most `SAMPLED` rows, evenly spread, in float64 on the CPU."""
    return x[evenly(len(x), SAMPLED)].double().cpu()


_HERE = "transfer_cli.evaluation.validators"
VALIDATORS = {
    name: f"{_HERE}.{name}:{name}"
    for name in (
        "source_val",
        "source_acc",
        "iwv",
        "dev",
        "atc",
        "im",
        "entropy",
        "diversity",
        "snd",
        "bnm",
        "silhouette",
        "dbi",
        "rankme",
        "mmd",
    )
}
WITHOUT_A_SCORE = ("last", "oracle")  # the newest checkpoint; the best on target test labels
OF_RUNS = ("agreement", "reverse")  # scores of finished runs, by `transfer validate`


def load_validator(name: str, plugins: Sequence[str]) -> Validator:
    """Raises:
    TransferError: no validator of that name."""
    if name in OF_RUNS:
        raise TransferError(
            f"selection={name}: it compares finished runs, not checkpoints; see transfer validate --help."
        )
    if ":" not in name and name not in VALIDATORS:
        options = [*VALIDATORS, *WITHOUT_A_SCORE]
        raise TransferError(
            f"selection must be one of auto, {', '.join(options)}; not '{name}'.{suggest(name, options)}"
        )
    validator: Validator = resolve(VALIDATORS.get(name, name), plugins, where="selection")
    return validator


def needed(validator: Validator) -> tuple[str, ...]:
    """What a validator says that it cannot do without: a plugin's need not say anything."""
    found: tuple[str, ...] = getattr(validator, "needs", ())
    return found


def applicable(view: View, validator: Validator) -> bool:
    """Whether there is what the validator needs."""
    return all(view.has(need) for need in needed(validator))


def _finite(features: Tensor | None) -> Tensor | None:
    """Features of which no value is infinite, nor so large that its square would be."""
    if features is None or not len(features):
        return None
    return torch.nan_to_num(features.double().cpu().flatten(1), nan=0.0).clamp(-1e100, 1e100)
