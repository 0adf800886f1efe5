"""The tensors of several methods of one build as one stack, `(S, ...)`, and an objective and batches over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from transfer_cli.errors import TransferError
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Batch, Labelled, Losses, Moves, Progress, Update


class CannotStack(TransferError):
    """This experiment's seeds cannot be trained together; what their runs saved before is as it was."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"seeds_together: {reason}. Leave it out and sweep: transfer run -m ... seed=0,1,2")


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
    return channels_last_room(shape, parts[0])


def channels_last_room(shape: Sequence[int], like: Tensor) -> Tensor:
    """Of shape `(S, B, C, H, W)`, each of S in that format."""
    s, b, c, h, w = shape
    return like.new_empty((s, b, h, w, c)).permute(0, 1, 4, 2, 3)


def _with_copies(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            state[key] = value.detach().clone()


class Bound(nn.Module):
    """An objective as the forward pass of a module, which is what `functional_call` calls with other tensors."""

    def __init__(self, method: Method, adds_target_term: bool, owner: Method) -> None:
        super().__init__()
        self.method, self.adds_target_term = method, adds_target_term
        self.owner = [owner]  # part of the method, and no second name of its tensors

    def forward(self, update: Update, progress: Progress, first: bool, parts: dict[str, Any]) -> tuple[Any, Any, Any]:
        losses = losses_of(
            update, batch_of(parts), progress, self.owner[0] if self.adds_target_term and first else None
        )
        return losses.terms, losses.diagnostics, dict(self.method.named_buffers())


def places(method: nn.Module) -> dict[str, str]:
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


def parts_of(batch: Batch) -> dict[str, Any]:
    parts: dict[str, Any] = {"views": {name: list(views) for name, views in batch.views.items()}}
    for name in ("source", "target_labelled"):
        labelled = getattr(batch, name)
        if labelled is not None:
            parts[name] = (labelled.x, labelled.y)
    if batch.target is not None:
        parts["target"] = batch.target
    return parts


def batch_of(parts: Mapping[str, Any]) -> Batch:
    labelled = {name: Labelled(*parts[name]) for name in ("source", "target_labelled") if name in parts}
    return Batch(labelled.get("source"), parts.get("target"), labelled.get("target_labelled"), parts["views"])


def stack_trees(parts: Sequence[Any]) -> Any:
    """Trees of tensors as one tree of stacked ones."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.stack(list(parts))
    if isinstance(first, dict):
        return {key: stack_trees([part[key] for part in parts]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(stack_trees([part[i] for part in parts]) for i in range(len(first)))
    raise CannotStack(f"inputs of kind {type(first).__name__} do not stack")
