"""Laplace approximation of a trained network, of its last layer or of all (MacKay 1992; Kristiadi, Hein & Hennig, ICML 2020;
Daxberger et al., NeurIPS 2021).

    train     min_{F,W}  CE(W F(x), y)                     on all that is labelled
    laplace   p(W | data) ≈ N(Ŵ, τ (H + λ I)⁻¹)            H the Hessian of Σ CE in the head's weights, at what training left

`covariance`: H is whole (`full`), or `kronecker`, mean(diag p - p pᵀ) ⊗ Σ z zᵀ. λ is that of the greatest Laplace evidence.
At temperature τ = 1 such posteriors are far too unsure where labels are few; τ is that of the least negative log-likelihood of
left-out samples, `folds` times, under the head that is a Newton step without them away from Ŵ on the trained features,
Ŵ + (H₋ + λ I)⁻¹ Σ_left ∇CE (Giordano et al., AISTATS 2019). Predicted is the mean of softmax
over `draws` of the logits, without the direction in which softmax does not move. In regression the approximation is exact for
the head: H_t = Σ z zᵀ / σ_t² with the trained noise, and τ = 1. All but the closed form is the network's own training.

`layers: all`: linear and convolutional layers have factors of their own (curvature.py), of `curvature_steps` minibatches, and
logits are f_θ̂(x) + J(x) (θ - θ̂), N(f, τ C). τ is chosen as above, by as many minibatches, each sample left out by itself:

    f₋ = f + C₋ (p - y),    C₋ = C_h + C_h S (I - Sᵀ C_h S)⁻¹ Sᵀ C_h,    S Sᵀ = diag p - p pᵀ

C_h is the head's part of C: the same step in all layers would be far off, since the factors of convolutions let a sample have
several times the whole say in its own logits. What is still more than `LEVERAGE` of it counts as that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.bayes_head import TEMPERATURES, Posterior, left_out, normal_draws
from transfer_cli.methods.bayes.curvature import Curvature, curvature_root
from transfer_cli.methods.bayes.supervised import Supervised, labelled_parts
from transfer_cli.methods.fitted import Fitted
from transfer_cli.methods.math.folds import folds_of
from transfer_cli.methods.math.softmax import Precision, Softmax, data_hessian
from transfer_cli.methods.phases import (
    Batch,
    ClosedForm,
    FeatureTask,
    Gradient,
    Labelled,
    Losses,
    Phase,
    Progress,
    Update,
)

LAMBDAS = torch.logspace(-4, 6, 201, dtype=torch.float64)
FULL_MOST = 5000  # unknowns of a whole Hessian
LEVERAGE = 0.95  # the greatest eigenvalue of Sᵀ C S; exact Hessians have none above 1


@dataclass(frozen=True)
class Kronecker(Posterior):
    """(A ⊗ B + λI)⁻¹ by A = U a Uᵀ and B = V b Vᵀ: `covariance` holds V `(D, D)`, `left` U `(K, K)` and `scales`
    1 / (a_k b_d + λ) `(K, D)`."""

    left: Tensor
    scales: Tensor

    def spread(self, z: Tensor) -> Tensor:
        centring = torch.eye(len(self.left), dtype=z.dtype, device=z.device) - 1 / len(self.left)
        return (centring @ self.left) * self.variances(z).sqrt()[:, None, :]

    def times(self, v: Tensor) -> Tensor:
        return self.left @ (self.scales * (self.left.T @ v @ self.covariance)) @ self.covariance.T

    def variances(self, z: Tensor) -> Tensor:
        """`(B, K)`, along the directions of U."""
        return (z @ self.covariance).square() @ self.scales.T


class LastLayerLaplace(Supervised):
    version = 2  # of all layers, another temperature
    losses_by: Tensor  # of left-out samples, by temperature

    def __init__(
        self,
        context: Context,
        *,
        layers: Literal["last", "all"] = "last",
        covariance: Literal["full", "kronecker"] = "kronecker",
        lam: float | None = None,
        temperature: float | None = None,
        folds: int = 5,
        draws: int = 64,
        curvature_steps: int = 50,
    ) -> None:
        super().__init__(context)
        if (lam is not None and lam <= 0) or (temperature is not None and temperature < 0) or folds < 2 or draws < 2:
            raise ValueError("lam is positive and temperature not negative, or null; folds and draws are at least 2")
        self.whole = covariance == "full" and context.kind == "classification"
        self.lam, self.temperature, self.folds, self.draws = lam, temperature, folds, draws
        if layers == "all" and (covariance == "full" or curvature_steps < 1):
            raise ValueError("layers=all has covariance=kronecker, and curvature_steps of at least 1")
        self.posterior, self.labelled, self.steps = Fitted(), context.labelled, curvature_steps
        self.curvature = Curvature(self.network) if layers == "all" else None
        if self.curvature is not None:
            self.register_buffer("losses_by", torch.zeros(len(TEMPERATURES) - 1, dtype=torch.float64))

    def phases(self) -> list[Phase]:
        if self.curvature is not None:
            factors, choice = (Update(f, moves=[]) for f in (self.add_curvature, self.add_left_out))
            return [
                self.train_phase(),
                Gradient("curvature", [factors], self.steps, parts=self.parts, predicts=False),
                ClosedForm("laplace", self.decompose, parts=(), predicts=False),
                Gradient("temperature", [choice], self.steps, parts=self.parts),
            ]
        return [self.train_phase(), ClosedForm("laplace", self.fit, parts=self.parts)]

    def fit(self, task: FeatureTask) -> dict[str, float]:
        parts = [part for part in (task.source, task.target_labelled) if part is not None and part.y is not None]
        x, y = torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts if part.y is not None])
        z, head = with_one(x), self.network.head
        w = torch.cat([head.weight, head.bias[:, None]], 1).detach().double()
        if self.whole and w.numel() > FULL_MOST:
            raise TransferError(
                f"a whole Hessian of {w.numel():,} weights is too large: set method.covariance=kronecker."
            )
        lam = self.evidence(z, w) if self.lam is None else self.lam
        losses = self.held_out(Softmax(z, y, torch.ones_like(z[:, 0]), 0 * w, Precision(torch.full_like(w, lam))), w)
        temperature = min(losses, key=lambda t: losses[t])
        found = self.around(z, w, lam)
        self.posterior.put(mean=w, covariance=found.covariance, temperature=z.new_tensor(temperature))
        if isinstance(found, Kronecker):
            self.posterior.put(left=found.left, scales=found.scales)
        return {"lambda": lam, "temperature": temperature}

    def evidence(self, z: Tensor, w: Tensor) -> float:
        """The λ of the greatest ½ log |λI| - ½ λ ‖W‖² - ½ log |H + λI|; what else there is does not depend on it."""
        if self.whole:
            values = torch.linalg.eigvalsh(data_hessian(z, torch.ones_like(z[:, 0]), (z @ w.T).softmax(1))).clamp_min(0)
        else:
            a, b = self.kronecker_factors(z, w)
            values = torch.outer(*(torch.linalg.eigvalsh(m).clamp_min(0) for m in (a, b))).flatten()
        return best_evidence(values, w)

    def kronecker_factors(self, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """A `(K, K)` and B `(D, D)`."""
        if self.network.kind == "regression":
            return torch.diag(torch.exp(-self.network.log_noise.detach().double())), z.T @ z
        probs = (z @ w.T).softmax(1)
        return torch.diag(probs.mean(0)) - probs.T @ probs / len(z), z.T @ z

    def around(self, z: Tensor, w: Tensor, lam: float) -> Posterior:
        if self.whole:
            hessian = data_hessian(z, torch.ones_like(z[:, 0]), (z @ w.T).softmax(1))
            hessian.diagonal().add_(lam)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            return Posterior(w, inverse.view(*w.shape, *w.shape))
        (a, left), (b, right) = (torch.linalg.eigh(m) for m in self.kronecker_factors(z, w))
        scales = 1 / (torch.outer(a.clamp_min(0), b.clamp_min(0)) + lam)
        return Kronecker(w, right, left, scales)

    def held_out(self, problem: Softmax, w: Tensor) -> dict[float, float]:
        """Losses by temperature; where nothing chooses, the one that is set, or 1."""
        folds = folds_of(problem.y, self.folds) if self.network.kind == "classification" else None
        if folds is None or self.temperature is not None:
            return {1.0 if self.temperature is None else self.temperature: 0.0}
        total, lam = slope(problem, w), float(problem.precision.diagonal[0, 0])

        def fit(part: Softmax) -> Posterior:
            without = self.around(part.x, w, lam)
            return replace(without, mean=w + without.times(total - slope(part, w)))

        return left_out(problem, folds, fit, TEMPERATURES[1:], self.draws)  # at 0 nothing would be in doubt

    # --- all layers -------------------------------------------------------------------------------

    def add_curvature(self, batch: Batch, progress: Progress) -> Losses:
        assert self.curvature is not None
        for part, domain in labelled_parts(batch):
            self.curvature.add(part.x, domain, self.share(part, domain) / progress.steps)
        return Losses({})

    def share(self, part: Labelled, domain: str) -> float:
        """How many labelled samples one of the minibatch stands for."""
        n = self.labelled.get({"source": "source", "target": "target_labelled"}[domain])
        return 1.0 if n is None else n / len(part.y)

    def decompose(self, task: FeatureTask) -> dict[str, float]:
        assert self.curvature is not None
        values, w = self.curvature.decompose(), self.curvature.weights()
        lam = best_evidence(values, w) if self.lam is None else self.lam
        self.posterior.put(lam=w.new_tensor(lam))
        return {"lambda": lam}

    def add_left_out(self, batch: Batch, progress: Progress) -> Losses:
        """Negative log-likelihoods of each sample under what is left without it, by temperature."""
        assert self.curvature is not None
        if self.network.kind == "regression" or self.temperature is not None:
            return Losses({})
        for part, domain in labelled_parts(batch):
            logits, covariance, of_head = self.curvature.outputs(part.x, domain, self.posterior.lam)
            mean = without_itself(logits, of_head, part.y)
            own, weight = part.y[None, :, None], self.share(part, domain) / progress.steps
            for i, t in enumerate(TEMPERATURES[1:]):  # at 0 nothing would be in doubt
                log_probs = Prediction.of_draws(self.drawn(mean, covariance, t)).log_probs
                assert log_probs is not None
                self.losses_by[i] -= weight * log_probs.gather(1, own[0]).sum()
        return Losses({})

    def drawn(self, mean: Tensor, covariance: Tensor, temperature: float | Tensor) -> Tensor:
        """Log-probabilities `(S, B, K)` of logits of such moments."""
        classes = mean.shape[1]
        centring = torch.eye(classes).to(mean) - 1 / classes
        values, vectors = torch.linalg.eigh(centring @ covariance @ centring)
        spread = vectors * (temperature * values.clamp_min(0)).sqrt()[:, None, :]
        noise = normal_draws(self.draws, classes, mean)
        return (mean + torch.einsum("bkj,sj->sbk", spread, noise)).log_softmax(2)

    def linearised(self, x: Any, domain: str) -> Prediction:
        assert self.curvature is not None
        logits, covariance, _ = self.curvature.outputs(x, domain, self.posterior.lam)
        chosen = logits.new_tensor(TEMPERATURES[1:])[self.losses_by.argmin()] if bool(self.losses_by.any()) else 1.0
        temperature = chosen if self.temperature is None else self.temperature
        if self.network.kind == "classification":
            return Prediction.of_draws(self.drawn(logits, covariance, temperature))
        plain, square = self.network.prediction(logits), self.network.label_std.double().square()
        spread = temperature * covariance.diagonal(dim1=1, dim2=2) * square
        assert plain.mean is not None and plain.variance is not None
        return Prediction(mean=plain.mean, variance=plain.variance + spread, epistemic=spread)

    # --- prediction -------------------------------------------------------------------------------

    def predict(self, x: Any) -> Prediction:
        return self.averaged(x, "target")

    def predict_source(self, x: Any) -> Prediction:
        return self.averaged(x, "source")

    def averaged(self, x: Any, domain: str) -> Prediction:
        state, network = self.posterior, self.network
        if hasattr(state, "lam"):
            return self.linearised(x, domain)
        if not hasattr(state, "mean"):  # still training
            return network.predict(x, domain)
        z = with_one(network.features(x, domain).double())
        if self.whole:
            found = Posterior(state.mean, state.covariance)
        else:
            found = Kronecker(state.mean, state.covariance, state.left, state.scales)
        if network.kind == "classification":
            logits = found.logits(z, float(state.temperature), normal_draws(self.draws, len(state.mean), z))
            return Prediction.of_draws(logits.log_softmax(2))
        assert isinstance(found, Kronecker)
        plain, square = network.prediction(z @ state.mean.T), network.label_std.double().square()
        spread = state.temperature * found.variances(z) @ state.left.square().T * square
        assert plain.mean is not None and plain.variance is not None
        return Prediction(mean=plain.mean, variance=plain.variance + spread, epistemic=spread)


def best_evidence(values: Tensor, w: Tensor) -> float:
    """The λ of a Hessian's eigenvalues and of weights."""
    lams = LAMBDAS.to(w)
    log_dets = torch.stack([torch.log1p(values / lam).sum() for lam in lams])
    return float(lams[(-0.5 * lams * w.square().sum() - 0.5 * log_dets).argmax()])


def without_itself(logits: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
    """f₋ `(B, K)` of samples of classes `(B,)`."""
    probs = logits.softmax(1)
    root = curvature_root(probs)
    along = covariance @ root
    values, vectors = torch.linalg.eigh(root.mT @ along)
    turned = along @ vectors
    wider = covariance + turned / (1 - values.clamp(0, LEVERAGE))[:, None, :] @ turned.mT
    slopes = probs - torch.nn.functional.one_hot(y, probs.shape[1])
    return logits + torch.einsum("bkl,bl->bk", wider, slopes)


def slope(problem: Softmax, w: Tensor) -> Tensor:
    """The gradient of the samples' cross-entropies, `(K, D)`."""
    return problem.gradient(w, (problem.x @ w.T).softmax(1)) - problem.precision(w - problem.mean)


def with_one(x: Tensor) -> Tensor:
    """A column of ones for the bias."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)
