"""A Bayesian linear head on frozen features whose prior is the source's.

    p(y | z, W) = softmax(W z)        W ~ N(W0, P⁻¹)        p(W | target labels) ≈ N(Ŵ, τ (H + P)⁻¹)

    prior       W0    P
    isotropic   0     λ I
    l2sp        W_s   λ I                          (Li, Grandvalet & Davoine, ICML 2018)
    ewc         W_s   α diag H_s + λ I             (Kirkpatrick et al., PNAS 2017)
    source      W_s   α H_s + λ I                  the whole posterior of the source, tempered (Shwartz-Ziv et al., NeurIPS 2022)

z are features whitened by the source's covariance within classes (`whiten`), with a one for the bias: then λ I is
N(0, (λ S_w)⁻¹) on the features themselves. W_s and H_s are optimum and Hessian of the source's head. `covariance`: H is the
Hessian at Ŵ (`laplace`) or Böhning's bound of it, ½ (I - 11ᵀ/K) ⊗ Σ z zᵀ (`boehning`), which needs one factor of size D.
λ, α and the posterior's temperature τ are those of the least cross-validated negative log-likelihood (`choose: cv`), or λ and
α those of the greatest Laplace evidence (`evidence`). Where no class has two labels nothing can be left out: the evidence chooses,
but of an isotropic prior, which it would then make so narrow that all classes are equally likely: λ = 1.
Predicted is the mean of softmax over `draws` antithetic normal draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.bayes.base import SourceInformed
from transfer_cli.methods.bayes.source_head import (
    SourceHead,
    diagonal_curvature,
    penalties,
    source_curvature,
    source_optimum,
    whitened,
)
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.softmax import Precision, Softmax
from transfer_cli.methods.math.span import Span, centred_block
from transfer_cli.methods.phases import FeatureTask

LAMBDAS = torch.logspace(-3, 3, 7, dtype=torch.float64).tolist()
ONE_EACH = 1.0  # λ
ALPHAS = torch.logspace(-3, 0, 4, dtype=torch.float64).tolist()
FULL_MOST = 5000  # weights of a whole covariance
TEMPERATURES = [0.0, *torch.logspace(-3, 0, 7, dtype=torch.float64).tolist()]

Prior = Literal["isotropic", "l2sp", "ewc", "source"]
Covariance = Literal["laplace", "boehning"]


@dataclass(frozen=True)
class Posterior:
    """`mean` `(K, D)`; `covariance` `(K, D, K, D)`, or `(D, D)` where it is that times I - 11ᵀ/K between the classes."""

    mean: Tensor
    covariance: Tensor

    def probs(self, z: Tensor, temperature: float, noise: Tensor) -> Tensor:
        """Class probabilities `(B, K)` at `(B, D)`, the mean over standard normal draws `noise` `(S, K)`."""
        return self.logits(z, temperature, noise).softmax(2).mean(0)

    def logits(self, z: Tensor, temperature: float, noise: Tensor) -> Tensor:
        """Draws `(S, B, K)`."""
        spread = temperature**0.5 * self.spread(z)
        return z @ self.mean.T + torch.einsum("bkj,sj->sbk", spread, noise)

    def spread(self, z: Tensor) -> Tensor:
        """Roots `(B, K, K)` of the logits' covariances, without the direction in which softmax does not move."""
        classes = len(self.mean)
        centring = torch.eye(classes, dtype=z.dtype, device=z.device) - 1 / classes
        if self.covariance.ndim == 2:
            return ((z @ self.covariance) * z).sum(1).clamp_min(0).sqrt()[:, None, None] * centring
        between = self.between(z)
        values, vectors = torch.linalg.eigh(centring @ between @ centring)
        return vectors * values.clamp_min(0).sqrt()[:, None, :]

    def times(self, v: Tensor) -> Tensor:
        """The whole covariance times weights `(K, D)`."""
        return torch.einsum("kdle,le->kd", self.covariance, v)

    def between(self, z: Tensor) -> Tensor:
        """Covariances `(B, K, K)` of the logits."""
        return torch.einsum("bd,kdle,be->bkl", z, self.covariance, z)


class BayesianHead(Head):
    """Whitening, the posterior and its predictive; fitted by the method."""

    kinds = ("classification",)

    def __init__(self, kind: str, outputs: int, draws: int) -> None:
        super().__init__(kind, outputs)
        self.draws = draws

    def predict(self, x: Tensor) -> Prediction:
        state = self.fitted
        posterior = Posterior(state.mean, state.covariance)
        z = whitened(x.double(), state.centre, state.whitening)
        logits = posterior.logits(z, float(state.temperature), normal_draws(self.draws, self.outputs, z))
        return Prediction.of_draws(logits.log_softmax(2))


class BayesHead(SourceInformed):
    version = 4  # one label a class under an isotropic prior
    needs = Needs(source_of_any_classes=True, target_labels=True)

    def __init__(
        self,
        context: Context,
        *,
        prior: Prior = "isotropic",
        whiten: bool = True,
        covariance: Covariance = "boehning",
        choose: Literal["cv", "evidence"] = "cv",
        lam: float | None = None,
        alpha: float | None = None,
        temperature: float | None = None,
        source_l2: float = 1e-3,
        folds: int = 5,
        draws: int = 64,
    ) -> None:
        super().__init__(context, BayesianHead(context.kind, context.outputs, draws), folds)
        if prior != "isotropic" and not context.source_labels_fit_head:
            raise ValueError(f"prior={prior} needs a source with the target's classes: set method.prior=isotropic")
        if any(value is not None and value <= 0 for value in (lam, alpha, source_l2)):
            raise ValueError("lam, alpha and source_l2 are positive; lam and alpha may be null")
        if draws < 2 or (temperature is not None and temperature < 0):
            raise ValueError("temperature is not negative, and draws at least 2")
        if self.known is not None and prior != "isotropic":
            self.known.check(whiten=whiten, source_l2=source_l2)
        self.prior_kind, self.whiten, self.covariance, self.choose = prior, whiten, covariance, choose
        self.lam, self.alpha, self.temperature, self.source_l2, self.draws = lam, alpha, temperature, source_l2, draws

    def learn(self, task: FeatureTask) -> dict[str, float]:
        assert task.target_labelled is not None and task.target_labelled.y is not None
        summary = self.summary(task)
        half = summary.half(self.whiten)
        z = whitened(task.target_labelled.x, summary.centre, half)
        if self.covariance == "laplace" and self.num_classes * z.shape[1] > FULL_MOST:
            raise TransferError(
                f"a whole covariance of {self.num_classes * z.shape[1]:,} weights is too large: set "
                "method.covariance=boehning, or features.reduce=pca."
            )
        if self.known is not None:
            mean, sharp = self.from_known(self.known, z.device)
        else:
            assert task.source is not None and task.source.y is not None
            mean, sharp = self.of_source(whitened(task.source.x, summary.centre, half), task.source.y)
        problem = Softmax(z, task.target_labelled.y, torch.ones_like(z[:, 0]), mean, Precision(torch.zeros_like(mean)))
        lam, alpha, temperature = self.chosen(problem, sharp)
        posterior = self.posterior(with_prior(problem, sharp, lam, alpha))
        self.head.fitted.put(
            mean=posterior.mean, covariance=posterior.covariance, centre=summary.centre, whitening=half
        )
        self.head.fitted.put(temperature=z.new_tensor(temperature))
        return {"lambda": lam, "alpha": alpha, "temperature": temperature}

    def of_source(self, z: Tensor, y: Tensor) -> tuple[Tensor, Precision]:
        """W_s and H_s (ewc: its diagonal), or zeros where the prior has no use for them."""
        start = z.new_zeros(self.num_classes, z.shape[1])
        if self.prior_kind == "isotropic":
            return start, Precision(start)
        w = source_optimum(z, y, self.num_classes, self.source_l2)
        if self.prior_kind == "l2sp":
            return w, Precision(start)
        return w, Precision(diagonal_curvature(z, w)) if self.prior_kind == "ewc" else source_curvature(z, w)

    def from_known(self, known: SourceHead, device: torch.device) -> tuple[Tensor, Precision]:
        """The same from a source's posterior, in the source's place."""
        head = known.to(device)
        none = torch.zeros_like(head.mean)
        if self.prior_kind in ("isotropic", "l2sp"):
            return none if self.prior_kind == "isotropic" else head.mean, Precision(none)
        return head.mean, Precision(head.diagonal) if self.prior_kind == "ewc" else head.precision()

    def settings(self, folds: Tensor | None) -> Iterator[tuple[float, float]]:
        """λ and α to choose among."""
        if self.lam is None and folds is None and self.choose == "cv" and self.prior_kind == "isotropic":
            return iter([(ONE_EACH, 0.0)])
        alphas = [0.0] if self.prior_kind in ("isotropic", "l2sp") else ALPHAS if self.alpha is None else [self.alpha]
        return product(LAMBDAS if self.lam is None else [self.lam], alphas)

    def chosen(self, problem: Softmax, sharp: Precision) -> tuple[float, float, float]:
        """λ, α and τ."""
        folds = folds_of(problem.y, self.folds)
        best = None
        for lam, alpha in self.settings(folds):
            here = with_prior(problem, sharp, lam, alpha)
            span = Span.of(here)
            here = here if span is None else span.problem
            losses = self.held_out(here, folds)
            score = -self.log_evidence(here) if self.choose == "evidence" or folds is None else min(losses.values())
            if best is None or score < best[0]:
                best = score, (lam, alpha, min(losses, key=lambda t: losses[t]))
        assert best is not None
        return best[1]

    def held_out(self, problem: Softmax, folds: Tensor | None) -> dict[float, float]:
        """By temperature, the mean negative log-likelihood of samples left out; where no class has two, only 1 is known."""
        if folds is None:
            return {1.0 if self.temperature is None else self.temperature: 0.0}
        temperatures = TEMPERATURES if self.temperature is None else [self.temperature]
        return left_out(problem, folds, self.posterior, temperatures, self.draws)

    def posterior(self, problem: Softmax) -> Posterior:
        span = Span.of(problem)
        if span is not None:
            found = self.posterior(span.problem)
            return Posterior(span.weights(found.mean), span.covariance(found.covariance))
        w = problem.minimise()
        if self.covariance == "boehning":
            return bounded(problem, w)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(problem.hessian(w)))
        return Posterior(w, inverse.view(*w.shape, *w.shape))

    def log_evidence(self, problem: Softmax) -> float:
        """Laplace's approximation; Böhning's bound in the Hessian's place where that is the covariance."""
        w = problem.minimise()
        if self.covariance == "laplace":
            dets = [torch.linalg.slogdet(m).logabsdet for m in (problem.precision.dense(), problem.hessian(w))]
            return -problem.value(w) + 0.5 * float(dets[0] - dets[1])
        prior = block_of(problem.precision)
        bound = 0.5 * (problem.x * problem.weights[:, None]).T @ problem.x + prior
        dets = [torch.linalg.slogdet(m).logabsdet for m in (prior, bound)]
        return -problem.value(w) + 0.5 * (len(w) - 1) * float(dets[0] - dets[1])


def left_out(
    problem: Softmax, folds: Tensor, fit: Callable[[Softmax], Posterior], temperatures: Sequence[float], draws: int
) -> dict[float, float]:
    """By temperature, the mean negative log-likelihood of each fold's samples under what `fit` makes of the others."""
    totals = dict.fromkeys(temperatures, 0.0)
    noise = normal_draws(draws, len(problem.mean), problem.x)
    for fold in folds.unique():
        left, seen = folds == fold, folds != fold
        posterior = fit(replace(problem, x=problem.x[seen], y=problem.y[seen], weights=problem.weights[seen]))
        for t in temperatures:
            probs = posterior.probs(problem.x[left], t, noise).clamp_min(torch.finfo(torch.float64).tiny)
            totals[t] += float(F.nll_loss(probs.log(), problem.y[left], reduction="sum")) / len(folds)
    return totals


def bounded(problem: Softmax, w: Tensor) -> Posterior:
    """At the optimum W, with Böhning's bound in the Hessian's place."""
    bound = 0.5 * (problem.x * problem.weights[:, None]).T @ problem.x + block_of(problem.precision)
    return Posterior(w, torch.cholesky_inverse(torch.linalg.cholesky(bound)))


def block_of(precision: Precision) -> Tensor:
    """`(D, D)`, of each class; where classes differ, one that stands for them."""
    block = centred_block(precision)
    return precision.shared() if block is None else block


def with_prior(problem: Softmax, sharp: Precision, lam: float, alpha: float) -> Softmax:
    """The problem under P = α H_s + λ I."""
    return replace(problem, precision=sharp.scaled(alpha).plus(penalties(problem.mean, lam)))


def normal_draws(n: int, width: int, like: Tensor) -> Tensor:
    """`(n, width)`, always the same, the second half the negative of the first."""
    draw = torch.Generator().manual_seed(0)
    half = torch.randn((n + 1) // 2, width, generator=draw, dtype=torch.float64)
    return torch.cat([half, -half])[:n].to(like)
