"""Diabetes progression within a year of 442 patients, bundled with scikit-learn (Efron et al., Annals of Statistics 2004)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_diabetes

from transfer_cli.data.domain import Domain, Part, Place, fingerprint_values
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.roles import moments

OVERWEIGHT = 25.0  # kg / m², the World Health Organization's


class Diabetes:
    """Age, sex, body mass index, blood pressure and six serum values, standardised over all patients; one target, 25 to 346.

    Args:
        domain: `female` or `male` (sex is then no input), `low_bmi` or `high_bmi` (below 25 kg/m², or not), or null for all.
            The file codes sex as 1 and 2; code 1, with more HDL cholesterol in the mean, is read as female.
    """

    def __init__(
        self, place: Place, *, domain: Literal["female", "male", "low_bmi", "high_bmi"] | None = "female"
    ) -> None:
        self.domain = domain

    def fingerprint(self) -> str:
        return fingerprint_values("diabetes", self.domain)

    def load(self) -> Domain:
        data = load_diabetes(scaled=False)
        sex, bmi = (data.data[:, data.feature_names.index(name)] for name in ("sex", "bmi"))
        rows = {
            None: bmi > 0,
            "female": sex == 1,
            "male": sex == 2,
            "low_bmi": bmi < OVERWEIGHT,
            "high_bmi": bmi >= OVERWEIGHT,
        }[self.domain]
        constant = ["sex"] if self.domain in ("female", "male") else []
        mean, scale = moments(data.data)
        inputs = (data.data - mean) / scale
        kept = [i for i, name in enumerate(data.feature_names) if name not in constant]
        chosen = np.flatnonzero(rows)
        part = Part(
            ArrayInputs(torch.from_numpy(inputs[chosen][:, kept]).float()),
            torch.from_numpy(data.target[chosen]).float()[:, None],
            tuple(f"diabetes/{i}" for i in chosen),
        )
        return Domain("diabetes" + (f"_{self.domain}" if self.domain else ""), "regression", (), part)
