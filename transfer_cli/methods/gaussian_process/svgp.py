"""Stochastic variational Gaussian processes, for many points (Hensman et al., UAI 2013; AISTATS 2015), on any backbone's features.

    f_k(x) ~ GP(0, k(z, z')),  z = F(x)        v_k = L⁻¹ f_k(Z),  L Lᵀ = k(Z, Z)        q(v_k) = N(Λ_k⁻¹ η_k, Λ_k⁻¹)
    max  α Σ_s E_q log p(y_s | f(x_s)) + Σ_t E_q log p(y_t | f(x_t)) - Σ_k KL(q(v_k) ‖ N(0, I))

p is normal with a learnt noise in regression, and softmax(f) in classification, its expectations over `samples` draws. All labels
train one function, the source's with the power α = `source_power` (a power prior, Ibrahim & Chen, Stat. Sci. 2000; 1: pooled).
The Z are `inducing` centres of k-means on the features. With `features: joint` the network is trained first, with its linear head,
for `network_steps` (null: `trainer.steps`; none where it starts from another run).

Two updates take turns (Salimbeni et al., AISTATS 2018). The first moves kernel and noise, at `hyper_lr` times the configured rate,
with `features: joint` also the network, at `network_lr` times it, and Z (a deep kernel, Wilson et al., AISTATS 2016); the KL term
does not depend on them. The second moves q by the natural gradient with rate ρ = `natural_lr` (1 - p): of B samples among N

    Λ ← (1 - ρ) Λ + ρ (I + N/B Σ φ β φᵀ)        η ← (1 - ρ) η + ρ N/B Σ φ (g + β m)
    φ = L⁻¹ k(Z, z),    m = E f,    g = E ∂ log p / ∂f,    β = -E ∂² log p / ∂f²

(Khan & Lin, AISTATS 2017), in which Λ stays positive definite. All that follows the backbone is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Method, Needs, Network
from transfer_cli.methods.gaussian_process.expected_softmax import class_probs
from transfer_cli.methods.math.kernels import Form, Kernel
from transfer_cli.methods.math.logistic import deviation
from transfer_cli.methods.math.sparse import JITTER, inducing_points
from transfer_cli.methods.phases import Batch, ClosedForm, FeatureTask, Gradient, Losses, Moves, Phase, Progress, Update

NOISE = 0.1  # variance at the start, standardised units
FLOOR = 1e-6  # below which it never falls
APART = 0.1  # of inducing points beyond the distinct samples from those, in standard deviations


class SVGP(Method):
    needs = Needs(any_labels=True)
    handles_target_labels = True
    centre: Tensor
    scale: Tensor
    counts: Tensor
    precision: Tensor
    pull: Tensor

    def __init__(
        self,
        context: Context,
        *,
        features: Literal["joint", "frozen"] = "joint",
        kernel: Form = "rbf",
        ard: bool = False,
        linear: bool = False,
        inducing: int = 256,
        source_power: float = 1.0,
        natural_lr: float = 0.1,
        hyper_lr: float = 5.0,
        network_lr: float = 0.1,
        network_steps: int | None = None,
        samples: int = 8,
        draws: int = 64,
    ) -> None:
        super().__init__()
        if not 0 < natural_lr <= 1 or not 0 < source_power <= 1:
            raise ValueError("natural_lr and source_power are above 0 and at most 1")
        if min(hyper_lr, network_lr, network_steps or 0) < 0 or min(inducing, samples, draws) < 1:
            raise ValueError(
                "hyper_lr, network_lr and network_steps are not negative, and inducing, samples and draws are at least 1"
            )
        self.network, self.kind, self.outputs = Network(context), context.kind, context.outputs
        self.joint = features == "joint" and bool(Moves.of(self.network.backbone, self.network.bottleneck).parameters)
        self.network_steps = network_steps if self.joint and context.source_model is None else 0
        self.source_power, self.natural_lr, self.hyper_lr, self.network_lr = (
            source_power,
            natural_lr,
            hyper_lr,
            network_lr,
        )
        self.samples, self.draws = samples, draws
        self.parts = ("source", "target_labelled") if context.source_labels_fit_head else ("target_labelled",)
        width = self.network.feature_dim
        self.kernel = Kernel(kernel, width, ard, linear and kernel != "linear")
        self.theta = nn.Parameter(torch.zeros(self.kernel.size))  # about a variance of 1 and length-scales of √D
        self.inducing = nn.Parameter(torch.zeros(inducing, width, dtype=torch.float64), requires_grad=self.joint)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.float64))  # of source and granted target labels
        self.register_buffer("centre", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(width, dtype=torch.float64))
        identity = torch.eye(inducing, dtype=torch.float64)
        self.register_buffer("precision", identity.repeat(self.outputs, 1, 1))
        self.register_buffer("pull", torch.zeros(self.outputs, inducing, dtype=torch.float64))
        if self.kind == "regression":
            self.log_noise = nn.Parameter(torch.zeros(self.outputs))

    def train(self, mode: bool = True) -> SVGP:
        super().train(mode)
        if not self.joint:
            self.network.eval()
        return self

    def phases(self) -> list[Phase]:
        own = [self.theta, *([self.log_noise] if self.kind == "regression" else [])]
        moves = [Moves(own, lr_scale=self.hyper_lr, player="process")]
        if self.joint:
            below = Moves.of(self.network.backbone, self.network.bottleneck, lr_scale=self.network_lr)
            moves += [below, Moves([self.inducing], player="process")]
        updates = [Update(self.losses, moves), Update(self.natural_step, [])]
        place = ClosedForm("inducing", self.place, parts=self.parts, predicts=False)
        phases: list[Phase] = [place, Gradient("variational", updates, parts=self.parts)]
        if self.network_steps == 0:
            return phases
        first = Update(self.network_losses, [Moves.of(self.network)])
        return [Gradient("network", [first], self.network_steps, parts=self.parts, predicts=False), *phases]

    def place(self, task: FeatureTask) -> dict[str, float]:
        """Units of the features, inducing points, and q at the prior."""
        found = [task.source, task.target_labelled]
        x = torch.cat([part.x for part in found if part is not None])
        self.counts.copy_(x.new_tensor([0 if part is None else len(part.x) for part in found]))
        self.centre.copy_(x.mean(0))
        self.scale.copy_(deviation(x))
        z = inducing_points((x - self.centre) / self.scale, len(self.inducing))
        more = torch.arange(len(self.inducing) - len(z), device=z.device) % len(z)
        draw = torch.Generator().manual_seed(0)
        noise = torch.randn(len(more), z.shape[1], generator=draw, dtype=torch.float64).to(z)
        self.inducing.data.copy_(torch.cat([z, z[more] + APART * noise]))
        self.precision.copy_(torch.eye(len(self.inducing)).to(z))
        self.pull.zero_()
        return {"distinct": float(len(z))}

    # --- the process ------------------------------------------------------------------------------

    def features(self, x: Any, domain: str = "target") -> Tensor:
        with torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            return self.network.features(x, domain)

    def features_source(self, x: Any) -> Tensor:
        return self.features(x, "source")

    def hyper(self) -> Tensor:
        """log s², log ℓ and log v, float64."""
        lengths = self.theta.new_zeros(self.kernel.size)
        if self.kernel.form != "linear":
            lengths[1 : 1 + self.kernel.scales] = 0.5 * math.log(self.kernel.width)
        return (self.theta + lengths).double()

    def noise(self) -> Tensor:
        """Variances `(T,)`, standardised units, float64."""
        return FLOOR + NOISE * self.log_noise.double().exp()

    def latent(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ `(M, B)`, and mean and variance `(B, K)` of f at features `(B, D)`."""
        z, hyper = (features.double() - self.centre) / self.scale, self.hyper()
        prior = self.kernel(hyper, self.inducing, self.inducing)
        lower = cholesky(prior + torch.diag(JITTER * prior.diagonal()))
        phi = torch.linalg.solve_triangular(lower, self.kernel(hyper, self.inducing, z), upper=False)
        inner = cholesky(self.precision)
        spread = torch.linalg.solve_triangular(inner, phi.expand(self.outputs, *phi.shape), upper=False)
        centre = torch.cholesky_solve(self.pull[:, :, None], inner)[:, :, 0]
        missed = (self.kernel.diagonal(hyper, z) - phi.square().sum(0)).clamp_min(0)
        return phi, (centre @ phi).T, (missed + spread.square().sum(1)).T

    # --- training ---------------------------------------------------------------------------------

    def network_losses(self, batch: Batch, progress: Progress) -> Losses:
        """Of the network with its linear head."""
        parts = self.labelled(batch)
        return Losses({name: self.network.supervised(self.network.head(z), y) for name, _, z, y in parts})

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        """-E_q log p, a sample; each part by its share of all labels."""
        parts, n = self.labelled(batch), self.shares().sum()
        likelihood = self.expected_log_likelihood
        return Losses({name: -share / n * likelihood(*self.latent(z)[1:], y) for name, share, z, y in parts})

    def natural_step(self, batch: Batch, progress: Progress) -> Losses:
        rate = self.natural_lr * (1 - progress.p)
        precision, pull = torch.eye(len(self.inducing)).to(self.precision), torch.zeros_like(self.pull)
        for _, share, z, y in self.labelled(batch):
            phi, mean, variance = self.latent(z)
            slope, curvature = self.derivatives(mean, variance, y)
            precision = precision + share / len(y) * (phi * curvature.T[:, None]) @ phi.T
            pull = pull + share / len(y) * (slope + curvature * mean).T @ phi.T
        self.precision.lerp_(precision, rate)
        self.pull.lerp_(pull, rate)
        return Losses({})

    def shares(self) -> Tensor:
        """How many samples each part stands for `(2,)`."""
        return self.counts * self.counts.new_tensor([self.source_power, 1.0])

    def labelled(self, batch: Batch) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Each part's name, share, features and labels."""
        shares = self.shares()
        if batch.source is not None:
            yield "supervised", shares[0], self.features_source(batch.source.x), batch.source.y
        if batch.target_labelled is not None:
            yield "target_supervised", shares[1], self.features(batch.target_labelled.x), batch.target_labelled.y

    def logits(self, mean: Tensor, variance: Tensor) -> Tensor:
        """Draws `(S, B, K)` of f."""
        noise = torch.randn(self.samples, *mean.shape, dtype=mean.dtype, device=mean.device)
        return mean + variance.clamp_min(1e-12).sqrt() * noise

    def expected_log_likelihood(self, mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        """The mean over samples; `mean`, `variance` `(B, K)`, `y` `(B,)` classes or `(B, T)` targets."""
        if self.kind == "classification":
            log_probs = self.logits(mean, variance).log_softmax(2)
            return (log_probs * F.one_hot(y, self.outputs)).sum(2).mean()
        square = (self.standard(y) - mean).square() + variance
        return -0.5 * (square / self.noise() + (2 * math.pi * self.noise()).log()).sum(1).mean()

    def derivatives(self, mean: Tensor, variance: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """E ∂ log p / ∂f and -E ∂² log p / ∂f², `(B, K)`."""
        if self.kind == "classification":
            probs = self.logits(mean, variance).softmax(2)
            return F.one_hot(y, self.outputs) - probs.mean(0), (probs * (1 - probs)).mean(0)
        precision = (1 / self.noise()).expand_as(mean)
        return (self.standard(y) - mean) * precision, precision

    def standard(self, y: Tensor) -> Tensor:
        return (y.double() - self.network.label_mean) / self.network.label_std

    # --- prediction -------------------------------------------------------------------------------

    def predict(self, x: Any) -> Prediction:
        return self._predict(self.features(x))

    def predict_source(self, x: Any) -> Prediction:
        return self._predict(self.features_source(x))

    def _predict(self, features: Tensor) -> Prediction:
        _, mean, variance = self.latent(features)
        if self.kind == "classification":
            return Prediction.from_probs(class_probs(mean, variance, self.draws))
        std, square = self.network.label_std.double(), self.network.label_std.double().square()
        return Prediction(
            mean=self.network.label_mean + std * mean,
            variance=(variance + self.noise()) * square,
            epistemic=variance * square,
        )


def cholesky(k: Tensor) -> Tensor:
    """The lower factor of `(..., N, N)`, not finite where there is none: the device is not waited for."""
    factor, info = torch.linalg.cholesky_ex(k)
    return factor + torch.where(info == 0, 0.0, torch.nan)[..., None, None]
