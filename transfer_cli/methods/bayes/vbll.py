"""A variational Bayesian last layer (Harrison, Willes & Snoek, ICLR 2024).

    q(W) = Π_k N(w̄_k, S_k)        p(W) = Π_k N(0, `prior_variance` I)

    classification   max  mean_i [w̄_yᵀφ - log Σ_k exp(w̄_kᵀφ + ½ φᵀS_kφ)] - KL(q ‖ p) / N
    regression       max  mean_i [log N(y; w̄ᵀφ, σ²) - ½ φᵀSφ / σ²] - KL(q ‖ p) / N

φ are the network's features with a one for the bias, w̄ the head's weights, N the number of labelled samples; backbone, w̄, S and
the noise σ² are trained together. Where both domains have labels mean_i is the sum of either's mean, so that few granted labels
count as much as a large source; of T targets the mean over them is maximised, with KL / (N T). `covariance`: S_k is `diagonal`,
or `dense` (a Cholesky factor of the features' width for each class).
Both are lower bounds of the log-likelihood's mean under q less the KL term, without sampling. The paper's noise in the
logits and its inverse-Wishart prior on σ² are left out. Predicted is the mean of softmax over `draws` of the logits.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.bayes_head import normal_draws
from transfer_cli.methods.bayes.supervised import Supervised, labelled_terms
from transfer_cli.methods.math.precision import in_full_precision
from transfer_cli.methods.phases import Batch, Gradient, Losses, Moves, Progress, Update


class VBLL(Supervised):
    version = 2  # the divergence's weight with several targets

    def __init__(
        self,
        context: Context,
        *,
        covariance: Literal["diagonal", "dense"] = "diagonal",
        prior_variance: float = 1.0,
        draws: int = 64,
    ) -> None:
        super().__init__(context)
        if prior_variance <= 0 or draws < 2:
            raise ValueError("prior_variance is positive, and draws at least 2")
        self.prior_variance, self.draws = prior_variance, draws
        self.samples = sum(context.labelled.get(part, 0) for part in self.parts) or 1
        self.samples *= self.network.averaged_outputs
        width = self.network.feature_dim + 1
        self.log_scale = nn.Parameter(torch.full((context.outputs, width), -0.5 * math.log(width)))
        below = torch.zeros(context.outputs, width, width) if covariance == "dense" else None
        self.below = None if below is None else nn.Parameter(below)

    def phases(self) -> list[Gradient]:
        return [Gradient("train", [Update(self.losses, [Moves.of(self)])], parts=self.parts)]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        return Losses({**labelled_terms(batch, self.loss), "kl": self.divergence() / self.samples})

    def loss(self, x: Any, y: Tensor, domain: str) -> Tensor:
        features, logits = self.network(x, domain)
        return self.bound(logits, self.variances(features), y)

    def bound(self, logits: Tensor, variances: Tensor, y: Tensor) -> Tensor:
        """The mean negative bound, of w̄ᵀφ and φᵀSφ `(B, K)`."""
        if self.network.kind == "classification":
            logits = logits.float()
            own = logits.gather(1, y[:, None])[:, 0]
            return ((logits + 0.5 * variances).logsumexp(1) - own).mean()
        precision = torch.exp(-self.network.log_noise)
        return self.network.supervised(logits, y) + 0.5 * (variances * precision).mean()

    def scale(self) -> Tensor:
        """Cholesky factors of S, `(K, D, D)`, or standard deviations `(K, D)`."""
        if self.below is None:
            return self.log_scale.exp()
        return self.below.tril(-1) + torch.diag_embed(self.log_scale.exp())

    def variances(self, features: Tensor) -> Tensor:
        """φᵀSφ `(B, K)` of features `(B, D)`."""
        return quadratic(features, self.scale())

    def divergence(self) -> Tensor:
        """KL(q ‖ p)."""
        head, scale = self.network.head, self.scale()
        squares = scale.square().sum() + head.weight.square().sum() + head.bias.square().sum()
        logs = self.log_scale.numel() * (math.log(self.prior_variance) - 1) - 2 * self.log_scale.sum()
        return 0.5 * (squares / self.prior_variance + logs)

    def predict(self, x: Any) -> Prediction:
        return self.averaged(x, "target")

    def predict_source(self, x: Any) -> Prediction:
        return self.averaged(x, "source")

    def averaged(self, x: Any, domain: str) -> Prediction:
        features, logits = self.network(x, domain)
        variances = self.variances(features)
        if self.network.kind == "classification":
            draws = logits + variances.sqrt() * normal_draws(self.draws, logits.shape[1], logits)[:, None]
            return Prediction.of_draws(draws.float().log_softmax(2))
        plain, spread = self.network.prediction(logits), variances * self.network.label_std.square()
        assert plain.mean is not None and plain.variance is not None
        return Prediction(mean=plain.mean, variance=plain.variance + spread, epistemic=spread)


@in_full_precision
def quadratic(features: Tensor, scale: Tensor) -> Tensor:
    one = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    if scale.ndim == 2:
        return one.square() @ scale.square().T
    return torch.einsum("bd,kde->bke", one, scale).square().sum(2)
