"""Histograms of oriented gradients (Dalal & Triggs, CVPR 2005): differentiate, then integrate over cells.

    ∇I(u) = (I(u + e_x) - I(u - e_x), I(u + e_y) - I(u - e_y))        the channel where ‖∇I(u)‖ is largest
    h_c(k) = Σ_{u in c} ‖∇I(u)‖ w_k(∠∇I(u)) / |c|                     w_k: tent around the centre of orientation bin k
    f_b = hys([h_c : c in b])        hys(v) = n(min(n(v), 0.2)),  n(v) = v / √(‖v‖² + ε²)

Left out of the paper's detector: gamma compression and the Gaussian window over a block.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.backbones.base import Backbone
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError

CLIP, EPSILON = 0.2, 1e-5  # L2-Hys, section 6.4 of the paper


class HOG(Backbone):
    """Images `(B, C, H, W)` of any size to `(B, blocks_y · blocks_x · block² · orientations)`; nothing in it is learnt.

    Blocks overlap: one begins at every cell. The grid of cells is centred, so that up to `cell - 1` pixels are left over
    at the borders of a side that `cell` does not divide.

    Args:
        orientations: bins of an angle, the k-th centred at (k + 1/2) / orientations of the half (or full) turn.
        cell: side of a cell in pixels.
        block: side of a block in cells.
        signed: angles over the full turn, so that light on dark differs from dark on light.
        interpolation: which bins a pixel votes for. `none`: the one it falls in; `orientation`: the two nearest
            orientations, linearly; `full`: also the four nearest cells, bilinearly, as in the paper.

    Raises:
        TransferError: an image smaller than a block.
    """

    minimum_size: ClassVar[int] = 24  # with cells of 4, the best cross-validated choice on the labels of 8 x 8 digits
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        spec: InputSpec,
        *,
        orientations: int = 9,
        cell: int = 4,
        block: int = 2,
        signed: bool = False,
        interpolation: Literal["none", "orientation", "full"] = "full",
    ) -> None:
        super().__init__(spec)
        for key, value, least in (("orientations", orientations, 2), ("cell", cell, 1), ("block", block, 1)):
            if value < least:
                raise TransferError(f"backbone.{key} must be {least} or more, not {value}.")
        _, height, width = spec.shape
        if min(height, width) < cell * block:
            raise TransferError(
                f"backbone hog needs images of {cell * block} pixels or more (cell x block), not {height} x {width}: set "
                f"image.size={cell * block} or larger, or a smaller backbone.cell or backbone.block."
            )
        self.orientations, self.block, self.interpolation = orientations, block, interpolation
        self.turn = 2 * math.pi if signed else math.pi
        weights = [_cell_weights(side, cell, soft=interpolation == "full") for side in (height, width)]
        for name, matrix in zip(("rows", "columns"), weights, strict=True):
            self.register_buffer(name, matrix, persistent=False)
        blocks = [len(matrix) - block + 1 for matrix in weights]
        self.out_features = blocks[0] * blocks[1] * block * block * orientations

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            magnitude, angle = _strongest_gradient(x.float())
            votes = self._votes(magnitude, angle)
            histograms = self.rows @ votes @ self.columns.T  # (B, K, cells_y, cells_x)
            blocks = histograms.unfold(2, self.block, 1).unfold(3, self.block, 1)  # (B, K, blocks_y, blocks_x, b, b)
            return _hys(blocks.permute(0, 2, 3, 4, 5, 1).flatten(3)).flatten(1)

    def _votes(self, magnitude: Tensor, angle: Tensor) -> Tensor:
        """Gradients `(B, 1, H, W)` to votes `(B, K, H, W)` for the orientations."""
        position = torch.remainder(angle, self.turn) * (self.orientations / self.turn)  # the k-th bin is [k, k + 1)
        votes = magnitude.new_zeros(len(magnitude), self.orientations, *magnitude.shape[2:])
        if self.interpolation == "none":
            return votes.scatter_(1, position.long() % self.orientations, magnitude)
        lower = (position - 0.5).floor()
        share = position - 0.5 - lower
        votes.scatter_(1, lower.long() % self.orientations, magnitude * (1 - share))  # never the same bin twice
        return votes.scatter_(1, (lower.long() + 1) % self.orientations, magnitude * share)


def _strongest_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and angle `(B, 1, H, W)` of the channel with the largest gradient; beyond its border an image goes on
    as it ends."""
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    magnitude, channel = torch.hypot(dx, dy).max(1, keepdim=True)
    return magnitude, torch.atan2(dy.gather(1, channel), dx.gather(1, channel))


def _cell_weights(side: int, cell: int, soft: bool) -> Tensor:
    """`(cells, side)`: the share of each pixel in each cell's mean along one axis; a box, or a tent as wide as two cells."""
    cells = side // cell
    centres = (side - cells * cell) // 2 + torch.arange(cells) * cell + (cell - 1) / 2
    distance = (torch.arange(side) - centres[:, None]).abs() / cell
    return ((1 - distance).clamp_min(0) if soft else (distance < 0.5).float()) / cell


def _hys(blocks: Tensor) -> Tensor:
    """L2 normalisation along the last axis, clipping, and normalisation again."""
    for limit in (CLIP, 1.0):
        blocks = (blocks / (blocks.square().sum(-1, keepdim=True) + EPSILON**2).sqrt()).clamp_max(limit)
    return blocks
