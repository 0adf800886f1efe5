"""metrics.jsonl: one object an event, flushed at once, cut back when a run resumes from before its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfer_cli.errors import TransferError

GRADIENT_NORM = "gradient_norm_"  # and the player's name: a diagnostic


class MetricsLog:
    """A checkpoint remembers how long the file was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Callable[[Mapping[str, Any]], None]] = []  # called with an event before it is appended

    def write(self, **event: Any) -> None:
        for listener in self.listeners:
            listener(event)
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def state_dict(self) -> dict[str, int]:
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        with self.path.open("ab") as file:
            file.truncate(min(state["bytes"], self.path.stat().st_size))  # a file that was lost is not made longer


class StepRecord:
    """Each step's loss terms, kept on the device and read once an interval: no step waits for the host."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}
        self._steps: dict[str, list[int]] = {}  # in which each of them was recorded

    def add(self, step: int, terms: dict[str, Tensor]) -> None:
        """The terms of an update in `step`: any, and as often as there are updates."""
        for name, value in terms.items():
            self._values.setdefault(name, []).append(value.detach())
            self._steps.setdefault(name, []).append(step)

    def names(self) -> set[str]:
        return set(self._values)

    def take(self, watched: set[str]) -> dict[str, float]:
        """The means since the last call, over the values that are finite; a name without any is left out.

        Raises:
            TransferError: a watched value was not finite; it names the step and the loss term, or whose gradient.
        """
        if not self._values:
            return {}
        names = list(self._values)
        together = torch.cat([torch.stack(self._values[name]).float() for name in names]).cpu()  # one wait for all
        columns = dict(zip(names, together.split([len(self._values[name]) for name in names]), strict=True))
        bad = [
            (self._steps[name][i], name, float(columns[name][i]))
            for name in names
            if name in watched
            for i in _not_finite(columns[name])
        ]
        if bad:
            step, name, value = min(bad, key=lambda b: b[0])  # one bad term soon spoils the others
            player = name.removeprefix(GRADIENT_NORM)
            what = f"the loss term '{name}'" if player == name else f"the gradient of '{player}'"
            raise TransferError(f"{what} became {value} at step {step + 1}")
        self._values, self._steps = {}, {}
        finite = {name: column[torch.isfinite(column)] for name, column in columns.items()}
        return {name: float(column.double().mean()) for name, column in finite.items() if len(column)}

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": {name: torch.stack(values) for name, values in self._values.items()},
            "steps": {name: list(steps) for name, steps in self._steps.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._values = {name: list(values) for name, values in state["values"].items()}
        self._steps = {name: list(steps) for name, steps in state["steps"].items()}


def _not_finite(row: Tensor) -> list[int]:
    return (~torch.isfinite(row)).nonzero()[:1, 0].tolist()
