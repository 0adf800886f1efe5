"""The entropy of the mean prediction on target inputs, `H(mean p)`: high when the classes are all used (as a validator Musgrave
et al. 2022). Blind to how sure the predictions are, and wrong where the target's classes are of unequal frequency."""

from __future__ import annotations

import torch

from transfer_cli.evaluation.validators import View, needs


@needs("classification")
def diversity(view: View) -> float:
    return float(torch.special.entr(view.target.probs.double().mean(0)).sum())
