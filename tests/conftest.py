"""Shared fixtures: `transfer` run in this process, in a folder of the test's own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from transfer_cli import cli
from transfer_cli.data.readers.synth_digits import SynthDigits

torch.set_num_threads(1)  # tests run beside each other

SMALL = ["experiment=smoke", "threads=1", "device=cpu"]
"""Overrides of a run that takes a second."""


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test does not depend on those before it."""
    torch.manual_seed(0)


DIGITS: dict[Any, Any] = {}


@pytest.fixture
def rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered digits are kept from test to test."""
    load = SynthDigits.load

    def kept(self: SynthDigits) -> Any:
        key = (self.n, self.n_test, self.size, self.render_seed)
        if key not in DIGITS:
            DIGITS[key] = load(self)
        return DIGITS[key]

    monkeypatch.setattr(SynthDigits, "load", kept)


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def run(self) -> Path:
        """The folder that the run's last line names."""
        line = next(line for line in reversed(self.out.splitlines()) if "next: transfer report" in line)
        return Path(line.split()[0]).resolve()


@pytest.fixture
def transfer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """`transfer("run", "method=dann", ...)` in `tmp_path`; an unexpected exception comes through."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["transfer"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    path, root = list(sys.path), logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            code = cli._main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        os.environ["HYDRA_FULL_ERROR"] = "0"
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield call
    sys.path[:] = path
    root.handlers[:], root.level = handlers, level  # Hydra's --info leaves a handler that writes to this test's stderr


@pytest.fixture
def data_root() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    place = os.environ.get("TRANSFER_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("TRANSFER_DATA names no folder of real data sets")
    return Path(place)
