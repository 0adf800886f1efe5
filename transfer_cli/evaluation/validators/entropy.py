"""Minus the mean entropy of predictions on target inputs (Morerio et al., ICLR 2018). Blind to collapse on one class."""

from __future__ import annotations

import torch

from transfer_cli.evaluation.validators import View, needs


@needs("classification")
def entropy(view: View) -> float:
    return -float(torch.special.entr(view.target.probs.double()).sum(1).mean())
