"""Small tasks on features, and methods built on them, for the tests of methods on frozen features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transfer_cli.backbones.vectors import Identity
from transfer_cli.data.inputs import InputSpec
from transfer_cli.methods.base import Context, FeatureOptions
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.heads.base import Head
from transfer_cli.methods.heads.knn import KNN
from transfer_cli.methods.phases import Features, FeatureTask


def shifted_classes(
    n: int = 60,
    width: int = 6,
    classes: int = 3,
    shift: float = 1.5,
    seed: int = 0,
    granted: int = 0,
    turn: float = 0.1,
) -> tuple[FeatureTask, Tensor]:
    """Gaussian classes, the target's moved, stretched and turned a little; and the target's labels."""
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, width, generator=draw, dtype=torch.float64)
    labels = [torch.arange(size) % classes for size in (n, n + 10)]
    source, target = (centres[y] + torch.randn(len(y), width, generator=draw, dtype=torch.float64) for y in labels)
    skew = torch.randn(width, width, generator=draw, dtype=torch.float64)
    rotation = torch.matrix_exp(turn * (skew - skew.T) / width**0.5)
    target = (target * torch.linspace(0.7, 1.3, width).double()) @ rotation + shift
    few = Features(target[:granted], labels[1][:granted]) if granted else None
    return FeatureTask(Features(source, labels[0]), Features(target), few), labels[1]


def context(width: int = 6, classes: int = 3, head: Head | None = None, **changes: Any) -> Context:
    settings: dict[str, Any] = {
        "backbone": Identity(InputSpec("vector", (width,))),
        "feature_dim": width,
        "kind": "classification",
        "num_classes": classes,
        "source_classes": classes,
        "has_source": True,
        "has_target_labels": False,
        "source_labels_fit_head": True,
        "features": FeatureOptions(),
        "make_head": lambda: KNN("classification", classes) if head is None else head,
    }
    return Context(**{**settings, **changes})


def regression(width: int = 6, head: Head | None = None, **changes: Any) -> Context:
    moments = {"label_mean": torch.zeros(1), "label_std": torch.ones(1), "target_width": 1}
    make = {"make_head": lambda: KNN("regression", 1, k=3) if head is None else head}
    return context(width, 0, kind="regression", **{**moments, **make, **changes})


def accuracy(method: FeatureMethod, task: FeatureTask, labels: Tensor) -> float:
    """Of the method, fitted to the task, on the target's samples."""
    method.fit(task)
    assert task.target is not None
    return float((method.predict(task.target.x).labels == labels).double().mean())
