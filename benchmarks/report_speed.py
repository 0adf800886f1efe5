"""Seconds that `transfer report` takes over run folders that are written for it.

    python benchmarks/report_speed.py --runs 1000 10000

The folders have what a run's have of the files that a report reads, in their usual sizes: 2 pairs, 5 methods, seeds 0 to 4, and as
many settings of each method as it takes. Each command runs in a process of its own, its imports included; the best of
`--repeat`, wall clock and processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from transfer_cli.config.folders import packaged_folder
from transfer_cli.config.schema import Config

PAIRS = (("synth_digits", "digits"), ("digits", "synth_digits"))
METHODS = ("source_only", "dann", "deep_coral", "mcc", "cdan")
SEEDS = 5
GROUPS = {"backbone": "small_cnn", "optimizer": "sgd", "schedule": "inverse_decay", "augment": "digits"}
EVALUATIONS, INTERVALS = 15, 75  # of 1,500 steps
DISTINCT = 97  # files of metrics
FIGURES = ("accuracy", "macro_f1", "nll", "brier", "ece", "ece_equal_mass")
SCORES = ("source_val", "im", "entropy", "snd", "dev", "bnm", "mmd", "rankme")
COMMANDS = {
    "report": [],
    "--format json": ["--format", "json"],
    "--select im": ["--select", "im"],
    "--validators": ["--validators"],
}


def component(group: str, name: str) -> dict[str, Any]:
    return {"name": name, **yaml.safe_load((packaged_folder() / group / f"{name}.yaml").read_text())}


def write_runs(folder: Path, count: int) -> None:
    points = count // (len(PAIRS) * len(METHODS) * SEEDS)
    for pair in PAIRS:
        for method in METHODS:
            for point in range(points):
                for seed in range(SEEDS):
                    write_run(folder, pair, method, point, seed)


@cache
def config_text(pair: tuple[str, str], method: str) -> str:
    """With placeholders for what differs within a sweep."""
    config = asdict(Config()) | {group: component(group, name) for group, name in GROUPS.items()}
    config |= {side: component("dataset", name) for side, name in zip(("source", "target"), pair, strict=True)}
    config |= {"method": component("method", method), "seed": "SEED"}
    config["optimizer"]["lr"] = "RATE"
    return yaml.safe_dump(config, sort_keys=False)


@cache
def metrics_text(number: int) -> str:
    rng, events = random.Random(number), []
    for i in range(1, INTERVALS + 1):
        where = {"step": 20 * i, "phase": "adapt"}
        events += [{**where, "split": "train", "values": {"supervised": rng.random(), "domain": rng.random()}}]
        events += [{**where, "split": "diagnostics", "values": {"discriminator_accuracy": rng.random()}}]
        if i % (INTERVALS // EVALUATIONS) == 0:
            for name, names in {"validators": SCORES, "target_test": FIGURES, "health": SCORES}.items():
                events.append({**where, "split": name, "values": {n: rng.random() for n in names}})
    return "".join(json.dumps(event) + "\n" for event in events)


def write_run(folder: Path, pair: tuple[str, str], method: str, point: int, seed: int) -> None:
    number = 1000 * point + seed
    rng = random.Random(number)
    path = folder / "-".join(pair) / f"{method}-seed{seed}-{point:08x}"
    path.mkdir(parents=True)
    text = config_text(pair, method).replace("SEED", str(seed)).replace("RATE", str(0.001 * (1 + point)))
    (path / "config.yaml").write_text(text)
    (path / "metrics.jsonl").write_text(metrics_text(number % DISTINCT))

    figures, scores = ({name: rng.random() for name in names} for names in (FIGURES, SCORES))
    split = {"source_test": figures, "target_test": figures}
    result = {
        "schema_version": 1,
        "source": pair[0],
        "target": pair[1],
        "backbone": "small_cnn",
        "method": method,
        "seed": seed,
        "data_seed": 0,
        "kind": "classification",
        "classes": [str(i) for i in range(10)],
        "metrics": split,
        "validators": scores,
        "steps": 1500,
        "device": "cpu",
        "selection": {"validator": "im", "uses_target_labels": False, "candidates": EVALUATIONS, "step": 1500},
        "health": {"proxy_a_distance": 1.0, "warnings": []},
    }
    names = {"source": pair[0], "target": pair[1], "method": method, **GROUPS}
    manifest = {
        "components": {group: {"name": name, "version": 1} for group, name in names.items()},
        "machinery": 2,
        "transfer": "0.1.0",
        "libraries": {str(i): "1.2.3" for i in range(8)},
        "seed": seed,
        "command": ["transfer", "run", f"method={method}", f"seed={seed}"],
    }
    status = {"state": "finished", "time": "2026-11-25T10:00:00+0000"}
    for name, content in {"result": result, "manifest": manifest, "status": status}.items():
        (path / f"{name}.json").write_text(json.dumps(content, indent=2))


def measured(folder: Path, arguments: list[str], repeat: int) -> tuple[float, float]:
    """Seconds of wall clock and of the processor, the best of each."""
    found = []
    for _ in range(repeat):
        before, began = os.times(), time.perf_counter()
        command = [sys.executable, "-m", "transfer_cli", "report", str(folder), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - began, os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        found.append((wall, used))
    return min(wall for wall, _ in found), min(used for _, used in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1000])
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    print("| runs | command | seconds | of processor |\n|---:|---|---:|---:|")
    for count in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            write_runs(Path(folder), count)
            for name, extra in COMMANDS.items():
                wall, used = measured(Path(folder), extra, arguments.repeat)
                print(f"| {count:,} | `{name}` | {wall:.2f} | {used:.2f} |", flush=True)


if __name__ == "__main__":
    main()
