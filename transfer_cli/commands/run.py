"""`transfer run [OVERRIDES] [HYDRA FLAGS]`: one experiment, or a sweep with -m."""

from __future__ import annotations

import os
import sys
import traceback

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from transfer_cli.config.compose import typed
from transfer_cli.config.hydra_glue import call_hydra
from transfer_cli.errors import TransferError

_failures: list[str] = []


def main(argv: list[str]) -> int:
    _failures.clear()
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

    def task(composed: DictConfig) -> None:
        if HydraConfig.get().mode == RunMode.RUN:
            _experiment(composed)
            return
        _job_of_a_sweep(composed, show_traceback)

    call_hydra(task, argv)
    if _failures:
        print(f"transfer: {len(_failures)} of the sweep's runs failed; transfer report lists them.", file=sys.stderr)
    return 2 if _failures else 0


def _experiment(composed: DictConfig) -> None:
    from transfer_cli.experiment import run  # torch comes only now: completion and --cfg answer without it

    run(typed(composed))


def _job_of_a_sweep(composed: DictConfig, show_traceback: bool) -> None:
    """A failing run must not take the others with it: it says why, its status keeps it, the sweep goes on."""
    try:
        _experiment(composed)
    except Exception as error:
        overrides = " ".join(HydraConfig.get().overrides.task)
        _failures.append(overrides)
        if show_traceback or not isinstance(error, TransferError):
            traceback.print_exc()
        print(f"transfer: {' '.join(str(error).split())} [{overrides}]", file=sys.stderr)
