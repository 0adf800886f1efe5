"""A run that was stopped, in whatever way and moment, ends bit-identical to one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome
from PIL import Image

from transfer_cli import cli
from transfer_cli.data.batching import Stream
from transfer_cli.loops.checkpoints import Checkpoints

Transfer = Callable[..., Outcome]

IN_MEMORY = [*SMALL, "method=dann", "trainer.log_every=7", "trainer.ema=0.9"]


def outcome_of(run: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    last = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    result = json.loads((run / "result.json").read_text())
    del result["seconds"], last["parts"]["clock"]
    return {
        "last": flat(last),
        "best": flat(best),
        "result": result,
        "metrics": (run / "metrics.jsonl").read_text(),
        "predictions": (run / "predictions.npz").read_bytes(),
        "leftovers": [p.name for p in run.rglob("*.tmp")],
    }


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and tensors as one dictionary of comparable values."""
    if isinstance(content, dict):
        return {k: v for key, value in content.items() for k, v in flat(value, f"{prefix}/{key}").items()}
    return {prefix: content.numpy().tobytes() if isinstance(content, torch.Tensor) else repr(content)}


def assert_same(run: Path, expected: dict[str, Any]) -> None:
    found = outcome_of(run)
    assert found["leftovers"] == []
    for part in ("last", "best"):
        assert [k for k in expected[part] if expected[part][k] != found[part].get(k)] == [], part
    assert found == expected


@pytest.fixture
def folder_of_images(tmp_path: Path) -> list[str]:
    """Overrides for a pair of small folders of pictures, read by workers."""
    draw = np.random.default_rng(0)
    for domain in ("a", "b"):
        for c, name in enumerate(("dark", "light", "striped")):
            (tmp_path / domain / name).mkdir(parents=True)
            for i in range(40):
                pixels = draw.integers(0, 100, (20, 24, 3)) + 70 * c
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / domain / name / f"{i}.png")
    return [
        "source=image_folder", f"source.path={tmp_path}/a", "target=image_folder", f"target.path={tmp_path}/b",
        "image.size=16", "image.storage=files", "augment=photo", "method=source_only", "threads=1", "device=cpu",
        "trainer.steps=12", "trainer.batch_size=16", "trainer.eval_every=6", "trainer.checkpoint_every=3", "trainer.log_every=4",
    ]  # fmt: skip


def stop_at(monkeypatch: pytest.MonkeyPatch, call: int, number: int = signal.SIGTERM, stream: str = "source") -> None:
    """Send this process a signal at the `call`-th batch of a stream."""
    original, seen = Stream.indices, [0]

    def indices(self: Stream, step: int) -> torch.Tensor:
        if self.name == stream:
            seen[0] += 1
            if seen[0] == call:
                signal.raise_signal(number)
        return original(self, step)

    monkeypatch.setattr(Stream, "indices", indices)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_the_run_goes_on_exactly(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    whole = transfer("run", *IN_MEMORY)
    expected = outcome_of(whole.run)
    with monkeypatch.context() as patch:
        stop_at(patch, 13, number)
        stopped = transfer("run", *IN_MEMORY, "force=true")
    assert stopped.code == code
    assert not (whole.run / "result.json").exists()
    position = torch.load(whole.run / "checkpoints" / "last.pt", weights_only=True)["position"]
    assert position["step"] == 13  # between two intervals of the log
    again = transfer("run", *IN_MEMORY)
    assert again.code == 0 and "going on at step 13/40" in again.out
    assert_same(again.run, expected)


def test_several_phases_and_granted_labels_resume(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        *SMALL,
        "method=delta",
        "target_labels=4",
        "method.source_steps=10",
        "trainer.steps=15",
    ]
    expected = outcome_of(transfer("run", *chosen).run)
    for stream, extra in (
        ("source", ["force=true"]),
        ("target_labelled", []),
    ):  # in the first gradient phase, and the last
        with monkeypatch.context() as patch:
            stop_at(patch, 4, stream=stream)
            assert transfer("run", *chosen, *extra).code == 143
    assert_same(transfer("run", *chosen).run, expected)


def test_another_number_of_workers_changes_nothing(
    transfer: Transfer, monkeypatch: pytest.MonkeyPatch, folder_of_images: list[str]
) -> None:
    expected = outcome_of(transfer("run", *folder_of_images, "workers=0").run)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        assert transfer("run", *folder_of_images, "workers=0", "force=true").code == 143
    assert_same(transfer("run", *folder_of_images, "workers=2").run, expected)
    assert_same(transfer("run", *folder_of_images, "workers=1", "force=true").run, expected)


def test_a_truncated_checkpoint_falls_back_to_the_previous(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = transfer("run", *IN_MEMORY, "trainer.checkpoint_every=5")
    expected = outcome_of(whole.run)
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        transfer("run", *IN_MEMORY, "trainer.checkpoint_every=5", "force=true")
    last = whole.run / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    again = transfer("run", *IN_MEMORY, "trainer.checkpoint_every=5")
    assert again.code == 0 and "going on at step 10/40" in again.out
    assert_same(whole.run, expected)


def test_a_broken_checkpoint_never_replaces_a_whole_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "id")
    for step in (1, 2):
        checkpoints.save({"phase": 0, "step": step, "global_step": step})
    (tmp_path / "last.pt").write_bytes(b"half of it")
    assert (checkpoints.open() or {})["step"] == 1
    assert not (tmp_path / "last.pt").exists(), "or the next save would move it over the whole one"


def test_lost_metrics_are_not_made_up(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 25)
        assert transfer("run", *IN_MEMORY).code == 143
    next(Path("outputs").rglob("metrics.jsonl")).unlink()
    again = transfer("run", *IN_MEMORY)
    assert again.code == 0
    assert all(json.loads(line) for line in (again.run / "metrics.jsonl").read_text().splitlines())


def test_a_checkpoint_of_another_configuration_is_refused(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    other = transfer("run", *SMALL, "seed=5")
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        transfer("run", *SMALL)
    run = next(p for p in other.run.parent.iterdir() if p != other.run)
    (run / "checkpoints" / "last.pt").write_bytes((other.run / "checkpoints" / "last.pt").read_bytes())
    refused = transfer("run", *SMALL)
    assert refused.code == 2 and "another configuration" in refused.err and "force=true" in refused.err


def test_a_sweep_typed_again_finishes_only_what_is_missing(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ["-m", *SMALL, "method=source_only,dann", "seed=0,1", "trainer.steps=10"]
    with monkeypatch.context() as patch:
        stop_at(patch, 10 + 4)  # in the second run
        assert transfer("run", *sweep).code == 143
    again = transfer("run", *sweep)
    assert again.code == 0
    assert "1 finished before" in again.out and again.out.count("going on at step 4/10") == 1
    assert again.out.count("next: transfer report") == 3
    once_more = transfer("run", *sweep)
    assert "4 finished before" in once_more.out and "next: transfer report" not in once_more.out


def in_a_child(arguments: list[str], seconds: float, number: int) -> int:
    """Run `transfer run` in a forked process, send it a signal after so long, and wait; its exit status."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 1
        try:
            code = cli._main(["run", *arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_process_group_saves_too(
    tmp_path: Path, transfer: Transfer, folder_of_images: list[str], number: int, code: int
) -> None:
    """A scheduler's SIGTERM, like Ctrl-C, reaches the loader's workers as well."""
    chosen = [
        *folder_of_images,
        "workers=2",
        "trainer.steps=4000",
        "trainer.eval_every=4000",
        "trainer.checkpoint_every=4000",
    ]
    command = [sys.executable, "-m", "transfer_cli", "run", *chosen]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        end = time.monotonic() + 60
        while time.monotonic() < end and not [p for p in tmp_path.rglob("metrics.jsonl") if p.stat().st_size]:
            time.sleep(0.05)  # until its workers work
        os.killpg(process.pid, number)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, err
    assert "stopped and saved" in out and err == ""


def storm(transfer: Transfer, chosen: list[str], workers: list[int], strikes: int) -> None:
    """Kill runs at random moments until `strikes` blows of each kind (SIGKILL, SIGTERM) have hit a process at work;
    every run, struck twice at most, is then finished and must be as if untouched."""
    expected = outcome_of(transfer("run", *chosen).run)
    began = time.monotonic()
    run = transfer("run", *chosen, "force=true").run
    duration = time.monotonic() - began
    draw, struck, i = random.Random(0), {signal.SIGKILL: 0, signal.SIGTERM: 0}, 0
    while min(struck.values()) < strikes:
        number = signal.SIGKILL if i % 2 else signal.SIGTERM
        i += 1
        assert i < 10 * strikes, struck
        overrides = [*chosen, f"workers={draw.choice(workers)}", "force=true"]
        for _ in range(2):
            code = in_a_child(overrides, draw.uniform(0, duration), number)
            struck[number] += code != 0
            overrides = [*chosen, f"workers={draw.choice(workers)}"]
        finished = transfer("run", *overrides)
        assert finished.code == 0, finished.err
        assert_same(run, expected)


needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="signals and fork of POSIX")


@needs_fork
def test_killed_at_random_moments(transfer: Transfer) -> None:
    storm(transfer, IN_MEMORY, [0, 2], strikes=1)


@needs_fork
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_in_memory(transfer: Transfer) -> None:
    storm(transfer, IN_MEMORY, [0, 1, 2], strikes=20)


@needs_fork
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_twenty_random_moments_with_workers(transfer: Transfer, folder_of_images: list[str]) -> None:
    storm(transfer, folder_of_images, [0, 1, 2], strikes=20)
