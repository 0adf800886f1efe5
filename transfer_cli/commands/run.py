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
from transfer_cli.run_folder import RunFolder, read_object

MULTIRUN = ("-m", "--multirun")
RETRY = "--retry-failed"  # the flag for retry_failed=true
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"


class Task:
    """What Hydra calls for each job; a launcher may do so in another process, so it can be pickled.

    Errors are kept instead of raised: Hydra would add lines of its own, and in a sweep lose the other runs.
    """

    def __init__(self, show_traceback: bool) -> None:
        self.show_traceback = show_traceback
        self.errors: list[Exception] = []
        self.failed: list[str] = []

    def __call__(self, composed: DictConfig) -> float | None:
        """The run's score, for a sweeper that searches; None where it failed or target labels chose its checkpoint."""
        words = HydraConfig.get().overrides.task
        try:
            config, sweeping = typed(composed), HydraConfig.get().mode == RunMode.MULTIRUN
            if config.sweep.kind != "grid" and not sweeping:
                raise TransferError(f"sweep={config.sweep.kind} is of many runs: add -m.")
            command = ["transfer", "run", *_own_folder(), *(w for w in words if not w.startswith("sweep"))]
            if config.seeds_together > 1:  # torch comes only now: completion and --cfg answer without it
                from transfer_cli.together import run_seeds

                scores = [score(folder) for folder in run_seeds(config, command)]
                known = [s for s in scores if s is not None]
                return sum(known) / len(known) if known else None
            from transfer_cli.experiment import run

            return score(run(config, command))
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                _tell(error, words, self.show_traceback)
                if HydraConfig.get().launcher._target_ != BASIC_LAUNCHER:
                    raise  # another process: only so does the launcher learn of it
            self.errors.append(error)
            self.failed.append(" ".join(words))
            return None

    def failed_elsewhere(self, error: str, overrides: str) -> None:
        """Of a job that failed in another process, or before."""
        self.errors.append(TransferError(error))
        self.failed.append(overrides)


def main(argv: list[str]) -> int:
    """Exit status 0, or 2 where a run of a sweep failed; the error of a single run is raised."""
    argv = ["retry_failed=true" if a == RETRY else a for a in argv]
    argv = sorted(argv, key=lambda a: a not in MULTIRUN)  # to the front: Hydra's parser takes no flag among overrides
    task = Task(os.environ.get("HYDRA_FULL_ERROR") == "1")
    call_hydra(task, argv)
    if task.errors and not _is_sweep(argv):
        raise task.errors[0]
    if task.errors:
        why = [
            f"{words}: {' '.join(str(error).split())}" for words, error in zip(task.failed, task.errors, strict=True)
        ]
        print(f"transfer: {len(task.errors)} of the sweep's runs failed:", *why, sep="\n  ", file=sys.stderr)
    return 2 if task.errors else 0


def _own_folder() -> list[str]:
    """`--config-dir` as it was given, without which the command would mean another thing."""
    sources = HydraConfig.get().runtime.config_sources
    return [word for s in sources if s.provider == "command-line" for word in ("--config-dir", s.path)]


def score(folder: RunFolder) -> float | None:
    """What the selection gave the checkpoint that it chose; None where it has none, or had it of target labels."""
    selection = read_object(folder.result).get("selection", {})
    if selection.get("uses_target_labels", True) or selection["validator"] == "last":
        return None
    return float(selection["score"])


def _tell(error: Exception, overrides: Sequence[str], show_traceback: bool) -> None:
    if show_traceback or not isinstance(error, TransferError):
        traceback.print_exception(error)
    print(f"transfer: {' '.join(str(error).split())} [{' '.join(overrides)}]", file=sys.stderr)


def _is_sweep(argv: Sequence[str]) -> bool:
    return any(a in MULTIRUN or a == "hydra.mode=MULTIRUN" for a in argv)
