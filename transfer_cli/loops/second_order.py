"""Optimisers that evaluate an update's objective more than once a step: SAM, L-BFGS and Newton-CG.

A step stays a function of its batch and of the state at its start: objectives are evaluated again with the same draws (dropout),
and BatchNorm's statistics take in the first evaluation alone. So a run that goes on from a checkpoint ends as one never stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from transfer_cli.config.schema import Trainer
from transfer_cli.errors import TransferError
from transfer_cli.loops.rng import RandomState
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Gradient, Phase

ARMIJO = 1e-4  # the share of the decrease promised by the slope that a step must keep
HALVINGS = 20  # of a step, before it is given up


class SAM(torch.optim.SGD):
    """Sharpness-aware minimisation (Foret, Kleiner, Mobahi & Neyshabur, ICLR 2021):

        w <- w - lr ∇L(w + e),    e = ρ ∇L(w) / ‖∇L(w)‖

    with momentum and weight decay as of SGD. Where players of a game share an update, each climbs its own loss, and the norm is of
    all.
    """

    def __init__(self, groups: list[dict[str, Any]], *, rho: float, **of_sgd: Any) -> None:
        if rho <= 0:
            raise ValueError(f"rho, the distance climbed, must be positive, not {rho}")
        super().__init__(groups, **of_sgd)
        self.rho = rho

    @contextmanager
    def climbed(self) -> Iterator[None]:
        """Within, parameters are w + e of their gradients; then exactly w again."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        kept = [p.detach().clone() for p in moved]
        with torch.no_grad():
            gradients = [p.grad for p in moved]
            scale = self.rho / nn.utils.get_total_norm(gradients).clamp_min(1e-12)
            for p, gradient in zip(moved, gradients, strict=True):
                p.add_(gradient * scale)
        yield
        with torch.no_grad():
            for p, before in zip(moved, kept, strict=True):
                p.copy_(before)


class LineSearch(Optimizer):
    """Moves along one direction a step, as far as the batch's objective keeps falling (Nocedal & Wright 2006, section 3.1).

    Has neither a learning rate nor a schedule. To the objective it adds ½ `weight_decay` ‖w‖².
    """

    def __init__(self, groups: list[dict[str, Any]], *, weight_decay: float = 0.0, **defaults: Any) -> None:
        if weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, it is {weight_decay}")
        super().__init__(groups, {"lr": 1.0, "weight_decay": weight_decay, **defaults})

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def minimise(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """One step from `loss`, 0-dim, with its graph; `again()` is the same objective at other parameters. Leaves the gradient in
        `.grad`."""
        self._move(loss + self._decay(), lambda: again() + self._decay())

    def _move(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        """`minimise`, of the whole objective."""
        raise NotImplementedError

    def _decay(self) -> Tensor:
        parts = [g["weight_decay"] * p.square().sum() for g in self.param_groups for p in g["params"]]
        return 0.5 * torch.stack(parts).sum()

    def _search(
        self, value: float, direction: Tensor, slope: float, again: Callable[[], Tensor]
    ) -> tuple[float, Tensor | None]:
        """Move; the step's length and the loss there, or 0 and None, without a move, where no length lets the objective fall."""
        start = [p.detach().clone() for p in self.parameters]
        for halving in range(HALVINGS):
            length = 0.5**halving
            self._place(start, length * direction)
            loss = again()
            if float(loss.detach()) <= value + ARMIJO * length * slope:
                return length, loss
        self._place(start, torch.zeros_like(direction))
        return 0.0, None

    @torch.no_grad()
    def _place(self, start: Sequence[Tensor], away: Tensor) -> None:
        parts = away.split([p.numel() for p in start])
        for parameter, origin, part in zip(self.parameters, start, parts, strict=True):
            parameter.copy_(origin + part.view_as(origin))

    def _gradient(self, loss: Tensor, twice: bool = False) -> Tensor:
        """`(P,)`, of all parameters in turn. `twice`: it can be differentiated."""
        gradients = torch.autograd.grad(
            loss, self.parameters, create_graph=twice, retain_graph=twice, allow_unused=True, materialize_grads=True
        )
        return torch.cat([g.flatten() for g in gradients])

    def _leave(self, gradient: Tensor) -> None:
        """In the parameters' `.grad`, where norms are measured."""
        for p, part in zip(self.parameters, gradient.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = part.view_as(p).clone()


class LBFGS(LineSearch):
    """Limited-memory BFGS (Liu & Nocedal 1989). Both gradients of a pair are of one batch (Schraudolph, Yu & Guenter, AISTATS
    2007), so that batches may change; a pair without positive curvature is left out."""

    def __init__(self, groups: list[dict[str, Any]], *, history: int, weight_decay: float = 0.0) -> None:
        if history < 1:
            raise ValueError(f"history is a number of pairs, not {history}")
        super().__init__(groups, weight_decay=weight_decay)
        self.history = history

    def _move(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        gradient = self._gradient(loss)
        self._leave(gradient)
        pairs = self.state[self.parameters[0]].setdefault("pairs", [])
        direction = -self._inverse_times(gradient, pairs)
        length, reached = self._search(float(loss.detach()), direction, float(direction @ gradient), again)
        if reached is None:
            pairs.clear()  # what they say of the curvature is wrong here
            return
        step, change = length * direction, self._gradient(reached) - gradient
        if float(step @ change) > 1e-8 * float(step.norm() * change.norm()):
            pairs.append(torch.stack([step, change]))
            del pairs[: -self.history]

    def _inverse_times(self, gradient: Tensor, pairs: Sequence[Tensor]) -> Tensor:
        """The inverse Hessian's estimate times the gradient (Nocedal & Wright 2006, algorithm 7.4)."""
        q, shares = gradient, []
        for step, change in reversed(pairs):
            shares.append((step @ q) / (step @ change))
            q = q - shares[-1] * change
        if pairs:
            step, change = pairs[-1]
            q = q * (step @ change) / (change @ change)
        else:
            q = q / q.norm().clamp_min(1.0)
        for (step, change), share in zip(pairs, reversed(shares), strict=True):
            q = q + (share - (change @ q) / (step @ change)) * step
        return q


class NewtonCG(LineSearch):
    """Newton's method by conjugate gradients on Hessian-vector products, which stop where curvature is not positive (Nocedal &
    Wright 2006, algorithm 7.1), of the damped Hessian H + λ I (Martens, ICML 2010): λ falls or rises fourfold with the share of the
    promised decrease that a full step has brought."""

    def __init__(
        self, groups: list[dict[str, Any]], *, damping: float, iterations: int, weight_decay: float = 0.0
    ) -> None:
        if damping < 0 or iterations < 1:
            raise ValueError(
                f"damping must not be negative and iterations at least 1; they are {damping} and {iterations}"
            )
        super().__init__(groups, weight_decay=weight_decay, damping=damping)
        self.iterations = iterations

    def _move(self, loss: Tensor, again: Callable[[], Tensor]) -> None:
        with_graph = self._gradient(loss, twice=True)
        gradient = with_graph.detach()
        self._leave(gradient)

        def times(v: Tensor) -> Tensor:
            return self._gradient_of_slope(with_graph, v)

        group = self.param_groups[0]
        direction = self._solve(times, gradient, group["damping"])
        slope, value = float(direction @ gradient), float(loss.detach())
        promised = slope + 0.5 * float(direction @ times(direction))
        length, reached = self._search(value, direction, slope, again)
        kept = 0.0 if reached is None or length < 1 else (float(reached.detach()) - value) / min(promised, -1e-300)
        if kept > 0.75:
            group["damping"] /= 4
        elif kept < 0.25:
            group["damping"] = max(4 * group["damping"], 1e-8)

    def _gradient_of_slope(self, gradient: Tensor, v: Tensor) -> Tensor:
        products = torch.autograd.grad(
            gradient, self.parameters, v, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([p.flatten() for p in products])

    def _solve(self, times: Callable[[Tensor], Tensor], gradient: Tensor, damping: float) -> Tensor:
        """`-(H + λ I)⁻¹ g`, as well as the distance from the optimum asks."""
        step, residual, direction = torch.zeros_like(gradient), gradient, -gradient
        square = first = float(residual @ residual)
        for i in range(self.iterations):
            if square <= min(0.25, first**0.5) * first:
                break
            along = times(direction) + damping * direction
            curvature = float(direction @ along)
            if curvature <= 0:
                return direction if i == 0 else step
            step, residual = step + square / curvature * direction, residual + square / curvature * along
            last, square = square, float(residual @ residual)
            direction = -residual + square / last * direction
        return step


class Replay:
    """An objective that can be evaluated again as it was the first time; made before that."""

    def __init__(self, objective: Callable[[], Tensor], method: Method, device: torch.device) -> None:
        self.objective, self.method, self.generators = objective, method, RandomState(device)
        self.start = self.generators.state_dict()

    def __call__(self) -> Tensor:
        self.generators.load_state_dict(self.start)
        return self.objective()

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """What is evaluated within leaves buffers as they were."""
        kept = {name: buffer.clone() for name, buffer in self.method.named_buffers()}
        yield
        for name, buffer in self.method.named_buffers():
            buffer.copy_(kept[name])


def check_fits(optimizer: Optimizer, name: str, trainer: Trainer, method: Method, phases: Sequence[Phase]) -> None:
    """Raises:
    TransferError: the optimiser cannot do what these phases or the trainer ask for."""
    if isinstance(optimizer, SAM) and trainer.precision == "16":
        raise TransferError(f"optimizer={name} has no loss scale: set trainer.precision=bf16 or 32.")
    if not isinstance(optimizer, LineSearch):
        return
    trained = [phase for phase in phases if isinstance(phase, Gradient)]
    if trained and trainer.precision != "32":
        raise TransferError(
            f"optimizer={name} compares losses more finely than trainer.precision={trainer.precision} tells them: set it to 32."
        )
    if trained and trainer.clip_norm is not None:
        raise TransferError(f"optimizer={name} finds the length of its steps itself: set trainer.clip_norm=null.")
    if trained and trainer.compile and isinstance(optimizer, NewtonCG):
        raise TransferError(
            f"optimizer={name} differentiates twice, which compiled networks cannot: set trainer.compile=false."
        )
    for phase in trained:
        moving = [update for update in phase.updates if update.moves]
        players = {move.player for update in moving for move in update.moves}
        if len(moving) > 1 or len(players) > 1 or (phase.owner or method).is_game:
            raise TransferError(
                f"optimizer={name} minimises one objective along a line, and phase '{phase.name}' is a game of several: set "
                "optimizer=sgd, adam, adamw or sam."
            )
