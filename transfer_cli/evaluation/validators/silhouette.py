"""The mean silhouette (Rousseeuw, J. Comput. Appl. Math. 1987) of target features under the predicted classes,

    (b_i - a_i) / max(a_i, b_i),    a_i the mean distance to the others of its class, b_i the least mean distance to another class:

1 where classes are tight and far apart; 0 of a sample alone in its class. -1 where all are of one class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from transfer_cli.evaluation.validators import View, needs, sampled


@needs("classification", "target_features")
def silhouette(view: View) -> float:
    assert view.target_features is not None
    x, labels = view.target_features, view.target.labels
    classes, labels = sampled(labels).long().unique(return_inverse=True)
    if len(classes) < 2:
        return -1.0
    members = F.one_hot(labels, len(classes)).double()  # (n, C)
    sizes = members.sum(0)
    sums = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") @ members
    own = sizes[labels]
    inside = sums.gather(1, labels[:, None])[:, 0] / (own - 1).clamp_min(1)
    others = (sums / sizes).masked_fill(members.bool(), torch.inf).min(1).values
    score = (others - inside) / torch.maximum(inside, others).clamp_min(1e-300)
    return float(torch.where(own > 1, score, 0.0).mean())
