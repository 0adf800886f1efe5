"""Small pictures as text that a page holds."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SIDE = 64  # pixels at most: a page with 24 of them stays small


def as_data_uri(image: np.ndarray) -> str:
    """`(C, H, W)` uint8, grey or RGB, as a PNG in a data URI; larger images are made smaller."""
    from PIL import Image

    picture = Image.fromarray(image[0] if len(image) == 1 else image[:3].transpose(1, 2, 0))
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
