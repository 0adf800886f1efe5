"""Where a run's events go besides metrics.jsonl: `sinks=[tensorboard,mlflow,wandb]`, each an extra, or a plugin's `module:Class`.

metrics.jsonl stays the source of truth. A sink begins with what stands there, so that one of a resumed run has every event once;
it gets the same events, is closed with its run, and changes nothing in it: one that fails is named once and left out.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from transfer_cli.config.schema import OUTSIDE_IDENTITY, Config
from transfer_cli.errors import TransferError, suggest
from transfer_cli.loops.rng import RandomState
from transfer_cli.registry import resolve
from transfer_cli.run_folder import RunFolder

SINKS = {  # name: implementation, the package it imports; the extra bears the sink's name
    "tensorboard": ("transfer_cli.sinks.tensorboard:Tensorboard", "tensorboardX"),
    "mlflow": ("transfer_cli.sinks.mlflow:Mlflow", "mlflow"),
    "wandb": ("transfer_cli.sinks.wandb:Wandb", "wandb"),
}


@dataclass(frozen=True)
class SinkRun:
    """The run that a sink is told of."""

    folder: Path
    pair: str  # source-target
    name: str  # method-seed0-1a2b3c4d
    settings: Mapping[str, Any]  # flat: `trainer.steps`; those that determine the figures

    @property
    def identity(self) -> str:
        return self.name.rpartition("-")[2]


class Sink(Protocol):
    """`Sink(run)` opens it, anew where the run had one before."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite figures by name, such as `train/supervised`; `step` never falls."""

    def close(self, state: str) -> None:
        """`finished`, `failed` or `interrupted`."""


def check_sinks(names: Sequence[str], plugins: Sequence[str]) -> None:
    """Raises:
    TransferError: no such sink, or its package is not installed."""
    for name in names:
        if name in SINKS and importlib.util.find_spec(SINKS[name][1]) is None:
            raise TransferError(f"sink {name} needs {SINKS[name][1]}: pip install 'transfer-cli[{name}]'")
        _implementation(name, plugins)


def _implementation(name: str, plugins: Sequence[str]) -> Callable[[SinkRun], Sink]:
    if name not in SINKS and ":" not in name:
        raise TransferError(f"no sink named '{name}'.{suggest(name, SINKS)} There are: {', '.join(SINKS)}.")
    return resolve(SINKS[name][0] if name in SINKS else name, plugins, where=f"sink '{name}'")


class Sinks:
    """All of a run's. They open at the first event: by then a resumed run has cut metrics.jsonl back."""

    def __init__(self, config: Config, folder: RunFolder, device: torch.device, warn: Callable[[str], None]) -> None:
        self._random = RandomState(device)
        self._plugins, self._warn, self._metrics = config.plugins, warn, folder.metrics
        self._waiting = list(dict.fromkeys(config.sinks))
        self._open: dict[str, Sink] = {}
        self._run = SinkRun(folder.path.resolve(), folder.path.parent.name, folder.path.name, _flat(asdict(config)))

    def write(self, event: Mapping[str, Any]) -> None:
        """An event that is about to be appended to metrics.jsonl."""
        self._begin()
        self._each(lambda sink: sink.write(*figures(event)))

    def finish(self, result: Mapping[str, Any]) -> None:
        """The final figures, as `result/target_test/accuracy`."""
        for split, values in result["metrics"].items():
            self.write({"step": result["steps"], "split": f"result/{split}", "values": values})

    def close(self, state: str) -> None:
        self._each(lambda sink: sink.close(state))
        self._open = {}

    def _begin(self) -> None:
        names, self._waiting = self._waiting, []
        for name in names:
            with self._harmless(name):
                self._open[name] = _implementation(name, self._plugins)(self._run)
        if names and self._metrics.exists():
            for line in self._metrics.read_text().splitlines():
                step, values = figures(json.loads(line))
                self._each(lambda sink, step=step, values=values: sink.write(step, values))  # type: ignore[misc]

    def _each(self, call: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            with self._harmless(name):
                call(sink)

    @contextmanager
    def _harmless(self, name: str) -> Iterator[None]:
        """Whatever a sink does, the run's random numbers are its own, and the run goes on."""
        state = self._random.state_dict()
        try:
            yield
        except Exception as error:
            sink = self._open.pop(name, None)
            if sink is not None:
                with suppress(Exception):
                    sink.close("interrupted")
            self._warn(f"sink {name} failed and is left out, the run goes on: {type(error).__name__}: {error}")
        finally:
            self._random.load_state_dict(state)


def figures(event: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """The step and the finite numbers of an event, by split and name."""
    found = {}
    for name, value in event["values"].items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{event['split']}/{name}"] = float(value)
    return int(event["step"]), found


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if prefix + key in OUTSIDE_IDENTITY or key in ("implementation", "search"):
            continue
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
