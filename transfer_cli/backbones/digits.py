"""Small convolutional networks for digits and other images of 16 to 32 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone, flat_width
from transfer_cli.data.inputs import InputSpec
from transfer_cli.errors import TransferError
from transfer_cli.registry import FilePath


class SmallCNN(Backbone):
    """Blocks of 3 x 3 convolution, BatchNorm, ReLU and 2 x 2 pooling, then one fully connected layer of `features`."""

    minimum_size: ClassVar[int] = 16

    def __init__(
        self,
        spec: InputSpec,
        *,
        widths: Sequence[int] = (16, 32, 64),
        features: int = 128,
        dropout: float = 0.0,
        weights: FilePath = "none",
        freeze: str = "none",
    ) -> None:
        super().__init__(spec)
        channels = [spec.shape[0], *widths]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in zip(channels, widths, strict=False)
        )
        side = spec.shape[1] // 2 ** len(widths)
        if not widths or side < 1:
            raise TransferError(
                f"backbone small_cnn halves {spec} {len(widths)} times: set image.size to at least {2 ** len(widths)}, or "
                "between one and that many backbone.widths."
            )
        self.project = nn.Sequential(
            nn.Flatten(),
            nn.Linear(widths[-1] * side * side, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(),
            nn.Dropout(dropout),
        )
        self.out_features = features
        self.start_from(weights, freeze)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        for block in self.blocks:
            x = block(x)
        return self.project(x)

    def stages(self) -> dict[str, nn.Module]:
        return {**{f"block{i + 1}": block for i, block in enumerate(self.blocks)}, "project": self.project}


class LeNet(Backbone):
    """The LeNet of the digits benchmarks (Ganin & Lempitsky 2015; Tzeng et al. 2017): 20 and 50 filters of 5 x 5, 500 units."""

    preferred_size: ClassVar[int | None] = 28

    def __init__(
        self, spec: InputSpec, *, dropout: float = 0.5, weights: FilePath = "none", freeze: str = "none"
    ) -> None:
        super().__init__(spec)
        self.conv1 = nn.Sequential(nn.Conv2d(spec.shape[0], 20, 5), nn.MaxPool2d(2), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(20, 50, 5), nn.Dropout2d(dropout), nn.MaxPool2d(2), nn.ReLU())
        with torch.no_grad():
            width = flat_width(self.conv2(self.conv1(torch.zeros(1, *spec.shape))).shape)
        self.fc = nn.Sequential(nn.Flatten(), nn.Linear(width, 500), nn.ReLU(), nn.Dropout(dropout))
        self.out_features = 500
        self.start_from(weights, freeze)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv2(self.conv1(2 * x - 1)))
