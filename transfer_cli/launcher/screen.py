"""What a sweep shows: a live table on a terminal, a line at each job's end elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence


class Screen:
    """`total` jobs, `jobs` at once."""

    def __init__(self, total: int, jobs: int) -> None:
        self.total, self.jobs = total, jobs
        self.counts: Counter[str] = Counter()
        self.terminal = sys.stdout.isatty()
        self._lines = 0  # of the table that stands there
        self._drawn = 0.0
        self._spent: list[float] = []  # seconds of the jobs that ended

    def show(self, running: Sequence[tuple[str, float, str]]) -> None:
        """The table: for each job its overrides, its seconds so far and the last line of its log."""
        if not self.terminal or time.monotonic() - self._drawn < 0.4:
            return
        self._drawn = time.monotonic()
        self._erase()
        width = shutil.get_terminal_size().columns
        waiting = self.total - sum(self.counts.values()) - len(running)
        parts = [f"{len(running)} running", *(f"{self.counts[s]} {s}" for s in ("done", "failed")), f"{waiting} to go"]
        left = self.seconds_left([seconds for _, seconds, _ in running], waiting)
        lines = ["   ".join(parts) + (f"   about {duration(left)} left" if left is not None else "")]
        lines += [f"  {duration(seconds):>8}  {words}    {last}" for words, seconds, last in running]
        for line in lines:
            sys.stdout.write(line[: width - 1] + "\n")
        sys.stdout.flush()
        self._lines = len(lines)

    def seconds_left(self, running: Sequence[float], waiting: int) -> float | None:
        """By the mean of the jobs that ended; None before the first."""
        if not self._spent:
            return None
        mean = sum(self._spent) / len(self._spent)
        return (sum(max(mean - seconds, 0) for seconds in running) + mean * waiting) / self.jobs

    def ended(self, state: str, words: str, seconds: float, more: str) -> None:
        """A job is `done`, `failed` or `stopped`; `more`: its figure, or why."""
        self.counts[state] += 1
        self._spent.append(seconds)
        place = f"[{sum(self.counts.values())}/{self.total}]"
        self.say("  ".join(part for part in (place, state, duration(seconds), words, more) if part))

    def say(self, line: str) -> None:
        """A line that stays."""
        self._erase()
        print(line, flush=True)
        self._drawn = 0.0

    def close(self) -> None:
        self._erase()

    def _erase(self) -> None:
        if self._lines:
            sys.stdout.write(f"\033[{self._lines}F\033[J")
            sys.stdout.flush()
            self._lines = 0


def duration(seconds: float) -> str:
    """`42 s`, `3:05`, `2:10:00`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
