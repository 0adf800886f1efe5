"""Printed digits, rendered from the fonts that ship with matplotlib: the source of the default pair.

Typeface, size, aspect, slant, rotation, stroke width, position, contrast and noise are drawn at random; everything is a pure
function of a seed. Images are area averages of four times finer ones, as the UCI handwriting digits were made.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from transfer_cli.data.domain import Domain, Part, Place, as_labels, fingerprint_values, numbered
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.digits import DIGIT_NAMES

# Typefaces with ordinary (lining) digits; the Display, symbol and maths fonts have none.
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)

GLYPH = 64  # height in pixels of a glyph in the atlas
CELL = 112  # side of an atlas cell, glyph in the middle
SUPERSAMPLE = 4  # bitmap pixels per image pixel and axis, as in the UCI digits


@lru_cache(maxsize=1)
def _atlas() -> tuple[NDArray[Any], NDArray[Any]]:
    """Signed distance to the outline (> 0 in the ink), in glyph heights, and glyph widths."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    field = np.empty((len(FONTS), 10, CELL, CELL), np.float32)
    width = np.empty((len(FONTS), 10), np.float32)
    for i, name in enumerate(FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 2 * GLYPH)
        for digit in range(10):
            page = Image.new("L", (4 * GLYPH, 4 * GLYPH))
            ImageDraw.Draw(page).text((GLYPH, GLYPH), str(digit), fill=255, font=font)
            glyph = page.crop(page.getbbox())
            w = max(1, round(glyph.width * GLYPH / glyph.height))
            glyph = glyph.resize((w, GLYPH), Image.Resampling.LANCZOS)
            cell = Image.new("L", (CELL, CELL))
            cell.paste(glyph, ((CELL - w) // 2, (CELL - GLYPH) // 2))
            ink = np.asarray(cell) > 127
            field[i, digit] = (distance_transform_edt(ink) - distance_transform_edt(~ink)) / GLYPH
            width[i, digit] = w / GLYPH
    return field, width


def _sample(cells: NDArray[Any], x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Bilinear look-up of cells (n, CELL, CELL) at pixel coordinates x, y (n, m), edges held."""
    x, y = (np.clip(v, 0, CELL - 1.001) for v in (x, y))
    x0, y0 = x.astype(np.int32), y.astype(np.int32)
    fx, fy = x - x0, y - y0
    flat = cells.reshape(-1)
    at = y0 * CELL + x0 + (np.arange(len(cells), dtype=np.int32) * CELL * CELL)[:, None]
    top = flat[at] * (1 - fx) + flat[at + 1] * fx
    low = flat[at + CELL] * (1 - fx) + flat[at + CELL + 1] * fx
    return top * (1 - fy) + low * fy


def render(n: int, seed: int, size: int = 8) -> tuple[NDArray[Any], NDArray[Any]]:
    """`n` printed digits, ink bright on black: uint8 `(n, size, size)` and int64 labels `(n,)`.

    Lengths of the style are in image sides, angles in radians.
    """
    rng = np.random.default_rng(seed)
    field, width = _atlas()
    labels = rng.permutation(np.arange(n) % 10)

    def uniform(low: float, high: float) -> NDArray[Any]:
        return rng.uniform(low, high, n).astype(np.float32)

    style = {
        "font": rng.integers(len(FONTS), size=n),
        "height": uniform(0.75, 1.0),
        "aspect": uniform(0.8, 1.25),
        "slant": uniform(-0.25, 0.35),
        "rotation": uniform(-0.15, 0.15),
        "stroke": uniform(0.0, 0.05),
        "dx": uniform(-1, 1),
        "dy": uniform(-1, 1),
        "contrast": uniform(0.8, 1.0),
        "noise": uniform(0.0, 0.05),
    }
    # The glyph may move as far as the room its box leaves, at least a little.
    room_x = np.maximum(0.05, (1 - style["height"] * style["aspect"] * width[style["font"], labels]) / 4)
    room_y = np.maximum(0.03, (1 - style["height"]) / 2)
    style["dx"], style["dy"] = style["dx"] * room_x, style["dy"] * room_y

    fine = size * SUPERSAMPLE
    axis = (np.arange(fine, dtype=np.float32) + 0.5) / fine - 0.5
    gy, gx = (v.reshape(1, -1) for v in np.meshgrid(axis, axis, indexing="ij"))
    images = np.empty((n, size, size), np.float32)
    step = max(1, 2**18 // fine**2)
    for start in range(0, n, step):
        part = slice(start, start + step)
        s = {key: value[part, None] for key, value in style.items()}
        px, py = gx - s["dx"], gy - s["dy"]
        cos, sin = np.cos(s["rotation"]), np.sin(s["rotation"])
        px, py = cos * px + sin * py, cos * py - sin * px
        px = (px + np.tan(s["slant"]) * py) / s["aspect"]
        scale = GLYPH / s["height"]
        middle = (CELL - 1) / 2
        cells = field[style["font"][part], labels[part]]
        distance = _sample(cells, px * scale + middle, py * scale + middle) + s["stroke"]
        ink = np.clip(0.5 + distance * s["height"] * fine, 0, 1)  # one fine pixel of soft edge
        images[part] = ink.reshape(-1, size, SUPERSAMPLE, size, SUPERSAMPLE).mean((2, 4))
    images *= style["contrast"][:, None, None]
    images += style["noise"][:, None, None] * rng.standard_normal(images.shape, np.float32)
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8), labels


class SynthDigits:
    """`n` training and `n_test` test images of `size` x `size` pixels, a function of `render_seed`."""

    version = 1

    def __init__(self, place: Place, *, n: int = 4400, n_test: int = 1000, size: int = 8, render_seed: int = 0) -> None:
        self.n, self.n_test, self.size, self.render_seed = n, n_test, size, render_seed

    def fingerprint(self) -> str:
        return fingerprint_values("synth_digits", self.version, self.n, self.n_test, self.size, self.render_seed)

    def load(self) -> Domain:
        images, labels = render(self.n + self.n_test, self.render_seed, self.size)
        part = Part(ArrayInputs(torch.from_numpy(images)[:, None]), as_labels(labels), numbered("synth", len(images)))
        order = torch.arange(len(images))
        return Domain(
            "synth_digits", "classification", DIGIT_NAMES, part.take(order[: self.n]), part.take(order[self.n :])
        )
