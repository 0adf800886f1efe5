"""What every loop works with, and the walk through a method's phases."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from transfer_cli.config.identity import Identity
from transfer_cli.config.schema import Config, Trainer
from transfer_cli.data.augment import Augment
from transfer_cli.data.batching import check_batch_size, derive_seed
from transfer_cli.data.domain import Part
from transfer_cli.data.task import TransferTask, Unlabelled
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.evaluator import Evaluator
from transfer_cli.loops.checkpoints import Checkpoints, Stateful, read_checkpoint
from transfer_cli.loops.console import Console
from transfer_cli.loops.health import Health, health_of
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.metrics_log import MetricsLog
from transfer_cli.loops.monitor import Monitor
from transfer_cli.loops.rng import seed_all
from transfer_cli.loops.second_order import check_fits
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import ClosedForm, Gradient, Phase
from transfer_cli.registry import Component
from transfer_cli.run_folder import RunFolder

LOOPS: dict[type, str] = {  # the loop registry: imported on use
    Gradient: "transfer_cli.loops.gradient:run_gradient",
    ClosedForm: "transfer_cli.loops.closed_form:run_closed_form",
}


class Clock:
    """Seconds spent, over all the processes that worked on the run: its `share` of theirs, where several seeds train together."""

    def __init__(self, share: float = 1.0) -> None:
        self._start, self.share = time.perf_counter(), share
        self._end: float | None = None

    def seconds(self) -> float:
        return ((self._end or time.perf_counter()) - self._start) * self.share

    def stop(self) -> None:
        self._end = time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._start = time.perf_counter() - state["seconds"] / self.share


@dataclass
class Session:
    method: Method
    task: TransferTask
    trainer: Trainer
    device: torch.device
    seed: int
    workers: int
    augment: Augment
    strong: Augment | None  # where the method asks for strong views
    make_optimizer: Callable[[list[dict[str, Any]]], Optimizer]
    schedule: Callable[[float], float]
    metrics: MetricsLog
    checkpoints: Checkpoints
    console: Console
    interrupt: Interrupt
    monitor: Monitor
    health: Health
    average: AveragedModel | None = None
    clock: Clock = field(default_factory=Clock)

    @property
    def evaluated(self) -> Method:
        """The weights that are evaluated and kept: the running average where there is one."""
        return self.method if self.average is None else self.average.module  # type: ignore[return-value]

    def restart_average(self) -> None:
        """The running average from the weights as they are: what a phase copies at its start is not to lag behind."""
        if self.average is not None:
            self.average.module.load_state_dict(self.method.state_dict())
            self.average.n_averaged.zero_()

    def follow_buffers(self) -> None:
        """The average takes on buffers that were found, whatever their number and shape."""
        if self.average is not None:
            averaged = dict(self.average.module.named_parameters())
            state = self.method.state_dict()
            self.average.module.load_state_dict({key: averaged.get(key, value) for key, value in state.items()})

    def augmentation(self, view: str, part: str) -> Augment | None:
        """That of a view (`weak` or `strong`) of a part; None where it changes nothing."""
        if view == "strong":
            assert self.strong is not None, "the method's `uses_strong` says that it has strong views"
            return self.strong
        return self.augment if self.augment.applies_to(part.removesuffix("_labelled")) else None

    def leave_if_asked(self, phase: str, done: int, steps: int) -> None:
        """After a checkpoint: stop if a signal asked for it.

        Raises:
            SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
        """
        if self.interrupt.signal is not None:
            self.console.say(f"{phase}: stopped and saved at step {done}/{steps}; the same command goes on from here")
            raise SystemExit(128 + self.interrupt.signal)

    def load_best(self) -> None:
        """The weights that the selection kept, into the method."""
        kept = read_checkpoint(self.monitor.best)
        assert kept is not None, "the last phase's end is always evaluated"
        self.method.load_state_dict(kept["method"])


def make_session(
    config: Config,
    components: Mapping[str, Component],
    task: TransferTask,
    method: Method,
    evaluator: Evaluator,
    folder: RunFolder,
    identity: Identity,
    device: torch.device,
    console: Console,
    interrupt: Interrupt,
) -> Session:
    """All that the loops work with.

    Raises:
        TransferError: a batch that the task's parts cannot fill, or a number of steps below 1.
    """
    for phase in method.phases():
        if not isinstance(phase, Gradient):
            continue
        every = None if phase.refresh is None else phase.refresh.every
        for what, count in (("runs for", phase.steps), ("is refreshed every", every)):
            if count is not None and count < 1:
                raise TransferError(f"phase '{phase.name}' {what} {count} steps: at least 1 is needed.")
        for name, part in task_parts(task, phase.parts).items():
            if part is not None and name != "target_labelled":  # few granted labels make a small batch
                check_batch_size(config.trainer.batch_size, name, len(part))
    if "strong" in components and task.input.kind == "sequence":
        raise TransferError(f"method {components['method'].name} needs augmented views, and sequences have none.")
    average = None
    if config.trainer.ema is not None:
        average = AveragedModel(method, multi_avg_fn=get_ema_multi_avg_fn(config.trainer.ema))
    metrics = MetricsLog(folder.metrics)
    optimizer = components["optimizer"]
    trial = optimizer.build([{"params": [torch.zeros(1, requires_grad=True)]}])  # says now what it would refuse later
    check_fits(trial, optimizer.name, config.trainer, method, method.phases())
    best, health = folder.checkpoints / "best.pt", health_of(task, console.say)
    return Session(
        method=method,
        task=task,
        trainer=config.trainer,
        device=device,
        seed=config.seed,
        workers=config.workers,
        augment=components["augment"].build(),
        strong=components["strong"].build() if "strong" in components else None,
        make_optimizer=optimizer.build,
        schedule=components["schedule"].build(),
        metrics=metrics,
        checkpoints=Checkpoints(folder.checkpoints, identity.hash),
        console=console,
        interrupt=interrupt,
        monitor=Monitor(
            evaluator, best, {"identity": identity.hash, "task": task.shape.plain()}, metrics, console, health
        ),
        health=health,
        average=average,
    )


@dataclass(frozen=True)
class Place:
    """Where a phase stands in the whole: its index, whether it is the last, the steps before it, and the step it goes on from."""

    index: int
    last: bool
    steps_before: int
    start: int

    def position(self, step: int) -> dict[str, int]:
        return {"phase": self.index, "step": step, "global_step": self.steps_before + step}


def run_phases(session: Session) -> int:
    """Run, or go on with, the method's phases; the number of gradient steps in all.

    Raises:
        SystemExit: interrupted; the state is saved.
        TransferError: a loss that is not finite.
    """
    phases, position = session.method.phases(), begin(session)
    steps_before = 0
    for index, phase in enumerate(phases):
        if index >= position["phase"]:
            start = position["step"] if index == position["phase"] else 0
            run_phase(phase, session, Place(index, index == len(phases) - 1, steps_before, start))
            session.checkpoints.save(
                {"phase": index + 1, "step": 0, "global_step": steps_before + steps_of(phase, session)}
            )
            session.leave_if_asked(phase.name, steps_of(phase, session), steps_of(phase, session))
        steps_before += steps_of(phase, session)
    return steps_before


def begin(session: Session) -> dict[str, Any]:
    """Restore what a checkpoint holds of all that outlives a phase; the position to go on from."""
    position = session.checkpoints.open()
    if position is None:
        position = {"phase": 0, "step": 0}
        session.metrics.load_state_dict(
            {"bytes": 0}
        )  # a process that died before its first checkpoint may have written some
    parts: dict[str, Stateful] = {"method": session.method, "monitor": session.monitor, "metrics": session.metrics}
    if session.average is not None:
        parts["average"] = session.average
    session.checkpoints.register(**parts, clock=session.clock, health=session.health)
    return position


def run_phase(phase: Phase, session: Session, place: Place) -> None:
    """One phase, in the loop of its kind."""
    if place.start == 0:
        seed_all(derive_seed(session.seed, "phase", place.index), session.device)
        session.health.begin(steps_of(phase, session))
    _loop(phase)(phase, session, place)


def steps_of(phase: Phase, session: Session) -> int:
    if isinstance(phase, Gradient):
        return session.trainer.steps if phase.steps is None else phase.steps
    return 0


def _loop(phase: Phase) -> Callable[[Any, Session, Place], None]:
    reference = LOOPS.get(type(phase))
    if reference is None:
        raise TransferError(f"no loop runs phases of type {type(phase).__name__}.")
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def task_parts(task: TransferTask, wanted: Sequence[str]) -> dict[str, Part | Unlabelled | None]:
    """The parts by name; None for one that the task lacks or that is not wanted."""
    parts = {"source": task.source, "target": task.target_unlabelled, "target_labelled": task.target_labelled}
    return {name: part if name in wanted else None for name, part in parts.items()}
