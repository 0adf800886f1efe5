"""Figures of a model's health that need no label: how its predictions spread, and how far apart its features leave the domains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transfer_cli.data.batching import derive_seed
from transfer_cli.evaluation.samples import evenly
from transfer_cli.evaluation.validators import View

FEW = 20  # samples a domain, below which half of them say nothing about the other half
L2 = 1e-2  # a sample, of the domain classifier on standardised features: it has wide ones and some hundred samples


def prediction_health(view: View) -> dict[str, float]:
    """In classification the mean entropy (nats) of target predictions and the effective numbers of classes that are predicted.

    The source's is that of as many samples as the target has, evenly spread, so that the two compare.
    """
    if view.kind != "classification":
        return {}
    figures = {
        "target_entropy": float(torch.special.entr(view.target.probs.double()).sum(1).mean()),
        "target_classes": effective_classes(view.target.labels),
    }
    if view.source is not None:
        labels = view.source.labels
        figures["source_classes"] = effective_classes(labels[evenly(len(labels), len(view.target.labels))])
    return figures


def effective_classes(labels: Tensor) -> float:
    """`exp(H(histogram))` of class indices `(N,)`: 1 where all are one class, K where K classes are equally frequent."""
    shares = torch.bincount(labels.cpu()).double() / len(labels)
    return math.exp(float(torch.special.entr(shares).sum()))


def proxy_a_distance(source: Tensor, target: Tensor, seed: int = 0) -> float | None:
    """`2 (1 - 2 ε)`, ε the error of a linear classifier that tells the domains' features `(N, D)`, `(M, D)` apart
    (Ben-David et al., NIPS 2006): 0 where it cannot, 2 where it never errs. At least 0, for ε is an estimate.

    ε is the mean over two folds, each half predicted by the classifier of the other. None where there are too few samples
    or a feature is not finite.
    """
    errors = domain_errors(source, target, seed)
    return None if errors is None else max(0.0, 2 * (1 - 2 * sum(float(fold.mean()) for fold in errors) / 2))


def domain_errors(source: Tensor, target: Tensor, seed: int = 0) -> tuple[Tensor, Tensor] | None:
    """For the samples of each of the two folds, equally many of both domains: 1 where the other fold's classifier errs, else 0."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    n = min(len(source), len(target))
    if n < FEW or not bool(torch.isfinite(source).all() and torch.isfinite(target).all()):
        return None
    draw = torch.Generator().manual_seed(derive_seed(seed, "a_distance"))
    halves = [x.double().cpu().flatten(1)[torch.randperm(len(x), generator=draw)[:n]] for x in (source, target)]
    folds = [torch.cat([x[i::2] for x in halves]).numpy() for i in (0, 1)]  # each half source, half target
    labels = [torch.arange(2).repeat_interleave(len(fold) // 2).numpy() for fold in folds]
    errors = []
    for one, other in ((0, 1), (1, 0)):
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (L2 * len(folds[one])), max_iter=1000))
        guesses = classifier.fit(folds[one], labels[one]).predict(folds[other])
        errors.append(torch.from_numpy(guesses != labels[other]).double())
    return errors[0], errors[1]
