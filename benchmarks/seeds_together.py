"""Several seeds in one loop (`seeds_together`) against the same seeds one after another: the training loops' time, without set-up
and evaluation, which are a seed's own either way.

Both in one process, in alternating rounds; the figure is the median of the rounds' ratios. On the CPU it is the process's own
seconds, so that other work on the machine counts little; on a GPU the clock's.

    python benchmarks/seeds_together.py [--device cpu] [--threads 1] [--seeds 1 2 4 8] [--rounds 3] [--cases moons linear ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from transfer_cli.build import Problem, build_method, labelled_sizes, pose_problem
from transfer_cli.config import hydra_glue
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.folders import packaged_folder
from transfer_cli.config.identity import identify
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.loops.console import Console, SeedConsole
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.session import Session, make_session, run_phases
from transfer_cli.loops.stacked import run_together
from transfer_cli.run_folder import RunFolder

DIGITS = ["source.n=1200", "source.n_test=100"]
MOONS = ["source=two_moons", "target=two_moons", "target.angle=30", "augment=none", "trainer.batch_size=32"]
CASES: dict[str, tuple[str, int, list[str]]] = {  # what it is, steps, overrides
    "moons": ("two moons, perceptron 2-64-64", 200, [*MOONS, "backbone=mlp", "backbone.hidden=[64,64]"]),
    "linear": ("linear head on 64 features", 200, [*DIGITS, "backbone=identity", "augment=none"]),
    "mlp": ("perceptron 64-256-128", 150, [*DIGITS, "backbone=mlp", "augment=none"]),
    "cnn": ("small_cnn, 16 x 16, augmented", 24, DIGITS),
    "cnn_plain": ("small_cnn, 16 x 16, not augmented", 24, [*DIGITS, "augment=none"]),
    "lenet": ("lenet, 28 x 28, not augmented", 12, [*DIGITS, "backbone=lenet", "augment=none"]),
}


def prepare(case: str, method: str, seeds: int, device: torch.device, folder: Path) -> Callable[[], list[Session]]:
    """A function that makes fresh sessions; the data are loaded once."""
    _, steps, overrides = CASES[case]
    never = 10**9
    fixed = [
        f"method={method}",
        f"trainer.steps={steps}",
        f"trainer.eval_every={never}",
        f"trainer.checkpoint_every={never}",
    ]
    hydra_glue._store_schema([packaged_folder()])
    configs = []
    for seed in range(seeds):
        with initialize_config_dir(str(packaged_folder()), version_base="1.3"):
            configs.append(typed(compose("config", [*overrides, *fixed, f"seed={seed}", f"outputs={folder}"])))
    components = resolve_components(configs[0])
    problem: Problem = pose_problem(configs[0], components)

    def make() -> list[Session]:
        sessions = []
        for config in configs:
            network = build_method(config, components, problem.task.shape, device, sizes=labelled_sizes(problem.task))
            evaluator = make_evaluator(config, problem.task, problem.heldout, device)
            identity = identify(config, components)
            run = RunFolder(Path(tempfile.mkdtemp(dir=folder)))
            session = make_session(
                config, components, problem.task, network, evaluator, run, identity, device, SeedConsole(config.seed),
                Interrupt(),
            )  # fmt: skip
            session.monitor.observe = lambda *_, **__: None  # type: ignore[method-assign]  # is not what is measured
            sessions.append(session)
        return sessions

    return make


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began


def measure(case: str, method: str, seeds: int, rounds: int, device: torch.device) -> tuple[float, float]:
    """Milliseconds of a step of all seeds, one after another and together."""
    steps = CASES[case][1]
    with tempfile.TemporaryDirectory() as folder:
        make = prepare(case, method, seeds, device, Path(folder))
        alone, together = [], []
        for _ in range(rounds):
            single, stacked = make(), make()
            alone.append(seconds(lambda s=single: [run_phases(session) for session in s], device))
            together.append(seconds(lambda s=stacked: run_together(s, Console()), device))
    middle = sorted(range(rounds), key=lambda i: alone[i] / together[i])[rounds // 2]
    return 1e3 * alone[middle] / steps, 1e3 * together[middle] / steps


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["source_only", "dann"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    print("| network | method | " + " | ".join(f"{n} seeds" for n in given.seeds) + " |")
    print("|---|---|" + "---|" * len(given.seeds))
    for case in given.cases:
        for method in given.methods:
            cells = []
            for seeds in given.seeds:
                alone, together = measure(case, method, seeds, given.rounds, device)
                cells.append(f"{alone / together:.2f} ({alone:.1f} -> {together:.1f} ms)")
            print(f"| {CASES[case][0]} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
