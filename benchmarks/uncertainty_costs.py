"""What heads and Gaussian processes cost against numbers of samples and features, and beside scikit-learn's and GPyTorch's loop.

    python benchmarks/uncertainty_costs.py [--small] > table.md

Seconds on this machine with the threads it is given; the ratios compare what ran side by side. GPyTorch's loop is that of its
regression tutorial: 50 steps of Adam at 0.1 on the exact marginal likelihood, in float64 and by Cholesky.
"""

from __future__ import annotations

import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transfer_cli.backbones.vectors import Identity
from transfer_cli.data.inputs import InputSpec
from transfer_cli.data.readers.friedman import FUNCTIONS
from transfer_cli.methods.base import Context, FeatureOptions
from transfer_cli.methods.baseline.no_adaptation import NoAdaptation
from transfer_cli.methods.bayes.bayes_head import BayesHead
from transfer_cli.methods.bayes.niw_lda import NIWLDA
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.gaussian_process.dirichlet_gp import DirichletGP
from transfer_cli.methods.gaussian_process.gp import GP
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.phases import Features, FeatureTask

CLASSES = 10
HEADS: dict[str, tuple[type[FeatureMethod], dict[str, Any]]] = {
    "logistic": (NoAdaptation, {}),
    "niw_lda": (NIWLDA, {}),
    "bayes_head": (BayesHead, {}),
    "dirichlet_gp": (DirichletGP, {}),
}


def context(width: int, kind: str) -> Context:
    classes = CLASSES if kind == "classification" else 0
    return Context(
        backbone=Identity(InputSpec("vector", (width,))),
        feature_dim=width,
        kind=kind,
        num_classes=classes,
        source_classes=classes,
        has_source=True,
        has_target_labels=True,
        source_labels_fit_head=True,
        target_width=int(kind == "regression"),
        label_mean=torch.zeros(1),
        label_std=torch.ones(1),
        features=FeatureOptions(),
        make_head=lambda: Logistic(kind, CLASSES),
    )


def classes(n: int, width: int, few: int = 100) -> FeatureTask:
    """Gaussian classes of a source of n samples, moved a little in the target, of which `few` have labels."""
    draw = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(CLASSES, width, generator=draw).double() / width**0.25

    def part(size: int, shift: float) -> Features:
        y = torch.arange(size) % CLASSES
        return Features(centres[y] + shift + torch.randn(size, width, generator=draw).double(), y)

    target = part(few, 0.3)
    return FeatureTask(part(n, 0.0), replace(target, y=None), target)


def function(n: int, few: int = 50) -> tuple[FeatureTask, Features]:
    """Friedman's function, and a close one with `few` labels; and 1,000 samples of the source's function."""
    draw = torch.Generator().manual_seed(0)

    def part(size: int, name: str) -> Features:
        x = torch.rand(size, 10, generator=draw).double()
        return Features(x, (FUNCTIONS[name](*x.T[:5]) + torch.randn(size, generator=draw))[:, None].float())

    test = part(1000, "source")
    return FeatureTask(part(n, "source"), None, part(few, "close")), test


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rmse(mean: Tensor, y: Tensor) -> float:
    return float((mean.flatten() - y.flatten()).square().mean().sqrt())


def heads(sizes: list[int], widths: list[int]) -> None:
    print("\n## Heads: seconds to fit, ten classes, 100 target labels\n")
    print(
        f"| source samples N | features D | {' | '.join(f'`{name}`' for name in HEADS)} |",
        "|---" * (2 + len(HEADS)) + "|",
        sep="\n",
    )
    for width in widths:
        for n in sizes:
            task = classes(n, width)
            took = []
            for method, options in HEADS.values():
                built = method(context(width, "classification"), **options)
                took.append(f"{seconds(lambda: built.fit(task)):.2f}")  # noqa: B023
            print(f"| {n:,} | {width} | {' | '.join(took)} |", flush=True)


def processes(sizes: list[int]) -> None:
    print("\n## `gp mode=source`: seconds to fit, ten features (ARD off; sparse beyond 2,000 samples)\n")
    print("| N | seconds | RMSE (noise 1) | largest memory so far, GB |", "|---|---|---|---|", sep="\n")
    for n in sizes:
        task, test = function(n)
        built = GP(context(10, "regression"), mode="source")
        took = seconds(lambda: built.fit(task))  # noqa: B023
        error = rmse(built.predict(test.x).mean, test.y)  # type: ignore[arg-type]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"| {n:,} | {took:.1f} | {error:.3f} | {memory:.1f} |", flush=True)


def peers(sizes: list[int]) -> None:
    from sklearn.gaussian_process import GaussianProcessRegressor, kernels

    print("\n## Exact Gaussian process against peers: seconds (RMSE), ratio of times\n")
    print("| N | `gp` MAP | `gp` Laplace, 32 draws | scikit-learn | GPyTorch's loop | scikit-learn / MAP | GPyTorch / MAP |",
          "|---" * 7 + "|", sep="\n")  # fmt: skip
    for n in [50, *sizes]:  # the first warms everything up, and is not shown
        task, test = function(n)
        source = task.source
        assert source is not None and source.y is not None and test.y is not None
        mean, scale = source.x.mean(0), source.x.std(0)
        x, z, y = (source.x - mean) / scale, (test.x - mean) / scale, source.y.double()
        level, spread = y.mean(), y.std()
        found: list[tuple[float, float]] = []
        for posterior in ("map", "laplace"):
            built = GP(context(10, "regression"), mode="source", hyper_posterior=posterior)  # type: ignore[arg-type]
            took = seconds(lambda: built.fit(task))  # noqa: B023
            found.append((took, rmse(built.predict(test.x).mean, test.y)))  # type: ignore[arg-type]
        kernel = kernels.ConstantKernel() * kernels.RBF() + kernels.WhiteKernel()
        theirs = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=0)  # three starts, as ours
        took = seconds(lambda: theirs.fit(x.numpy(), ((y - level) / spread).numpy()))  # noqa: B023
        guess = torch.from_numpy(theirs.predict(z.numpy())) * spread + level
        found.append((took, rmse(guess, test.y)))
        found.append(gpytorch_loop(x, ((y - level) / spread)[:, 0], z, lambda m: rmse(m * spread + level, test.y)))  # noqa: B023
        cells = [f"{took:.3f} ({error:.3f})" for took, error in found]
        ratios = [f"{found[i][0] / found[0][0]:.1f}" for i in (2, 3)]
        if n >= min(sizes):
            print(f"| {n:,} | {' | '.join([*cells, *ratios])} |", flush=True)


def gpytorch_loop(x: Tensor, y: Tensor, z: Tensor, error: Callable[[Tensor], float]) -> tuple[float, float]:
    import gpytorch

    class Model(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Model(likelihood).double()

    def train() -> None:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        for _ in range(50):
            optimizer.zero_grad()
            loss = -objective(model(x), y)
            loss.backward()
            optimizer.step()

    with gpytorch.settings.max_cholesky_size(10_000), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        took = seconds(train)
        model.eval()
        with torch.no_grad():
            return took, error(model(z).mean)


if __name__ == "__main__":
    small = "--small" in sys.argv
    peers([100, 500] if small else [100, 500, 1000, 2000])
    processes([100, 1000] if small else [100, 1000, 2000, 10_000, 100_000])
    heads([100, 1000] if small else [100, 1000, 10_000, 100_000], [32] if small else [32, 256])
