"""The gradient loop: minibatches of the task's parts, and in each step a method's updates in order.

Knows no method. Nothing in a step waits for the device: losses are read once an interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_cli.data.batching import Stream
from transfer_cli.data.domain import Part
from transfer_cli.data.task import Unlabelled
from transfer_cli.errors import TransferError
from transfer_cli.loops.features import feature_task
from transfer_cli.loops.metrics_log import GRADIENT_NORM, StepRecord
from transfer_cli.loops.rng import RandomState
from transfer_cli.loops.second_order import SAM, LineSearch, Replay
from transfer_cli.loops.session import Place, Session, steps_of, task_parts
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Batch, Gradient, Labelled, Losses, Moves, Progress, Update

AUTOCAST = {"bf16": torch.bfloat16, "16": torch.float16}


def run_gradient(phase: Gradient, session: Session, place: Place) -> None:
    method, trainer, checkpoints = session.method, session.trainer, session.checkpoints
    steps = steps_of(phase, session)
    if place.start == 0 and phase.on_start is not None:
        phase.on_start()
        session.restart_average()
    optimizers = [optimizer_of(update, session) if update.moves else None for update in phase.updates]
    scaler = torch.amp.GradScaler(session.device.type, enabled=trainer.precision == "16")
    record, losses = StepRecord(), set[str]()
    phase_parts: dict[str, Any] = {f"optimizer{i}": o for i, o in enumerate(optimizers) if o is not None}
    phase_parts |= {"scaler": scaler, "record": record, "rng": RandomState(session.device)}
    batches = batches_of(phase, session, place.start)
    checkpoints.register(**phase_parts)  # the generators last: nothing draws between here and the first step
    stepper = _Stepper(session, phase, scaler)
    every = refresh_every(phase, session)

    session.console.start(phase.name, place.start, steps)
    method.train()
    with closing(batches):  # ends its workers, whatever happens
        for step in range(place.start, steps):
            progress = Progress(step, steps)
            if phase.refresh is not None and step % every == 0:
                phase.refresh.fit(feature_task(session, phase.owner or method, phase.refresh.parts))
                session.follow_buffers()
                method.train()
            batch = next(batches)
            stepper.measure = (step + 1) % trainer.log_every == 0  # a norm costs a little, and nobody reads every one
            for i, (update, optimizer) in enumerate(zip(phase.updates, optimizers, strict=True)):
                if optimizer is not None:
                    set_rates(optimizer, session.schedule(progress.p))
                for _ in range(update.repeats):
                    outcome = stepper(update, optimizer, batch, progress, first=i == 0)
                    record.add(step, {**outcome.terms, **outcome.diagnostics})
                losses.update(outcome.terms)
            if phase.after_step is not None:
                phase.after_step(progress)
            if session.average is not None:  # of the weights that `after_step` leaves, a teacher's among them
                session.average.update_parameters(method)

            done = step + 1
            at_end = done == steps
            if (
                at_end
                or done % trainer.log_every == 0
                or done % trainer.eval_every == 0
                or done % trainer.checkpoint_every == 0
            ):
                log_interval(record, losses, scaler.is_enabled(), phase, session, place, done)
            if phase.predicts and (at_end or done % trainer.eval_every == 0):
                session.monitor.observe(session.evaluated, place.steps_before + done, phase.name, candidate=place.last)
                method.train()
            if not at_end and (done % trainer.checkpoint_every == 0 or session.interrupt.signal is not None):
                checkpoints.save(place.position(done))
                session.leave_if_asked(phase.name, done, steps)
    session.console.stop()
    checkpoints.forget(*phase_parts)


class _Stepper:
    """One update: forward under autocast, backward, clip, step."""

    def __init__(self, session: Session, phase: Gradient, scaler: torch.amp.GradScaler) -> None:
        self.method, self.clip, self.scaler = session.method, session.trainer.clip_norm, scaler
        self.device = session.device
        self.owner: Method = phase.owner or session.method
        precision = session.trainer.precision
        self.autocast = torch.autocast(
            session.device.type, AUTOCAST.get(precision, torch.bfloat16), enabled=precision != "32"
        )
        self.adds_target_term = session.task.target_labelled is not None and not self.owner.handles_target_labels
        self.measure = False  # whether the gradients' norms are recorded

    def __call__(
        self, update: Update, optimizer: Optimizer | None, batch: Batch, progress: Progress, first: bool
    ) -> Losses:
        if optimizer is None:
            with torch.no_grad(), self.autocast:
                return update.objective(batch, progress)
        again = None
        if isinstance(optimizer, SAM | LineSearch):
            again = Replay(lambda: total(self._losses(update, batch, progress, first)), self.method, self.device)
        losses = self._losses(update, batch, progress, first)
        self.method.zero_grad(set_to_none=True)
        if isinstance(optimizer, LineSearch):
            assert again is not None
            with again.without_trace():
                optimizer.minimise(total(losses), again)
            return self._measured(losses, update)
        self.scaler.scale(total(losses)).backward()
        if isinstance(optimizer, SAM):
            assert again is not None
            with again.without_trace(), optimizer.climbed():
                climbed = again()
                self.method.zero_grad(set_to_none=True)
                climbed.backward()
        if self.clip is not None or self.measure:
            self.scaler.unscale_(optimizer)
        losses = self._measured(losses, update)
        if self.clip is not None:
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self.clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        return losses

    def _losses(self, update: Update, batch: Batch, progress: Progress, first: bool) -> Losses:
        with self.autocast:
            losses = update.objective(batch, progress)
            if self.adds_target_term and first and batch.target_labelled is not None:
                term = self.owner.supervised_loss(batch.target_labelled.x, batch.target_labelled.y)
                losses = replace(losses, terms={**losses.terms, "target_supervised": term})
        return losses

    def _measured(self, losses: Losses, update: Update) -> Losses:
        if not self.measure:
            return losses
        return replace(losses, diagnostics={**losses.diagnostics, **_gradient_norms(update.moves)})


def total(losses: Losses) -> Tensor:
    """What is minimised."""
    terms = list(losses.terms.values())
    return sum(terms[1:], terms[0])


def _gradient_norms(moves: Sequence[Moves]) -> dict[str, Tensor]:
    """The norm of each player's gradient, before clipping; zero where the objective does not depend on it."""
    players: dict[str, list[nn.Parameter]] = {}
    for move in moves:
        players.setdefault(move.player, []).extend(move.parameters)
    norms = {}
    for player, parameters in players.items():
        grads = [p.grad for p in parameters if p.grad is not None]
        if parameters:
            norms[GRADIENT_NORM + player] = (
                nn.utils.get_total_norm(grads) if grads else parameters[0].detach().new_zeros(())
            )
    return norms


def refresh_every(phase: Gradient, session: Session) -> int:
    if phase.refresh is None:
        return 0
    if phase.refresh.every is not None:
        return phase.refresh.every
    sizes = [len(part) for part in task_parts(session.task, phase.refresh.parts).values() if part is not None]
    return max(1, max(sizes) // session.trainer.batch_size)


def optimizer_of(update: Update, session: Session) -> Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": list(m.parameters), "lr_scale": m.lr_scale} for m in update.moves if len(m.parameters)
    ]
    if not groups:
        raise TransferError(
            "nothing to train: every parameter is frozen. Set backbone.freeze, or take method=linear_probe."
        )
    optimizer = session.make_optimizer(groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] * group["lr_scale"]
    return optimizer


def set_rates(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def batches_of(phase: Gradient, session: Session, start: int) -> Any:
    """Endless batches of the parts that the task has and the phase reads, from step `start` on."""
    parts = task_parts(session.task, phase.parts)
    streams = {name: _stream(session, phase, name, part, start) for name, part in parts.items() if part is not None}

    def batches() -> Iterator[Batch]:
        try:
            while True:
                drawn = {name: next(stream) for name, stream in streams.items()}
                first = {name: views[0] for name, (views, _) in drawn.items()}
                labelled = {name: Labelled(first[name], y) for name, (_, y) in drawn.items() if y is not None}
                several = {name: views for name, (views, _) in drawn.items() if len(views) > 1}
                yield Batch(labelled.get("source"), first.get("target"), labelled.get("target_labelled"), several)
        finally:
            for stream in streams.values():
                stream.close()  # ends its workers

    return batches()


def _stream(session: Session, phase: Gradient, name: str, part: Part | Unlabelled, start: int) -> Any:
    size = session.trainer.batch_size
    # Few granted labels make a small batch; both domains' own sets must fill one.
    batch_size = min(size, len(part)) if name == "target_labelled" else size
    if batch_size == 1 and any(isinstance(m, nn.BatchNorm1d) for m in session.method.modules()):
        raise TransferError(
            f"a batch of one {name.replace('_', ' ')} sample is nothing that BatchNorm could normalise: set target_labels or "
            "trainer.batch_size to 2 or more."
        )
    stream = Stream(
        part.inputs,
        part.labels if isinstance(part, Part) else None,
        name=name,
        batch_size=batch_size,
        seed=session.seed,
        device=session.device,
        views=[session.augmentation(view, name) for view in phase.views.get(name, ("weak",))],
        workers=session.workers,
        channels_last=session.trainer.channels_last,
    )
    return stream.iterate(start)


def log_interval(
    record: StepRecord, losses: set[str], scaled: bool, phase: Gradient, session: Session, place: Place, done: int
) -> dict[str, float]:
    """Write the means since the last call; they are returned.

    Raises:
        TransferError: one was not finite.
    """
    # Where losses are scaled, a gradient that overflows is a step skipped; elsewhere it would end in the weights.
    gradients = set() if scaled else {name for name in record.names() if name.startswith(GRADIENT_NORM)}
    try:
        values = record.take(losses | gradients)
    except TransferError as error:
        saved = session.checkpoints.saved_step
        kept = (
            f"the last good checkpoint is that of step {saved}"
            if saved is not None
            else "no checkpoint was due before it"
        )
        with suppress(Exception):
            session.console.stop()
        raise TransferError(
            f"{error} of phase '{phase.name}'; {kept}. A lower optimizer.lr or trainer.clip_norm=1 usually helps."
        ) from None
    if values:
        step = place.steps_before + done
        terms = {name: value for name, value in values.items() if name in losses}
        session.metrics.write(step=step, phase=phase.name, split="train", values=terms)
        others = {name: value for name, value in values.items() if name not in losses}
        if others:
            session.metrics.write(step=step, phase=phase.name, split="diagnostics", values=others)
        session.health.interval(step, phase.name, done, terms, others)
    session.console.advance(done, values)
    return values
