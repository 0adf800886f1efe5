"""Event files for TensorBoard, in the run's folder: `tensorboard --logdir outputs/runs` shows every run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from transfer_cli.sinks import SinkRun


class Tensorboard:
    def __init__(self, run: SinkRun) -> None:
        from tensorboardX import SummaryWriter

        place = run.folder / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)
        self.writer = SummaryWriter(str(place))
        settings = "\n".join(f"    {key}: {value}" for key, value in run.settings.items())  # indented: kept as it is
        self.writer.add_text("settings", settings)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, state: str) -> None:
        self.writer.close()
