"""Layers for which a stack needs, or gains from, code of its own: linear ones and dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from transfer_cli.loops.stack import CannotStack, channels_last_room

SMALL = 4096  # weights of a linear layer, up to which the general rule's copies cost less than leaving it


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
        kept = channels_last_room(shape, x) if channels_last else x.new_empty(shape)
        for noise, generator in zip(kept, generators, strict=True):
            noise.bernoulli_(1 - rate, generator=generator)
        return x * kept.div_(1 - rate), 0


def _first(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


@contextmanager
def stackable_layers(method: nn.Module, generators: Sequence[torch.Generator], channels_last: bool) -> Iterator[None]:
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


@contextmanager
def plain_layers(method: nn.Module) -> Iterator[None]:
    """Inside, the method of a stack works by itself."""
    kept = {module: vars(module).pop("forward") for module in method.modules() if "forward" in vars(module)}
    try:
        yield
    finally:
        for module, forward in kept.items():
            module.forward = forward
