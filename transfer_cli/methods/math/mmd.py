"""Maximum mean discrepancy between minibatches of two domains (Gretton et al., JMLR 13, 2012), as a loss.

    MMD²(P, Q) = E k(s, s') + E k(t, t') - 2 E k(s, t)
    k(x, y) = Σ_u exp(-‖x - y‖² / (u d)),   u = 1/4, 1/2, 1, 2, 4

d: the mean squared distance of the batch's samples, held fixed in the gradient, so that no scale of the features escapes the
kernel. In the notation exp(-‖x - y‖² / 2σ²) the bandwidths are σ² = 2^k d, k = -3..1.

Unbiased estimates are so for independent samples. Where BatchNorm takes its statistics from each domain's batch alone, the samples
of a batch are not, and estimates fall a little below zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transfer_cli.methods.math.kernel_map import square_distances
from transfer_cli.methods.math.precision import in_full_precision

Estimator = Literal["unbiased", "biased", "linear"]
Layer = tuple[Tensor, Tensor]  # activations of the source (n, D) and of the target (m, D)
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
SMALLEST = 1e-12  # mean squared distance: of samples that are all equal it would be 0


def gaussian(squares: Tensor, mean: Tensor, widths: Sequence[float] = WIDTHS) -> Tensor:
    """`Σ_u exp(-squares / (u · mean))` of squared distances, in their shape; no gradient to `mean`, 0-dim."""
    scaled = squares / mean.detach().clamp_min(SMALLEST)
    return torch.stack([torch.exp(-scaled / width) for width in widths]).sum(0)


def kernel_matrix(source: Tensor, target: Tensor, widths: Sequence[float] = WIDTHS) -> Tensor:
    """k of all samples, source first: `(n, D)` and `(m, D)` to `(n + m, n + m)`."""
    z = torch.cat([source, target])
    z = z - z.mean(0).detach()  # distances stay; far from the origin they would be differences of large numbers
    squares = square_distances(z, z)
    return gaussian(squares, squares.sum() / (len(z) * (len(z) - 1)), widths)


@in_full_precision
def mmd(
    layers: Sequence[Layer], estimator: Estimator = "unbiased", widths: Sequence[Sequence[float]] | None = None
) -> Tensor:
    """MMD² under the product of the layers' kernels: of several layers it is the joint MMD (Long et al., ICML 2017).

    Args:
        layers: activations of the same n and m samples at one or more layers.
        estimator: `unbiased`, the U-statistic, which may be negative; `biased`, the V-statistic, which may not; `linear`, the
            unbiased mean over pairs that are neighbours in the batches, of cost n + m (ibid., section 6): the surplus of the
            larger batch is left out.
        widths: u of each layer.
    """
    widths = widths or [WIDTHS] * len(layers)
    if estimator == "linear":
        k = torch.stack([_paired_kernels(s, t, w) for (s, t), w in zip(layers, widths, strict=True)]).prod(0)
        return (k[0] + k[1] - k[2] - k[3]).mean()
    k = torch.stack([kernel_matrix(s, t, w) for (s, t), w in zip(layers, widths, strict=True)]).prod(0)
    n = len(layers[0][0])
    return _mean(k[:n, :n], estimator) + _mean(k[n:, n:], estimator) - 2 * k[:n, n:].mean()


def _mean(k: Tensor, estimator: Estimator) -> Tensor:
    """Over all pairs `(n, n)` or, unbiased, over those of two different samples."""
    n = len(k)
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1)) if estimator == "unbiased" else k.mean()


def _paired_kernels(source: Tensor, target: Tensor, widths: Sequence[float]) -> Tensor:
    """k(s, s'), k(t, t'), k(s, t') and k(s', t) of pairs of samples, `(4, h)`."""
    half = min(len(source), len(target)) // 2
    (s, s2), (t, t2) = (x[: 2 * half].reshape(2, half, -1) for x in (source, target))
    squares = torch.stack([s - s2, t - t2, s - t2, s2 - t]).square().sum(2)
    return gaussian(squares, squares.mean(), widths)


@in_full_precision
def class_mmd(source: Tensor, target: Tensor, source_weights: Tensor, target_weights: Tensor) -> Tensor:
    """`‖Σ_i w_ic φ(s_i) - Σ_j v_jc' φ(t_j)‖²` of every class c of the source and c' of the target, `(K, K)`; biased.

    Args:
        source, target: `(n, D)` and `(m, D)`.
        source_weights, target_weights: how much each sample belongs to each class, `(n, K)` and `(m, K)`, not negative. A column is
            scaled to sum to 1; one of zeros stays so, and what the result says of that class means nothing.
    """
    n = len(source)
    k = kernel_matrix(source, target)
    w, v = (x.to(k) / x.to(k).sum(0).clamp_min(SMALLEST) for x in (source_weights, target_weights))
    of_source, of_target = ((w.T @ k[:n, :n]) * w.T).sum(1), ((v.T @ k[n:, n:]) * v.T).sum(1)
    return of_source[:, None] + of_target - 2 * w.T @ k[:n, n:] @ v
