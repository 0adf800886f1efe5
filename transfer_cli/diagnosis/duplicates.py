"""The same samples in two parts of the data: exact by a checksum of what a network would read, near by what a person would see.

Near duplicates (of images alone): grey thumbnails of 16 x 16 pixels, less their mean, whose cosine is `SAME` or more. That outlives
compression, resizing, brightness and contrast, not flips, crops or turns. Simple pictures look alike without being copies, so the
share of a part's samples that have such a twin within the part is told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.data.batching import in_order
from transfer_cli.data.feature_cache import checksums
from transfer_cli.data.inputs import Inputs, Padded

SAME = 0.99
SIDE = 16
BLOCK = 1024
SHOWN = 5  # pairs that are named
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prints:
    """Of n samples: their names, checksums `(n,)` and, of images, thumbnails `(n, SIDE²)` of length one."""

    ids: tuple[str, ...]
    keys: np.ndarray
    thumbnails: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)


def prints(inputs: Inputs, ids: tuple[str, ...], workers: int = 0, longest: int = 0) -> Prints:
    """`longest`: the number of steps to which sequences are filled up, so that those of two parts compare."""
    keys, thumbnails = [], []
    with closing(in_order(inputs, BLOCK if inputs.in_memory else 64, CPU, workers)) as batches:
        for x in batches:
            if isinstance(x, Padded):
                values = F.pad(x.values, (0, 0, 0, max(0, longest - x.values.shape[1]))).flatten(1)
                x = torch.cat([x.mask.sum(1, keepdim=True).float(), values], 1)
            rows = np.ascontiguousarray(x.flatten(1).float().numpy()) + np.float32(0)  # -0 is 0
            keys.append(checksums(rows, np.zeros(len(rows), np.uint64)))
            if x.ndim == 4:
                thumbnails.append(thumbnail(x))
    keys = keys or [np.zeros(0, np.uint64)]
    return Prints(ids, np.concatenate(keys), torch.cat(thumbnails) if thumbnails else None)


def thumbnail(images: Tensor) -> Tensor:
    """`(B, C, H, W)` to `(B, SIDE²)`; of an image of one grey alone, zeros."""
    grey = images.float().mean(1, keepdim=True)
    small = F.interpolate(grey, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False).flatten(1)
    small = small - small.mean(1, keepdim=True)
    length = small.norm(dim=1, keepdim=True)
    return torch.where(length > 1e-3, small / length.clamp_min(1e-3), 0.0)


def compare(one: Prints, other: Prints) -> dict[str, Any]:
    """How many samples of `other` are in `one`: `exact`, and `near` besides; some pairs by name. `own`: how many of `one`, had they
    been in another part, would be near a sample of `one`, as a share."""
    order = one.keys.argsort(kind="stable")
    at = np.searchsorted(one.keys[order], other.keys).clip(0, max(0, len(one) - 1))
    exact = one.keys[order][at] == other.keys if len(one) else np.zeros(len(other), bool)
    pairs = [(one.ids[order[at[j]]], other.ids[j]) for j in np.flatnonzero(exact)[:SHOWN]]
    found: dict[str, Any] = {"compared": [len(one), len(other)], "exact": int(exact.sum()), "exact_pairs": pairs}
    if one.thumbnails is None or other.thumbnails is None:
        return found
    best, place = nearest(other.thumbnails, one.thumbnails)
    near = ((best >= SAME) & ~torch.from_numpy(exact)).nonzero()[:, 0].tolist()
    found["near"] = len(near)
    found["near_pairs"] = [(one.ids[int(place[j])], other.ids[j]) for j in near[:SHOWN]]
    return found


def own_share(part: Prints) -> float | None:
    """The share of a part's samples that have a near twin within the part; None but for images."""
    if part.thumbnails is None or len(part) < 2:
        return None
    best, _ = nearest(part.thumbnails, part.thumbnails, others=True)
    return float((best >= SAME).double().mean())


def nearest(rows: Tensor, among: Tensor, others: bool = False) -> tuple[Tensor, Tensor]:
    """The largest cosine of each row with one `among`, and its place; `others`: they are the same samples, itself left out."""
    best, place = [], []
    for start in range(0, len(rows), BLOCK):
        cosine = rows[start : start + BLOCK] @ among.T
        if others:
            cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -1
        value, index = cosine.max(1)
        best.append(value)
        place.append(index)
    return torch.cat(best), torch.cat(place)


def between(parts: Mapping[str, Prints], by_design: set[tuple[str, str]]) -> dict[str, Any]:
    """Every pair of parts but those that share samples `by_design`."""
    names = [name for name, part in parts.items() if len(part)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if (a, b) not in by_design]
    own = {name: own_share(parts[name]) for name in names}
    return {f"{a} / {b}": {**compare(parts[a], parts[b]), "own_share": own[a]} for a, b in pairs}
