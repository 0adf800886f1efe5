"""Gaussian-process regression with a source: what is learnt there is the prior here.

    mode         f_t, given the source's labels y_s and the granted target labels y_t
    scratch      the target's labels alone
    source       the source's posterior, as it is
    pooled       one function for all labels
    hyper        hyperparameters carry over: prior N(θ_s, H_s⁻¹ + τ² I) from the source's Laplace posterior N(θ_s, H_s⁻¹)
    icm          both tasks with covariance B ⊗ k, noise and mean of their own (Bonilla, Chai & Williams, NIPS 2008)
    sequential   f_t = ρ f_s + c + δ with f_s the source's posterior (Kennedy & O'Hagan, Biometrika 2000):
                 ρ ~ N(1, ½²), log s_δ² ~ N(log 0.1, 1.5²), log ℓ_δ ~ N(log ℓ_s, 0.7²), log σ² ~ N(log σ_s², 0.7²)

Hyperparameters θ are logarithms with normal priors. Their posterior is Laplace's, N(θ*, H⁻¹), and the prediction the first two
moments of the mixture over `draws` antithetic draws (`hyper_posterior: map` takes θ* alone). c ~ N(0, 1) is integrated out.

`guard: evidence` weighs the transfer against a GP from scratch, w = sigmoid(log Z_transfer - log Z_scratch), both the Laplace
evidence of the target's labels, and predicts the mixture; w says whether the source helps.

Inputs and outputs are standardised by the source, without one by the target. Targets are independent GPs. Beyond
`exact_limit` samples a GP is sparse (Titsias, AISTATS 2009), with its hyperparameters at θ*.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from transfer_cli.errors import TransferError
from transfer_cli.evaluation.prediction import Prediction
from transfer_cli.methods.base import Context, Needs
from transfer_cli.methods.feature_method import FeatureMethod
from transfer_cli.methods.math import sparse
from transfer_cli.methods.math.gp import (
    Moments,
    Posterior,
    Process,
    cholesky,
    condition,
    leave_one_out,
    mixture,
    negative_log_likelihood,
    predict,
)
from transfer_cli.methods.math.kernels import Form, Kernel
from transfer_cli.methods.math.laplace import Laplace, Prior, laplace, maximum_a_posteriori, starts_of
from transfer_cli.methods.math.logistic import deviation
from transfer_cli.methods.math.processes import Autoregressive, Coregional, Plain
from transfer_cli.methods.phases import FeatureTask

Mode = Literal["scratch", "source", "pooled", "hyper", "icm", "sequential"]
Row = tuple[float, float, float, float]  # a hyperparameter's mean, standard deviation and bounds

RHO: Row = (1.0, 0.5, -5.0, 5.0)
DIFFERENCE = (math.log(0.1), 1.5)  # log s_δ²
NEAR = 0.7  # standard deviation of log ℓ_δ and log σ² about the source's
AMPLITUDE: Row = (0.0, 0.5, -3.0, 3.0)  # icm: log a
RELATION: Row = (0.0, 1.0, -4.0, 4.0)  # icm: η, the correlation's inverse hyperbolic tangent
SIGNAL_BOUNDS, NOISE_BOUNDS = (math.log(1e-4), math.log(1e4)), (math.log(1e-6), math.log(1e2))
FEW = 200  # samples on which a start for more is sought
EXACT_MOST = 20_000  # samples whose covariance fits a memory
MANY = 10_000  # samples, a random part of more, on which a sparse GP finds its hyperparameters
KEPT = 2**23  # numbers in the factors of all draws together


class GP(FeatureMethod):
    needs = Needs(any_labels=True)
    kinds = ("regression",)
    uses_head = False
    parts = ("source", "target_labelled")

    def __init__(
        self,
        context: Context,
        *,
        mode: Mode = "sequential",
        guard: Literal["none", "evidence"] = "none",
        kernel: Form = "rbf",
        ard: bool = False,
        linear: bool = False,
        hyper_posterior: Literal["laplace", "map"] = "laplace",
        draws: int = 32,
        signal: tuple[float, float] = (1.0, 1.0),
        lengthscale: tuple[float, float] = (1.0, 1.0),
        noise: tuple[float, float] = (0.1, 1.5),
        tau: float = 0.3,
        approximation: Literal["auto", "exact", "sparse"] = "auto",
        inducing: int = 512,
        exact_limit: int = 2000,
    ) -> None:
        super().__init__(context)
        if mode != "scratch" and not context.has_source:
            raise TransferError(f"method.mode={mode} needs a source: set source=NAME, or method.mode=scratch.")
        if mode != "source" and not context.has_target_labels:
            way = "set target_labels=N" + (", or method.mode=source" if context.has_source else "")
            raise TransferError(f"method.mode={mode} needs target labels: {way}.")
        if guard != "none" and mode in ("scratch", "source"):
            raise ValueError(f"guard={guard} weighs a transfer against scratch, and mode={mode} is none")
        if min(*signal, *lengthscale, *noise, tau) <= 0 or min(draws, inducing, exact_limit) < 1:
            raise ValueError("medians and standard deviations of priors, draws, inducing and exact_limit are positive")
        self.mode, self.guard, self.kernel_of = mode, guard, (kernel, ard, linear)
        self.draws = draws if hyper_posterior == "laplace" else 1
        self.signal, self.lengthscale, self.noise, self.tau = signal, lengthscale, noise, tau
        self.approximation, self.inducing, self.exact_limit = approximation, inducing, exact_limit
        self.has_source, self.outputs = context.has_source, context.outputs
        # Factors that follow from the state, with the draws that they belong to.
        self._known: dict[tuple[str, int], tuple[Tensor, list[Posterior]]] = {}

    # --- fitting ----------------------------------------------------------------------------------

    def learn(self, task: FeatureTask) -> dict[str, float]:
        parts = {"source": task.source, "target": task.target_labelled}
        given = {name: (part.x, part.y.double()) for name, part in parts.items() if part and part.y is not None}
        x, y = given["source" if self.has_source else "target"]
        self.fitted.put(mean_x=x.mean(0), scale_x=deviation(x), mean_y=y.mean(0), scale_y=deviation(y))
        if not self.has_source and not bool((y != y[0]).any()):
            raise TransferError("without a source, method gp needs target labels of at least two values.")
        for name, (x, y) in given.items():
            self.fitted.put(
                **{f"x_{name}": self._standard(x), f"y_{name}": (y - self.fitted.mean_y) / self.fitted.scale_y}
            )
        reports = [self._fit_output(t) for t in range(self.outputs)]
        if self.guard != "none":
            self.fitted.put(transfer_weight=self.fitted.mean_y.new_tensor([r["transfer_weight"] for r in reports]))
        return {name: sum(report[name] for report in reports) / len(reports) for name in reports[0]}

    def _fit_output(self, t: int) -> dict[str, float]:
        """All GPs that the prediction of one target needs, into the state."""
        source = self._learn("source", t, None) if self.has_source and self.mode != "scratch" else None
        found = source if source is not None and self.mode == "source" else self._learn(self.mode, t, source)
        report = self._describe(t)
        if self.mode == "sequential":
            report["rho"] = float(found.mode[0])
        if self.guard != "none":
            assert source is not None
            scratch, before = self._learn("scratch", t, None), source if self.mode in ("pooled", "icm") else None
            gain = found.log_evidence - (before.log_evidence if before else 0.0) - scratch.log_evidence
            report |= {"transfer_weight": _sigmoid(gain), "log_evidence_gain": gain}
        return report

    def _describe(self, t: int) -> dict[str, float]:
        """The noise's standard deviation, and how each label of the last domain is predicted from all others, at θ*."""
        (best,), (x, y) = self._posteriors(f"{self.mode}_best", t), self._data(self.mode, t)
        scale = self.fitted.scale_y[t]
        report = {"noise": float(best.process.noise(x[-1:])(best.theta).sqrt() * scale)}
        if best.inner is None:
            own = len(self.fitted.y_source if self.mode == "source" else self.fitted.y_target)
            mean, variance = (column[-own:] for column in leave_one_out(best, y))
            losses = 0.5 * ((y[-own:] - mean).square() / variance + (2 * math.pi * variance).log())
            report["left_out_nll"] = float(losses.mean() + scale.log())
        return report

    def _learn(self, mode: str, t: int, source: Laplace | None) -> Laplace:
        """The hyperparameters' posterior; its draws into the state."""
        process, prior, (x, y) = self._process(mode, t), self._prior(mode, source), self._data(mode, t)
        starts = starts_of(prior)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
        if len(x) > FEW:
            few = order[:FEW]
            starts = maximum_a_posteriori(negative_log_likelihood(process, x[few], y[few]), prior, starts)[None]
        if self.approximation == "exact" and len(x) > EXACT_MOST:
            raise TransferError(
                f"an exact Gaussian process of {len(x):,} samples is too large: set method.approximation=auto."
            )
        draws, whole = min(self._draws(mode), max(2, KEPT // len(x) ** 2)), None
        if self._is_sparse(len(x)):
            z, part = self._inducing(mode, x), order[:MANY].sort().values
            self.fitted.put(**{f"{mode}_inducing_{t}": z})
            draws, whole = 1, sparse.negative_log_bound(process, z, x, y)
            objective = sparse.negative_log_bound(process, z, x[part], y[part], len(x) / len(part))
        else:
            objective = negative_log_likelihood(process, x, y)
        if draws > 1 or self._needs_curvature(mode):
            found = laplace(objective, prior, starts, twice=whole is None, value=whole)
        else:
            found = Laplace.at(maximum_a_posteriori(objective, prior, starts), prior)
        self.fitted.put(**{f"{mode}_{t}": found.draws(draws), f"{mode}_best_{t}": found.mode[None]})
        return found

    def _draws(self, mode: str) -> int:
        """Sequential Bayes builds on the source at its θ* alone."""
        return 1 if mode == "source" and self.mode == "sequential" else self.draws

    def _needs_curvature(self, mode: str) -> bool:
        """Whether more than θ* is asked of a GP: evidence for the guard, or a prior for the next one."""
        if mode == "source":
            return self.mode == "hyper" or (self.guard != "none" and self.mode in ("pooled", "icm"))
        return self.guard != "none"

    def _is_sparse(self, n: int) -> bool:
        return self.approximation == "sparse" or (self.approximation == "auto" and n > self.exact_limit)

    def _inducing(self, mode: str, x: Tensor) -> Tensor:
        if mode != "icm":
            return sparse.inducing_points(x, self.inducing)
        source, target = (x[x[:, -1] == task, :-1] for task in (0, 1))  # the task is no coordinate to be averaged
        mine = sparse.inducing_points(target, max(1, self.inducing // 2))
        others = sparse.inducing_points(source, max(1, self.inducing - len(mine)))
        return torch.cat([_with_task(others, 0), _with_task(mine, 1)])

    # --- models -----------------------------------------------------------------------------------

    def _data(self, mode: str, t: int) -> tuple[Tensor, Tensor]:
        """Standardised inputs `(N, D)` and outputs `(N,)` that a GP is conditioned on."""
        names = {"source": ["source"], "pooled": ["source", "target"], "icm": ["source", "target"]}.get(
            mode, ["target"]
        )
        x = [getattr(self.fitted, f"x_{name}") for name in names]
        y = [getattr(self.fitted, f"y_{name}")[:, t] for name in names]
        return torch.cat([_with_task(part, i) for i, part in enumerate(x)] if mode == "icm" else x), torch.cat(y)

    def _kernel(self) -> Kernel:
        form, ard, linear = self.kernel_of
        return Kernel(form, len(self.fitted.mean_x), ard, linear and form != "linear")

    def _process(self, mode: str, t: int) -> Process:
        if mode == "icm":
            return Coregional(self._kernel())
        if mode == "sequential":
            return Autoregressive(self._posteriors("source_best", t)[0], self._kernel())
        return Plain(self._kernel())

    def _prior(self, mode: str, source: Laplace | None) -> Prior:
        kernel, like = self._kernel(), self.fitted.mean_x
        root = math.sqrt(kernel.width)
        signal: Row = (math.log(self.signal[0]), self.signal[1], *SIGNAL_BOUNDS)
        length: Row = (math.log(self.lengthscale[0] * root), self.lengthscale[1], math.log(1e-2), math.log(1e3 * root))
        noise: Row = (math.log(self.noise[0]), self.noise[1], *NOISE_BOUNDS)
        rows = _kernel_rows(kernel, signal, [length] * kernel.scales)
        if mode == "icm":
            return Prior.of([*rows, AMPLITUDE, RELATION, noise, noise], like)
        plain = Prior.of([*rows, noise], like)
        if source is None or mode not in ("hyper", "sequential"):
            return plain
        if mode == "hyper":
            spread = source.covariance + self.tau**2 * torch.eye(len(plain.mean), dtype=like.dtype, device=like.device)
            return Prior(source.mode, spread, plain.lower, plain.upper)
        known = [float(value) for value in source.mode]
        lengths = [(known[1 + i], NEAR, *length[2:]) for i in range(kernel.scales if kernel.form != "linear" else 0)]
        difference = _kernel_rows(kernel, (*DIFFERENCE, *SIGNAL_BOUNDS), lengths)
        return Prior.of([RHO, *difference, (known[-1], NEAR, *NOISE_BOUNDS)], like)

    def _posteriors(self, name: str, t: int) -> list[Posterior]:
        """One for each draw of the hyperparameters, from the state alone. `name`: a mode, with `_best` at θ* only."""
        draws = getattr(self.fitted, f"{name}_{t}")
        known = self._known.get((name, t))
        if known is None or known[0] is not draws:
            mode = name.removesuffix("_best")
            process, (x, y) = self._process(mode, t), self._data(mode, t)
            if self._is_sparse(len(x)):
                z = getattr(self.fitted, f"{mode}_inducing_{t}")
                found = [sparse.condition(process, theta, z, x, y) for theta in draws]
            else:
                found = [condition(process, theta, x, y) for theta in draws]
            known = self._known[name, t] = (draws, found)
        return known[1]

    # --- prediction -------------------------------------------------------------------------------

    def predict(self, x: Any) -> Prediction:
        return self._predict(self._standard(self._preprocess(self.features(x).double(), "target")), self.mode, 1)

    def predict_source(self, x: Any) -> Prediction:
        """By the source's own GP where there is one."""
        mode = "source" if self.mode in ("hyper", "sequential") else self.mode
        return self._predict(self._standard(self._preprocess(self.features(x).double(), "source")), mode, 0)

    def _predict(self, x: Tensor, mode: str, task: int) -> Prediction:
        found = [self._moments(x, mode, task, t) for t in range(self.outputs)]
        mean, variance, noise = (torch.stack(column, 1) for column in zip(*found, strict=True))
        mean, square = mean * self.fitted.scale_y + self.fitted.mean_y, self.fitted.scale_y.square()
        return Prediction(mean=mean, variance=(variance + noise) * square, epistemic=variance * square)

    def _moments(self, x: Tensor, mode: str, task: int, t: int) -> Moments:
        parts, weights = [], []
        for name, weight in self._experts(mode, task, t):
            found = predict(self._posteriors(name, t), _with_task(x, task) if name == "icm" else x)
            parts += found
            weights += [weight / len(found)] * len(found)
        return mixture(parts, x.new_tensor(weights))

    def _experts(self, mode: str, task: int, t: int) -> list[tuple[str, float]]:
        """The modes that predict one target, and their weights."""
        if self.guard == "none" or task == 0:
            return [(mode, 1.0)]
        w = float(self.fitted.transfer_weight[t])
        return [(mode, w), ("scratch", 1 - w)]

    def functions(self, x: Any, n: int, seed: int = 0) -> Tensor:
        """The hyperparameters are drawn too; all inputs belong to one function, at the cost of their covariances `(B, B)`."""
        x = self._standard(self._preprocess(self.features(x).double(), "target"))
        draw, found = torch.Generator().manual_seed(seed), x.new_empty(n, len(x), self.outputs)
        for t in range(self.outputs):
            experts = self._experts(self.mode, 1, t)
            chances = torch.tensor([weight for _, weight in experts], dtype=torch.float64)
            for i, which in enumerate(torch.multinomial(chances, n, replacement=True, generator=draw)):
                name, posteriors = experts[int(which)][0], self._posteriors(experts[int(which)][0], t)
                posterior, at = posteriors[i % len(posteriors)], _with_task(x, 1) if name == "icm" else x
                noise = torch.randn(len(x), generator=draw, dtype=torch.float64).to(x)
                found[i, :, t] = posterior.mean(at) + cholesky(posterior.covariance(at, at), "the posterior") @ noise
        return found * self.fitted.scale_y + self.fitted.mean_y

    def _standard(self, x: Tensor) -> Tensor:
        return (x - self.fitted.mean_x) / self.fitted.scale_x


def _kernel_rows(kernel: Kernel, signal: Row, lengths: list[Row]) -> list[Row]:
    if kernel.form == "linear":
        return [signal] * kernel.scales
    return [signal, *lengths, *([signal] if kernel.linear else [])]


def _with_task(x: Tensor, task: int) -> Tensor:
    return torch.cat([x, torch.full_like(x[:, :1], task)], 1)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))
