"""Several seeds of one experiment in one loop: their networks' tensors stacked, `(S, ...)`, and each operation done for all.

The methods stay as they are: an update's objective is traced over the stack with `torch.func.vmap`, and since seeds share nothing,
the gradient of the sum of their losses is each one's own. Elementwise optimisers step on the stack as on single tensors. What is a
seed's own stays so: initialisation, order of the data, augmentation, dropout's draws (the same numbers on the CPU), BatchNorm's
statistics, evaluation, selection, logs and checkpoints, which are those of a single run: either goes on from the other's.

Sums are rounded differently over a stack. So in float64 the first steps are those of single runs, and in float32 long runs end
statistically alike. That the stack computes what each seed alone would is checked while it runs: losses and gradients, at the first
steps of a phase and after each evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim import Optimizer

from transfer_cli.data.batching import derive_seed
from transfer_cli.errors import TransferError
from transfer_cli.loops.console import Console, SeedConsole
from transfer_cli.loops.features import feature_task
from transfer_cli.loops.gradient import batches_of, log_interval, optimizer_of, refresh_every, set_rates, total
from transfer_cli.loops.metrics_log import GRADIENT_NORM, StepRecord
from transfer_cli.loops.rng import seed_all
from transfer_cli.loops.second_order import SAM, LineSearch
from transfer_cli.loops.session import Place, Session, begin, run_phase, steps_of
from transfer_cli.loops.stack import Bound, CannotStack, Stack, batch_of, losses_of, parts_of, places, stack_trees
from transfer_cli.loops.stack_layers import plain_layers, stackable_layers
from transfer_cli.loops.stack_state import OwnDraws, OwnState, restore
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Gradient, Losses, Moves, Phase, Progress

# Of a loss or gradient over the stack from that of one seed alone, relative and absolute. Rounding shows in the flip of a ReLU at
# most; state that is another seed's, or a term that got lost, shows by tenths.
TOLERANCE = {torch.float32: (2e-2, 2e-6), torch.float64: (1e-7, 1e-10)}
CHECKED = 2  # steps at a phase's start: terms that measure what has moved are zero in the first


def check_stackable(session: Session) -> None:
    """What is known before any work.

    Raises:
        CannotStack: naming what cannot be stacked.
    """
    method, trainer = session.method, session.trainer
    if not any(_is_trained(phase) for phase in method.phases()):
        raise CannotStack("the method trains no network by gradient steps, so there is nothing to stack")
    if trainer.precision != "32":
        raise CannotStack(f"a stack has one precision, trainer.precision=32, and not {trainer.precision}")
    if trainer.compile:
        raise CannotStack("a stack is not compiled: set trainer.compile=false")
    if session.task.input.kind == "sequence":
        raise CannotStack("sequences of different lengths do not stack")
    if session.device.type not in ("cpu", "cuda"):
        raise CannotStack(f"stacks were never tried on {session.device.type}: set device=cpu")
    optimizer = session.make_optimizer([{"params": [torch.zeros(1, requires_grad=True)]}])
    if isinstance(optimizer, SAM | LineSearch):
        raise CannotStack("this optimizer looks at a whole network's norm or loss: set optimizer=sgd, adam or adamw")


def run_together(sessions: Sequence[Session], console: Console) -> tuple[int, dict[int, TransferError]]:
    """Run, or go on with, the phases of sessions that differ in nothing but their seed.

    The number of gradient steps in all, and by index the error of each that failed; the others are not stopped by it.

    Raises:
        SystemExit: interrupted; all states are saved.
        CannotStack: the method does what a stack cannot follow.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for i, session in enumerate(sessions):
        position = begin(session)  # not all need stand where the others do: one may have been run by itself meanwhile
        groups.setdefault((position["phase"], position["step"]), []).append(i)
    failed: dict[int, TransferError] = {}
    for (phase, step), members in groups.items():
        errors = _run_group([sessions[i] for i in members], phase, step, console)
        failed |= {members[i]: error for i, error in errors.items()}
    return sum(steps_of(phase, sessions[0]) for phase in sessions[0].method.phases()), failed


def _run_group(sessions: Sequence[Session], first: int, start: int, console: Console) -> dict[int, TransferError]:
    """From step `start` of phase `first` on."""
    alive, failed = list(range(len(sessions))), dict[int, TransferError]()
    phases = [session.method.phases() for session in sessions]
    before = 0
    for index, phase in enumerate(phases[0]):
        steps = steps_of(phase, sessions[0])
        if index >= first and alive:
            place = Place(index, index == len(phases[0]) - 1, before, start if index == first else 0)
            own = [phases[i][index] for i in alive]
            run = _run_stacked if _is_trained(phase) else _run_in_turn
            errors = run(own, [sessions[i] for i in alive], place, console)
            failed |= {alive[i]: error for i, error in errors.items()}
            alive = [i for i in alive if i not in failed]
            for i in alive:
                sessions[i].checkpoints.save({"phase": index + 1, "step": 0, "global_step": before + steps})
            _leave_if_asked(sessions, console, phase.name, steps, steps)
        before += steps
    return failed


def _is_trained(phase: Phase) -> bool:
    return isinstance(phase, Gradient) and any(update.moves for update in phase.updates)


def _run_in_turn(
    phases: Sequence[Phase], sessions: Sequence[Session], place: Place, console: Console
) -> dict[int, TransferError]:
    """Closed forms and statistics, of each seed by itself."""
    failed: dict[int, TransferError] = {}
    for i, (phase, session) in enumerate(zip(phases, sessions, strict=True)):
        try:
            run_phase(phase, session, place)
        except TransferError as error:
            failed[i] = error
    return failed


def _run_stacked(
    phases: Sequence[Phase], sessions: Sequence[Session], place: Place, console: Console
) -> dict[int, TransferError]:
    return _Together([phase for phase in phases if isinstance(phase, Gradient)], sessions, place, console).run()


def _leave_if_asked(sessions: Sequence[Session], console: Console, phase: str, done: int, steps: int) -> None:
    if (signal := sessions[0].interrupt.signal) is not None:
        console.stop()
        console.say(f"{phase}: stopped and saved at step {done}/{steps}; the same command goes on from here")
        raise SystemExit(128 + signal)


class _Together:
    """One gradient phase of all seeds."""

    def __init__(self, phases: Sequence[Gradient], sessions: Sequence[Session], place: Place, console: Console) -> None:
        self.phases, self.sessions, self.place, self.console = phases, sessions, place, console
        self.phase, self.session = phases[0], sessions[0]  # the pattern of all
        self.steps = steps_of(self.phase, self.session)
        self.failed: dict[int, TransferError] = {}
        self.records = [StepRecord() for _ in sessions]
        self.figures: dict[str, float] = {}
        owner: Method = self.phase.owner or self.session.method
        self.adds = self.session.task.target_labelled is not None and not owner.handles_target_labels
        self.bound = Bound(self.session.method, self.adds, owner)

    def run(self) -> dict[int, TransferError]:
        self.draws = []
        for phase, session in zip(self.phases, self.sessions, strict=True):
            if self.place.start == 0:
                seed_all(derive_seed(session.seed, "phase", self.place.index), session.device)
                session.health.begin(self.steps)
                if phase.on_start is not None:
                    phase.on_start()
                    session.restart_average()
            self.draws.append(OwnDraws(session.device))
        self.stack = Stack([session.method for session in self.sessions])
        try:
            with ExitStack() as inside:
                inside.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="There is a performance drop")  # of rare operations
                inside.enter_context(
                    stackable_layers(
                        self.session.method,
                        [draws.generator for draws in self.draws],
                        self.session.trainer.channels_last,
                    )
                )
                self._train(inside)
        finally:
            self.stack.release()
        return self.failed

    def _train(self, inside: ExitStack) -> None:
        self.places = places(self.session.method)
        trainer, start = self.session.trainer, self.place.start
        self.moves = [self.stack.grouped(update.moves) for update in self.phase.updates]
        optimizers = [
            optimizer_of(replace(update, moves=moves), self.session) if update.moves else None
            for update, moves in zip(self.phase.updates, self.moves, strict=True)
        ]
        streams = [
            inside.enter_context(closing(batches_of(phase, session, start)))
            for phase, session in zip(self.phases, self.sessions, strict=True)
        ]
        names = self._register(optimizers)
        self.console.start(self.phase.name, start, self.steps)
        for session in self.sessions:
            session.method.train()
        check, losses = CHECKED, set[str]()
        for step in range(start, self.steps):
            progress = Progress(step, self.steps)
            if self.phase.refresh is not None and step % refresh_every(self.phase, self.session) == 0:
                self._refresh()
                check = CHECKED
            parts = [parts_of(next(stream)) for stream in streams]
            together = stack_trees(parts)
            measure = (step + 1) % trainer.log_every == 0
            for k, (update, optimizer) in enumerate(zip(self.phase.updates, optimizers, strict=True)):
                if optimizer is not None:
                    set_rates(optimizer, self.session.schedule(progress.p))
                for repeat in range(update.repeats):
                    alone = [] if not check or repeat else self._alone(k, progress, parts)
                    values = self._update(k, optimizer, progress, together, measure, alone)
                    for record, own in zip(self.records, values, strict=True):
                        record.add(step, own)
                losses.update(self.terms)
            check = max(0, check - 1)
            self._after_step(progress)
            done = step + 1
            at_end = done == self.steps
            evaluates = self.phase.predicts and (at_end or done % trainer.eval_every == 0)
            saves = not at_end and (done % trainer.checkpoint_every == 0 or self.session.interrupt.signal is not None)
            if at_end or measure or done % trainer.eval_every == 0 or done % trainer.checkpoint_every == 0:
                self._each(partial(self._log, losses, done))
                self.console.advance(done, self.figures)
            if evaluates:
                self._each(partial(self._observe, done))
                self._tell(done)
                check = 1
            if saves:
                self._each(partial(self._save, done))
                _leave_if_asked(self.sessions, self.console, self.phase.name, done, self.steps)
            if len(self.failed) == len(self.sessions):
                break
        self.console.stop()
        for session in self.sessions:
            session.console.stop()
            session.checkpoints.forget(*names)

    def _register(self, optimizers: Sequence[Optimizer | None]) -> list[str]:
        parts: list[dict[str, Any]] = []
        for i, session in enumerate(self.sessions):
            own: dict[str, Any] = {
                f"optimizer{k}": OwnState(optimizer, i)
                for k, optimizer in enumerate(optimizers)
                if optimizer is not None
            }
            own["scaler"] = torch.amp.GradScaler(session.device.type, enabled=False)
            own |= {"record": self.records[i], "rng": self.draws[i]}
            session.checkpoints.register(**own)
            parts.append(own)
        for name in parts[0]:
            if name.startswith("optimizer"):
                restore([own[name] for own in parts])
        return list(parts[0])

    def _each(self, act: Callable[[int], None]) -> None:
        """For every seed that has not failed; one that fails now is only itself lost."""
        for i in range(len(self.sessions)):
            if i not in self.failed:
                try:
                    act(i)
                except TransferError as error:
                    self.failed[i] = error

    def _refresh(self) -> None:
        for phase, session, draws in zip(self.phases, self.sessions, self.draws, strict=True):
            assert phase.refresh is not None
            with draws.installed(), plain_layers(session.method):
                phase.refresh.fit(feature_task(session, phase.owner or session.method, phase.refresh.parts))
            session.follow_buffers()
            session.method.train()
        self.stack.gather()
        self.places = places(self.session.method)

    def _update(
        self,
        k: int,
        optimizer: Optimizer | None,
        progress: Progress,
        parts: dict[str, Any],
        measure: bool,
        alone: Sequence[tuple[dict[str, Tensor], list[Tensor | None]]],
    ) -> list[dict[str, Tensor]]:
        """One update of all; each seed's values to be recorded."""
        update, first = self.phase.updates[k], k == 0

        def objective(parameters: Any, buffers: Any, own: Any) -> Any:
            tensors = {**parameters, **buffers}
            state = {place: tensors[name] for place, name in self.places.items()}
            return functional_call(self.bound, state, (update, progress, first, own), tie_weights=False)

        with torch.set_grad_enabled(optimizer is not None):
            try:
                terms, diagnostics, buffers = vmap(objective)(self.stack.parameters, self.stack.buffers, parts)
            except RuntimeError as error:
                raise CannotStack(_reason(error)) from error
        self.stack.keep(buffers)
        self.terms = list(terms)
        if optimizer is not None:
            for parameter in self.stack.parameters.values():
                parameter.grad = None
            total(Losses(terms)).sum().backward()
            if alone:
                self._compare(k, terms, alone)
            norms = self._norms(self.moves[k]) if measure else {}
            diagnostics = {**diagnostics, **norms}
            if self.session.trainer.clip_norm is not None:
                self._clip([p for group in optimizer.param_groups for p in group["params"]])
            optimizer.step()
        columns = {name: value.detach().unbind() for name, value in {**terms, **diagnostics}.items()}
        return [{name: column[i] for name, column in columns.items()} for i in range(len(self.sessions))]

    def _norms(self, moves: Sequence[Moves]) -> dict[str, Tensor]:
        players: dict[str, list[Tensor]] = {}
        for move in moves:
            players.setdefault(move.player, []).extend(move.parameters)
        return {GRADIENT_NORM + player: self._norm(tensors) for player, tensors in players.items() if tensors}

    def _norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Of each seed's gradient, `(S,)`."""
        squares = [p.grad.flatten(1).square().sum(1) for p in parameters if p.grad is not None]
        return sum(squares[1:], squares[0]).sqrt() if squares else parameters[0].detach().new_zeros(len(self.sessions))

    def _clip(self, parameters: Sequence[Tensor]) -> None:
        limit = self.session.trainer.clip_norm
        assert limit is not None
        factor = (limit / (self._norm(parameters) + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(factor.view(-1, *(1 for _ in p.shape[1:])))

    def _after_step(self, progress: Progress) -> None:
        for phase, session, draws in zip(self.phases, self.sessions, self.draws, strict=True):
            if phase.after_step is not None:
                with draws.installed():
                    phase.after_step(progress)
            if session.average is not None:
                session.average.update_parameters(session.method)
        if self.phase.after_step is not None:
            self.stack.gather()
            self.places = places(self.session.method)

    def _log(self, losses: set[str], done: int, i: int) -> None:
        values = log_interval(self.records[i], losses, False, self.phases[i], self.sessions[i], self.place, done)
        self.figures = values if i == 0 else self.figures

    def _save(self, done: int, i: int) -> None:
        self.sessions[i].checkpoints.save(self.place.position(done))

    def _observe(self, done: int, i: int) -> None:
        session, place = self.sessions[i], self.place
        with plain_layers(session.method):
            session.monitor.observe(session.evaluated, place.steps_before + done, self.phase.name, candidate=place.last)
        session.method.train()

    def _tell(self, done: int) -> None:
        """The seeds' figures of this evaluation, from the least to the largest."""
        voices = [session.console for i, session in enumerate(self.sessions) if i not in self.failed]
        looks = [voice.last for voice in voices if isinstance(voice, SeedConsole)]
        spans = {name: [look[name] for look in looks] for name in (looks[0] if looks else {})}
        told = "  ".join(f"{name} {min(v):.3g} to {max(v):.3g}" for name, v in spans.items())
        self.console.note(f"{self.phase.name} step {self.place.steps_before + done}  {told}")

    def _alone(
        self, k: int, progress: Progress, parts: Sequence[dict[str, Any]]
    ) -> list[tuple[dict[str, Tensor], list[Tensor | None]]]:
        """What each seed by itself would compute here: loss terms and gradients; its state is left as it was."""
        found: list[tuple[dict[str, Tensor], list[Tensor | None]]] = []
        for phase, session, draws, own in zip(self.phases, self.sessions, self.draws, parts, strict=True):
            update = phase.updates[k]
            if not update.moves:
                continue
            moved = [p for move in update.moves for p in move.parameters]
            buffers = {name: buffer.clone() for name, buffer in session.method.named_buffers()}
            state = draws.state_dict()
            labels_for = (phase.owner or session.method) if self.adds and k == 0 else None
            with plain_layers(session.method):
                draws.all.load_state_dict(state)
                losses = losses_of(update, batch_of(own), progress, labels_for)
                gradients = torch.autograd.grad(total(losses), moved, allow_unused=True)
            draws.load_state_dict(state)
            for name, buffer in session.method.named_buffers():
                buffer.copy_(buffers[name])
            found.append(({n: v.detach() for n, v in losses.terms.items()}, list(gradients)))
        return found

    def _compare(
        self, k: int, terms: Mapping[str, Tensor], alone: Sequence[tuple[dict[str, Tensor], list[Tensor | None]]]
    ) -> None:
        """Raises:
        CannotStack: the stack computes something else."""
        stacked = [p.grad for move in self.moves[k] for p in move.parameters]
        for i, (losses, gradients) in enumerate(alone):
            if i in self.failed:
                continue
            for name, value in losses.items():
                self._same(i, f"the loss term '{name}'", terms[name].detach()[i], value)
            pairs = [(s[i], g) for s, g in zip(stacked, gradients, strict=True) if s is not None and g is not None]
            if pairs:
                ours, own = (torch.cat([pair[j].flatten() for pair in pairs]) for j in (0, 1))
                self._same(i, "the gradient", ours, own)

    def _same(self, i: int, what: str, ours: Tensor, own: Tensor) -> None:
        relative, absolute = TOLERANCE[ours.dtype]
        if not bool(torch.isfinite(own).all()):
            return  # a seed that fails by itself will be told so
        apart, size = float((ours - own).norm()), float(own.norm())
        if not apart <= relative * size + absolute:
            raise CannotStack(
                f"over the stack {what} of seed {self.sessions[i].seed} differs from that of the seed alone by {apart:.2g}, its "
                f"size being {size:.2g}: the method keeps state where a stack does not see it"
            )


def _reason(error: RuntimeError) -> str:
    text = str(error)
    if "random" in text:
        return "the method draws random numbers within a step"
    if "requires_grad_()" in text:
        return "the method differentiates within its objective"
    if "item()" in text or "data-dependent" in text:
        return "the method decides by the values of tensors within a step"
    return f"the method does what torch.func.vmap cannot follow ({text.splitlines()[0].rstrip('.')})"
