"""`transfer plan [WORDS OF run -m]`: what a sweep would run, what is finished or failed, and how long the rest may take."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from transfer_cli.commands.run import MULTIRUN, RETRY
from transfer_cli.config.hydra_glue import call_hydra
from transfer_cli.errors import TransferError
from transfer_cli.sweep.expected import PastRuns, plain
from transfer_cli.sweep.jobs import Job

HELP = """usage: transfer plan [WORDS] [--runs]

What `transfer run -m WORDS` would do, and nothing is run: what is finished, running elsewhere, interrupted, failed or new, and
how long the rest takes by the median of past runs of the same method, backbone, data and steps (one after another, on this kind
of device). WORDS are those of `transfer run -m`, sweep=random n=20 and --retry-failed included.

  --runs    a line for each run
"""
STATES = ("finished", "running", "interrupted", "failed", "refused", "new")
SHOWN = 10  # of the runs that failed


def main(argv: list[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    words = ["retry_failed=true" if a == RETRY else a for a in argv if a not in (*MULTIRUN, "--runs")]
    for word in words:
        if word in ("sweep=optuna", "hydra/sweeper=optuna", "hydra/sweeper=basic"):
            raise TransferError(
                f"{word} cannot be planned: its runs are not known before they are run, or not to transfer."
            )
    call_hydra(Plan("--runs" in argv), ["-m", *words])
    return 0


class Plan:
    """What the sweeper finds in the place of a task to run."""

    def __init__(self, each: bool) -> None:
        self.each = each

    def __call__(self, composed: DictConfig) -> Any:
        """Called by another sweeper, for a job."""
        raise TransferError(
            "this sweep cannot be planned: its sweeper is another than sweep=grid's and sweep=random's."
        )

    def plan(self, jobs: Sequence[Job]) -> None:
        _show(jobs, self.each)


def _show(jobs: Sequence[Job], each: bool) -> None:
    seconds = _expected(jobs)
    rows: dict[tuple[str, str], list[int]] = {}
    for number, job in enumerate(jobs):
        rows.setdefault(_row(job), []).append(number)
    shown = [state for state in STATES if any(job.state == state for job in jobs)]
    table = [["", "", "runs", *shown, "to run", "a run", "in all"]]
    for (method, pair), numbers in rows.items():
        table.append([method, pair, *_cells([(jobs[n], seconds[n]) for n in numbers], shown)])
    if len(rows) > 1:
        table.append(["all", "", *_cells(list(zip(jobs, seconds, strict=True)), shown, alone=False)])
    print("\n".join(_aligned(table)))
    _tell_failed(jobs)
    if each:
        print()
        for job, expectation in zip(jobs, seconds, strict=True):
            about = f"  about {duration(expectation)}" if expectation is not None and job.is_to_run() else ""
            print(f"{job.state:12}{' '.join(job.words)}{about}")


def _expected(jobs: Sequence[Job]) -> list[float | None]:
    """Seconds of each job's run."""
    from transfer_cli.loops.devices import choose_device

    past: dict[str, PastRuns] = {}
    devices: dict[str, str] = {}
    found: list[float | None] = []
    for job in jobs:
        if job.config is None or job.folder is None:
            found.append(None)
            continue
        wanted, outputs = job.config.device, job.config.outputs
        if wanted not in devices:
            devices[wanted] = choose_device(wanted).type
        runs = past.setdefault(outputs, PastRuns(outputs))
        found.append(runs.seconds(job.folder, plain(job.config), devices[wanted]))
    return found


def _row(job: Job) -> tuple[str, str]:
    """Method and pair."""
    if job.folder is None:
        return next((w.partition("=")[2] for w in job.words if w.startswith("method=")), "?"), "?"
    return job.folder.path.name.rpartition("-seed")[0], job.folder.path.parent.name.replace("-", " -> ", 1)


def _cells(jobs: Sequence[tuple[Job, float | None]], shown: Sequence[str], alone: bool = True) -> list[str]:
    """Numbers by state, what is to run, and its time."""
    states = Counter(job.state for job, _ in jobs)
    left = [seconds for job, seconds in jobs if job.is_to_run() and job.state != "refused"]
    known = [seconds for seconds in left if seconds is not None]
    one = duration(sum(known) / len(known)) if known else "unknown"
    whole = duration(sum(known)) if known else "unknown"
    if known and len(known) < len(left):
        whole += f" + {len(left) - len(known)} unknown"
    times = [one if alone else "", whole] if left else ["", ""]
    return [str(len(jobs)), *(str(states[state] or "") for state in shown), str(len(left) or ""), *times]


def _tell_failed(jobs: Sequence[Job]) -> None:
    """Why runs failed, and which words are refused."""
    for state, hint in (("failed", "--retry-failed runs them again"), ("refused", "the words are wrong")):
        found = [job for job in jobs if job.state == state]
        if found:
            print(f"\n{state} ({hint}):")
            for job in found[:SHOWN]:
                where = " ".join(job.words) if job.folder is None else os.path.relpath(job.folder.path)
                print(f"  {where}\n    {' '.join(str(job.error).split())}")
            if len(found) > SHOWN:
                print(f"  and {len(found) - SHOWN} more: --runs names them")


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def duration(seconds: float) -> str:
    """`42 s`, `3:05`, `2:10:00`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return time.strftime("%M:%S" if seconds < 3600 else f"{int(seconds // 3600)}:%M:%S", time.gmtime(seconds)).lstrip(
        "0"
    )
