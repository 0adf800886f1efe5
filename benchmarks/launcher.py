"""What running jobs side by side brings, and what a job costs that is started by the launcher instead of by hand.

    python benchmarks/launcher.py [--steps 400] [--runs 4] [--repeats 3]

Throughput: a sweep of `method=dann` over seeds, one after another in one process (with one thread, and with all cores) and under
`jobs=2` (one thread each). Wall-clock seconds of the whole command, imports included.

Overhead: the seconds of a job beyond those that its run accounts for itself (`seconds` in result.json: load, fit,
evaluate). For a bare `transfer run` that is the start of Python, the imports, composing and the figures; under the launcher the
imports are shared. Other work on the machine distorts all of it: the load average is printed beside each figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMON = ["method=dann", "device=cpu", "trainer.eval_every=100"]


def sweep(folder: str, *overrides: str, multirun: bool = True) -> tuple[float, str]:
    """Wall-clock seconds of `transfer run` in a new folder, and what it printed.

    Raises:
        CalledProcessError: the command failed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "transfer_cli", "run", *(["-m"] if multirun else []), *COMMON, *overrides]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


def own_seconds(folder: str) -> list[float]:
    """What the runs in a folder account for themselves, in the order of their seeds."""
    results = [json.loads(p.read_text()) for p in Path(folder).rglob("result.json")]
    return [sum(r["seconds"].values()) for r in sorted(results, key=lambda r: r["seed"])]


def throughput(steps: int, seeds: str) -> dict[str, float]:
    """Seconds of each way, one after another, so that they meet the same machine."""
    ways = {
        "one after another, 1 thread": ["threads=1"],
        "one after another, all cores": [],
        "jobs=2, 1 thread each": ["threads=1", "jobs=2"],
    }
    found = {}
    for name, words in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name], _ = sweep(folder, f"trainer.steps={steps}", f"seed={seeds}", *words)
    return found


def overhead(seeds: str) -> dict[str, list[float]]:
    """Seconds beyond a run's own: of bare runs, and the mean of jobs of the launcher, with the shared imports in it."""
    found: dict[str, list[float]] = {"bare": [], "launcher": []}
    for seed in seeds.split(","):
        with tempfile.TemporaryDirectory() as folder:
            wall, _ = sweep(folder, "experiment=smoke", "threads=1", f"seed={seed}", multirun=False)
            found["bare"].append(wall - own_seconds(folder)[0])
    with tempfile.TemporaryDirectory() as folder:
        wall, _ = sweep(folder, "experiment=smoke", "threads=1", f"seed={seeds}", "jobs=1")
        own = own_seconds(folder)
        found["launcher"] = [(wall - sum(own)) / len(own)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seeds = ",".join(str(seed) for seed in range(options.runs))
    ratios: dict[str, list[float]] = {}
    for repeat in range(options.repeats):
        found = throughput(options.steps, seeds)
        side_by_side = found["jobs=2, 1 thread each"]
        print(f"repeat {repeat + 1}, {options.runs} runs of {options.steps} steps, load {os.getloadavg()[0]:.1f}")
        for name, seconds in found.items():
            ratios.setdefault(name, []).append(seconds / side_by_side)
            print(f"  {name:30}{seconds:8.1f} s   {seconds / side_by_side:5.2f} times jobs=2", flush=True)
    for name, values in ratios.items():
        print(f"median: {name:30}{statistics.median(values):5.2f}")
    spent = overhead(seeds)
    print(f"overhead, load {os.getloadavg()[0]:.1f}")
    print(f"  bare run, beyond its own seconds           {statistics.median(spent['bare']):6.2f} s")
    print(f"  job of the launcher, shared start included {spent['launcher'][0]:6.2f} s   (mean of {options.runs})")


if __name__ == "__main__":
    main()
