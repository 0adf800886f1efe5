"""What a run says: lines to the terminal and to run.log, a progress bar where there is a terminal to show it."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

BAR = "{desc}  {percentage:3.0f} %|{bar:10}| {n_fmt}/{total_fmt}  {elapsed}"


class Console:
    """`say` prints a line and keeps it for run.log; a bar is shown on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._log: Path | None = None
        self._early: list[str] = []
        self._bar: tqdm | None = None
        self.terminal = sys.stderr.isatty()

    def log_to(self, path: Path) -> None:
        """From now on lines go to `path` too, those already said first."""
        self._log = path
        with path.open("a") as file:
            file.writelines(line + "\n" for line in self._early)
        self._early = []

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(line, flush=True)
        self.log(line)

    def log(self, line: str) -> None:
        """A line for run.log alone."""
        if self._log is None:
            self._early.append(line)
        else:
            with self._log.open("a") as file:
                file.write(line + "\n")

    def start(self, name: str, done: int, total: int) -> None:
        """A phase of `total` steps begins (or goes on) at `done`."""
        if self.terminal:
            self._bar = tqdm(total=total, initial=done, desc=name, bar_format=BAR, ascii=" #", leave=True)
        elif done:
            self.say(f"{name}: going on at step {done}/{total}")

    def advance(self, done: int, values: dict[str, float]) -> None:
        if self._bar is not None:
            # not as tqdm's postfix, which would begin with a comma
            self._bar.bar_format = BAR + "".join(f"  {k.replace('_', ' ')} {v:.3g}" for k, v in values.items())
            self._bar.update(done - self._bar.n)

    def milestone(self, name: str, step: int, values: dict[str, float]) -> None:
        """An evaluation's figures: into the log, and to the reader where no bar shows the way."""
        self.note(f"{name} step {step}  " + "  ".join(f"{k} {v:.3g}" for k, v in values.items()))

    def note(self, line: str) -> None:
        """A line for the log, and for the reader where no bar shows the way."""
        if self._bar is None:
            self.say(line)
        else:
            self.log(line)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SeedConsole(Console):
    """The voice of one seed among several that train together: its lines go to its own run.log, its warnings also to the reader."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.last: dict[str, float] = {}  # the figures of its last evaluation

    def say(self, line: str) -> None:
        print(f"seed {self.seed}: {line}", flush=True)
        self.log(line)

    def start(self, name: str, done: int, total: int) -> None:
        if done:
            self.log(f"{name}: going on at step {done}/{total}")

    def milestone(self, name: str, step: int, values: dict[str, float]) -> None:
        self.last = values
        super().milestone(name, step, values)

    def note(self, line: str) -> None:
        self.log(line)
