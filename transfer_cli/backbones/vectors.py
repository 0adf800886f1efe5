"""Backbones for feature vectors: the features as they are, or a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone, flat_width
from transfer_cli.data.inputs import InputSpec
from transfer_cli.registry import FilePath

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


class Identity(Backbone):
    """Given features, unchanged; images are flattened."""

    accepts: ClassVar[tuple[str, ...]] = ("vector", "image")
    trivial: ClassVar[bool] = True

    def __init__(self, spec: InputSpec) -> None:
        super().__init__(spec)
        self.out_features = flat_width(spec.shape)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class MLP(Backbone):
    """`hidden` fully connected layers, `activation` and dropout after each."""

    accepts: ClassVar[tuple[str, ...]] = ("vector", "image")

    def __init__(
        self,
        spec: InputSpec,
        *,
        hidden: Sequence[int] = (256, 128),
        dropout: float = 0.0,
        activation: Literal["relu", "sigmoid", "tanh"] = "relu",
        weights: FilePath = "none",
        freeze: str = "none",
    ) -> None:
        super().__init__(spec)
        widths = [flat_width(spec.shape), *hidden]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), ACTIVATIONS[activation](), nn.Dropout(dropout))
            for a, b in zip(widths, hidden, strict=False)
        )
        self.out_features = widths[-1]
        self.start_from(weights, freeze)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x)
        return x

    def stages(self) -> dict[str, nn.Module]:
        return {f"layer{i + 1}": layer for i, layer in enumerate(self.layers)}
