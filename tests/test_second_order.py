"""Second order: solvers of convex heads, optimisers of networks, and the calculus beneath kernels."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, Outcome
from feature_tasks import context, shifted_classes
from sklearn.linear_model import LogisticRegression
from test_resume import assert_same, outcome_of, stop_at
from torch import Tensor, nn

from transfer_cli.errors import TransferError
from transfer_cli.loops.optimizers import lbfgs, newton, sam
from transfer_cli.loops.second_order import LBFGS, SAM, NewtonCG, Replay
from transfer_cli.methods.base import Method
from transfer_cli.methods.finetuning.linear_probe import LinearProbe
from transfer_cli.methods.heads.logistic import Logistic
from transfer_cli.methods.heads.ridge import Ridge
from transfer_cli.methods.math import softmax
from transfer_cli.methods.math.kernels import Kernel
from transfer_cli.methods.math.logistic import fit_logistic, fit_ridge
from transfer_cli.methods.math.softmax import Precision, Softmax

Transfer = Callable[..., Outcome]
SOLVERS = ("newton", "newton_cg", "lbfgs")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, width: int, classes: int, scales: float = 2.0) -> tuple[Tensor, Tensor]:
    """Features of which few directions have most of the variance, and labels that are not certain."""
    x = (normal(n, width) * torch.logspace(0, -scales, width, dtype=torch.float64)) @ normal(width, width, seed=1)
    y = torch.distributions.Categorical(logits=2 * x @ normal(width, classes, seed=2)).sample()
    return x, y


# --- solvers ------------------------------------------------------------------------------------


def problem(n: int = 120, width: int = 6, classes: int = 4) -> Softmax:
    x, y = correlated(n, width, classes)
    a, b, full = (0.05 * normal(s, s, seed=s) @ normal(s, s, seed=s).T for s in (classes, width, classes * width))
    precision = Precision(normal(classes, width, seed=5).square() + 0.1, (a, b), full)
    return Softmax(x, y, normal(n, seed=6).square(), normal(classes, width, seed=7), precision)


@pytest.mark.parametrize("n", [4, 120])  # fewer samples than features, and more
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_any_gaussian_prior_end_where_the_gradient_vanishes(solver: Any, n: int) -> None:
    p = problem(n)

    def objective(w: Tensor) -> Tensor:
        away = (w - p.mean).flatten()
        losses = F.cross_entropy(p.x @ w.T, p.y, reduction="none")
        return (p.weights * losses).sum() + 0.5 * away @ p.precision.dense() @ away

    far = 3 * normal(4, 6, seed=8)
    found = [p.minimise(tolerance=1e-8, solver=solver), p.minimise(far, tolerance=1e-8, solver=solver)]
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)
    assert float(torch.func.grad(objective)(found[0]).abs().max()) < 1.1e-8


@pytest.mark.parametrize("solver", ["auto", *SOLVERS])
@pytest.mark.parametrize("shape", [(200, 5, 3), (40, 60, 3), (90, 8, 2)])
def test_logistic_regression_is_scikit_learns_by_any_solver(solver: Any, shape: tuple[int, int, int]) -> None:
    x, y = correlated(*shape)
    n, _, classes = shape
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    w, b = fit_logistic(x, y, classes, 0.01, weights, tolerance=1e-10, solver=solver)
    peer = LogisticRegression(C=1 / (0.01 * n), tol=1e-10, max_iter=100_000).fit(x.numpy(), y.numpy())
    wanted = peer.predict_proba(x.numpy())
    if classes == 2:  # theirs has one column of weights, w_1 - w_0, and its penalty is twice that of two opposite ones
        peer.set_params(C=2 / (0.01 * n)).fit(x.numpy(), y.numpy())
        wanted = peer.predict_proba(x.numpy())
    np.testing.assert_allclose((x @ w.T + b).softmax(1).numpy(), wanted, atol=2e-6)
    assert float(b.sum().abs()) < 1e-12


def test_whitening_saves_iterations_where_features_are_correlated(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = correlated(800, 30, 4, scales=2.5)
    counts = []
    count = softmax.minimize

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        def one(flat: Any) -> Any:
            counts[-1] += 1
            return function(flat)

        return count(one, *args, **kwargs)

    monkeypatch.setattr(softmax, "minimize", counted)
    weights = torch.full((800,), 1 / 800, dtype=torch.float64)
    counts.append(0)
    fit_logistic(x, y, 4, 1e-4, weights, solver="lbfgs")
    monkeypatch.setattr(Softmax, "_whitening", lambda self: (torch.clone, torch.clone, torch.clone))
    counts.append(0)
    fit_logistic(x, y, 4, 1e-4, weights, solver="lbfgs")
    assert counts[0] < 0.5 * counts[1], counts


def test_the_solver_follows_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def spied(name: str, original: Any) -> Any:
        def call(self: Softmax, *args: Any) -> Any:
            taken.append(name)
            return original(self, *args)

        return call

    for name in ("_dense_step", "_conjugate_step", "_whitened"):
        monkeypatch.setattr(Softmax, name, spied(name, getattr(Softmax, name)))
    for n, width, wanted in ((40, 5, "_dense_step"), (3000, 5, "_whitened"), (10, 400, "_whitened")):
        taken.clear()
        x, y = correlated(n, width, 3)
        Logistic("classification", 3, l2=0.1).fit(x, y)
        assert set(taken) == {wanted}, (n, width)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scales_duplicates_constants_and_no_penalty_are_borne(solver: Any) -> None:
    """Features in any units, twice the same, or constant; classes that a line parts, without a penalty."""
    x, y = correlated(60, 4, 2)
    x = torch.cat([1e6 * x, 1e-6 * x, x[:, :1], x[:, :1], torch.zeros(60, 1).double(), torch.ones(60, 1).double()], 1)
    x[:, 0] += 1e7 * y
    weights = torch.full((60,), 1 / 60, dtype=torch.float64)
    for penalty in (1e-3, 0.0):
        w, b = fit_logistic(softmaxed(x), y, 2, penalty, weights, solver=solver)
        assert bool(w.isfinite().all() and b.isfinite().all())
        assert bool(((softmaxed(x) @ w.T + b).argmax(1) == y).all())


def softmaxed(x: Tensor) -> Tensor:
    scale = x.std(0, correction=0)
    return (x - x.mean(0)) / torch.where(scale > 1e-8, scale, 1.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_probe_takes_a_solver(solver: Any) -> None:
    task, _ = shifted_classes(60)
    probes = [LinearProbe(context(), solver=s) for s in ("auto", solver)]
    for probe in probes:
        probe.fit(task)
    assert task.target is not None
    first, second = (probe.predict(task.target.x).probs for probe in probes)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)


# --- ridge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_the_variance_of_ridge_is_that_of_samples_left_out(weighted: bool) -> None:
    """Against as many fits as there are samples."""
    x, noise = normal(25, 6), normal(25, 2, seed=1)
    y = x[:, :2] + 0.5 * noise
    weights = normal(25, seed=2).square() if weighted else None
    head = Ridge("regression", 2, l2=0.05)
    head.fit(x, y, weights)
    z = softmaxed(x)
    share = torch.full((25,), 1 / 25).double() if weights is None else weights / weights.sum()
    squares = []
    for i in range(25):
        others = share.clone()
        others[i] = 0
        w, b = fit_ridge(z, y, 0.05, others)
        squares.append((y[i] - w @ z[i] - b).square())
    torch.testing.assert_close(head.fitted.variance, share @ torch.stack(squares))


def test_ridges_variance_is_honest_where_samples_are_few() -> None:
    """Ten samples of five features: the residuals of the fit itself would promise less than half the error."""
    slopes, ratios, naive = normal(5, 1), [], []
    for seed in range(200):
        x, new = normal(10, 5, seed=seed), normal(200, 5, seed=1000 + seed)
        y = x @ slopes + normal(10, 1, seed=2000 + seed)
        head = Ridge("regression", 1, l2=0.01)
        head.fit(x, y)
        error = (head.predict(new).mean.double() - new @ slopes).square().mean() + 1  # type: ignore[union-attr]
        ratios.append(float((head.fitted.variance / error).log()))
        residual = (head.predict(x).mean.double() - y).square().mean()  # type: ignore[union-attr]
        naive.append(float((residual / error).log()))
    assert abs(np.mean(ratios)) < 0.4 and np.mean(naive) < -1.5


def test_one_sample_tells_no_variance() -> None:
    with pytest.raises(TransferError, match="two or more"):
        Ridge("regression", 1).fit(normal(1, 3), normal(1, 1))


# --- differentiation and integration ------------------------------------------------------------


def line(n: int, step: float) -> tuple[Tensor, Tensor]:
    """A grid `(n, 1)`, and the matrix of (1 - ℓ² d²/dx²) at ℓ = 1 by central differences, for its inner points `(n - 2, n)`."""
    x = step * torch.arange(n, dtype=torch.float64)[:, None]
    second = torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1) - 2 * torch.eye(n)
    return x, (torch.eye(n) - second / step**2).double()[1:-1]


@pytest.mark.parametrize("form", ["matern12", "matern32", "rbf"])
def test_matern_half_is_greens_function(form: Any) -> None:
    """(1 - ℓ² ∂²) k(·, x') = 2 ℓ s² δ(· - x'); of the smoother kernels that is not so."""
    length, height, step = 0.7, 1.3, 0.7 * 0.02
    x, operator = line(300, step / length)
    theta = torch.tensor([math.log(height), math.log(length)], dtype=torch.float64)
    applied = operator @ Kernel(form, 1)(theta, length * x, length * x) * step / (2 * length * height)
    delta = torch.eye(300, dtype=torch.float64)[1:-1]
    gap = float((applied - delta).abs().max())
    assert gap < 1e-3 if form == "matern12" else gap > 0.1


def test_the_processes_mean_minimises_the_energy_of_its_kernel() -> None:
    """argmin Σ (y - f)² / σ² + ‖f‖²_H is the posterior mean; for Matern-1/2 ‖f‖²_H = ∫ (f² + ℓ² f'²) dx / (2 ℓ s²)."""
    length, noise, step, n = 1.0, 0.3, 0.01, 1600  # eight lengths beyond the data on either side
    x = step * torch.arange(n, dtype=torch.float64)[:, None]
    seen = torch.arange(700, 900, 25)
    y = normal(len(seen))
    theta = torch.zeros(2, dtype=torch.float64)
    k = Kernel("matern12", 1)
    mean = k(theta, x, x[seen]) @ torch.linalg.solve(k(theta, x[seen], x[seen]) + noise * torch.eye(len(seen)), y)
    slope = (torch.diag(torch.ones(n - 1), 1) - torch.eye(n)).double()[:-1] / step
    energy = step * (torch.eye(n, dtype=torch.float64) + length**2 * slope.T @ slope) / (2 * length)
    pick = torch.eye(n, dtype=torch.float64)[seen]
    minimum = torch.linalg.solve(pick.T @ pick / noise + energy, pick.T @ y / noise)
    assert float((minimum - mean)[500:1100].abs().max()) < 2e-3 * float(mean.abs().max())


# --- optimisers of networks ---------------------------------------------------------------------


def network(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """Small, with dropout and BatchNorm, and a batch."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()
    return net, normal(30, 4), torch.arange(30) % 3


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(net.parameters())}]


def test_sam_steps_by_the_gradient_at_the_top_of_the_ball() -> None:
    net, x, y = network()
    net.eval()
    optimizer = sam(groups_of(net), lr=0.1, momentum=0.0, weight_decay=0.0, rho=0.3)
    before = nn.utils.parameters_to_vector(net.parameters()).detach().clone()

    def loss(flat: Tensor) -> Tensor:
        names = [name for name, _ in net.named_parameters()]
        parts = flat.split([p.numel() for p in net.parameters()])
        shaped = {n: q.view_as(p) for n, q, p in zip(names, parts, net.parameters(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, shaped, (x,)), y)

    gradient = torch.func.grad(loss)(before)
    wanted = before - 0.1 * torch.func.grad(loss)(before + 0.3 * gradient / gradient.norm())
    F.cross_entropy(net(x), y).backward()
    assert isinstance(optimizer, SAM)
    with optimizer.climbed():
        climbed = nn.utils.parameters_to_vector(net.parameters()).detach()
        assert float((climbed - before).norm()) == pytest.approx(0.3)
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()).detach(), before), "back to the last bit"
    optimizer.step()
    torch.testing.assert_close(nn.utils.parameters_to_vector(net.parameters()).detach(), wanted)
    assert float((wanted - (before - 0.1 * gradient)).norm()) > 1e-3


def test_an_objective_is_replayed_with_its_draws_and_without_a_trace() -> None:
    net, x, y = network()
    replay = Replay(lambda: F.cross_entropy(net(x), y), net, torch.device("cpu"))  # type: ignore[arg-type]
    first = replay.objective()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    after = torch.get_rng_state()
    with replay.without_trace():
        second = replay()
    assert torch.equal(first, second), "the same dropout"
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items()), "one update of BatchNorm's statistics"


LINE_SEARCHES: dict[str, Any] = {
    "lbfgs": lambda groups, **keys: lbfgs(groups, **keys),
    "newton": lambda groups, **keys: newton(groups, damping=0.0, **keys),
}


def convex() -> tuple[nn.Linear, Any, Tensor]:
    x, y = correlated(150, 6, 3)
    head = nn.Linear(6, 3).double()

    def loss() -> Tensor:
        return F.cross_entropy(head(x), y) + 0.005 * head.weight.square().sum()

    w, b = fit_logistic(x, y, 3, 0.01, torch.full((150,), 1 / 150, dtype=torch.float64), tolerance=1e-9)
    return head, loss, torch.cat([w, (b - b.mean())[:, None]], 1)


@pytest.mark.parametrize(("name", "steps"), [("lbfgs", 80), ("newton", 12)])
def test_line_searches_find_the_optimum_of_a_convex_head(name: str, steps: int) -> None:
    head, loss, wanted = convex()
    optimizer = LINE_SEARCHES[name](groups_of(head))
    values = []
    for _ in range(steps):
        now = loss()
        values.append(float(now.detach()))
        optimizer.minimise(now, loss)
    found = torch.cat([head.weight, (head.bias - head.bias.mean())[:, None]], 1).detach()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert values == sorted(values, reverse=True) or max(np.diff(values)) < 1e-12, "never upwards"


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_weight_decay_is_ridges_penalty(name: str) -> None:
    x, y = normal(9, 20), normal(9, seed=1)  # more weights than samples: without it there is no one optimum
    weight = nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = LINE_SEARCHES[name]([{"params": [weight]}], weight_decay=0.3)

    def loss() -> Tensor:
        return 0.5 * (x @ weight - y).square().sum()

    for _ in range(60):
        optimizer.minimise(loss(), loss)
    wanted = x.T @ torch.linalg.solve(x @ x.T + 0.3 * torch.eye(9, dtype=torch.float64), y)
    torch.testing.assert_close(weight.detach(), wanted, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="weight_decay must not be negative"):
        LINE_SEARCHES[name]([{"params": [weight]}], weight_decay=-1.0)


def test_lbfgs_is_bfgs_of_its_pairs() -> None:
    """Against the update of a dense inverse Hessian (Nocedal & Wright 2006, equation 6.17)."""
    curvature = normal(5, 5) @ normal(5, 5).T + torch.eye(5)
    steps = normal(3, 5, seed=1)
    pairs = [torch.stack([s, curvature @ s]) for s in steps]
    step, change = pairs[-1]
    inverse = torch.eye(5).double() * (step @ change) / (change @ change)
    for step, change in pairs:
        rho, identity = 1 / (step @ change), torch.eye(5, dtype=torch.float64)
        left = identity - rho * torch.outer(step, change)
        inverse = left @ inverse @ left.T + rho * torch.outer(step, step)
    gradient = normal(5, seed=2)
    optimizer = LBFGS([{"params": [nn.Parameter(torch.zeros(5))]}], history=3)
    torch.testing.assert_close(optimizer._inverse_times(gradient, pairs), inverse @ gradient)


def test_conjugate_gradients_solve_and_stop_at_negative_curvature() -> None:
    optimizer = NewtonCG([{"params": [nn.Parameter(torch.zeros(2))]}], damping=0.0, iterations=50)
    gradient = torch.tensor([1e-9, 2e-9], dtype=torch.float64)  # near an optimum the system is solved well
    found = optimizer._solve(lambda v: v * torch.tensor([3.0, 1.0]), gradient, 1.0)
    torch.testing.assert_close(found, -gradient / torch.tensor([4.0, 2.0]), rtol=1e-6, atol=0)
    falling = optimizer._solve(lambda v: -v, gradient, 0.0)
    torch.testing.assert_close(falling, -gradient, rtol=1e-6, atol=0)
    mixed = optimizer._solve(lambda v: v * torch.tensor([-1.0, 3.0]), gradient, 0.0)  # first up, then down
    assert float(mixed @ gradient) < 0


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_line_search_gives_up_where_it_is_and_leaves_the_gradient(name: str) -> None:
    weight = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    optimizer = LINE_SEARCHES[name]([{"params": [weight]}])
    before = weight.detach().clone()
    optimizer.minimise(weight.square().sum(), lambda: weight.sum() * 0 + math.nan)
    assert torch.equal(weight.detach(), before)
    torch.testing.assert_close(weight.grad, 2 * before)


def test_newtons_damping_follows_the_model() -> None:
    """A quadratic is its own model: less damping; one that is met by half only: more."""
    weight = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    optimizer = newton([{"params": [weight]}], damping=1.0)
    optimizer.minimise(weight.square().sum(), lambda: weight.square().sum())  # type: ignore[attr-defined]
    assert optimizer.param_groups[0]["damping"] == 0.25
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -1 / 3]).double())  # g / (2 + 1) of g = 2 w
    start = weight.square().sum()
    optimizer.minimise(start, lambda: start.detach() - 1e-3 + 0 * weight.sum())  # type: ignore[attr-defined]
    assert optimizer.param_groups[0]["damping"] == 1.0


def test_newton_goes_downhill_where_curvature_is_negative() -> None:
    weight = nn.Parameter(torch.tensor([0.1, 1.0], dtype=torch.float64))

    def saddle() -> Tensor:
        return weight[1] ** 2 - weight[0] ** 2 + weight[0] ** 4

    optimizer = newton([{"params": [weight]}], damping=0.0)
    for _ in range(30):
        optimizer.minimise(saddle(), saddle)  # type: ignore[attr-defined]
    torch.testing.assert_close(weight.detach().abs(), torch.tensor([0.5**0.5, 0.0]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", LINE_SEARCHES)
def test_a_line_search_goes_on_from_its_state(name: str) -> None:
    """The pairs and the damping are all that it remembers."""
    head, loss, _ = convex()
    optimizer = LINE_SEARCHES[name](groups_of(head))
    for _ in range(4):
        optimizer.minimise(loss(), loss)
    state = copy.deepcopy((head.state_dict(), optimizer.state_dict()))
    for _ in range(3):
        optimizer.minimise(loss(), loss)
    wanted = head.weight.detach().clone()
    head.load_state_dict(state[0])
    fresh = LINE_SEARCHES[name](groups_of(head))
    fresh.load_state_dict(state[1])
    for _ in range(3):
        fresh.minimise(loss(), loss)
    assert torch.equal(head.weight.detach(), wanted)


RUNS = [
    ["optimizer=sam", "method=dann"],  # two players
    ["optimizer=sam", "method=mcd"],  # several updates a step, some repeated
    ["optimizer=sam", "method=source_only", "trainer.precision=bf16", "trainer.clip_norm=1"],
    ["optimizer=lbfgs", "method=deep_coral", "target_labels=2"],
    ["optimizer=newton", "method=source_only", "backbone.freeze=all", "trainer.steps=9", "trainer.batch_size=300"],
    ["optimizer=newton", "method=source_only", "trainer.steps=9", "optimizer.iterations=5"],
]
OFTEN = [*SMALL, "trainer.steps=20", "trainer.checkpoint_every=3", "trainer.eval_every=10", "trainer.log_every=4"]


@pytest.mark.parametrize("overrides", RUNS)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    overrides: list[str], transfer: Transfer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = transfer("run", *OFTEN, *overrides, "outputs=whole")
    assert whole.code == 0, whole.err
    expected = outcome_of(whole.run)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        stopped = transfer("run", *OFTEN, *overrides)
    assert stopped.code == 143, stopped.err
    resumed = transfer("run", *OFTEN, *overrides)
    assert resumed.code == 0 and "going on" in resumed.out, resumed.err
    if "trainer.precision=bf16" not in overrides:  # elsewhere, the state is complete
        assert_same(resumed.run, expected)
    events = [json.loads(line) for line in (resumed.run / "metrics.jsonl").read_text().splitlines()]
    losses = [sum(e["values"].values()) for e in events if e["split"] == "train"]
    assert all(math.isfinite(loss) for loss in losses)
    if "method=source_only" in overrides:
        assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["optimizer=lbfgs", "method=dann"],
            "phase 'adapt' is a game of several: set optimizer=sgd, adam, adamw or sam",
        ),
        (["optimizer=newton", "method=mcd"], "is a game of several"),
        (["optimizer=newton", "method=mme", "target_labels=1"], "is a game of several"),
        (["optimizer=lbfgs", "method=source_only", "trainer.precision=bf16"], "trainer.precision=bf16"),
        (["optimizer=lbfgs", "method=source_only", "trainer.clip_norm=1"], "set trainer.clip_norm=null"),
        (["optimizer=newton", "method=source_only", "trainer.compile=true"], "set trainer.compile=false"),
        (["optimizer=sam", "method=source_only", "optimizer.rho=0"], "rho, the distance climbed"),
        (["optimizer=lbfgs", "method=source_only", "optimizer.history=0"], "history is a number of pairs"),
        (["optimizer=newton", "method=source_only", "optimizer.damping=-1"], "damping must not be negative"),
        (["optimizer=newton", "method=source_only", "optimizer.lr=1"], "lr"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(overrides: list[str], said: str, transfer: Transfer) -> None:
    outcome = transfer("run", *SMALL, *overrides)
    assert outcome.code == 2 and said in outcome.err and len(outcome.err.strip().splitlines()) <= 2, outcome.err


@pytest.mark.parametrize("name", ["newton", "lbfgs"])
def test_methods_of_one_fit_take_any_optimiser(name: str, transfer: Transfer) -> None:
    assert transfer("run", *SMALL, "method=linear_probe", f"optimizer={name}", "trainer.clip_norm=1").code == 0


def test_every_reversed_gradient_is_known_to_be_a_game() -> None:
    """By players of several names, or by the method's word."""
    folder = Path(inspect.getfile(Method)).parent
    for path in folder.rglob("*.py"):
        text = path.read_text()
        if "reverse_gradient(" in text and "def reverse_gradient" not in text:
            assert "player=" in text or "is_game = True" in text, path
