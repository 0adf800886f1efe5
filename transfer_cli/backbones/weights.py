"""Pretrained weights from a file into a backbone: state dicts, safetensors, or a run's own checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from transfer_cli.errors import TransferError


def load_state(path: str) -> dict[str, Tensor]:
    """Tensors by name, wrappers (`state_dict`, `model`, DataParallel's `module.`) removed; of a run's checkpoint the backbone.

    Raises:
        TransferError: missing, truncated, or not a file of tensors.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise TransferError(f"backbone.weights: there is no file {path}.")
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TransferError(f"backbone.weights: {path} cannot be read ({reason}).") from error
    except Exception as error:  # weights_only refuses by an unpickling error of its own
        raise TransferError(
            f"backbone.weights: {path} is not a plain file of tensors ({type(error).__name__})."
        ) from error
    for wrapper in ("state_dict", "model", "parts", "method"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, Tensor) for v in state.values()):
        raise TransferError(f"backbone.weights: {path} holds no tensors by name.")
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    for prefix in ("network.backbone.", "backbone.", "second.network.backbone.", "second.backbone."):  # or a chain's
        if any(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def load_into(
    module: nn.Module,
    state: dict[str, Tensor],
    path: str,
    ignored: tuple[str, ...] = (),
    key: str = "backbone.weights",
) -> None:
    """Load, and report every key that does not match; keys that begin with one of `ignored` (a removed head) may be left over.

    Raises:
        TransferError: keys missing, left over, or of another shape.
    """
    own = module.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith(ignored or "\0")}
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    shapes = [k for k in state if k in own and own[k].shape != state[k].shape]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("not in the network", extra), ("of another shape", shapes))
        if keys
    ]
    if problems:
        what = "backbone" if key == "backbone.weights" else "network"
        raise TransferError(f"{key}: {path} does not fit this {what}: {'; '.join(problems)}.")
    module.load_state_dict(state, strict=False)
