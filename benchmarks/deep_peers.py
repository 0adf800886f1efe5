"""Steps per second and accuracy of methods that train a network, beside the public packages that have the same method.

    python benchmarks/deep_peers.py [--methods dann dan] [--peers skada] [--backbones small_cnn] [--steps 600] [--seeds 3]

The embedded pair synth_digits -> digits: 3,200 labelled source and 1,078 unlabelled target images of one channel, 16 x 16 for
`small_cnn` and 28 x 28 for `lenet`. Both sides of a cell train the same modules from the same weights (our backbone, heads and
discriminator), 64 samples of each domain a step, with the same SGD, loss weights and number of steps, in float32, without
augmentation or schedule and with adversaries at full strength throughout. Peers are used where they are installed:
pip install skada skorch pytorch-adapt 'setuptools<81' (which pytorch-adapt's torchmetrics needs). Dassl.pytorch is on no index.

Ours goes the way of `transfer run`: configuration, readers, session, `run_phases` with its records, but no looks at validation or
test samples in between. A peer goes its documentation's way: pytorch-adapt's hooks in the loop of its README, fed by its
`CombinedSourceAndTargetDataset` and `DataloaderCreator`; skada's nets by their `fit`, which is skorch's. They get float32 tensors
in memory, which suits their loaders best, and torch's own SGD, and leave modules in the memory layout in which torch makes them;
ours reads what it keeps (uint8), takes fused SGD and, unless told otherwise, channels-last convolutions, as ever.

Each side is a process of its own with one thread, warmed up. The sides take turns, one working while the other waits, once a seed.
Timed is the training alone, the loading of batches included. `ratio` is how many times faster ours is by the clock, the median
over seeds; `cpu` the same by the time that the two had a processor, which other programs disturb less. Accuracy is that of the
last weights on 599 target test images, mean and standard deviation over seeds; what differs in the formulation is noted.

Goals: at least 1.2 times as fast as every peer, and no accuracy more than a standard error of the difference below.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
os.environ |= {"POT_BACKEND_DISABLE_TENSORFLOW": "1"}  # which skada would load where it happens to be installed

import argparse
import contextlib
import copy
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from transfer_cli import torchvision_compat  # noqa: F401  (pytorch-adapt imports torchvision, in whatever build is there)
from transfer_cli.build import build_method, pose_problem
from transfer_cli.config import hydra_glue
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.folders import packaged_folder
from transfer_cli.config.identity import identify
from transfer_cli.data.batching import to_model
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.loops.console import Console
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.session import Session, make_session, run_phases
from transfer_cli.methods.base import Network
from transfer_cli.run_folder import RunFolder

BATCH = 64
PASS = 50  # steps of a pass over the source
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}
HIDDEN = 512  # of discriminators
FASTER = 1.2  # the goal
CPU = torch.device("cpu")
SHARED = [
    *(f"optimizer.{key}={value}" for key, value in SGD.items()),
    f"trainer.batch_size={BATCH}",
    "trainer.eval_every=1000000000",
    "trainer.checkpoint_every=1000000000",
    "subset.source=3556",  # of which a tenth is for validation
    "schedule=constant",
    "augment=none",
    "device=cpu",
]
# An adversary at full strength from the second step on, and at the network's own rate.
CONSTANT = ("method.gamma=1000000", "method.discriminator_lr=1")
JOINT = ("trainer.domain_batches=joint",)  # one pass over both domains, as skada's nets make


class Trained(NamedTuple):
    """A training that is ready to start."""

    train: Callable[[], Any]
    predict: Callable[[Tensor], Tensor]  # images to labels, afterwards


@dataclass
class Problem:
    """The session of a run, and what a peer is to train and on what."""

    session: Session
    test: tuple[Tensor, Tensor]

    @property
    def steps(self) -> int:
        return self.session.trainer.steps

    @property
    def network(self) -> Network:
        return self.session.method.network  # type: ignore[return-value]

    @property
    def source(self) -> tuple[Tensor, Tensor]:
        part = self.session.task.source
        assert part is not None
        return images(part.inputs), part.labels

    @property
    def target(self) -> Tensor:
        return images(self.session.task.target_unlabelled.inputs)


def images(inputs: Any) -> Tensor:
    return to_model(inputs.values, CPU)  # type: ignore[return-value]


AS_BUILT = ("trainer.channels_last=false",)  # a peer's modules


class Unwatched:
    """Instead of evaluation, which is not part of what is measured."""

    def observe(self, *arguments: Any, **keywords: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def prepare(overrides: list[str], folder: Path) -> Problem:
    """All that `transfer run` would have at hand when it starts to train."""
    hydra_glue._store_schema([packaged_folder()])
    with initialize_config_dir(str(packaged_folder()), version_base="1.3"):
        config = typed(compose("config", [*SHARED, *overrides]))
    components = resolve_components(config)
    problem = pose_problem(config, components)
    method = build_method(config, components, problem.task.shape, CPU)
    session = make_session(
        config, components, problem.task, method, make_evaluator(config, problem.task, problem.heldout, CPU), RunFolder(folder),
        identify(config, components), CPU, Console(), Interrupt(),
    )  # fmt: skip
    session.monitor = Unwatched()  # type: ignore[assignment]
    test = problem.heldout.target_test
    return Problem(session, (images(test.inputs), test.labels))


def ours(problem: Problem) -> Trained:
    method = problem.session.method

    def predict(x: Tensor) -> Tensor:
        method.eval()
        return method.predict(x).labels

    return Trained(lambda: run_phases(problem.session), predict)


# --- pytorch-adapt ------------------------------------------------------------------------------------


def loaded(dataset: Any) -> Iterator[Any]:
    """Endless batches of its own loader."""
    from pytorch_adapt.datasets import DataloaderCreator

    loader = DataloaderCreator(batch_size=BATCH, num_workers=0)(train=dataset)["train"]
    while True:
        yield from loader


def optimizers(models: dict[str, nn.Module], **multipliers: float) -> dict[str, Any]:
    from pytorch_adapt.containers import Optimizers

    made = Optimizers((torch.optim.SGD, SGD), multipliers=multipliers)
    made.create_with(models)
    return dict(made)


def weighter(**weights: float) -> Any:
    """The sum of losses, where the default is their mean."""
    from pytorch_adapt.weighters import SumWeighter

    return SumWeighter(weights=weights)


def train_by(hook: Any, models: dict[str, Any], batches: Iterator[Any], steps: int) -> None:
    from pytorch_adapt.utils.common_functions import batch_to_device

    for model in models.values():
        if isinstance(model, nn.Module):
            model.train()
    for _ in range(steps):
        hook({**models, **batch_to_device(next(batches), CPU)})


def by_hook(problem: Problem, hook: Any, models: dict[str, Any]) -> Trained:
    from pytorch_adapt.datasets import CombinedSourceAndTargetDataset, SourceDataset, TargetDataset

    data = CombinedSourceAndTargetDataset(SourceDataset(TensorDataset(*problem.source)), TargetDataset(problem.target))

    def predict(x: Tensor) -> Tensor:
        logits = models["C"].eval()(models["G"].eval()(x))
        return (sum(logits) if isinstance(logits, list) else logits).argmax(1)

    return Trained(lambda: train_by(hook, models, loaded(data), problem.steps), predict)


def parts(problem: Problem) -> dict[str, Any]:
    """Generator and classifier, and the discriminator of a method that has one."""
    method, network = problem.session.method, problem.network
    models: dict[str, Any] = {"G": network.backbone, "C": network.head}
    return models | ({"D": method.discriminator} if hasattr(method, "discriminator") else {})


def adapt_dann(problem: Problem) -> Trained:
    from pytorch_adapt.hooks import DANNHook

    models = parts(problem)
    weights = weighter(src_domain_loss=0.5, target_domain_loss=0.5)
    return by_hook(problem, DANNHook(list(optimizers(models).values()), weighter=weights), models)


def adapt_cdan(problem: Problem) -> Trained:
    from pytorch_adapt.hooks import CDANHook
    from pytorch_adapt.layers import RandomizedDotProduct

    models, multilinear = parts(problem), problem.session.method.map
    opts = optimizers(models)
    hook = CDANHook(
        d_opts=[opts["D"]],
        g_opts=[opts["G"], opts["C"]],
        d_weighter=weighter(d_src_domain_loss=0.5, d_target_domain_loss=0.5),
        g_weighter=weighter(g_src_domain_loss=0.5, g_target_domain_loss=0.5),
    )
    if multilinear.randomised:
        combine = RandomizedDotProduct(
            [problem.network.feature_dim, problem.network.head.out_features], multilinear.width
        )
    else:
        combine = multilinear  # the outer product
    return by_hook(problem, hook, {**models, "feature_combiner": combine})


def adapt_mcd(problem: Problem) -> Trained:
    from pytorch_adapt.hooks import MCDHook
    from pytorch_adapt.layers import MultipleModels

    models = parts(problem)
    models["C"] = MultipleModels(models["C"], problem.session.method.second_head)
    opts = optimizers(models)
    weighters = {f"{name}_weighter": weighter() for name in "xyz"}
    return by_hook(problem, MCDHook(g_opts=[opts["G"]], c_opts=[opts["C"]], **weighters), models)


def adapt_adda(problem: Problem) -> Trained:
    """Its hook is the second phase alone; the first is its classifier's."""
    from pytorch_adapt.datasets import SourceDataset
    from pytorch_adapt.hooks import ADDAHook, ClassifierHook

    models = parts(problem)
    first = ClassifierHook(list(optimizers({key: models[key] for key in "GC"}).values()))
    models["T"] = copy.deepcopy(models["G"])
    opts = optimizers({key: models[key] for key in "DT"}, T=0.1)
    d_weighter = weighter(d_src_domain_loss=0.5, d_target_domain_loss=0.5)
    second = by_hook(
        problem, ADDAHook(threshold=0.0, d_opts=[opts["D"]], g_opts=[opts["T"]], d_weighter=d_weighter), models
    )

    def train() -> None:
        source = loaded(SourceDataset(TensorDataset(*problem.source)))
        train_by(first, {key: models[key] for key in "GC"}, source, problem.steps)
        models["T"].load_state_dict(models["G"].state_dict())
        second.train()

    return Trained(train, lambda x: models["C"].eval()(models["T"].eval()(x)).argmax(1))


def adapt_aligner(problem: Problem, loss: Any, layer: str, weight: float = 1.0) -> Trained:
    from pytorch_adapt.hooks import AlignerHook, AlignerPlusCHook

    models = parts(problem)
    hook = AlignerPlusCHook(
        list(optimizers(models).values()),
        weighter=weighter(**{f"{layer}_confusion_loss": weight}),
        aligner_hook=AlignerHook(loss, layer=layer),
        softmax=False,
    )
    return by_hook(problem, hook, models)


def adapt_coral(problem: Problem) -> Trained:
    from pytorch_adapt.layers import CORALLoss

    return adapt_aligner(problem, CORALLoss(), "logits")


def adapt_dan(problem: Problem) -> Trained:
    from pytorch_adapt.layers import MMDLoss
    from pytorch_adapt.layers.utils import get_kernel_scales

    scales = get_kernel_scales(low=-2, high=2, num_kernels=5)  # of which it takes the mean, ours the sum
    return adapt_aligner(problem, MMDLoss(scales, mmd_type="quadratic"), "features", 5.0)


# --- skada --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Backbone and head as one module, in skada's signature."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.backbone, self.head = network.backbone, network.head

    def forward(self, x: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return self.head(self.backbone(x))


class Reversed(nn.Module):
    """A discriminator behind a gradient reversal, as skada's own classifier has it."""

    def __init__(self, discriminator: nn.Module) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, x: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        from skada.deep.modules import GradientReversalLayer

        return self.discriminator(GradientReversalLayer.apply(x, 1.0))


def by_fit(problem: Problem, make: Callable[..., Any], layer: str, **settings: Any) -> Trained:
    module = Plain(problem.network)
    (x_s, y_s), x_t = problem.source, problem.target
    data = {
        "X": torch.cat([x_s, x_t]).numpy(),
        "y": np.concatenate([y_s.numpy(), np.full(len(x_t), -1)]),
        "sample_domain": np.repeat([1, -2], [len(x_s), len(x_t)]),
    }
    rates = {key if key == "lr" else f"optimizer__{key}": value for key, value in SGD.items()}
    net = make(
        module,
        layer,
        **settings,
        optimizer=torch.optim.SGD,
        **rates,
        batch_size=BATCH,
        max_epochs=problem.steps // PASS,
        train_split=None,
        verbose=0,
    )
    return Trained(lambda: net.fit(**data), lambda x: module.eval()(x).argmax(1))


def skada_adversary(problem: Problem, name: str, **settings: Any) -> Trained:
    import skada.deep

    domain = {
        "domain_classifier": Reversed(problem.session.method.discriminator),
        "domain_criterion": nn.BCEWithLogitsLoss(),
        "reg": 0.5,  # of the sum over domains, ours being the mean
    }
    return by_fit(problem, getattr(skada.deep, name), "backbone", **domain, **settings)


def skada_dann(problem: Problem) -> Trained:
    return skada_adversary(problem, "DANN")


def skada_cdan(problem: Problem) -> Trained:
    return skada_adversary(problem, "CDAN", max_features=10_000)


def skada_coral(problem: Problem) -> Trained:
    from skada.deep import DeepCoral

    return by_fit(problem, DeepCoral, "head")


def skada_dan(problem: Problem) -> Trained:
    from skada.deep import DAN

    return by_fit(problem, DAN, "backbone")


def skada_jdot(problem: Problem) -> Trained:
    from skada.deep import DeepJDOT

    return by_fit(problem, DeepJDOT, "backbone", reg_dist=0.001, reg_cl=0.0001)


@dataclass(frozen=True)
class Case:
    method: str
    peer: str
    theirs: Callable[[Problem], Trained]
    overrides: tuple[str, ...] = ()  # that make ours the peer's formulation, as far as it goes
    differs: str = ""
    phases: int = 1
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.method

    @property
    def package(self) -> str:
        return self.peer.replace("-", "_")


HIDDEN_UNITS = f"method.hidden={HIDDEN}"
ADVERSARY = (*CONSTANT, HIDDEN_UNITS)
EXACT = ("method.solver=exact",)
CASES = [
    Case("dann", "pytorch-adapt", adapt_dann, ADVERSARY),
    Case(
        "cdan",
        "pytorch-adapt",
        adapt_cdan,
        ADVERSARY,
        "the peer plays by inverted labels, in two updates, and moves the class probabilities too",
    ),
    Case(
        "mcd",
        "pytorch-adapt",
        adapt_mcd,
        (),
        "the peer's BatchNorm statistics count every pass of a step, and it adds the heads' logits to predict",
    ),
    Case(
        "adda",
        "pytorch-adapt",
        adapt_adda,
        ("method.discriminator_lr=1", "method.encoder_lr=0.1", HIDDEN_UNITS),
        "the peer moves the discriminator first, and looks at its accuracy in every step",
        phases=2,
    ),
    Case("deep_coral", "pytorch-adapt", adapt_coral),
    Case(
        "dan",
        "pytorch-adapt",
        adapt_dan,
        (),
        "the peer's bandwidth is the source's median distance, ours the mean of both",
    ),
    Case("dann", "skada", skada_dann, ADVERSARY + JOINT),
    Case(
        "cdan",
        "skada",
        skada_cdan,
        ADVERSARY + JOINT,
        "the peer takes logits for class probabilities, and moves them too",
    ),
    Case("deep_coral", "skada", skada_coral, JOINT),
    Case("dan", "skada", skada_dan, JOINT, "the peer sums 33 kernels of the distance, ours 5 of its square"),
    Case("deepjdot", "skada", skada_jdot, JOINT + EXACT, label="deepjdot exact"),
    Case("deepjdot", "skada", skada_jdot, JOINT, "the peer's plan is exact, ours (the default) entropic"),
]


# --- measuring ----------------------------------------------------------------------------------------


class Run(NamedTuple):
    wall: float  # steps a second
    cpu: float
    accuracy: float


def train(case: Case, peer: bool, common: list[str], steps: int, seed: int) -> Run:
    overrides = [f"method={case.method}", *case.overrides, *common, f"trainer.steps={steps}", f"seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        problem = prepare(overrides, Path(folder))
        trained = (case.theirs if peer else ours)(problem)
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (pytorch-adapt draws source samples by it)
        wall, cpu = time.perf_counter(), time.process_time()
        trained.train()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    x, y = problem.test
    with torch.no_grad():
        accuracy = float((trained.predict(x) == y).float().mean())
    return Run(steps * case.phases / wall, steps * case.phases / cpu, 100 * accuracy)


def work(connection: Connection, case: Case, peer: bool, common: list[str]) -> None:
    """One side of a cell: for each message, steps and seed, a run."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        while True:
            steps, seed = connection.recv()
            try:
                connection.send(train(case, peer, common, steps, seed))
            except Exception as error:
                connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Failed(Exception):
    """What a side said instead of a result."""


class Side:
    """The process of one side."""

    def __init__(self, case: Case, peer: bool, common: list[str]) -> None:
        processes = multiprocessing.get_context("forkserver")
        self.connection, other = processes.Pipe()
        self.process = processes.Process(target=work, args=(other, case, peer, common), daemon=True)
        self.process.start()
        other.close()
        self.runs: list[Run] = []

    def run(self, steps: int, seed: int, warm_up: bool = False) -> None:
        self.connection.send((steps, seed))
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise Failed(answer)
        if not warm_up:
            self.runs.append(answer)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.join()

    @property
    def speed(self) -> float:
        return statistics.median(run.wall for run in self.runs)

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean and standard deviation."""
        values = [run.accuracy for run in self.runs]
        return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


HEADINGS = ("backbone", "method", "peer", "ours/s", "peer/s", "ratio", "cpu", "ours %", "peer %", "difference")


def show(*cells: object) -> None:
    """A line of the table; what comes after its columns as it is."""
    text = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
    left = [f"{cell:<{width}}" for cell, width in zip(text, (10, 15, 14), strict=False)]
    middle = [f"{cell:>7}" for cell in text[3:7]]
    right = [f"{cell:>13}" for cell in text[7:10]]
    print(" ".join([*left, *middle, *right, "", *text[10:]]).rstrip(), flush=True)


def compare(case: Case, backbone: str, extra: list[str], steps: int, seeds: int) -> list[str]:
    """Print a cell's line; the goals that it misses."""
    common = [f"backbone={backbone}"]
    with Side(case, False, common + extra) as mine, Side(case, True, [*common, *AS_BUILT]) as peer:
        for side in (mine, peer):
            side.run(PASS, 0, warm_up=True)
        for seed in range(seeds):
            for side in (mine, peer) if seed % 2 == 0 else (peer, mine):
                side.run(steps, seed)
    pairs = list(zip(mine.runs, peer.runs, strict=True))
    ratio, cpu = (
        statistics.median(a.wall / b.wall for a, b in pairs),
        statistics.median(a.cpu / b.cpu for a, b in pairs),
    )
    (m, s), (m_peer, s_peer) = mine.accuracy, peer.accuracy
    error = ((s**2 + s_peer**2) / seeds) ** 0.5
    missed = [f"{ratio:.2f} times as fast"] if ratio < FASTER else []
    if seeds > 1 and m < m_peer - error:
        missed.append(f"accuracy {m - m_peer:.1f}")
    accuracies = (f"{m:.1f} ± {s:.1f}", f"{m_peer:.1f} ± {s_peer:.1f}", f"{m - m_peer:+.1f} ± {error:.1f}")
    speeds = (f"{mine.speed:.1f}", f"{peer.speed:.1f}", f"{ratio:.2f}", f"{cpu:.2f}")
    show(backbone, case.name, case.peer, *speeds, *accuracies, *(f"<- {what}" for what in missed))
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="those of the table's second column")
    parser.add_argument("--peers", nargs="+", help="those of its third")
    parser.add_argument("--backbones", nargs="+", choices=("small_cnn", "lenet"), default=["small_cnn"])
    parser.add_argument(
        "--steps", type=int, default=600, help=f"of every phase, a multiple of {PASS}: whole passes over the source"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--ours", nargs="+", default=[], metavar="KEY=VALUE", help="settings of ours alone: trainer.channels_last=true"
    )
    arguments = parser.parse_args()
    if arguments.steps < PASS or arguments.steps % PASS or arguments.seeds < 1:
        parser.error(f"--steps is a multiple of {PASS}, and --seeds at least 1")
    needed = {"skada": ("skada", "skorch"), "pytorch-adapt": ("pytorch_adapt",)}
    missing = {peer for peer, packages in needed.items() if any(find_spec(p) is None for p in packages)}
    for peer in sorted(missing):
        print(
            f"{peer} is not installed, and its rows are left out: pip install {' '.join(needed[peer]).replace('_', '-')}"
        )
    used = [c for c in CASES if c.peer not in missing]
    used = [c for c in used if not arguments.methods or {c.method, c.name} & set(arguments.methods)]
    used = [c for c in used if not arguments.peers or c.peer in arguments.peers]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__"])  # imports once
    show(*HEADINGS)
    missed: list[str] = []
    for backbone in arguments.backbones:
        for case in used:
            try:
                missed += compare(case, backbone, arguments.ours, arguments.steps, arguments.seeds)
            except Failed as error:
                print(f"{backbone} {case.name} / {case.peer}: {error}")
                missed.append("failed")
    print("\nformulations that differ:")
    for case in used:
        if case.differs:
            print(f"  {case.name} / {case.peer}: {case.differs}")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
