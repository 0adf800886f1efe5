"""Average thresholded confidence (Garg et al., ICLR 2022): a prediction of the target's accuracy,

    share of target inputs with  max_k p_k(x) >= t,    t such that the share of source validation samples below it is their error.

The confidence is the highest probability.
"""

from __future__ import annotations

from transfer_cli.evaluation.validators import View, needs


@needs("classification", "source_labels")
def atc(view: View) -> float:
    assert view.source is not None and view.source_labels is not None
    errors = int((view.source.labels.cpu() != view.source_labels.cpu()).sum())
    confidence = view.source.probs.double().cpu().max(1).values.sort().values
    if errors == len(confidence):  # no threshold leaves so many below it
        return 0.0
    return float((view.target.probs.double().cpu().max(1).values >= confidence[errors]).double().mean())
