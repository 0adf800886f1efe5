"""State of closed forms: tensors that are found, not trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Fitted(nn.Module):
    """Tensors that a closed-form phase finds, of shapes unknown beforehand; saved and loaded like any module's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.empty(0), persistent=False)  # knows the device before any tensor is there

    def put(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def __getattr__(self, name: str) -> Tensor:
        return super().__getattr__(name)  # type: ignore[return-value]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        self.put(**{name: value.to(self.place.device, copy=True) for name, value in own.items()})
