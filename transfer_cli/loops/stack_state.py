"""Each seed's share of what a stack holds, under the names and in the form of a single run's checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from transfer_cli.loops.rng import RandomState


class OwnState:
    """One seed's part of a stacked optimiser. What was restored waits until `restore` has that of all."""

    def __init__(self, optimizer: Optimizer, index: int) -> None:
        self.optimizer, self.index, self.waiting = optimizer, index, None

    def state_dict(self) -> dict[str, Any]:
        whole = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def own(number: int, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value[self.index] if value.shape == parameters[number].shape else value).clone()

        state = {n: {key: own(n, value) for key, value in of.items()} for n, of in whole["state"].items()}
        return {"state": state, "param_groups": whole["param_groups"]}

    def load_state_dict(self, state: Any) -> None:
        self.waiting = state


def restore(parts: Sequence[OwnState]) -> None:
    states: list[Any] = [part.waiting for part in parts]
    if states[0] is None:
        return

    def joined(number: int, key: str) -> Any:
        values = [state["state"][number][key] for state in states]
        return torch.stack(values) if isinstance(values[0], Tensor) and key != "step" else values[0]

    merged = {n: {key: joined(n, key) for key in of} for n, of in states[0]["state"].items()}
    parts[0].optimizer.load_state_dict({"state": merged, "param_groups": states[0]["param_groups"]})


class OwnDraws:
    """A seed's generators; its torch generator is drawn from directly, or installed where code draws from the global one."""

    def __init__(self, device: torch.device) -> None:
        self.all, self.device = RandomState(device), device
        self.generator = torch.Generator(device)
        self.take()

    def take(self) -> None:
        """The global generators' states as this seed's."""
        self.kept = self.all.state_dict()
        self.generator.set_state(self.kept[self._key])

    @property
    def _key(self) -> str:
        return "cuda" if self.device.type == "cuda" else "torch"

    @contextmanager
    def installed(self) -> Iterator[None]:
        self.all.load_state_dict(self.state_dict())
        yield
        self.take()

    def state_dict(self) -> dict[str, Any]:
        return {**self.kept, self._key: self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.all.load_state_dict(state)
        self.take()
