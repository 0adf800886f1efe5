"""Dropout as approximate Bayesian inference: it stays on when predicting (Gal & Ghahramani, ICML 2016).

    train     min_θ  CE(C(z ∘ F(x)), y)        z Bernoulli masks over the activations, dropped at `rate`
    predict   (1/S) Σ_s p(y | x, θ, z_s)        S = `draws`

`layers: all` drops after every stage of the backbone, `last` before the head alone, which costs one pass of the backbone for all
draws. Dropout layers that the backbone has itself stay on too (`all`). The paper's prior is weight decay.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from transfer_cli.backbones.base import Backbone
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context
from transfer_cli.methods.bayes.supervised import Supervised, labelled_terms
from transfer_cli.methods.phases import Batch, Losses, Progress


class Mask:
    """A forward hook that drops from a module's output. An object, so that a copy of the network has hooks of its own."""

    def __init__(self, dropout: nn.Module) -> None:
        self.dropout = dropout

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self.dropout(output) if isinstance(output, Tensor) else output

    def __repr__(self) -> str:
        return f"Mask({self.dropout})"


class MCDropout(Supervised):
    def __init__(
        self, context: Context, *, rate: float = 0.1, layers: Literal["all", "last"] = "all", draws: int = 20
    ) -> None:
        super().__init__(context)
        if not 0 <= rate < 1 or draws < 1:
            raise ValueError("rate is a share from 0 to below 1, and draws at least 1")
        self.everywhere, self.draws = layers == "all", draws
        self.dropout = nn.Dropout(rate)
        if self.everywhere and isinstance(self.network.backbone, Backbone):
            inner = list(self.network.backbone.stages().values())
            for stage in inner if context.bottleneck else inner[:-1]:  # the last is masked before the head
                stage.register_forward_hook(Mask(self.dropout))

    def phases(self) -> list[Any]:
        return [self.train_phase()]

    def losses(self, batch: Batch, progress: Progress) -> Losses:
        return Losses(labelled_terms(batch, self.loss))

    def loss(self, x: Any, y: Tensor, domain: str) -> Tensor:
        return self.network.supervised(self.head(self.network.features(x, domain)), y)

    def head(self, features: Tensor) -> Tensor:
        return self.network.head(self.dropout(features))

    def predict(self, x: Any) -> Prediction:
        return self.averaged(x, "target")

    def predict_source(self, x: Any) -> Prediction:
        return self.averaged(x, "source")

    def averaged(self, x: Any, domain: str) -> Prediction:
        features = None if self.everywhere else self.network.features(x, domain)
        layers = [m for m in self.modules() if isinstance(m, _DropoutNd)]
        before = [layer.training for layer in layers]
        for layer in layers:
            layer.train()
        draws = []
        for _ in range(self.draws):
            logits = self.head(self.network.features(x, domain) if features is None else features)
            draws.append(self.network.prediction(logits))
        for layer, training in zip(layers, before, strict=True):
            layer.train(training)
        return Prediction.mixture(draws)
