"""Weights & Biases. Offline unless WANDB_MODE says otherwise: `wandb sync outputs/runs/*/*/wandb/offline-run-*` sends it later.
WANDB_PROJECT and WANDB_ENTITY say where to.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from transfer_cli.sinks import SinkRun


class Wandb:
    def __init__(self, run: SinkRun) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            shutil.rmtree(run.folder / "wandb", ignore_errors=True)  # of before an interruption; it is written anew
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "transfer"),
            id=run.identity,  # a resumed run goes on in the same place; steps that are there already are not taken twice
            resume="allow" if mode == "online" else None,
            name=f"{run.pair}/{run.name}",
            group=run.pair,
            dir=str(run.folder),
            config=dict(run.settings),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, state: str) -> None:
        self.run.finish(exit_code=0 if state == "finished" else 1)
