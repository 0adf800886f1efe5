"""The gradient loop's parts: what is recorded, half precision, divergence, and workers that end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, Outcome
from PIL import Image
from torch import nn

from transfer_cli.data import batching
from transfer_cli.data.inputs import ImageFiles
from transfer_cli.errors import TransferError
from transfer_cli.loops.metrics_log import StepRecord
from transfer_cli.loops.optimizers import sgd

Transfer = Callable[..., Outcome]


def test_a_term_that_comes_later_is_recorded_and_watched() -> None:
    record = StepRecord()
    record.add(0, {"ce": torch.tensor(1.0)})
    record.add(1, {"ce": torch.tensor(3.0), "transfer": torch.tensor(5.0)})
    assert record.take({"ce", "transfer"}) == {"ce": 2.0, "transfer": 5.0}
    assert record.take({"ce"}) == {}
    record.add(2, {"ce": torch.tensor(1.0)})
    record.add(3, {"transfer": torch.tensor(float("nan"))})
    with pytest.raises(TransferError, match="'transfer' became nan at step 4"):
        record.take({"ce", "transfer"})


def test_every_repeat_of_an_update_is_watched() -> None:
    record = StepRecord()
    record.add(0, {"critic": torch.tensor(float("inf"))})
    record.add(0, {"critic": torch.tensor(1.0)})
    with pytest.raises(TransferError, match="'critic' became inf at step 1"):
        record.take({"critic"})


def test_the_record_keeps_no_graph_and_survives_a_checkpoint() -> None:
    record, restored = StepRecord(), StepRecord()
    weight = torch.ones((), requires_grad=True)
    record.add(4, {"ce": 2 * weight})
    record.add(5, {"ce": 4 * weight, "late": weight})
    assert not any(value.requires_grad for values in record._values.values() for value in values)
    restored.load_state_dict(record.state_dict())
    assert restored.take({"ce"}) == {"ce": 3.0, "late": 1.0}


def test_sgd_survives_a_first_step_that_the_loss_scale_skips() -> None:
    layer = nn.Linear(3, 2)
    optimizer = sgd([{"params": list(layer.parameters())}], lr=0.1, momentum=0.9, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    start = layer.weight.detach().clone()
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, start)
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, scaler.get_scale())
    scaler.step(optimizer)
    torch.testing.assert_close(layer.weight, start - 0.1 * 1.9)  # Nesterov's first step: lr (1 + momentum) g


@pytest.mark.parametrize("precision", ["16", "bf16"])
def test_half_precision_trains(transfer: Transfer, precision: str) -> None:
    outcome = transfer("run", *SMALL, f"trainer.precision={precision}")
    assert outcome.code == 0, outcome.err


def test_weights_that_diverge_in_the_last_step_are_one_line(transfer: Transfer) -> None:
    outcome = transfer("run", *SMALL, "method=source_only", "trainer.steps=1", "optimizer.lr=1e30")
    assert outcome.code == 2 and "the predictions are not finite" in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """A folder of pictures, read by two workers, one of them cut in its body: its header still opens."""
    draw = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(draw.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(
                tmp_path / "pictures" / name / f"{i}.png"
            )
    cut = tmp_path / "pictures" / "dark" / "7.png"
    cut.write_bytes(cut.read_bytes()[:1500])
    folders = [f"{group}=image_folder" for group in ("source", "target")]
    paths = [f"{group}.path={tmp_path}/pictures" for group in ("source", "target")]
    return [
        *folders, *paths, "image.size=16", "image.storage=files", "workers=2", "method=source_only", "threads=1", "device=cpu",
        "trainer.batch_size=8", "trainer.steps=20", "trainer.eval_every=20",
    ]  # fmt: skip


def test_a_workers_error_ends_the_workers_too(transfer: Transfer, pictures: list[str]) -> None:
    outcome = transfer("run", *pictures)
    assert outcome.code == 2 and "7.png" in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err
    assert multiprocessing.active_children() == []


def test_an_error_in_the_loop_ends_the_workers_too(transfer: Transfer, pictures: list[str]) -> None:
    skip = ["source.skip_unreadable=true", "target.skip_unreadable=true"]
    outcome = transfer("run", *pictures, *skip, "optimizer.lr=1e25")
    assert outcome.code == 2, outcome.err
    assert multiprocessing.active_children() == []


def test_a_truncated_image_is_skipped_and_counted_if_allowed(transfer: Transfer, pictures: list[str]) -> None:
    outcome = transfer("run", *pictures, "source.skip_unreadable=true", "target.skip_unreadable=true")
    assert outcome.code == 0, outcome.err
    assert "1 unreadable image skipped: dark/7.png" in outcome.out


def test_a_signal_that_finds_workers_starting_does_not_kill_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Between its fork and its own word on signals a worker would die of one sent to the whole group."""
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    inputs = ImageFiles([str(tmp_path / f"{i}.png") for i in range(8)], size=8)
    own = batching._own_signals

    def late(worker: int) -> None:
        time.sleep(0.5)
        own(worker)

    monkeypatch.setattr(batching, "_own_signals", late)
    before = set(multiprocessing.active_children())

    def strike() -> None:
        for worker in set(multiprocessing.active_children()) - before:
            os.kill(worker.pid or 0, signal.SIGTERM)

    with closing(batching._loader(inputs, torch.arange(8).split(2), 2, False)) as batches:
        threading.Timer(0.2, strike).start()
        assert [len(x) for _, x in batches] == [2, 2, 2, 2]
    assert set(multiprocessing.active_children()) <= before


def test_workers_left_by_a_failed_start_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(multiprocessing.active_children())

    def start_one_and_fail(loader: object) -> None:
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
        raise RuntimeError("a worker died")

    monkeypatch.setattr(batching.DataLoader, "__iter__", start_one_and_fail)
    with pytest.raises(RuntimeError, match="a worker died"):
        batching._started(batching.DataLoader([1]))  # type: ignore[arg-type]
    assert set(multiprocessing.active_children()) <= before
