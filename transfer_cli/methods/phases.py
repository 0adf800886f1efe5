"""What a method asks of the loops: a list of phases. Data only; this file knows no loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Labelled:
    """A minibatch with labels: class indices `(B,)`, or regression targets `(B, T)`."""

    x: Any
    y: Tensor


@dataclass(frozen=True)
class Batch:
    """One step's minibatches. `target` is inputs alone; a part that the task lacks, or the phase did not ask for, is None.

    `views`: of the parts for which the phase asked for several, all of them; the first is the `x` above.
    """

    source: Labelled | None
    target: Any | None
    target_labelled: Labelled | None
    views: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """Where a gradient phase stands: `step` of `steps`, and `p` from 0 (first step) towards 1."""

    step: int
    steps: int

    @property
    def p(self) -> float:
        return self.step / self.steps


@dataclass(frozen=True)
class Losses:
    """What an objective returns: the `terms` whose sum is minimised, and `diagnostics` that are only logged. All 0-dim tensors."""

    terms: dict[str, Tensor]
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Moves:
    """Parameters that an update moves, at `lr_scale` times the configured learning rate.

    `player`: under which name the norm of their gradient is logged; moves of one name are one player.
    """

    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0
    player: str = "network"

    @classmethod
    def of(cls, *modules: nn.Module, lr_scale: float = 1.0, player: str = "network") -> Moves:
        """All trainable parameters of the modules, each once."""
        parameters = dict.fromkeys(p for m in modules for p in m.parameters() if p.requires_grad)
        return cls(list(parameters), lr_scale, player)


@dataclass(frozen=True)
class Update:
    """One objective, the parameters it moves and how often it does so with each batch. `objective(batch, progress) -> Losses`.

    One that moves nothing runs without gradients: for BatchNorm statistics alone.
    """

    objective: Callable[[Any, Progress], Losses]
    moves: Sequence[Moves]
    repeats: int = 1


ALL_PARTS = ("source", "target", "target_labelled")


@dataclass(frozen=True)
class Features:
    """One part of the task after the backbone: `x` `(N, D)` float64 and, where the method may have them, labels."""

    x: Tensor
    y: Tensor | None = None


@dataclass(frozen=True)
class FeatureTask:
    """The task as a closed-form phase sees it; a part that the task lacks, or that the phase did not ask for, is None."""

    source: Features | None
    target: Features | None
    target_labelled: Features | None


@dataclass(frozen=True)
class Refresh:
    """A look at whole parts from time to time: before step 0 and every `every` steps (None: once a pass over the largest).

    Their features, without augmentation and in evaluation mode, go to `fit`, which leaves what it finds in the method's state.
    """

    fit: Callable[[FeatureTask], None]
    parts: Sequence[str]
    every: int | None = None


@dataclass(frozen=True)
class Gradient:
    """Minibatches of the task's `parts`; in each step the updates are made in order. `steps=None`: the trainer's.

    `on_start` runs once, before the first step and never on resume; what it changes belongs in the method's state.
    """

    name: str
    updates: Sequence[Update]
    steps: int | None = None
    parts: Sequence[str] = ALL_PARTS  # those it reads: others are not even loaded
    # By part the augmentation of each view, `weak` (the configured one) or `strong` (the group `strong`); one weak if not said.
    views: Mapping[str, Sequence[str]] = field(default_factory=dict)
    on_start: Callable[[], None] | None = None
    after_step: Callable[[Progress], None] | None = None
    refresh: Refresh | None = None
    predicts: bool = True  # False: the method cannot predict before a later phase, so nothing is evaluated
    owner: Any = None  # the method whose phase it is, in a chain of methods


@dataclass(frozen=True)
class ClosedForm:
    """Fit once on features. `fit(features)` leaves its result in the method's state, and returns figures to be logged, if any."""

    name: str
    fit: Callable[[FeatureTask], dict[str, float] | None]
    parts: Sequence[str] = ALL_PARTS
    predicts: bool = True
    owner: Any = None


Phase = Gradient | ClosedForm
