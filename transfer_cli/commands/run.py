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


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 where a run of a sweep failed; the error of a single run is raised."""
    argv = sorted(argv, key=lambda a: a not in MULTIRUN)  # to the front: Hydra's parser takes no flag among overrides
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    errors: list[Exception] = []
    failed: list[str] = []

    def task(composed: DictConfig) -> None:
        """Errors are kept instead of raised: Hydra would add lines of its own, and in a sweep lose the other runs."""
        try:
            config, command = typed(composed), ["transfer", "run", *HydraConfig.get().overrides.task]
            if config.seeds_together > 1:  # torch comes only now: completion and --cfg answer without it
                from transfer_cli.together import run_seeds

                run_seeds(config, command)
            else:
                from transfer_cli.experiment import run

                run(config, command)
        except Exception as error:
            errors.append(error)
            failed.append(" ".join(HydraConfig.get().overrides.task))
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _tell(error, HydraConfig.get().overrides.task, show_traceback)
                if HydraConfig.get().launcher._target_ != BASIC_LAUNCHER:
                    raise  # another process: only so does the launcher learn of it

    call_hydra(task, argv)
    if errors and not _is_sweep(argv):
        raise errors[0]
    if errors:
        print(f"transfer: {len(errors)} of the sweep's runs failed:", *failed, sep="\n  ", file=sys.stderr)
    return 2 if errors else 0


def _tell(error: Exception, overrides: Sequence[str], show_traceback: bool) -> None:
    if show_traceback or not isinstance(error, TransferError):
        traceback.print_exception(error)
    print(f"transfer: {' '.join(str(error).split())} [{' '.join(overrides)}]", file=sys.stderr)


def _is_sweep(argv: Sequence[str]) -> bool:
    return any(a in MULTIRUN or a == "hydra.mode=MULTIRUN" for a in argv)
