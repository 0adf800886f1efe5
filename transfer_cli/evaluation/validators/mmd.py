"""Minus the squared maximum mean discrepancy (Gretton et al., JMLR 2012) of source and target features,

    - [ mean k(s, s') + mean k(t, t') - 2 mean k(s, t) ],    k(x, z) = exp( - ||x - z||² / (2 m) ),

m the median of all squared distances of both together, so that the features' scale does not matter; all is over all pairs, those of
a sample with itself too. 0 where the domains cannot be told apart, whether or not the classes can.
"""

from __future__ import annotations

import torch

from transfer_cli.evaluation.validators import View, needs


@needs("source_features", "target_features")
def mmd(view: View) -> float:
    assert view.source_features is not None and view.target_features is not None
    n = len(view.source_features)
    x = torch.cat([view.source_features, view.target_features])
    x = ((x - x.mean(0)) / x.std().clamp_min(1e-30)).float()  # half the time, and in float32 of any scale
    squared = torch.cdist(x, x).square().double()
    median = float(squared.median())
    kernel = torch.exp(-squared / (2 * median)) if median > 0 else (squared <= 0).double()
    return -float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())
