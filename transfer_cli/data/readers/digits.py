"""The UCI optical handwriting digits inside scikit-learn: real, small, no download."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from transfer_cli.data.domain import Domain, Part, Place, as_labels, fingerprint_values, numbered
from transfer_cli.data.inputs import ArrayInputs

DIGIT_NAMES = tuple("0123456789")


class Digits:
    """Grey 8 x 8, block counts 0..16 stretched to 0..255; no published split inside scikit-learn.

    Args:
        rotate: degrees, anticlockwise, by which every image is turned.
    """

    def __init__(self, place: Place, *, rotate: float = 0.0) -> None:
        self.rotate = rotate

    def fingerprint(self) -> str:
        images = load_digits().images
        return fingerprint_values("digits", images.shape, float(images.sum()), *([self.rotate] if self.rotate else []))

    def load(self) -> Domain:
        bunch = load_digits()
        pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        images = torch.from_numpy(pixels)[:, None]
        if self.rotate:
            from transfer_cli.torchvision_compat import torchvision  # only here is it needed

            bilinear = torchvision.transforms.InterpolationMode.BILINEAR
            images = torchvision.transforms.functional.rotate(images, self.rotate, bilinear)
        inputs = ArrayInputs(images)
        return Domain(
            "digits",
            "classification",
            DIGIT_NAMES,
            Part(inputs, as_labels(bunch.target), numbered("digits", len(inputs))),
        )
