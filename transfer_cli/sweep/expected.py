"""How long a run will take, by the finished runs that were like it. Reads files alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from transfer_cli.config.schema import Config
from transfer_cli.run_folder import RunFolder, read_json

LOOKED_AT = 20  # of the newest finished runs of a method on a pair: their config.yaml takes milliseconds to read
DATA = ("source", "target", "subset", "image", "protocol", "target_labels")
WORK = ("steps", "batch_size", "eval_every", "precision", "compile")  # of the trainer


class PastRuns:
    """The seconds of finished runs under `outputs`."""

    def __init__(self, outputs: str | Path) -> None:
        self.runs = Path(outputs) / "runs"
        self._seconds: dict[tuple[str, str], dict[str, list[float]]] = {}

    def seconds(self, folder: RunFolder, config: Mapping[str, Any], device: str) -> float | None:
        """The median over runs of the same method, backbone, data, steps and kind of device; None where there is none.

        `folder`: the run's own, which names pair and method; `config`: its configuration as plain values.
        """
        place = folder.path.parent.name, folder.path.name.rpartition("-seed")[0]
        if place not in self._seconds:
            self._seconds[place] = self._read(*place)
        found = self._seconds[place].get(_kind(config, device), [])
        return statistics.median(found) if found else None

    def _read(self, pair: str, method: str) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {}
        for folder in _newest((self.runs / pair).glob(f"{method}-seed*/result.json")):
            result = read_json(folder.result)
            try:
                config = yaml.load(folder.config.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
                kind = _kind(config, str(result["device"]).partition(":")[0])
                seconds.setdefault(kind, []).append(sum(result["seconds"].values()))
            except (
                OSError,
                yaml.YAMLError,
                KeyError,
                TypeError,
                AttributeError,
            ):  # a run of another version, or damaged
                continue
        return seconds


def plain(config: Config) -> dict[str, Any]:
    """What of a configuration says how long a run takes."""
    return {
        **{key: getattr(config, key) for key in ("source", "target", "backbone", "protocol", "target_labels")},
        "subset": asdict(config.subset),
        "image": asdict(config.image),
        "trainer": asdict(config.trainer),
    }


def _newest(results: Iterable[Path]) -> list[RunFolder]:
    by_age = sorted(results, key=lambda path: path.stat().st_mtime, reverse=True)
    return [RunFolder(path.parent) for path in by_age[:LOOKED_AT]]


def _kind(config: Mapping[str, Any], device: str) -> str:
    """What two runs must have in common for one to tell the other's time."""
    same = [
        device,
        config["backbone"]["name"],
        *(config[key] for key in DATA),
        *(config["trainer"][key] for key in WORK),
    ]
    return json.dumps(same, sort_keys=True, default=str)
