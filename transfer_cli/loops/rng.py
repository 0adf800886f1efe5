"""The random generators of a run, as checkpointable state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, device: torch.device) -> None:
    """Seed every generator that a method may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a library beneath a method may use the global one
    torch.manual_seed(seed)


class RandomState:
    """All generators' states as tensors, so that `torch.load(weights_only=True)` reads them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def state_dict(self) -> dict[str, Any]:
        _, words, gauss = random.getstate()
        _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002
        state = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "python_gauss": gauss,
            "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "numpy_rest": [int(position), int(has_gauss), float(cached)],
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.set_rng_state(state["torch"])
        random.setstate((3, tuple(state["python"].tolist()), state["python_gauss"]))
        position, has_gauss, cached = state["numpy_rest"]
        np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
