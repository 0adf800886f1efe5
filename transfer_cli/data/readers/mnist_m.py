"""MNIST-M: digits blended into patches of colour photographs (Ganin et al., JMLR 17(59), 2016, section 5.2.4).

x = |patch - digit|      in each of the three channels
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from transfer_cli.data.domain import (
    Domain,
    Part,
    Place,
    as_labels,
    fingerprint_files,
    fingerprint_values,
    numbered,
)
from transfer_cli.data.inputs import ArrayInputs, read_image
from transfer_cli.data.readers.digits import DIGIT_NAMES
from transfer_cli.data.readers.files import below_root, list_images, reading, require
from transfer_cli.data.readers.torchvision_sets import TorchvisionSet
from transfer_cli.errors import TransferError


class MnistM:
    """MNIST-M as published, or built anew.

    Args:
        path: folder with one `*train*.npz` and one `*test*.npz`: `x` (N, H, W, 3) uint8, `y` (N,).
        photographs: folder of colour photographs, BSDS500 in the paper; MNIST-M is then built from MNIST and these,
            28 x 28, instead of read.
        seed: of the choice of photographs and patches.
    """

    def __init__(self, place: Place, *, path: str = "mnist_m", photographs: str | None = None, seed: int = 0) -> None:
        self.place = place
        self.path = path
        self.photographs = photographs
        self.seed = seed
        self.mnist = TorchvisionSet(place, dataset="mnist")

    def fingerprint(self) -> str:
        if self.photographs is None:
            return fingerprint_files([self._published("train"), self._published("test")])
        photographs = list_images(self._photograph_folder(self.photographs))
        return fingerprint_values(self.mnist.fingerprint(), self.seed, photographs)

    def load(self) -> Domain:
        if self.photographs is None:
            train, test = (self._read(self._published(split), split) for split in ("train", "test"))
        else:
            train, test = self._build(self._photograph_folder(self.photographs))
        return Domain("mnist_m", "classification", DIGIT_NAMES, train, test)

    def _published(self, split: str) -> Path:
        folder = below_root(self.place, self.path, "mnist_m")
        if not folder.is_dir():
            raise TransferError(
                f"mnist_m: missing folder {folder}. Either place the published arrays there yourself, "
                f"or build them from MNIST: photographs=DIR with a folder of colour photographs."
            )
        found = sorted(folder.glob(f"*{split}*.npz"))
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or "none"
            raise TransferError(f"mnist_m: {folder} needs one file *{split}*.npz; found {names}.")
        return found[0]

    def _read(self, path: Path, split: str) -> Part:
        with reading(path), path.open("rb") as stream, np.load(stream) as file:
            images, labels = file["x"], file["y"].reshape(-1)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
                raise ValueError(f"x {images.dtype} {images.shape}, y {labels.shape}; not uint8 (N, H, W, 3) and (N,)")
        return _part(images.transpose(0, 3, 1, 2), labels, split)

    def _photograph_folder(self, photographs: str) -> Path:
        return require(below_root(self.place, photographs, "mnist_m"), "mnist_m", "<photograph>")

    def _build(self, folder: Path) -> tuple[Part, Part]:
        paths = [str(folder / name) for name, _ in list_images(folder)]
        if not paths:
            raise TransferError(f"mnist_m: no image in {folder}")
        mnist = self.mnist.load()
        assert mnist.test is not None
        parts = []
        for number, (split, part) in enumerate({"train": mnist.train, "test": mnist.test}.items()):
            assert isinstance(part.inputs, ArrayInputs)
            images = blend(part.inputs.values.numpy(), paths, [self.seed, number])
            parts.append(_part(images, part.labels.numpy(), split))
        return parts[0], parts[1]


def blend(digits: np.ndarray, photographs: list[str], seed: list[int]) -> np.ndarray:
    """Grey digits `(N, 1, H, W)` to `(N, 3, H, W)` uint8, each on a random patch of a random photograph.

    Raises:
        TransferError: a photograph cannot be read, or is smaller than a digit.
    """
    n, _, height, width = digits.shape
    generator = np.random.default_rng(seed)
    chosen = generator.integers(len(photographs), size=n)
    corner = generator.random((2, n))  # as fractions, so that the draws do not depend on the photographs' sizes
    rows, columns = np.arange(height)[:, None], np.arange(width)
    blended = np.empty((n, 3, height, width), np.uint8)
    for index, path in enumerate(photographs):
        own = np.flatnonzero(chosen == index)
        if not len(own):
            continue
        photograph = read_image(path, channels=3).numpy()
        room = np.array(photograph.shape[1:]) - (height, width)
        if room.min() < 0:
            raise TransferError(f"mnist_m: {path} is smaller than {height} x {width} pixels; remove it.")
        top, left = (corner[:, own] * (room + 1)[:, None]).astype(np.int64)[:, :, None, None]
        patches = photograph[:, top + rows, left + columns].transpose(1, 0, 2, 3).astype(np.int16)  # (n, 3, H, W)
        blended[own] = np.abs(patches - digits[own])
    return blended


def _part(images: np.ndarray, labels: np.ndarray, split: str) -> Part:
    inputs = ArrayInputs(torch.from_numpy(np.ascontiguousarray(images)))
    return Part(inputs, as_labels(labels.astype(np.int64)), numbered(f"mnist_m/{split}", len(inputs)))
