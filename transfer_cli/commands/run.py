"""`transfer run [OVERRIDES] [HYDRA FLAGS]`: one experiment, or a sweep with -m."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from transfer_cli.config.compose import typed
from transfer_cli.config.hydra_glue import call_hydra
from transfer_cli.errors import TransferError

MULTIRUN = ("-m", "--multirun")
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class Task:
    """What Hydra calls for each job; a launcher may do so in another process, so it can be pickled.

    Errors are kept instead of raised: Hydra would add lines of its own, and in a sweep lose the other runs.
    """

    def __init__(self, show_traceback: bool) -> None:
        self.show_traceback = show_traceback
        self.errors: list[Exception] = []
        self.failed: list[str] = []

    def __call__(self, composed: DictConfig) -> None:
        try:
            from transfer_cli.experiment import run  # torch comes only now: completion and --cfg answer without it

            run(typed(composed), ["transfer", "run", *HydraConfig.get().overrides.task])
        except Exception as error:
            self.errors.append(error)
            self.failed.append(" ".join(HydraConfig.get().overrides.task))
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _tell(error, HydraConfig.get().overrides.task, self.show_traceback)
                if HydraConfig.get().launcher._target_ != BASIC_LAUNCHER:
                    raise  # another process: only so does the launcher learn of it

    def failed_elsewhere(self, error: str, overrides: str) -> None:
        """A launcher's word that a job in another process failed; the launcher has told the user."""
        self.errors.append(TransferError(error))
        self.failed.append(overrides)


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 where a run of a sweep failed; the error of a single run is raised."""
    argv = sorted(argv, key=lambda a: a not in MULTIRUN)  # to the front: Hydra's parser takes no flag among overrides
    task = Task(os.environ.get("HYDRA_FULL_ERROR") == "1")
    call_hydra(task, argv)
    if task.errors and not _is_sweep(argv):
        raise task.errors[0]
    if task.errors:
        print(f"transfer: {len(task.errors)} of the sweep's runs failed:", *task.failed, sep="\n  ", file=sys.stderr)
    return 2 if task.errors else 0


def _tell(error: Exception, overrides: Sequence[str], show_traceback: bool) -> None:
    if show_traceback or not isinstance(error, TransferError):
        traceback.print_exception(error)
    print(f"transfer: {' '.join(str(error).split())} [{' '.join(overrides)}]", file=sys.stderr)


def _is_sweep(argv: Sequence[str]) -> bool:
    return any(a in MULTIRUN or a == "hydra.mode=MULTIRUN" for a in argv)
