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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from transfer_cli.data.batching import derive_seed
from transfer_cli.errors import TransferError
from transfer_cli.loops.console import Console, SeedConsole
from transfer_cli.loops.features import feature_task
from transfer_cli.loops.gradient import batches_of, log_interval, optimizer_of, refresh_every, set_rates, total
from transfer_cli.loops.metrics_log import GRADIENT_NORM, StepRecord
from transfer_cli.loops.rng import RandomState, seed_all
from transfer_cli.loops.second_order import SAM, LineSearch
from transfer_cli.loops.session import Place, Session, begin, run_phase, steps_of
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Batch, Gradient, Labelled, Losses, Moves, Phase, Progress, Update

# Of a loss or gradient over the stack from that of one seed alone, relative and absolute. Rounding shows in the flip of a ReLU at
# most; state that is another seed's, or a term that got lost, shows by tenths.
TOLERANCE = {torch.float32: (2e-2, 2e-6), torch.float64: (1e-7, 1e-10)}
SMALL = 4096  # weights of a linear layer, up to which the general rule's copies cost less than leaving it
CHECKED = 2  # steps at a phase's start: terms that measure what has moved are zero in the first


class CannotStack(TransferError):
    """This experiment's seeds cannot be trained together; what their runs saved before is as it was."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"seeds_together: {reason}. Leave it out and sweep: transfer run -m ... seed=0,1,2")


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


class Stack:
    """All tensors of methods of one build, stacked; the methods' own become views of the stack, so that each can still be
    evaluated, saved and changed by itself."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = methods
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self._own: list[dict[str, Tensor]] = []
        self.gather()
        # A saved view would take the whole stack with it.
        self._hooks = [m.register_state_dict_post_hook(_with_copies) for m in methods]

    def gather(self) -> None:
        """Take in what the methods replaced by tensors of their own."""
        own = [dict(method.named_parameters()) for method in self.methods]
        buffers = [dict(method.named_buffers()) for method in self.methods]
        self._check_alike(own)
        self._check_alike(buffers)
        with torch.no_grad():
            for name, parameter in own[0].items():
                if name not in self.parameters:
                    self.parameters[name] = nn.Parameter(_room_for([of[name].detach() for of in own]))
                for i, of in enumerate(own):
                    self._settle(self.parameters[name].detach()[i], of[name])
                self.parameters[name].requires_grad_(parameter.requires_grad)
            for name in buffers[0]:
                parts = [of[name] for of in buffers]
                there = self.buffers.get(name)
                if there is None or there.shape[1:] != parts[0].shape or there.dtype != parts[0].dtype:
                    self.buffers[name] = _room_for(parts)
                for i, part in enumerate(parts):
                    self._settle(self.buffers[name][i], part)
            self.buffers = {name: self.buffers[name] for name in buffers[0]}

    @staticmethod
    def _settle(place: Tensor, own: Tensor) -> None:
        if own.data_ptr() != place.data_ptr() or own.stride() != place.stride():
            place.copy_(own)
            own.data = place

    @staticmethod
    def _check_alike(own: Sequence[Mapping[str, Tensor]]) -> None:
        for other in own[1:]:
            if other.keys() != own[0].keys() or any(other[n].shape != t.shape for n, t in own[0].items()):
                raise CannotStack("the method's state has another shape for each seed")

    def keep(self, buffers: Mapping[str, Tensor]) -> None:
        """Buffers `(S, ...)` as an objective left them; most were changed in place and are here already."""
        for name, value in buffers.items():
            if value.data_ptr() != self.buffers[name].data_ptr():
                self.buffers[name].copy_(value.detach())

    def release(self) -> None:
        """Each method its own tensors again."""
        for hook in self._hooks:
            hook.remove()
        with torch.no_grad():
            for method in self.methods:
                for tensor in (*method.parameters(), *method.buffers()):
                    tensor.data = tensor.detach().clone()

    def grouped(self, moves: Sequence[Moves]) -> list[Moves]:
        """The stacked parameters of the first method's."""
        names = {id(parameter): name for name, parameter in self.methods[0].named_parameters()}
        if any(id(p) not in names for move in moves for p in move.parameters):
            raise CannotStack("the method moves parameters that are not part of it")
        return [replace(move, parameters=[self.parameters[names[id(p)]] for p in move.parameters]) for move in moves]


def _room_for(parts: Sequence[Tensor]) -> Tensor:
    """For all of them, in the memory format that each has: on it depends in which order dropout draws, and convolutions' speed."""
    last = parts[0].dim() == 4 and parts[0].is_contiguous(memory_format=torch.channels_last)
    shape = (len(parts), *parts[0].shape)
    if not last:
        return torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device)
    return _channels_last(shape, parts[0])


def _channels_last(shape: Sequence[int], like: Tensor) -> Tensor:
    """Of shape `(S, B, C, H, W)`, each of S in that format."""
    s, b, c, h, w = shape
    return like.new_empty((s, b, h, w, c)).permute(0, 1, 4, 2, 3)


def _with_copies(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.detach().clone()


class _Bound(nn.Module):
    """An objective as the forward pass of a module, which is what `functional_call` calls with other tensors."""

    def __init__(self, method: Method, adds_target_term: bool, owner: Method) -> None:
        super().__init__()
        self.method, self.adds_target_term = method, adds_target_term
        self.owner = [owner]  # part of the method, and no second name of its tensors

    def forward(self, update: Update, progress: Progress, first: bool, parts: dict[str, Any]) -> tuple[Any, Any, Any]:
        losses = losses_of(update, _batch(parts), progress, self.owner[0] if self.adds_target_term and first else None)
        return losses.terms, losses.diagnostics, dict(self.method.named_buffers())


def _places(method: nn.Module) -> dict[str, str]:
    """Every place in which a module keeps a tensor, to the tensor's first name. A module known by two names is one place, which
    `functional_call` would fill twice, and so not clear."""
    names = {id(t): name for name, t in (*method.named_parameters(), *method.named_buffers())}
    return {
        ".".join(filter(None, ("method", prefix, key))): names[id(tensor)]
        for prefix, module in method.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def losses_of(update: Update, batch: Batch, progress: Progress, labels_for: Method | None) -> Losses:
    """The objective, and the supervised term of granted target labels by `labels_for`."""
    losses = update.objective(batch, progress)
    if labels_for is not None and batch.target_labelled is not None:
        term = labels_for.supervised_loss(batch.target_labelled.x, batch.target_labelled.y)
        losses = replace(losses, terms={**losses.terms, "target_supervised": term})
    return losses


def _parts(batch: Batch) -> dict[str, Any]:
    parts: dict[str, Any] = {"views": {name: list(views) for name, views in batch.views.items()}}
    for name in ("source", "target_labelled"):
        labelled = getattr(batch, name)
        if labelled is not None:
            parts[name] = (labelled.x, labelled.y)
    if batch.target is not None:
        parts["target"] = batch.target
    return parts


def _batch(parts: Mapping[str, Any]) -> Batch:
    labelled = {name: Labelled(*parts[name]) for name in ("source", "target_labelled") if name in parts}
    return Batch(labelled.get("source"), parts.get("target"), labelled.get("target_labelled"), parts["views"])


def _stacked(parts: Sequence[Any]) -> Any:
    """Trees of tensors as one tree of stacked ones."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.stack(list(parts))
    if isinstance(first, dict):
        return {key: _stacked([part[key] for part in parts]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_stacked([part[i] for part in parts]) for i in range(len(first)))
    raise CannotStack(f"inputs of kind {type(first).__name__} do not stack")


# ---- layers for which a stack needs, or gains from, code of its own


class _BatchedLinear(torch.autograd.Function):
    """`(S, B, I)`, `(S, O, I)`, `(S, O)` to `(S, B, O)`, without the copies that the general rule makes."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,), (x, weight), needed = gradients, ctx.saved_tensors, ctx.needs_input_grad
        return (
            torch.bmm(g, weight) if needed[0] else None,
            torch.bmm(g.mT, x) if needed[1] else None,
            g.sum(1) if needed[2] else None,
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int]:
        return _BatchedLinear.apply(*(_first(t, d, info.batch_size) for t, d in zip(inputs, in_dims, strict=True))), 0


class _Dropout(torch.autograd.Function):
    """Inverted dropout of each seed's samples by draws from its own generator, in the order of a single run."""

    @staticmethod
    def forward(
        x: Tensor, shape: tuple[int, ...], rate: float, generators: Sequence[torch.Generator], channels_last: bool
    ) -> Tensor:
        raise CannotStack("the method drops out something that is no seed's own")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, x: Tensor, shape: Any, rate: float, generators: Any, channels_last: bool
    ) -> tuple[Tensor, int]:
        x, shape = _first(x, in_dims[0], info.batch_size), (len(generators), *shape)
        kept = _channels_last(shape, x) if channels_last else x.new_empty(shape)
        for noise, generator in zip(kept, generators, strict=True):
            noise.bernoulli_(1 - rate, generator=generator)
        return x * kept.div_(1 - rate), 0


def _first(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


@contextmanager
def _stackable_layers(method: nn.Module, generators: Sequence[torch.Generator], channels_last: bool) -> Iterator[None]:
    """Inside, linear and dropout layers do their work on stacks."""
    changed = []
    for module in method.modules():
        if type(module) is nn.Linear:
            module.forward = _linear_of(module)  # type: ignore[method-assign, assignment]
        elif isinstance(module, _DropoutNd):
            if type(module) not in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
                raise CannotStack(f"{type(module).__name__} layers draw in a way of their own")
            module.forward = _dropout_of(module, generators, channels_last)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _linear_of(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    own = layer.weight.numel() > SMALL

    def forward(x: Tensor) -> Tensor:
        return (_Linear.apply if own and x.dim() == 2 else F.linear)(x, layer.weight, layer.bias)

    return forward


def _dropout_of(
    layer: _DropoutNd, generators: Sequence[torch.Generator], channels_last: bool
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not layer.training or layer.p == 0:
            return x
        whole = type(layer) is nn.Dropout
        shape = tuple(x.shape) if whole else (*x.shape[:2], *(1 for _ in x.shape[2:]))
        return _Dropout.apply(x, shape, layer.p, generators, channels_last and whole and x.dim() == 4)

    return forward


# ---- each seed's share of what the stack holds, under the names and in the form of a single run's checkpoint


class _OwnState:
    """One seed's part of a stacked optimiser. What was restored waits until `restore` has that of all."""

    def __init__(self, optimizer: Optimizer, index: int) -> None:
        self.optimizer, self.index, self.waiting = optimizer, index, None

    def state_dict(self) -> dict[str, Any]:
        whole = self.optimizer.state_dict()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def own(number: int, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value[self.index] if value.shape == parameters[number].shape else value).clone()

        state = {n: {key: own(n, value) for key, value in of.items()} for n, of in whole["state"].items()}
        return {"state": state, "param_groups": whole["param_groups"]}

    def load_state_dict(self, state: Any) -> None:
        self.waiting = state


def _restore(parts: Sequence[_OwnState]) -> None:
    states: list[Any] = [part.waiting for part in parts]
    if states[0] is None:
        return

    def joined(number: int, key: str) -> Any:
        values = [state["state"][number][key] for state in states]
        return torch.stack(values) if isinstance(values[0], Tensor) and key != "step" else values[0]

    merged = {n: {key: joined(n, key) for key in of} for n, of in states[0]["state"].items()}
    parts[0].optimizer.load_state_dict({"state": merged, "param_groups": states[0]["param_groups"]})


class _OwnDraws:
    """A seed's generators; its torch generator is drawn from directly, or installed where code draws from the global one."""

    def __init__(self, device: torch.device) -> None:
        self.all, self.device = RandomState(device), device
        self.generator = torch.Generator(device)
        self.take()

    def take(self) -> None:
        """The global generators' states as this seed's."""
        self.kept = self.all.state_dict()
        self.generator.set_state(self.kept[self._key])

    @property
    def _key(self) -> str:
        return "cuda" if self.device.type == "cuda" else "torch"

    @contextmanager
    def installed(self) -> Iterator[None]:
        self.all.load_state_dict(self.state_dict())
        yield
        self.take()

    def state_dict(self) -> dict[str, Any]:
        return {**self.kept, self._key: self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.all.load_state_dict(state)
        self.take()


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
        self.bound = _Bound(self.session.method, self.adds, owner)

    def run(self) -> dict[int, TransferError]:
        self.draws = []
        for phase, session in zip(self.phases, self.sessions, strict=True):
            if self.place.start == 0:
                seed_all(derive_seed(session.seed, "phase", self.place.index), session.device)
                session.health.begin(self.steps)
                if phase.on_start is not None:
                    phase.on_start()
                    session.restart_average()
            self.draws.append(_OwnDraws(session.device))
        self.stack = Stack([session.method for session in self.sessions])
        try:
            with ExitStack() as inside:
                inside.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="There is a performance drop")  # of rare operations
                inside.enter_context(
                    _stackable_layers(
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
        self.places = _places(self.session.method)
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
            parts = [_parts(next(stream)) for stream in streams]
            together = _stacked(parts)
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
                f"optimizer{k}": _OwnState(optimizer, i)
                for k, optimizer in enumerate(optimizers)
                if optimizer is not None
            }
            own["scaler"] = torch.amp.GradScaler(session.device.type, enabled=False)
            own |= {"record": self.records[i], "rng": self.draws[i]}
            session.checkpoints.register(**own)
            parts.append(own)
        for name in parts[0]:
            if name.startswith("optimizer"):
                _restore([own[name] for own in parts])
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
            with draws.installed(), _plain_layers(session.method):
                phase.refresh.fit(feature_task(session, phase.owner or session.method, phase.refresh.parts))
            session.follow_buffers()
            session.method.train()
        self.stack.gather()
        self.places = _places(self.session.method)

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
            self.places = _places(self.session.method)

    def _log(self, losses: set[str], done: int, i: int) -> None:
        values = log_interval(self.records[i], losses, False, self.phases[i], self.sessions[i], self.place, done)
        self.figures = values if i == 0 else self.figures

    def _save(self, done: int, i: int) -> None:
        self.sessions[i].checkpoints.save(self.place.position(done))

    def _observe(self, done: int, i: int) -> None:
        session, place = self.sessions[i], self.place
        with _plain_layers(session.method):
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
            with _plain_layers(session.method):
                draws.all.load_state_dict(state)
                losses = losses_of(update, _batch(own), progress, labels_for)
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


@contextmanager
def _plain_layers(method: nn.Module) -> Iterator[None]:
    """Inside, the method of a stack works by itself."""
    kept = {module: vars(module).pop("forward") for module in method.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, forward in kept.items():
            module.forward = forward


def _reason(error: RuntimeError) -> str:
    text = str(error)
    if "random" in text:
        return "the method draws random numbers within a step"
    if "requires_grad_()" in text:
        return "the method differentiates within its objective"
    if "item()" in text or "data-dependent" in text:
        return "the method decides by the values of tensors within a step"
    return f"the method does what torch.func.vmap cannot follow ({text.splitlines()[0].rstrip('.')})"
