"""Classification by Gaussian-process regression: Dirichlet-based GPs (Milios et al., NeurIPS 2018).

    α_ik = α_ε + [y_i = k]        σ̃²_ik = log(1 + 1 / α_ik)        ỹ_ik = log α_ik - σ̃²_ik / 2
    ỹ_ik = f_k(z_i) + ε_ik,    f_k ~ GP(m, k),    ε_ik ~ N(0, σ̃²_ik)        p(c | z) = E softmax(f(z))_c

The class probabilities of one sample are a Dirichlet's, whose gamma variates are matched by log-normal ones; so each class is a GP
with a noise of its own a sample, and all is closed form. m is the mean of ỹ where each class is as frequent as any other. z are
features whitened by the source's covariance within classes, where there is a source; its classes may be others than the target's.

    k(z, z') = s² exp(-|z - z'|² / 2 D ℓ²) + v (1 + zᵀ z' / D)        `signal` s², `lengthscale` ℓ, `linear` v

α_ε, ℓ, s² and v, where not set, are those of the least leave-one-out negative log-likelihood, each searched in turn on a grid. With
μ_i, v_i the posterior and h_i = v_i / σ̃²_i, sample i left out gives (Rasmussen & Williams 2006, section 5.4.2, in other terms)

    μ_-i = (μ_i - h_i ỹ_i) / (1 - h_i) = ỹ_i - [K⁻¹ (ỹ - m)]_i / [K⁻¹]_ii        v_-i = v_i / (1 - h_i) = 1 / [K⁻¹]_ii - σ̃²_i

The same left-out probabilities give the temperature T, p^(1/T), with log T ~ N(0, ½²). One code serves any number of samples:
f = φ(z)ᵀ w and what φ does not explain, φ = L⁻¹ k(Z, z), k(Z, Z) = L Lᵀ, w ~ N(0, I) (Nyström; Quiñonero-Candela & Rasmussen, JMLR
2005, DTC). Up to `points` distinct samples Z are the samples and it is exact; beyond, Z are as many centres of k-means, and
hyperparameters and temperature are found on as many random samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.bayes.summary import Summary
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.gaussian_process.expected_softmax import class_probs
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.math.gp import cholesky
from transfer_cli.methods.math.kernels import Kernel
from transfer_cli.methods.math.logistic import deviation
from transfer_cli.methods.math.sparse import BLOCK, JITTER, inducing_points
from transfer_cli.methods.phases import FeatureTask

GRID: dict[str, tuple[float, ...]] = {
    "alpha_eps": (0.1, 0.03, 0.01, 0.003, 0.001),  # below, the labels of other classes are all noise
    "lengthscale": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
    "signal": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
    "linear": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
}
ROUNDS = 4  # through the hyperparameters, at most
TEMPERATURES = torch.logspace(-1, 1, 41, dtype=torch.float64)
NEAR_ONE = 0.5  # standard deviation of log T


class Hyper(NamedTuple):
    alpha_eps: float = 0.01
    lengthscale: float = 2.0
    signal: float = 10.0
    linear: float = 10.0


@dataclass(frozen=True)
class Labels:
    """ỹ and σ̃² of a sample's own class and of any other, and the prior mean m."""

    own: float
    other: float
    own_noise: float
    other_noise: float
    mean: float

    @classmethod
    def of(cls, alpha_eps: float, classes: int) -> Labels:
        alpha = torch.tensor([1 + alpha_eps, alpha_eps], dtype=torch.float64)
        noise = torch.log1p(1 / alpha)
        own, other = (alpha.log() - noise / 2).tolist()
        own_noise, other_noise = noise.tolist()
        return cls(own, other, own_noise, other_noise, mean=(own + (classes - 1) * other) / classes)

    def table(self, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """ỹ and σ̃² `(N, K)`, float64."""
        own = F.one_hot(y, classes).double()
        return (
            self.other + own * (self.own - self.other),
            self.other_noise + own * (self.own_noise - self.other_noise),
        )


@dataclass(frozen=True)
class DirichletPosterior:
    """K independent GPs that share a kernel. `anchors` `(M, D)`, `lower` `(M, M)`, `inner` `(K, M, M)`, `weights` `(K, M)`."""

    theta: Tensor
    mean: Tensor
    anchors: Tensor
    lower: Tensor
    inner: Tensor
    weights: Tensor

    @classmethod
    def fit(cls, hyper: Hyper, x: Tensor, y: Tensor, classes: int, anchors: Tensor) -> DirichletPosterior:
        """On `(N, D)` and class indices `(N,)`; D counts the constant."""
        width = x.shape[1] - 1
        theta = x.new_tensor([hyper.signal, hyper.lengthscale * width**0.5, hyper.linear]).log()
        prior = kernel_of(x)(theta, anchors, anchors)
        lower = cholesky(prior + torch.diag(JITTER * prior.diagonal()), "the prior")
        labels, m = Labels.of(hyper.alpha_eps, classes), len(anchors)
        grams, sums = x.new_zeros(classes, m, m), x.new_zeros(classes, m)
        for part, which in zip(x.split(BLOCK), y.split(BLOCK), strict=True):
            phi = torch.linalg.solve_triangular(lower, kernel_of(x)(theta, anchors, part), upper=False)
            for k in which.unique().tolist():
                mine = phi[:, which == k]
                grams[k] += mine @ mine.T
                sums[k] += mine.sum(1)
        p_own, p_other = 1 / labels.own_noise, 1 / labels.other_noise
        precision = torch.eye(m, dtype=x.dtype, device=x.device) + p_other * grams.sum(0) + (p_own - p_other) * grams
        pull = p_other * (labels.other - labels.mean) * (sums.sum(0) - sums) + p_own * (labels.own - labels.mean) * sums
        inner = torch.linalg.cholesky(precision)
        weights = torch.cholesky_solve(pull[:, :, None], inner)[:, :, 0]
        return cls(theta, x.new_tensor(labels.mean), anchors, lower, inner, weights)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At `(B, D)`: mean `(B, K)` of f; its variance in the directions of φ, `(B, K)`; and what those miss, `(B, 1)`."""
        phi = torch.linalg.solve_triangular(self.lower, kernel_of(x)(self.theta, self.anchors, x), upper=False)
        missed = (kernel_of(x).diagonal(self.theta, x) - phi.square().sum(0)).clamp_min(0)
        spread = torch.linalg.solve_triangular(self.inner, phi.expand(len(self.inner), *phi.shape), upper=False)
        return self.mean + (self.weights @ phi).T, spread.square().sum(1).T, missed[:, None]

    def left_out(self, x: Tensor, y: Tensor, alpha_eps: float) -> tuple[Tensor, Tensor]:
        """Mean and variance `(N, K)` of f at each of the samples it was fitted to, given all the others."""
        target, noise = Labels.of(alpha_eps, len(self.inner)).table(y, len(self.inner))
        mean, variance, missed = self.moments(x)
        share = variance / noise
        return (mean - share * target) / (1 - share), variance / (1 - share) + missed


def kernel_of(x: Tensor) -> Kernel:
    return Kernel("rbf", x.shape[1] - 1, linear=True)


def log(probs: Tensor) -> Tensor:
    """A zero is taken for the smallest positive number."""
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def whitened(x: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    """`L⁻¹ (x - m)` of `(B, D)` and a column of √D, which makes the linear kernel's constant."""
    z = torch.linalg.solve_triangular(half, (x - centre).T, upper=False).T
    return torch.cat([z, torch.full_like(z[:, :1], z.shape[1] ** 0.5)], 1)


class DirichletHead(Head):
    """Whitening, the posterior and its predictive; fitted by the method."""

    kinds = ("classification",)

    def __init__(self, kind: str, outputs: int, draws: int) -> None:
        super().__init__(kind, outputs)
        self.draws = draws

    def predict(self, x: Tensor) -> Prediction:
        state = self.fitted
        posterior = DirichletPosterior(state.theta, state.mean, state.anchors, state.lower, state.inner, state.weights)
        mean, variance, missed = posterior.moments(whitened(x.double(), state.centre, state.whitening))
        probs = class_probs(mean, variance + missed, self.draws)
        return Prediction.from_logits(log(probs) / state.temperature)


class DirichletGP(FeatureMethod):
    needs = Needs(any_labels=True)
    kinds = ("classification",)
    uses_head = False
    parts = ("source", "target_labelled")
    label_spaces = ("closed", "partial", "separate")

    def __init__(
        self,
        context: Context,
        *,
        data: Literal["auto", "pooled"] = "auto",
        hyper: Literal["auto", "source"] = "auto",
        whiten: bool = True,
        alpha_eps: float | None = None,
        lengthscale: float | None = None,
        signal: float | None = None,
        linear: float | None = None,
        predictive: Literal["monte_carlo", "mean"] = "monte_carlo",
        draws: int = 64,
        points: int = 300,
    ) -> None:
        super().__init__(context, DirichletHead(context.kind, context.outputs, draws * (predictive == "monte_carlo")))
        given = {"alpha_eps": alpha_eps, "lengthscale": lengthscale, "signal": signal, "linear": linear}
        if any(value is not None and value <= 0 for value in given.values()):
            raise ValueError("alpha_eps, lengthscale, signal and linear are positive, or null")
        if draws < 2 or points < 2:
            raise ValueError("draws and points are at least 2")
        if not context.has_source and (hyper == "source" or data == "pooled"):
            raise ValueError("hyper=source and data=pooled need a source: set source=NAME")
        if data == "pooled" and not context.source_labels_fit_head:
            raise ValueError("data=pooled needs a source with the target's classes: set method.data=auto")
        self.data, self.hyper, self.whiten, self.points = data, hyper, whiten, points
        self.given = {name: value for name, value in given.items() if value is not None}
        self.source_classes, self.shared = context.source_classes, context.source_labels_fit_head

    def learn(self, task: FeatureTask) -> dict[str, float]:
        state = self.head.fitted
        centre, half = self.whitening(task)
        source, target = (
            None if part is None or part.y is None else (whitened(part.x, centre, half), part.y)
            for part in (task.source, task.target_labelled)
        )
        mine = [part for part in (source if self.shared else None, target) if part is not None]
        if not mine:
            raise TransferError("method dirichlet_gp has no label of the target's classes: set target_labels=N.")
        parts = mine if self.data == "pooled" else mine[-1:]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        few = self.some(parts)
        hyper = Hyper(**self.given)
        if source is not None and (self.hyper == "source" or few is None):
            others = self.some([source])
            hyper = hyper if others is None else self.chosen(others, self.source_classes)
        elif few is not None:
            hyper = self.chosen(few, self.num_classes)
        temperature = 1.0 if few is None else self.temperature(few, hyper)
        posterior = DirichletPosterior.fit(hyper, x, y, self.num_classes, inducing_points(x, self.points))
        state.put(**vars(posterior), centre=centre, whitening=half, temperature=x.new_tensor(temperature))
        return {**hyper._asdict(), "temperature": temperature, "anchors": float(len(posterior.anchors))}

    def whitening(self, task: FeatureTask) -> tuple[Tensor, Tensor]:
        """Centre and root of the source's covariance within classes; without a source, of the target's own variances."""
        part = task.source if task.source is not None else task.target_labelled
        assert part is not None
        if task.source is None or task.source.y is None:
            return part.x.mean(0), torch.diag(deviation(part.x))
        summary = Summary.of(task.source.x, task.source.y, self.source_classes)
        return summary.centre, summary.half(self.whiten)

    def some(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Few | None:
        """At most `points` samples, those of the last part first, whose own are asked; None where no class of theirs has two."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        room = self.points
        for i, (inputs, labels) in enumerate(reversed(parts)):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:room].to(labels.device)
            asked = torch.full_like(labels[order], i == 0, dtype=torch.bool)
            found.append((inputs[order], labels[order], asked))
            room -= len(order)
        few = Few(*(torch.cat(column) for column in zip(*found, strict=True)))
        few = replace(few, asked=few.asked & (torch.bincount(few.y)[few.y] > 1))
        return few if bool(few.asked.any()) else None

    def chosen(self, few: Few, classes: int) -> Hyper:
        """Of the least leave-one-out negative log-likelihood."""
        anchors = few.x.unique(dim=0)

        def score(hyper: Hyper) -> float:
            return few.loss(self.left_out(few, hyper, classes, anchors))

        best = Hyper(**self.given)
        least = score(best)
        for _ in range(ROUNDS):
            before = best
            for name in [name for name in GRID if name not in self.given]:
                for value in GRID[name]:
                    other = best._replace(**{name: value})
                    loss = least if other == best else score(other)
                    if loss < least:
                        best, least = other, loss
            if best == before:
                break
        return best

    def left_out(self, few: Few, hyper: Hyper, classes: int, anchors: Tensor) -> Tensor:
        """Log-probabilities `(N, K)` of each sample given the others."""
        posterior = DirichletPosterior.fit(hyper, few.x, few.y, classes, anchors)
        mean, variance = posterior.left_out(few.x, few.y, hyper.alpha_eps)
        return log(class_probs(mean, variance, self.head.draws))  # type: ignore[arg-type]

    def temperature(self, few: Few, hyper: Hyper) -> float:
        scores = self.left_out(few, hyper, self.num_classes, few.x.unique(dim=0))
        prior = 0.5 * (TEMPERATURES.log() / NEAR_ONE).square()
        losses = [few.loss((scores / t).log_softmax(1)) for t in TEMPERATURES.tolist()]
        return float(TEMPERATURES[int((prior + torch.tensor(losses)).argmin())])


@dataclass(frozen=True)
class Few:
    """Samples `(N, D)`, their classes `(N,)`, and which of them `(N,)` are asked about when left out."""

    x: Tensor
    y: Tensor
    asked: Tensor

    def loss(self, log_probs: Tensor) -> float:
        """Negative log-likelihood of those asked about, `(N, K)`."""
        return float(-log_probs.gather(1, self.y[:, None])[self.asked].sum())
