"""A run's folder: what lies in it, its lock, its state. Standard library only, so that reports read it without torch."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer_cli.errors import TransferError

RESULT_SCHEMA = 1  # of result.json
HEADLINE = {"classification": "accuracy", "regression": "rmse"}  # the figure of a kind of task that tables show


@dataclass(frozen=True)
class RunFolder:
    path: Path

    config = property(lambda self: self.path / "config.yaml")
    manifest = property(lambda self: self.path / "manifest.json")
    status = property(lambda self: self.path / "status.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    result = property(lambda self: self.path / "result.json")
    validators = property(lambda self: self.path / "validators.json")
    predictions = property(lambda self: self.path / "predictions.npz")
    features = property(lambda self: self.path / "features.npz")
    examples = property(lambda self: self.path / "examples.npz")
    checkpoints = property(lambda self: self.path / "checkpoints")
    calibration = property(lambda self: self.path / "checkpoints" / "calibration.pt")
    figures = property(lambda self: self.path / "figures")
    log = property(lambda self: self.path / "run.log")

    def state(self) -> str:
        """`new`, `running` (a process holds it), `interrupted`, `finished` or `failed`."""
        state = read_object(self.status).get("state", "new")
        if state == "running" and not self.is_locked():
            return "interrupted"
        return str(state)

    def set_status(self, state: str, **details: Any) -> None:
        write_json(
            self.status, {"state": state, "host": socket.gethostname(), "pid": os.getpid(), "time": _now(), **details}
        )

    def is_locked(self) -> bool:
        """Whether another process holds the folder (for onlookers; the holder must not ask, closing the file would free it)."""
        try:
            file = open(self.path / "lock", "rb+")  # noqa: SIM115
        except OSError:
            return False
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. The lock is the process's own (POSIX): no child inherits it, and it dies with the process.

        Raises:
            TransferError: another process holds it, or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / "lock", "ab")  # noqa: SIM115
        except OSError as error:
            raise TransferError(
                f"cannot write to {self.path}: {error.strerror}. Set outputs=DIR to a folder that can be written."
            ) from error
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(self.path / "lock").st_ino != os.fstat(file.fileno()).st_ino:
                    raise FileNotFoundError("removed meanwhile by a process that found nothing to do")
            except OSError as error:
                status = read_object(self.status)
                raise TransferError(
                    f"this experiment is running in process {status.get('pid', '?')} on {status.get('host', '?')}: {self.path}"
                ) from error
            try:
                yield
            finally:
                self._leave_no_empty_folder()

    def _leave_no_empty_folder(self) -> None:
        """Where nothing was begun (bad input, say), nothing stays."""
        if not self.status.exists() and {p.name for p in self.path.iterdir()} == {"lock"}:
            (self.path / "lock").unlink()
            self.path.rmdir()
            with suppress(OSError):  # other runs of the pair
                self.path.parent.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, whatever happens meanwhile."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """The content, or None where the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is none."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
