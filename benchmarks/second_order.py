"""Seconds until a linear probe is within 1e-4 of its optimum, relative to it, by first- and second-order solvers.

    python benchmarks/second_order.py [--rounds 5] [--cap 60] [--small]

The probe is a softmax head with a Gaussian prior: centred on the source's head, N(W_s, (H_s / 2 + λ)⁻¹) of Böhning's H_s; or
centred on zero and isotropic, which is what scikit-learn's LogisticRegression has. Features are standardised, with a bias.
`digits` is scikit-learn's (D = 64, N = 1437, K = 10; the source: the other 360), `noisy` is drawn: correlated features whose scales
fall over two decades, and labels drawn from the softmax (D = 512, N = 5000, K = 10).

For each solver, first the loosest of its own tolerances that reaches the gap is found; then all take turns, one thread, and the
median over rounds counts, whitening and factors included. Adam takes batches of 128 at the best of three rates, evaluations not
counted, and ends at the cap. `auto` is what heads use, at its usual tolerance, which is far finer than the gap. `--small`: where
Newton's method with the full Hessian pays, against whitened L-BFGS, both to a gradient of 1e-6.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from transfer_cli.methods.math.logistic import standardising
from transfer_cli.methods.math.softmax import Precision, Softmax

GAP = 1e-4
TOLERANCES = [10.0 ** (-e / 3) for e in range(3, 25)]
CLASSES = 10
Solve = Callable[[float], Tensor]


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    return x[360:].double(), y[360:].long(), x[:360].double(), y[:360].long()


def noisy(width: int = 512, n: int = 5000, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing, head, moved = normal(width, width), normal(width, classes), normal(width, classes)
    scales = torch.logspace(0, -2, width, dtype=torch.float64)

    def labelled(n: int, head: Tensor) -> tuple[Tensor, Tensor]:
        latent = normal(n, width)
        probs = (2 * latent * scales @ head).softmax(1)
        return (latent * scales) @ mixing, torch.multinomial(probs, 1, generator=draw)[:, 0]

    return *labelled(n, head), *labelled(n // 5, head + 0.3 * moved)


def probe(x: Tensor, y: Tensor, source_x: Tensor, source_y: Tensor, centred: str) -> Softmax:
    mean, scale = standardising(x)
    z, z_s = (torch.cat([(part - mean) / scale, torch.ones_like(part[:, :1])], 1) for part in (x, source_x))
    classes = int(y.max()) + 1
    n, diagonal = len(z), z.new_full((classes, z.shape[1]), 1.0)
    diagonal[:, -1] = 1e-6
    start = torch.zeros_like(diagonal)
    problem = Softmax(z, y, z.new_full((n,), 1 / n), start, Precision(diagonal).scaled(1 / n))
    if centred == "zero":
        return problem
    of_source = Softmax(z_s, source_y, torch.ones_like(z_s[:, 0]), start, Precision(10 * diagonal)).minimise()
    spread = torch.eye(classes, dtype=z.dtype) - 1 / classes
    prior = Precision(diagonal, kron=(0.5 * spread, 0.5 * z_s.T @ z_s))
    return replace(problem, mean=of_source, precision=prior.scaled(1 / n))


class Unwhitened(Softmax):
    def _whitening(self) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(self.x[0])
        return ones, ones


def solvers(p: Softmax, centred: str) -> dict[str, Solve]:
    plain = Unwhitened(p.x, p.y, p.weights, p.mean, p.precision)

    def scikit_learn(tolerance: float) -> Tensor:
        x, y = p.x[:, :-1].numpy(), p.y.numpy()
        peer = LogisticRegression(C=1.0, tol=tolerance, max_iter=10_000).fit(x, y)
        return torch.cat([torch.from_numpy(peer.coef_), torch.from_numpy(peer.intercept_)[:, None]], 1)

    found: dict[str, Solve] = {
        "auto (gradient 1e-6)": lambda tolerance: p.minimise(),
        "Newton, full Hessian": lambda tolerance: p.minimise(tolerance=tolerance, solver="newton"),
        "Newton-CG, Böhning": lambda tolerance: p.minimise(tolerance=tolerance, solver="newton_cg"),
        "L-BFGS, whitened": lambda tolerance: p.minimise(tolerance=tolerance, solver="lbfgs"),
        "L-BFGS": lambda tolerance: plain.minimise(tolerance=tolerance, solver="lbfgs"),
    }
    if p.mean.numel() > 2000:  # a Hessian of 5,130 unknowns: minutes
        del found["Newton, full Hessian"]
    return found | ({"scikit-learn": scikit_learn} if centred == "zero" else {})


def gap(p: Softmax, w: Tensor, optimum: float) -> float:
    return (p.value(w) - optimum) / abs(optimum)


def adam(p: Softmax, optimum: float, rate: float, cap: float) -> tuple[float, float]:
    """Seconds until the gap is reached (or infinity), and the smallest gap."""
    w = p.mean.clone().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=rate)
    draw = torch.Generator().manual_seed(0)
    spent, best, n = 0.0, float("inf"), len(p.x)
    while spent < cap:
        begin = time.perf_counter()
        for picked in torch.randperm(n, generator=draw).split(128):
            away = w - p.mean
            loss = F.cross_entropy(p.x[picked] @ w.T, p.y[picked]) + 0.5 * (away * p.precision(away)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spent += time.perf_counter() - begin
        best = min(best, gap(p, w.detach(), optimum))
        if best <= GAP:
            return spent, best
    return float("inf"), best


def compare(name: str, p: Softmax, centred: str, rounds: int, cap: float) -> None:
    optimum = p.value(p.minimise(tolerance=1e-9, solver="newton_cg"))
    ways, tolerances = solvers(p, centred), {}
    for way, solve in ways.items():
        tolerances[way] = next((t for t in TOLERANCES if gap(p, solve(t), optimum) <= GAP), None)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, solve in ways.items():
            tolerance = tolerances[way]
            if tolerance is not None:
                begin = time.perf_counter()
                solve(tolerance)
                times[way].append(time.perf_counter() - begin)
    seconds = {way: statistics.median(t) for way, t in times.items() if t}
    print(f"\n{name}, prior centred on the {centred}: D = {p.x.shape[1] - 1}, N = {len(p.x)}, K = {len(p.mean)}")
    for way, second in seconds.items():
        print(f"  {way:24s} {second:8.4f} s   {second / seconds['L-BFGS, whitened']:6.2f}", flush=True)
    attempts = [adam(p, optimum, rate, cap / 3) for rate in (1e-3, 1e-2, 1e-1)]
    reached = min(seconds for seconds, _ in attempts)
    smallest = min(found for _, found in attempts)
    told = f"{reached:8.4f} s   {reached / seconds['L-BFGS, whitened']:6.2f}"
    if reached == float("inf"):
        told = f"never within {cap / 3:.0f} s, {cap / 3 / seconds['L-BFGS, whitened']:.0f} times as long (gap {smallest:.1e})"
    print(f"  {'Adam, best of 3 rates':24s} {told}", flush=True)


def small(rounds: int) -> None:
    print("\nms to a gradient of 1e-6, zero-centred\n   D   N   K   D K   N D K   Newton   L-BFGS, whitened")
    for width, n, classes in (
        (4, 50, 3), (10, 200, 3), (30, 60, 3), (30, 200, 3), (64, 50, 5), (20, 500, 5), (64, 200, 5), (10, 2000, 3),
        (64, 100, 10), (64, 1000, 10),
    ):  # fmt: skip
        p = probe(*noisy(width, n, classes), centred="zero")
        times: dict[str, list[float]] = {"newton": [], "lbfgs": []}
        for _ in range(3 * rounds):
            for solver, taken in times.items():
                begin = time.perf_counter()
                p.minimise(solver=solver)  # type: ignore[arg-type]
                taken.append(1e3 * (time.perf_counter() - begin))
        told = "   ".join(f"{statistics.median(taken):6.1f}" for taken in times.values())
        print(f"{width:4d} {n:4d} {classes:3d} {p.mean.numel():5d} {p.mean.numel() * n:7d}   {told}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cap", type=float, default=60.0, help="seconds of Adam in all")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.small:
        small(options.rounds)
        return
    for name, data in (("digits", digits()), ("noisy", noisy())):
        for centred in ("source", "zero"):
            compare(name, probe(*data, centred=centred), centred, options.rounds, options.cap)


if __name__ == "__main__":
    main()
