"""Random augmentation of a whole batch at once, on its device; the random numbers are drawn on the CPU from a given generator,
so that a batch is the same on every device and for any number of workers.

All geometry (rotation, shift, scale, shear, flip, crop, bending) is one map and one interpolation a sample.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


class Augment:
    """Config group `augment`. Angles in degrees; shifts and crops as shares of the side; ranges are symmetric around "no change".

    Args:
        rotate: largest rotation.
        translate: largest shift along each axis.
        scale: `[low, high]` factor of the object's size, log-uniform.
        stretch: largest relative change of width against height.
        shear: largest shear along each axis.
        flip: probability of a horizontal flip.
        crop_area: `[low, high]` share of the area that is cropped and resized back (Inception's random resized crop).
        crop_ratio: largest aspect ratio of that crop.
        elastic: largest displacement of a smooth random field (4 x 4 knots, bicubic), as a share of half the side.
        brightness, contrast, saturation: largest relative change.
        noise: standard deviation of Gaussian noise, on [0, 1] intensities; of vectors, in their units.
        erase: probability of erasing a rectangle of up to a quarter of the area (Zhong et al. 2020).
        interpolation: of the one resampling; `bicubic` blurs small images less.
        padding: what lies outside the image: its `border` continued, `zeros` (black ground), or its `reflection`.
        domains: `both`, `source` or `target`: whose batches are augmented.
    """

    def __init__(
        self,
        *,
        rotate: float = 0.0,
        translate: float = 0.0,
        scale: tuple[float, float] | None = None,
        stretch: float = 0.0,
        shear: float = 0.0,
        flip: float = 0.0,
        crop_area: tuple[float, float] | None = None,
        crop_ratio: float = 1.0,
        elastic: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        noise: float = 0.0,
        erase: float = 0.0,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        padding: Literal["border", "zeros", "reflection"] = "border",
        domains: Literal["both", "source", "target"] = "both",
    ) -> None:
        for name, interval in (("scale", scale), ("crop_area", crop_area)):
            if interval is not None and not 0 < interval[0] <= interval[1]:
                raise ValueError(f"{name} is [low, high] with 0 < low <= high, not {list(interval)}")
        self.rotate, self.translate, self.scale, self.shear, self.flip = rotate, translate, scale, shear, flip
        self.crop_area, self.crop_ratio, self.elastic = crop_area, crop_ratio, elastic
        self.stretch, self.interpolation, self.padding = stretch, interpolation, padding
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.noise, self.erase, self.domains = noise, erase, domains
        self.geometric = bool(rotate or translate or scale or stretch or shear or flip or crop_area or elastic)
        self.photometric = bool(brightness or contrast or saturation or noise or erase)

    def applies_to(self, domain: str) -> bool:
        return (self.geometric or self.photometric) and self.domains in ("both", domain)

    def takes(self, kind: str) -> bool:
        """Whether it changes inputs of the kind: images, or vectors, of which only `noise` has a meaning."""
        return kind == "image" or (kind == "vector" and self.noise > 0)

    def __call__(self, images: Tensor, draw: torch.Generator) -> Tensor:
        """`(B, C, H, W)` float in [0, 1] to the same; or vectors `(B, D)`, with noise."""
        if images.ndim == 2:
            return images + self.noise * torch.randn(images.shape, generator=draw).to(images, non_blocking=True)
        if self.geometric:
            theta = self._affine(len(images), draw).to(images.device, non_blocking=True)
            grid = F.affine_grid(theta, list(images.shape), align_corners=False)
            if self.elastic:
                knots = (self.elastic * (2 * torch.rand(len(images), 2, 4, 4, generator=draw) - 1)).to(
                    images.device, non_blocking=True
                )
                bend = F.interpolate(knots, size=images.shape[-2:], mode="bicubic", align_corners=True)
                grid = grid + bend.permute(0, 2, 3, 1)
            images = F.grid_sample(
                images, grid.to(images.dtype), mode=self.interpolation, padding_mode=self.padding, align_corners=False
            )
            if self.interpolation == "bicubic":
                images = images.clamp(0, 1)  # it overshoots at edges
        return self._colour(images, draw) if self.photometric else images

    def _affine(self, n: int, draw: torch.Generator) -> Tensor:
        """`(n, 2, 3)`: where each output pixel reads from, in coordinates from -1 to 1."""

        def between(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=draw)

        angle = torch.deg2rad(between(-self.rotate, self.rotate))
        shear_x = torch.tan(torch.deg2rad(between(-self.shear, self.shear)))
        shear_y = torch.tan(torch.deg2rad(between(-self.shear, self.shear)))
        low, high = self.scale or (1.0, 1.0)
        zoom = torch.exp(-between(math.log(low), math.log(high)))  # the map is from output to input
        shift_x, shift_y = (
            between(-2 * self.translate, 2 * self.translate),
            between(-2 * self.translate, 2 * self.translate),
        )
        mirror = 1 - 2 * (torch.rand(n, generator=draw) < self.flip).float()
        width = height = torch.ones(n)
        if self.crop_area:
            area = between(*self.crop_area)
            ratio = torch.exp(between(-math.log(self.crop_ratio), math.log(self.crop_ratio)))
            width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
            shift_x = shift_x + (1 - width) * between(-1, 1)
            shift_y = shift_y + (1 - height) * between(-1, 1)
        if self.stretch:
            aspect = torch.exp(0.5 * between(-math.log1p(self.stretch), math.log1p(self.stretch)))
            width, height = width / aspect, height * aspect
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        row_x = torch.stack([(cos - sin * shear_y) * width * mirror, (cos * shear_x - sin) * height, shift_x], 1)
        row_y = torch.stack([(sin + cos * shear_y) * width * mirror, (sin * shear_x + cos) * height, shift_y], 1)
        return torch.stack([row_x, row_y], 1)

    def _colour(self, images: Tensor, draw: torch.Generator) -> Tensor:
        n = len(images)

        def factor(strength: float) -> Tensor:
            values = 1 + strength * (2 * torch.rand(n, 1, 1, 1, generator=draw) - 1)
            return values.to(images.device, images.dtype, non_blocking=True)

        if self.brightness:
            images = images * factor(self.brightness)
        if self.contrast:
            mean = images.mean((1, 2, 3), keepdim=True)
            images = mean + (images - mean) * factor(self.contrast)
        if self.saturation and images.shape[1] == 3:
            grey = images.mean(1, keepdim=True)
            images = grey + (images - grey) * factor(self.saturation)
        if self.noise:
            noise = torch.randn(images.shape, generator=draw).to(images.device, images.dtype, non_blocking=True)
            images = images + self.noise * noise
        if self.erase:
            images = images.masked_fill(
                self._rectangles(n, images.shape[-2:], draw).to(images.device, non_blocking=True), 0.5
            )
        return images.clamp(0, 1)

    def _rectangles(self, n: int, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
        """`(n, 1, H, W)` true inside each erased rectangle."""
        random = torch.rand(n, 5, generator=draw)
        half = 0.05 + 0.2 * random[:, :2]  # half sides, as shares
        centre = random[:, 2:4]
        inside = []
        for axis in (0, 1):
            position = (torch.arange(shape[axis]) + 0.5) / shape[axis]
            inside.append((position[None] - centre[:, axis, None]).abs() < half[:, axis, None])
        chosen = random[:, 4] < self.erase
        return (inside[0][:, :, None] & inside[1][:, None, :] & chosen[:, None, None])[:, None]
