"""`hydra/launcher=local`: jobs of a sweep side by side on this machine. Hydra accepts launchers from this namespace alone, and
imports every module in it at each start, so nothing here is heavy; the work is in `transfer_cli.launcher`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class LocalConf:
    _target_: str = "hydra_plugins.transfer_launcher.LocalLauncher"
    jobs: int = 2  # at once
    gpus: Any = "auto"  # auto: all that are visible here | a list of numbers or UUIDs; each job gets one, in turn


ConfigStore.instance().store(group="hydra/launcher", name="local", node=LocalConf, provider="transfer")


class LocalLauncher(Launcher):
    def __init__(self, jobs: int, gpus: Any) -> None:
        self.jobs, self.gpus = jobs, gpus

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """The jobs' returns in their order.

        Raises:
            TransferError: a setting that makes no sense.
            SystemExit: 130 after Ctrl-C, 143 after SIGTERM; every job has saved.
        """
        from transfer_cli.launcher.local import launch

        return launch(self, job_overrides, initial_job_idx)
