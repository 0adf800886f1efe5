"""How long `transfer plan` takes, by the number of runs: python benchmarks/sweep_planning.py

Each row is the whole command in a process of its own, from the shell.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time

METHODS = "dann,cdan,deep_coral,mcd,coral"
SWEEPS = {
    1: ["method=dann"],
    100: [f"method={METHODS}", "sweep=random", "n=10", "seed=0,1"],
    1000: [f"method={METHODS}", "sweep=random", "n=40", "seed=0,1,2,3,4"],
}


def main() -> None:
    print("runs    seconds    seconds of CPU")
    with tempfile.TemporaryDirectory() as folder:
        for runs, words in SWEEPS.items():
            command = [sys.executable, "-m", "transfer_cli", "plan", *words, "--runs"]
            began, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            assert len(shown.split("\n\n")[-1].splitlines()) == runs, shown
            cpu = after.ru_utime + after.ru_stime - spent.ru_utime - spent.ru_stime
            print(f"{runs:4}{time.perf_counter() - began:11.1f}{cpu:18.1f}")


if __name__ == "__main__":
    main()
