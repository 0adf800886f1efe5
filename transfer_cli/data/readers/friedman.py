"""Friedman's first function and relatives of it: regression domains of known distance (Friedman, Annals of Statistics 1991).

    y = f(x) + ε,    x ~ U[0, 1]^10,    ε ~ N(0, noise²)

    source      10 sin(π x₁x₂) + 20 (x₃ - 1/2)² + 10 x₄ + 5 x₅
    close       11 sin(π x₁x₂) + 18 (x₃ - 0.45)² + 9 x₄ + 6 x₅ + 1
    far          6 sin(π x₁x₂ + 1) + 30 (x₃ - 0.7)² + 4 x₄ - 5 x₅ + 3
    unrelated  -10 sin(π x₆x₇) - 20 (x₈ - 1/2)² - 10 x₉ - 5 x₁₀

The inputs have one distribution; what differs is the function. `close` and `far` move the coefficients and shifts of the
source's, as Pardoe & Stone (ICML 2010) do; `unrelated` depends on the five inputs that the source's ignores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch

from transfer_cli.data.domain import Domain, Part, Place, fingerprint_values, numbered
from transfer_cli.data.inputs import ArrayInputs

WIDTH = 10

FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "source": lambda a, b, c, d, e, *_: 10 * np.sin(np.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e,
    "close": lambda a, b, c, d, e, *_: 11 * np.sin(np.pi * a * b) + 18 * (c - 0.45) ** 2 + 9 * d + 6 * e + 1,
    "far": lambda a, b, c, d, e, *_: 6 * np.sin(np.pi * a * b + 1) + 30 * (c - 0.7) ** 2 + 4 * d - 5 * e + 3,
    "unrelated": lambda *x: -10 * np.sin(np.pi * x[5] * x[6]) - 20 * (x[7] - 0.5) ** 2 - 10 * x[8] - 5 * x[9],
}


class Friedman:
    """Ten inputs, one target.

    Args:
        domain: which function.
        n: samples.
        noise: standard deviation of the noise.
        seed: which sample is drawn; each domain draws its own.
    """

    def __init__(
        self,
        place: Place,
        *,
        domain: Literal["source", "close", "far", "unrelated"] = "source",
        n: int = 600,
        noise: float = 1.0,
        seed: int = 0,
    ) -> None:
        if n < 3 or noise < 0:
            raise ValueError("n must be 3 at least, and noise not negative.")
        self.domain, self.n, self.noise, self.seed = domain, n, noise, seed

    def fingerprint(self) -> str:
        return fingerprint_values("friedman", self.domain, self.n, self.noise, self.seed)

    def load(self) -> Domain:
        draw = np.random.default_rng([self.seed, list(FUNCTIONS).index(self.domain)])
        x = draw.random((self.n, WIDTH))
        y = FUNCTIONS[self.domain](*x.T) + self.noise * draw.standard_normal(self.n)
        name = f"friedman_{self.domain}"
        part = Part(
            ArrayInputs(torch.from_numpy(x).float()), torch.from_numpy(y).float()[:, None], numbered(name, self.n)
        )
        return Domain(name, "regression", (), part)
