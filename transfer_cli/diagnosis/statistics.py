"""What the inputs themselves look like, domain by domain: channels of images, columns of tables, lengths of sequences."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from transfer_cli.data.batching import in_order
from transfer_cli.data.inputs import Inputs, Padded

SHOWN = 5  # columns that differ most
CPU = torch.device("cpu")


def describe(inputs: Inputs, workers: int = 0) -> dict[str, Any]:
    """`mean` and `std` of each channel (of images, intensities in [0, 1]) or column, over samples and places; of sequences
    their mean `length`."""
    total, squares, count, lengths = torch.zeros(()), torch.zeros(()), 0.0, 0.0
    with closing(in_order(inputs, 256, CPU, workers)) as batches:
        for x in batches:
            if isinstance(x, Padded):
                lengths += float(x.mask.sum())
                x = x.values[x.mask]
            flat = x.double().movedim(1, -1).reshape(-1, x.shape[1])  # a row a place
            total, squares, count = total + flat.sum(0), squares + flat.square().sum(0), count + len(flat)
    mean = total / max(count, 1)
    std = (squares / max(count, 1) - mean.square()).clamp_min(0).sqrt()
    found: dict[str, Any] = {"mean": mean.tolist(), "std": std.tolist()}
    return found | ({"length": lengths / len(inputs)} if lengths else {})


def differences(source: dict[str, Any], target: dict[str, Any]) -> list[dict[str, float]]:
    """The channels or columns whose means differ most, in deviations of the two, with the ratio of their deviations."""
    means, stds = (torch.tensor([d[key] for d in (source, target)], dtype=torch.float64) for key in ("mean", "std"))
    scale = stds.square().mean(0).sqrt()
    apart = torch.where(scale > 1e-12, (means[1] - means[0]) / scale.clamp_min(1e-12), 0.0)
    ratio = torch.where(stds[0] > 1e-12, stds[1] / stds[0].clamp_min(1e-12), torch.nan)
    order = apart.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
    return [{"column": c, "shift": _number(apart[c]), "std_ratio": _number(ratio[c])} for c in order]


def _number(value: Tensor) -> Any:
    return None if bool(value.isnan()) else float(value)


def regression_labels(source: Tensor, granted: Tensor | None) -> dict[str, Any]:
    """Mean and deviation of the source's regression targets `(N, T)` and of the granted ones; of the first target, the p value of
    the Kolmogorov-Smirnov test that both are drawn alike."""
    found: dict[str, Any] = {"source_mean": source.mean(0).tolist(), "source_std": source.std(0).tolist()}
    if granted is None or len(granted) < 2:
        return found
    from scipy.stats import ks_2samp

    p = float(ks_2samp(source[:, 0].numpy(), granted[:, 0].numpy()).pvalue)
    return found | {"granted_mean": granted.mean(0).tolist(), "granted_std": granted.std(0).tolist(), "p": p}
