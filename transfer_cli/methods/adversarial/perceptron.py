"""The multilayer perceptron that discriminators, critics and heads are."""

from __future__ import annotations

from torch import nn


def perceptron(
    width: int, hidden: int, outputs: int, hidden_layers: int = 1, dropout: float = 0.0, batchnorm: bool = False
) -> nn.Sequential:
    """`(B, width)` to `(B, outputs)`: `hidden_layers` of `hidden` units with BatchNorm if wanted, ReLU and dropout, then a
    linear one; with `hidden` 0 the linear one alone.

    Raises:
        ValueError: a width that no layer has.
    """
    if hidden < 0 or outputs < 1:
        raise ValueError(f"a layer has at least one unit: not hidden={hidden} and {outputs} outputs")
    layers: list[nn.Module] = []
    for _ in range(hidden_layers if hidden else 0):
        norm = [nn.BatchNorm1d(hidden)] if batchnorm else []
        layers += [nn.Linear(width, hidden), *norm, nn.ReLU(), nn.Dropout(dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, outputs))
