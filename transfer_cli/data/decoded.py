"""A disk cache of decoded image files: one uint8 array, memory-mapped, so that no epoch decodes twice."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from transfer_cli.data.domain import fingerprint_values
from transfer_cli.data.inputs import ImageFiles, InputSpec


@dataclass(frozen=True)
class MappedImages:
    """Images `(N, C, S, S)` uint8 in a memory-mapped file; a subset is an index, so nothing is read before a batch asks."""

    values: Tensor
    index: Tensor
    in_memory = True

    @property
    def spec(self) -> InputSpec:
        return InputSpec("image", tuple(self.values.shape[1:]))

    def __len__(self) -> int:
        return len(self.index)

    def take(self, indices: Tensor) -> MappedImages:
        return replace(self, index=self.index[indices])

    def batch(self, indices: Tensor) -> Tensor:
        return self.values[self.index[indices]]


def _decode(files: ImageFiles, temporary: Path, path: Path) -> None:
    shape = (len(files), *files.spec.shape)
    array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
    for i in tqdm(range(len(files)), desc="decode", disable=None, leave=False):
        array[i] = files.decode(i).numpy()
    array.flush()
    os.replace(temporary, path)


def decode_once(files: ImageFiles, folder: Path) -> MappedImages:
    """The images of `files`, from `folder` if they were decoded before (same paths, sizes and dates), else decoded now."""
    stats = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in files.paths]
    path = folder / f"{fingerprint_values(stats, files.channels, files.size)}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # One name for all processes, so that what a killed one left is written over; its lock dies with the holder.
        temporary = path.with_suffix(".tmp")
        with open(temporary, "ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            try:
                if not path.exists():  # another process may have made it meanwhile
                    _decode(files, temporary, path)
            finally:
                temporary.unlink(missing_ok=True)  # an unreadable file, or an interruption
    # Copy-on-write: torch wants a writable array, and nothing written ever reaches the file.
    return MappedImages(torch.from_numpy(np.load(path, mmap_mode="c")), torch.arange(len(files)))
