"""Steps per second of `dann` on the default pair: this program's loop against a bare PyTorch loop.

Same network, batches, losses and optimiser; both in one process, in alternating rounds; the ratio is the median over rounds.

    python benchmarks/loop_overhead.py [--steps 200] [--rounds 7] [--threads 1]

Goal: at least 0.90 of the bare loop's speed.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from transfer_cli.build import build_method, pose_problem
from transfer_cli.config import hydra_glue
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.folders import packaged_folder
from transfer_cli.config.identity import identify
from transfer_cli.data.task import TransferTask
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.loops.console import Console
from transfer_cli.loops.gradient import run_gradient
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.session import Place, Session, make_session
from transfer_cli.run_folder import RunFolder


class NoMonitor:
    """Evaluation is not part of what is measured."""

    def observe(self, *arguments: Any, **keywords: Any) -> None: ...


def prepare(steps: int, folder: Path) -> Session:
    hydra_glue._store_schema([packaged_folder()])
    never = 10**9
    overrides = [
        f"trainer.steps={steps}",
        f"trainer.eval_every={never}",
        f"trainer.checkpoint_every={never}",
        "device=cpu",
    ]
    with initialize_config_dir(str(packaged_folder()), version_base="1.3"):
        config = typed(compose("config", overrides))
    components = resolve_components(config)
    problem, device = pose_problem(config, components), torch.device("cpu")
    method = build_method(config, components, problem.task.shape, device)
    evaluator = make_evaluator(config, problem.task, problem.heldout, device)
    session = make_session(
        config, components, problem.task, method, evaluator, RunFolder(folder), identify(config, components), device,
        Console(), Interrupt(),
    )  # fmt: skip
    session.monitor = NoMonitor()  # type: ignore[assignment]
    return session


def ours(session: Session) -> float:
    """Steps per second of the program's gradient loop."""
    phase = session.method.phases()[0]
    began = time.perf_counter()
    run_gradient(phase, session, Place(0, True, 0, 0))  # type: ignore[arg-type]
    return session.trainer.steps / (time.perf_counter() - began)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, strength: float) -> torch.Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.strength * gradients[0], None


def bare(method: Any, task: TransferTask, augment: Any, steps: int) -> float:
    """The same training written by hand, as short as it goes."""
    network, discriminator = method.network, method.discriminator
    assert task.source is not None
    source, labels, target = task.source.inputs.values, task.source.labels, task.target_unlabelled.inputs.values  # type: ignore[attr-defined]
    groups = [{"params": network.parameters()}, {"params": discriminator.parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9, weight_decay=1e-3, nesterov=True, fused=True)
    draw = torch.Generator().manual_seed(0)
    rates = [group["lr"] for group in optimizer.param_groups]
    method.train()
    orders = [torch.empty(0, dtype=torch.int64)] * 2
    began = time.perf_counter()
    for step in range(steps):
        p = step / steps
        strength = 2 / (1 + math.exp(-10 * p)) - 1
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + 10 * p) ** -0.75
        for i, pool in enumerate((source, target)):
            if len(orders[i]) < 64:
                orders[i] = torch.randperm(len(pool), generator=draw)
        (a, b), orders = (orders[0][:64], orders[1][:64]), [orders[0][64:], orders[1][64:]]
        x_s = augment(source[a].float().div_(255), draw)
        x_t = augment(target[b].float().div_(255), draw)
        f_s, f_t = network.backbone(x_s), network.backbone(x_t)
        d_s = discriminator(Reverse.apply(f_s, strength))
        d_t = discriminator(Reverse.apply(f_t, strength))
        domain = 0.5 * (F.softplus(-d_s).mean() + F.softplus(d_t).mean())
        loss = F.cross_entropy(network.head(f_s), labels[a]) + domain
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return steps / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        session = prepare(arguments.steps, Path(folder))
        initial = copy.deepcopy(session.method)
        pairs = []
        for round_ in range(arguments.rounds + 1):
            session.method.load_state_dict(initial.state_dict())
            mine = ours(session)
            theirs = bare(copy.deepcopy(initial), session.task, session.augment, arguments.steps)
            if round_:  # the first warms up
                pairs.append((mine, theirs))
                print(f"round {round_}: {mine:6.1f} steps/s, bare {theirs:6.1f}, ratio {mine / theirs:.3f}")
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"median ratio {ratio:.3f} ({'at least' if ratio >= 0.9 else 'below'} 0.90)")
    raise SystemExit(0 if ratio >= 0.9 else 1)


if __name__ == "__main__":
    main()
