"""Losses that half precision would spoil: small differences of large numbers, sums of squares, kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(loss: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors (and of pairs of them, in sequences) that computes outside autocast, in float32 at least."""

    @wraps(loss)
    def outside_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(_device(args), enabled=False):
            return loss(*(_raised(a) for a in args), **kwargs)

    return outside_autocast


def _raised(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return type(value)(_raised(v) for v in value) if isinstance(value, list | tuple) else value


def _device(args: Any) -> str:
    while not isinstance(args, Tensor):
        args = args[0]
    return args.device.type
