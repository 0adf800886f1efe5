"""Checkpoints: a named set of stateful parts and a position, written so that no moment of death loses the last good one."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch

from transfer_cli.errors import TransferError
from transfer_cli.run_folder import write_atomically

FORMAT = 1


class Stateful(Protocol):
    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any) -> Any: ...


class Checkpoints:
    """`last.pt`, and `previous.pt` should the last be unreadable.

    A part registers by name; if a checkpoint was opened that holds its state, it is restored at that moment.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.parts: dict[str, Stateful] = {}
        self._waiting: dict[str, Any] = {}
        self.saved_step: int | None = None

    def open(self) -> dict[str, Any] | None:
        """Read the newest whole checkpoint; its position, or None where there is none.

        Raises:
            TransferError: the checkpoint belongs to another configuration.
        """
        for name in ("last.pt", "previous.pt"):
            content = read_checkpoint(self.folder / name)
            if content is None:
                (self.folder / name).unlink(missing_ok=True)  # never to take the place of a whole one
                continue
            if content["identity"] != self.identity:
                raise TransferError(
                    f"{self.folder / name} belongs to another configuration ({content['identity']}, not {self.identity}): "
                    "start afresh with force=true."
                )
            self._waiting = content["parts"]
            position: dict[str, Any] = content["position"]
            self.saved_step = position["global_step"]
            return position
        return None

    def register(self, **parts: Stateful) -> None:
        for name, part in parts.items():
            self.parts[name] = part
            if name in self._waiting:
                part.load_state_dict(self._waiting.pop(name))

    def forget(self, *names: str) -> None:
        """Parts of a phase that ended."""
        for name in names:
            self.parts.pop(name, None)

    def save(self, position: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        last = self.folder / "last.pt"
        data = serialise(
            {
                "format": FORMAT,
                "identity": self.identity,
                "position": position,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }
        )
        if last.exists():
            os.replace(last, self.folder / "previous.pt")
        write_atomically(last, data)
        self.saved_step = position["global_step"]


def serialise(content: Any) -> bytes:
    """Equal contents give equal bytes (a file name would enter the archive)."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The content, or None where the file is missing, not whole, or something else."""
    if not path.exists() or not zipfile.is_zipfile(path):
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, UnpicklingError):
        return None
    return content if isinstance(content, dict) else None
