"""BatchNorm's running statistics, where a step sends more through a network than its batch once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from transfer_cli.methods.domain_batchnorm import BATCHNORMS


@contextmanager
def keep_statistics(network: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm layers normalise as ever, but leave their running statistics as they are.

    For passes beside a step's main one: perturbed inputs are not the data, and a batch that passes n times counts n times.
    """
    layers = [m for m in network.modules() if isinstance(m, BATCHNORMS) and m.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
