"""The source's posterior over a softmax head on frozen features, left as a file that stands for the source (`prior=PATH`).

    p(W | source) ≈ N(W_s, τ (H + P)⁻¹)        W_s = argmin Σ CE(W z_s) + ½ ⟨W, P W⟩

(Laplace's approximation, MacKay 1992; as a prior for another target: Shwartz-Ziv et al., NeurIPS 2022.) z are features
whitened by the source's covariance within classes (`whiten`), with a one for the bias; P is `source_l2` times the number of
samples. The file holds W_s, a factor of its Hessian H_s (`rank`: only the largest directions), class means and covariance
within classes: all that `bayes_head` and `niw_lda` ask of a source. The run itself predicts with Böhning's bound for H and the
temperature τ of the least cross-validated negative log-likelihood.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.bayes.artefact import FILE, SourcePosterior
from transfer_cli.methods.bayes.base import SourceInformed
from transfer_cli.methods.bayes.bayes_head import TEMPERATURES, BayesianHead, Posterior, bounded, left_out
from transfer_cli.methods.bayes.source_head import (
    diagonal_curvature,
    source_curvature,
    source_problem,
    whitened,
)
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.softmax import Precision, Softmax
from transfer_cli.methods.phases import FeatureTask

STATELESS = ("row_sum", "l2")  # steps of features.normalise that a sample needs no others for


class SourcePosteriorHead(SourceInformed):
    version = 2  # the source's covariance is shrunk in units of each feature
    needs = Needs(source_labels=True)
    parts = ("source",)
    label_spaces = ("closed", "partial")
    takes_prior = ()

    def __init__(
        self,
        context: Context,
        *,
        whiten: bool = True,
        source_l2: float = 1e-3,
        rank: int | None = None,
        folds: int = 5,
        draws: int = 64,
    ) -> None:
        super().__init__(context, BayesianHead(context.kind, context.outputs, draws), folds)
        steps = context.features.normalise
        if context.features.reduce != "none" or any(step not in STATELESS for step in steps):
            raise ValueError(
                "leaves a file for any target, so features may not depend on this one: features.reduce=none, and of "
                "features.normalise row_sum and l2 alone"
            )
        if source_l2 <= 0 or draws < 2 or (rank is not None and rank < 1):
            raise ValueError("source_l2 is positive, draws at least 2, and rank at least 1 or null")
        self.whiten, self.source_l2, self.rank, self.draws = whiten, source_l2, rank, draws
        self.context = context
        self.source = Fitted()

    def learn(self, task: FeatureTask) -> dict[str, float]:
        assert task.source is not None and task.source.y is not None
        summary, y = self.summary(task), task.source.y
        half = summary.half(self.whiten)
        z = whitened(task.source.x, summary.centre, half)
        problem = source_problem(z, y, self.num_classes, self.source_l2)
        w = problem.minimise()
        temperature, nll = z.new_tensor(1.0), float("nan")
        folds = folds_of(y, self.folds)
        if folds is not None:

            def fit(part: Softmax) -> Posterior:
                return bounded(part, part.minimise(w))

            losses = left_out(problem, folds, fit, TEMPERATURES, self.draws)
            temperature = z.new_tensor(min(losses, key=lambda t: losses[t]))
            nll = min(losses.values())
        factor = root(source_curvature(z, w), self.rank)
        self.source.put(counts=summary.counts, means=summary.means, whitening=summary.half())
        self.source.put(mean=w, factor=factor, diagonal=diagonal_curvature(z, w), temperature=temperature)
        posterior = bounded(problem, w)
        self.head.fitted.put(mean=w, covariance=posterior.covariance, centre=summary.centre, whitening=half)
        self.head.fitted.put(temperature=temperature)
        return {"temperature": float(temperature), "left_out_nll": nll, "rank": float(factor.shape[1])}

    def artefacts(self) -> Mapping[str, bytes]:
        assert self.context.fingerprint is not None
        settings = {
            "whiten": self.whiten,
            "source_l2": self.source_l2,
            "normalise": list(self.context.features.normalise),
            "width": self.context.feature_dim,
            **self.context.about,
        }
        tensors = dict(self.source.named_buffers())
        tensors.pop("place")
        kept = SourcePosterior("head", self.context.class_names, self.context.fingerprint(), settings, tensors)
        return {FILE: kept.to_bytes()}


def root(precision: Precision, rank: int | None) -> Tensor:
    """F with FFᵀ the whole matrix, or the second factor of its Kronecker product; its `rank` largest directions."""
    matrix = precision.full if precision.kron is None else precision.kron[1]
    assert matrix is not None
    values, vectors = torch.linalg.eigh(matrix)
    there = values > 1e-13 * values[-1]
    values, vectors = values[there], vectors[:, there]
    first = 0 if rank is None else max(0, len(values) - rank)
    return vectors[:, first:] * values[first:].sqrt()
