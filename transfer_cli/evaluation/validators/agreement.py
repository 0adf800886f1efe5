"""Agreement of runs: how often a model says what the others say together, on the same target inputs,

    1/N Σ_n 1[ argmax p_r(x_n) = argmax Σ_{q≠r} p_q(x_n) ];    in regression minus the RMSE to the mean of the others' means.

Models that were trained in different ways make different errors, so that what most of them say is right more often than one of them
(Baek et al., NeurIPS 2022, predict accuracy from the agreement of pairs). Blind to an error that all share, and a run is only as
well judged as the others are good.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST = 3  # runs: two tell nothing of which is right


def agreement(outputs: Sequence[np.ndarray], classification: bool) -> list[float]:
    """A score for each run, of all their probabilities `(N, K)` or means `(N, T)` of the same samples."""
    total = np.sum([output.astype(np.float64) for output in outputs], axis=0)
    scores = []
    for output in outputs:
        others = total - output
        if classification:
            scores.append(float((output.argmax(1) == others.argmax(1)).mean()))
        else:
            scores.append(-float(np.sqrt(np.square(output - others / (len(outputs) - 1)).mean())))
    return scores
