"""Minus the Davies-Bouldin index (Davies & Bouldin, IEEE TPAMI 1979) of target features under the predicted classes,

    - 1/C Σ_c max_{d≠c} (s_c + s_d) / ||μ_c - μ_d||,    s_c the mean distance of a class's samples to their mean μ_c:

0 where classes are points. A ratio counts 1,000 at most, which is also that of a single class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfer_cli.evaluation.validators import View, needs, sampled

LARGEST = 1000.0


@needs("classification", "target_features")
def dbi(view: View) -> float:
    assert view.target_features is not None
    x, labels = view.target_features, view.target.labels
    classes, labels = sampled(labels).long().unique(return_inverse=True)
    if len(classes) < 2:
        return -LARGEST
    members = F.one_hot(labels, len(classes)).double()  # (n, C)
    sizes = members.sum(0)
    centres = (members.T @ x) / sizes[:, None]
    spread = (members.T @ (x - centres[labels]).norm(dim=1)) / sizes
    apart = torch.cdist(centres, centres).fill_diagonal_(torch.inf)
    ratio = torch.nan_to_num((spread[:, None] + spread) / apart, nan=0.0, posinf=LARGEST).clamp_max(LARGEST)
    return -float(ratio.max(1).values.mean())
