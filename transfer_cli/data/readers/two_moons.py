"""Two interleaved half-circles, rotated: the toy of unsupervised adaptation (Ganin et al., JMLR 17(59), 2016)."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.datasets import make_moons

from transfer_cli.data.domain import Domain, Part, Place, fingerprint_values, numbered
from transfer_cli.data.inputs import ArrayInputs


class TwoMoons:
    """Features `(n, 2)` around their centre, two classes.

    Args:
        n: samples, half a class each.
        scale: factor of the coordinates; the moons are 3 wide at 1.
        angle: degrees by which both moons are turned, counterclockwise.
        noise: standard deviation of Gaussian noise on both coordinates.
        draw: which sample is drawn; other numbers give other points.
    """

    def __init__(
        self, place: Place, *, n: int = 150, scale: float = 1.0, angle: float = 0.0, noise: float = 0.05, draw: int = 0
    ) -> None:
        self.n, self.scale, self.angle, self.noise, self.draw = n, scale, angle, noise, draw

    def fingerprint(self) -> str:
        return fingerprint_values("two_moons", self.n, self.scale, self.angle, self.noise, self.draw)

    def load(self) -> Domain:
        x, y = make_moons(self.n, noise=self.noise, random_state=self.draw)
        angle = math.radians(self.angle)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        x = self.scale * (x - [0.5, 0.25]) @ turn.T  # the centre of the noise-free moons
        part = Part(ArrayInputs(torch.from_numpy(x).float()), torch.from_numpy(y), numbered("two_moons", self.n))
        return Domain("two_moons", "classification", ("upper", "lower"), part)
