"""The sweeper of `transfer run -m`: Hydra's grid, with points of a search where `sweep=random` asks for them, less the runs that
are finished. Hydra accepts sweepers from this namespace alone, and imports every module in it at each start, so nothing here is
heavy; the work is in `transfer_cli.sweep`.
"""

from dataclasses import dataclass
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class TransferSweeperConf(BasicSweeperConf):
    _target_: str = "hydra_plugins.transfer_sweeper.TransferSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="transfer", node=TransferSweeperConf, provider="transfer")


class TransferSweeper(BasicSweeper):
    """A task function that has a method `plan` is given the jobs, and none is run."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.task = task_function

    def sweep(self, arguments: list[str]) -> Any:
        """The returns of the jobs that were launched, all in one call of the launcher.

        Raises:
            TransferError: a configuration of no sense.
        """
        from transfer_cli.sweep.jobs import jobs_of, launch

        assert self.config is not None and self.hydra_context is not None
        loader = self.hydra_context.config_loader
        jobs = jobs_of([*self._parse_config(), *arguments], self.config, loader)
        plan = getattr(self.task, "plan", None)
        if plan is not None:
            return plan(jobs)
        assert self.launcher is not None
        return launch(jobs, self.config, self.task, self.launcher, self.max_batch_size)
