"""What one sample is, and containers of many: images or vectors in memory, image files, sequences.

Knows nothing of labels, domains or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from transfer_cli.errors import TransferError


@dataclass(frozen=True)
class InputSpec:
    """Kind and shape of one sample: image `(C, H, W)`, vector `(D,)`, sequence `(D,)` a step (its length varies)."""

    kind: Literal["image", "vector", "sequence"]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} of {' x '.join(str(n) for n in self.shape)}"


class Padded(NamedTuple):
    """A batch of sequences: values `(B, T, D)`, zero behind each end, and the mask `(B, T)`, true on real steps."""

    values: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Padded:
        return Padded(self.values.to(device), self.mask.to(device))


class Extracted(NamedTuple):
    """A batch of features `(B, D)` that a frozen backbone computed before."""

    values: Tensor

    def to(self, device: torch.device) -> Extracted:
        return Extracted(self.values.to(device))


class Inputs(Protocol):
    """Samples without labels. `batch` returns what a network reads, images still as uint8."""

    @property
    def spec(self) -> InputSpec: ...
    @property
    def in_memory(self) -> bool: ...
    def __len__(self) -> int: ...
    def take(self, indices: Tensor) -> Inputs: ...
    def batch(self, indices: Tensor) -> Tensor | Padded | Extracted: ...


@dataclass(frozen=True)
class ArrayInputs:
    """Images `(N, C, H, W)` uint8, or vectors `(N, D)` float32, as one tensor."""

    values: Tensor
    in_memory = True

    def __post_init__(self) -> None:
        images = self.values.ndim == 4 and self.values.dtype == torch.uint8
        vectors = self.values.ndim == 2 and self.values.dtype == torch.float32
        if not images and not vectors:
            raise TransferError(
                f"inputs must be uint8 images (N, C, H, W) or float32 vectors (N, D), "
                f"not {self.values.dtype} {tuple(self.values.shape)}."
            )

    @property
    def spec(self) -> InputSpec:
        return InputSpec("image" if self.values.ndim == 4 else "vector", tuple(self.values.shape[1:]))

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Tensor) -> ArrayInputs:
        return ArrayInputs(self.values[indices])

    def batch(self, indices: Tensor) -> Tensor:
        return self.values[indices]


@dataclass(frozen=True)
class ResizedArrays:
    """Images `(N, C, H, W)` uint8 kept as they are, and brought to `(channels, size, size)` when a batch asks."""

    values: Tensor
    channels: int
    size: int
    in_memory = True

    @property
    def spec(self) -> InputSpec:
        return InputSpec("image", (self.channels, self.size, self.size))

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Tensor) -> ResizedArrays:
        return replace(self, values=self.values[indices])

    def batch(self, indices: Tensor) -> Tensor:
        return resize_square(convert_channels(self.values[indices], self.channels), self.size)


@dataclass(frozen=True)
class SequenceInputs:
    """Sequences `(T_i, D)` float32 of varying length."""

    values: Sequence[Tensor]
    in_memory = True

    @property
    def spec(self) -> InputSpec:
        return InputSpec("sequence", (self.values[0].shape[1],))

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: Tensor) -> SequenceInputs:
        return SequenceInputs([self.values[i] for i in indices.tolist()])

    def batch(self, indices: Tensor) -> Padded:
        chosen = [self.values[i] for i in indices.tolist()]
        lengths = torch.tensor([len(sequence) for sequence in chosen])
        values = torch.nn.utils.rnn.pad_sequence(list(chosen), batch_first=True)
        return Padded(values, torch.arange(values.shape[1]) < lengths[:, None])


@dataclass(frozen=True)
class FeatureInputs:
    """Features `(S, D)` float32 of a frozen backbone for a whole split; these samples are the rows that `index` names.

    `raw`: the inputs that they were extracted from, for those who want to look at them.
    """

    values: Tensor
    index: Tensor
    raw: Inputs
    in_memory = True

    @property
    def spec(self) -> InputSpec:
        return InputSpec("vector", tuple(self.values.shape[1:]))

    def __len__(self) -> int:
        return len(self.index)

    def take(self, indices: Tensor) -> FeatureInputs:
        return FeatureInputs(self.values, self.index[indices], self.raw.take(indices))

    def batch(self, indices: Tensor) -> Extracted:
        return Extracted(self.values[self.index[indices]])


@dataclass(frozen=True)
class ImageFiles:
    """Image files, decoded when a batch asks: shorter side to `size`, centre crop, `channels` 1 or 3.

    `size` is set when a pair of domains is reconciled; until then `native` (the files' own side, if all
    agree, else None) is what is known.
    """

    paths: Sequence[str]
    channels: int = 3
    size: int | None = None
    native: int | None = None
    in_memory = False

    @property
    def spec(self) -> InputSpec:
        size = self.size or self.native or 0
        return InputSpec("image", (self.channels, size, size))

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, indices: Tensor) -> ImageFiles:
        return replace(self, paths=[self.paths[i] for i in indices.tolist()])

    def batch(self, indices: Tensor) -> Tensor:
        return torch.stack([self.decode(int(i)) for i in indices])

    def decode(self, index: int) -> Tensor:
        """One image `(C, S, S)` uint8."""
        image = read_image(self.paths[index], self.channels)
        assert self.size is not None, "the size is set when source and target are reconciled"
        return resize_square(image, self.size)

    def to_memory(self) -> ArrayInputs:
        """Decode everything now; Pillow releases the interpreter while it decodes, so threads serve."""
        with ThreadPoolExecutor() as pool:
            return ArrayInputs(torch.stack(list(pool.map(self.decode, range(len(self))))))


def read_image(path: str, channels: int) -> Tensor:
    """Decode a file to `(C, H, W)` uint8.

    Raises:
        TransferError: the file cannot be read as an image; it is named.
    """
    try:
        with Image.open(path) as image:
            array = np.array(_eight_bits(image).convert("L" if channels == 1 else "RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        if not Path(path).exists():
            raise TransferError(f"there is no image {path}.") from error
        raise TransferError(
            f"unreadable image: {path} ({error}). Replace or remove it; datasets skip such files with skip_unreadable=true."
        ) from error
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()


def _eight_bits(image: Image.Image) -> Image.Image:
    """What Pillow converts to grey or RGB by itself: it clips 16 bits at 255, and warns of palettes with transparency."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    return image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image


def resize_square(image: Tensor, size: int) -> Tensor:
    """`(..., C, H, W)` uint8 to `(..., C, size, size)`: shorter side to `size` (bilinear, antialiased), centre crop."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    batch = image.reshape(-1, *image.shape[-3:]).float()
    # Antialiasing matters only when shrinking, and enlarging needs none.
    resized = F.interpolate(batch, size=shape, mode="bilinear", antialias=scale < 1, align_corners=False)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    resized = resized[..., top : top + size, left : left + size].round().clamp(0, 255).to(torch.uint8)
    return resized.reshape(*image.shape[:-2], size, size)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """`(N, C, H, W)` uint8 between grey and RGB: repeat, or ITU-R 601 luminance."""
    if images.shape[1] == channels:
        return images
    if images.shape[1] == 1:
        return images.expand(-1, channels, -1, -1).contiguous()
    if channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (images.float() * weights).sum(1, keepdim=True).round().clamp(0, 255).to(torch.uint8)
    raise TransferError(f"images with {images.shape[1]} channels cannot be turned into {channels} channels.")
