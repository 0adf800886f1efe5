"""Devices, threads and reproducible arithmetic."""

from __future__ import annotations

import os
import warnings

import torch

from transfer_cli.errors import TransferError


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU.

    Raises:
        TransferError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TransferError(f"device must be auto, cpu, cuda, cuda:<number> or mps; not '{name}'.") from None
    count = (
        torch.cuda.device_count()
        if device.type == "cuda"
        else int(torch.backends.mps.is_available())
        if device.type == "mps"
        else 1
    )
    if (device.index or 0) >= count:
        raise TransferError(
            f"device={name}: this machine has {count or 'no'} {device.type} device{'s' * (count != 1)}."
        )
    return device


def reproducible(device: torch.device) -> None:
    """Deterministic kernels where torch has them; the CPU's are so with a fixed number of threads."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation", module="torch")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


_DEFAULT_THREADS = torch.get_num_threads()


def use_threads(number: int | None) -> None:
    """Threads of this process; None is torch's own choice. Sums on the CPU depend on it, so a resumed run takes its first one's."""
    torch.set_num_threads(number or _DEFAULT_THREADS)
