"""How far apart two domains' features are, and what of it moments or class shares explain.

    A-distance   2 (1 - 2 ε), ε the error of a linear domain classifier on samples that it was not fitted to
                 (Ben-David et al., NIPS 2006)
    MMD²         Gaussian kernels, unbiased; p by permuting the domains (Gretton et al., JMLR 13, 2012)
    covariance   ‖C_s - C_t‖²_F / (4 D²) (Sun & Saenko, ECCV workshops 2016)
    removed      1 - MMD²(after) / MMD²(before), after the source's means, scales, covariance or class shares were made the target's

Source `(N, D)` and target `(M, D)`, float64, standardised: mean 0 and variance 1 over both domains together.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.health import domain_errors
from transfer_cli.methods.math.divergences import coral, covariance
from transfer_cli.methods.math.eigen import gram, top_eigenvectors
from transfer_cli.methods.math.kernel_map import square_distances
from transfer_cli.methods.math.logistic import standardising
from transfer_cli.methods.math.mmd import gaussian, kernel_matrix
from transfer_cli.methods.moments.coral import alignment

LEVEL = 0.95  # of intervals
MOST = 500  # samples a domain in kernel matrices
PERMUTATIONS = 500
COMPONENTS = 50  # in which moments are matched: covariances of more would be noise
FEW = 1e-10  # an eigenvalue's share of the largest, below which it is rounding


def standardised(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """By the mean and deviation of both together; features that never vary are left out.

    Raises:
        TransferError: none varies.
    """
    both = torch.cat([source, target])
    varies = both.std(0, correction=0) > 1e-8
    if not bool(varies.any()):
        raise TransferError("the features are the same for all samples of both domains: nothing can be compared.")
    mean, scale = standardising(both[:, varies])
    return (source[:, varies] - mean) / scale, (target[:, varies] - mean) / scale


def a_distance(source: Tensor, target: Tensor, seed: int = 0) -> dict[str, float] | None:
    """The proxy A-distance, at least 0, with Wilson's interval (JASA 1927) for the error; None of too few samples.

    The interval treats the held-out samples as independent, and knows nothing of how the classifiers vary with their training
    samples.
    """
    errors = domain_errors(source, target, seed)
    if errors is None:
        return None
    wrong = torch.cat(errors)
    low, high = wilson(float(wrong.sum()), len(wrong))
    value, least, most = (min(2.0, max(0.0, 2 * (1 - 2 * e))) for e in (float(wrong.mean()), high, low))
    return {"value": value, "low": least, "high": most, "error": float(wrong.mean()), "samples": len(wrong)}


def wilson(hits: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval for a share, `hits` of `n`."""
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share, extra = hits / n, z * z / n
    middle, half = share + extra / 2, z * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return (middle - half) / (1 + extra), (middle + half) / (1 + extra)


def mmd_test(source: Tensor, target: Tensor, seed: int = 0, permutations: int = PERMUTATIONS) -> dict[str, float]:
    """MMD² of at most `MOST` samples a domain, and the share `(1 + #) / (1 + permutations)` of relabellings that reach it."""
    draw = torch.Generator().manual_seed(seed)
    source, target = (x[torch.randperm(len(x), generator=draw)[:MOST]] for x in (source, target))
    kernel = kernel_matrix(source, target)
    kernel.fill_diagonal_(0)
    n, total = len(source), len(kernel)
    member = torch.zeros(permutations + 1, total, dtype=kernel.dtype)
    order = torch.rand(permutations, total, generator=draw).argsort(1)
    member[0, :n] = 1
    member[1:].scatter_(1, order[:, :n], 1.0)
    values = _mmd_of(kernel, member)
    p = float((1 + (values[1:] >= values[0] - 1e-12).sum()) / (1 + permutations))
    return {"value": float(values[0]), "p": p, "source_samples": n, "target_samples": total - n}


def _mmd_of(kernel: Tensor, member: Tensor) -> Tensor:
    """Unbiased MMD² `(B,)` of the kernel `(T, T)`, its diagonal zero, for each choice of a source `(B, T)` of zeros and ones."""
    n = member[0].sum()
    m = len(kernel) - n
    rows = member @ kernel
    inside = (rows * member).sum(1)
    across = rows.sum(1) - inside
    outside = kernel.sum() - inside - 2 * across
    return inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m)


def moments(source: Tensor, target: Tensor, seed: int = 0, permutations: int = 200) -> dict[str, float]:
    """First and second moments of standardised features.

    `mean_shift`: root mean square over the features of the difference of means, in deviations; `mean_shift_noise`: what equal
    domains of so many samples would show. `coral`: as above. `covariance_distance`: ‖C_s - C_t‖_F over ‖C‖_F of both, each around
    its own mean, in the first components; `covariance_noise` and `covariance_p`: of relabelled samples.
    """
    apart = (source.mean(0) - target.mean(0)).square().mean().sqrt()
    noise = math.sqrt(1 / len(source) + 1 / len(target))
    s, t = _in_components(source, target)
    own = torch.cat([s - s.mean(0), t - t.mean(0)])
    scale = covariance(own).norm().clamp_min(1e-300)

    def distance(order: Tensor) -> Tensor:
        one, other = own[order[: len(s)]], own[order[len(s) :]]
        return (covariance(one) - covariance(other)).norm() / scale

    draw = torch.Generator().manual_seed(seed)
    found = float(distance(torch.arange(len(own))))
    null = torch.stack([distance(torch.randperm(len(own), generator=draw)) for _ in range(permutations)])
    return {
        "mean_shift": float(apart),
        "mean_shift_noise": noise,
        "coral": float(coral(source, target)),
        "covariance_distance": found,
        "covariance_noise": float(null.mean()),
        "covariance_p": float((1 + (null >= found).sum()) / (1 + permutations)),
    }


def removed(
    source: Tensor, target: Tensor, labels: Tensor | None = None, class_weights: Tensor | None = None, seed: int = 0
) -> dict[str, float]:
    """The share of MMD² that goes when something of the source is made as the target's: `means`, `scales` (means and deviations),
    `covariance` (and means), `class_shares` (samples of class y weighted by `class_weights[y]`).

    In the first components; matched on half of the samples and measured on the other, under one kernel. Below zero: it grows.
    """
    draw = torch.Generator().manual_seed(seed)
    s, t = _in_components(source, target)
    orders = [torch.randperm(len(x), generator=draw) for x in (s, t)]
    halves = [order.tensor_split(2) for order in orders]
    fit_s, fit_t = s[halves[0][0]], t[halves[1][0]]
    mine = halves[0][1][:MOST]
    test_s, test_t = s[mine], t[halves[1][1][:MOST]]
    both = torch.cat([test_s, test_t])
    squares = square_distances(both, both)
    width = squares.sum() / (len(both) * (len(both) - 1))

    def mmd2(x: Tensor, weights: Tensor | None = None) -> float:
        w = torch.ones(len(x), dtype=x.dtype) if weights is None else weights
        w = w / w.sum()
        inside, across, outside = (
            gaussian(square_distances(a, b), width) for a, b in ((x, x), (x, test_t), (test_t, test_t))
        )
        m, own = len(test_t), inside.diagonal()
        first = (w @ inside @ w - (w.square() * own).sum()) / (1 - w.square().sum())
        second = (outside.sum() - outside.diagonal().sum()) / (m * (m - 1))
        return float(first + second - 2 * (w @ across).mean())

    (mean_s, scale_s), (mean_t, scale_t) = standardising(fit_s), standardising(fit_t)
    ridge = 1e-3 * float(torch.cat([fit_s, fit_t]).var(0).mean())
    turned = (test_s - mean_s) @ alignment(fit_s, fit_t, ridge) + mean_t
    before = mmd2(test_s)
    after = {
        "means": mmd2(test_s - mean_s + mean_t),
        "scales": mmd2((test_s - mean_s) / scale_s * scale_t + mean_t),
        "covariance": mmd2(turned),
    }
    if class_weights is not None and labels is not None and float(class_weights[labels[mine]].sum()) > 0:
        after["class_shares"] = mmd2(test_s, class_weights[labels[mine]])
    if before <= 0:
        return {}
    return {name: 1 - max(0.0, value) / before for name, value in after.items()}


def principal(x: Tensor, k: int) -> Tensor:
    """Orthonormal directions `(D, <= k)` of the largest variance of samples `(N, D)`; as many as there are."""
    centred = x - x.mean(0)
    wide = x.shape[1] > len(x)
    inner = gram((centred.T if wide else centred).contiguous())
    values, vectors = top_eigenvectors(inner, min(k, len(inner)))
    solid = values > FEW * values[0]
    values, vectors = values[solid], vectors[:, solid]
    return centred.T @ vectors / values.sqrt() if wide else vectors


def _in_components(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([source, target])
    basis = principal(both, min(COMPONENTS, max(2, len(both) // 10)))
    return source @ basis, target @ basis
