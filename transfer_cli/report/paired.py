"""Paired tests of two rows or two runs, and ranks. Standard library only.

- Student's t of the differences over common seeds, two-sided; its tail by the continued fraction of the incomplete beta
  function (Numerical Recipes, 3rd ed., 6.4).
- Holm's step-down adjustment for several comparisons (Scandinavian Journal of Statistics 6, 1979).
- McNemar's exact test (Psychometrika 12, 1947): of the samples that one of two classifiers alone gets right, is a half
  each one's?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

FEWEST = 3  # seeds in common, below which a test would say little more than its assumptions
FRACTIONS = 300  # of the continued fraction, which needs some sqrt(max(a, b))


def paired_t(differences: Sequence[float]) -> float:
    """The two-sided p-value of a mean difference of zero; nan of fewer than `FEWEST` differences, or of ones that do not vary:
    seeds that change nothing are no sample."""
    n = len(differences)
    if n < FEWEST:
        return math.nan
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    if math.sqrt(variance) <= 1e-9 * max(abs(d) for d in differences) or not math.isfinite(variance):
        return math.nan
    return t_tail(mean / math.sqrt(variance / n), n - 1)


def t_tail(t: float, degrees: float) -> float:
    """P(|T| >= |t|) of Student's distribution."""
    return incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of I_x(a, b), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, FRACTIONS):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + numerator * d) or tiny)
            c = (1 + numerator / c) or tiny
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values, in the order given; a nan counts as a comparison and stays nan."""
    order = sorted(range(len(p_values)), key=lambda i: math.inf if math.isnan(p_values[i]) else p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        if not math.isnan(p_values[i]):
            largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
            adjusted[i] = largest
    return adjusted


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided exact p-value, of the numbers of samples that only the one and only the other gets right."""
    n, fewer = only_first + only_second, min(only_first, only_second)
    if 2 * fewer == n:
        return 1.0
    half = n * math.log(2)
    tail = math.fsum(
        math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - half) for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest; the mean of their ranks for equal ones."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for i in order[start : end + 1]:
            found[i] = (start + end) / 2 + 1
        start = end + 1
    return found


def spearman(x: Sequence[float], y: Sequence[float], weigh: Callable[..., list[float]] | None = None) -> float:
    """The correlation of ranks, with `weigh(x, y)` a weight for each; nan where one of them does not vary, or of fewer than 3."""
    if len(x) < 3:
        return math.nan
    weights = weigh(x, y) if weigh else [1.0] * len(x)
    a, b = (_centred(ranks(values), weights) for values in (x, y))
    cross, xx, yy = (
        math.fsum(w * p * q for w, p, q in zip(weights, *both, strict=True)) for both in ((a, b), (a, a), (b, b))
    )
    return cross / math.sqrt(xx * yy) if xx > 1e-12 and yy > 1e-12 else math.nan


def _centred(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    return [v - mean for v in values]


def top_weights(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """max(r(x), r(y))^2 with dense ranks as shares of the highest: what scores high, or is good, counts
    (Musgrave et al., "Three new validators and a large-scale benchmark ranking for unsupervised domain adaptation", 2022)."""
    shares = [_dense_shares(values) for values in (x, y)]
    return [max(pair) ** 2 for pair in zip(*shares, strict=True)]


def _dense_shares(values: Sequence[float]) -> list[float]:
    distinct = {value: i for i, value in enumerate(sorted(set(values)), start=1)}
    return [distinct[value] / len(distinct) for value in values]
