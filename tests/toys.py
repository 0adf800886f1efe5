"""Toy problems that a plugin brings: image classification, tabular regression, sequences, and domains of different classes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transfer_cli.backbones.base import Backbone
from transfer_cli.data.domain import Domain, Part, Place, fingerprint_values, numbered
from transfer_cli.data.inputs import ArrayInputs, InputSpec, SequenceInputs


class ToyImages:
    """Bright or dark squares, the target with less contrast."""

    def __init__(self, place: Place, *, shift: int = 0) -> None:
        self.shift = shift

    def fingerprint(self) -> str:
        return fingerprint_values("images", self.shift)

    def load(self) -> Domain:
        draw = torch.Generator().manual_seed(self.shift)
        labels = torch.randint(2, (200,), generator=draw)
        noise = torch.randint(0, 60, (200, 1, 16, 16), generator=draw)
        images = (noise + (120 - self.shift) * labels.view(-1, 1, 1, 1)).to(torch.uint8)
        return Domain(
            f"images{self.shift}",
            "classification",
            ("dark", "bright"),
            Part(ArrayInputs(images), labels, numbered("i", 200)),
        )


class ToyTable:
    """A linear function of four columns, two targets; the target domain is shifted."""

    def __init__(self, place: Place, *, shift: float = 0.0) -> None:
        self.shift = shift

    def fingerprint(self) -> str:
        return fingerprint_values("table", self.shift)

    def load(self) -> Domain:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(300, 4, generator=draw) + self.shift
        y = 100 + 10 * x @ torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, -1.0], [0.0, 0.0]])
        y = y + torch.randn(300, 2, generator=draw)
        return Domain(f"table{self.shift}", "regression", (), Part(ArrayInputs(x), y, numbered("row", 300)))


class ToySequences:
    """Of 3 to 12 steps; the class is the sign of their sum."""

    def __init__(self, place: Place, *, shift: float = 0.0) -> None:
        self.shift = shift

    def fingerprint(self) -> str:
        return fingerprint_values("sequences", self.shift)

    def load(self) -> Domain:
        draw = torch.Generator().manual_seed(2)
        lengths = torch.randint(3, 13, (240,), generator=draw).tolist()
        labels = torch.arange(240) % 2
        sequences = [
            torch.randn(n, 2, generator=draw) + (2 * label - 1) + self.shift
            for n, label in zip(lengths, labels.tolist(), strict=True)
        ]
        return Domain(
            f"sequences{self.shift}",
            "classification",
            ("down", "up"),
            Part(SequenceInputs(sequences), labels, numbered("s", 240)),
        )


class MeanOverTime(Backbone):
    """A step-wise layer, averaged over the real steps of each sequence."""

    accepts: ClassVar[tuple[str, ...]] = ("sequence",)

    def __init__(self, spec: InputSpec, *, width: int = 16) -> None:
        super().__init__(spec)
        self.layer = nn.Sequential(nn.Linear(spec.shape[0], width), nn.Tanh())
        self.out_features = width

    def forward(self, x: Any) -> Tensor:
        mask = x.mask[..., None]
        return (self.layer(x.values) * mask).sum(1) / mask.sum(1)


class ToyBlobs:
    """Five clusters on a circle, of which a domain has the `classes` it is told; the target's are moved by `shift`."""

    def __init__(self, place: Place, *, classes: str = "abc", shift: float = 0.0) -> None:
        self.classes, self.shift = classes, shift

    def fingerprint(self) -> str:
        return fingerprint_values("blobs", self.classes, self.shift)

    def load(self) -> Domain:
        draw = torch.Generator().manual_seed(3)
        labels = torch.arange(60 * len(self.classes)) % len(self.classes)
        angles = torch.tensor([2 * torch.pi * "abcde".index(c) / 5 for c in self.classes])[labels]
        x = 3 * torch.stack([angles.cos(), angles.sin()], 1) + 0.4 * torch.randn(len(labels), 2, generator=draw)
        part = Part(ArrayInputs(x + self.shift), labels, numbered("b", len(labels)))
        return Domain(f"blobs_{self.classes}", "classification", tuple(self.classes), part)
