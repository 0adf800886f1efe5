"""metrics.jsonl: one object an event, flushed at once, cut back when a run resumes from before its end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transfer_cli.errors import TransferError


class MetricsLog:
    """A checkpoint remembers how long the file was."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, **event: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(event) + "\n")

    def state_dict(self) -> dict[str, int]:
        return {"bytes": self.path.stat().st_size if self.path.exists() else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        with self.path.open("ab") as file:
            file.truncate(state["bytes"])


class StepRecord:
    """Each step's loss terms, kept on the device and read once an interval: no step waits for the host."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Tensor]] = []

    def add(self, terms: dict[str, Tensor]) -> None:
        self._steps.append(terms)

    def take(self, last_step: int, losses: set[str]) -> dict[str, float]:
        """The means since the last call.

        Raises:
            TransferError: a loss was not finite; it names the step and the term.
        """
        if not self._steps:
            return {}
        columns = self._columns()
        table = torch.stack(list(columns.values())).float().cpu()  # (terms, steps)
        bad = [
            (i, name, row[i])
            for name, row in zip(columns, table, strict=True)
            if name in losses
            for i in _not_finite(row)
        ]
        if bad:
            i, name, value = min(bad, key=lambda b: b[0])  # one bad term soon spoils the others
            step = last_step - table.shape[1] + i + 1
            raise TransferError(f"the loss term '{name}' became {float(value)} at step {step}")
        self._steps = []
        means = {name: float(row.mean()) for name, row in zip(columns, table, strict=True)}
        return {name: value if math.isfinite(value) else 0.0 for name, value in means.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self._columns() if self._steps else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        n = len(next(iter(state.values()))) if state else 0
        self._steps = [{name: column[i] for name, column in state.items()} for i in range(n)]

    def _columns(self) -> dict[str, Tensor]:
        return {name: torch.stack([step[name].detach() for step in self._steps]) for name in self._steps[0]}


def _not_finite(row: Tensor) -> list[int]:
    return (~torch.isfinite(row)).nonzero()[:1, 0].tolist()
