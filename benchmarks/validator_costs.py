"""What the label-free validators add to a look, on the default pair: milliseconds of processor time, one thread.

    python benchmarks/validator_costs.py [OVERRIDES...]        # e.g. method=dann backbone=lenet

A look predicts the source validation, target validation and target test samples, and scores them; the baseline is a look with three
validators that need no features, and with features of up to 128 samples a domain for the health figures.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from transfer_cli.build import build_method, extract_features, pose_problem, readers
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.hydra_glue import composed
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.evaluation.health import evenly, prediction_health
from transfer_cli.loops.console import Console

REPEATS = 15
PLAIN = ("source_val", "im", "entropy")


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """The median of some repeats, after one that does not count."""
    taken = []
    for _ in range(repeats + 1):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def main() -> None:
    torch.set_num_threads(1)
    config = typed(composed(["device=cpu", *sys.argv[1:]]))
    components, device = resolve_components(config), torch.device("cpu")
    fingerprints = {group: reader.fingerprint() for group, reader in readers(config, components).items()}
    problem = pose_problem(config, components, fingerprints)
    method = build_method(config, components, problem.task.shape, device)
    problem = extract_features(problem, method, config, components, device, Console())
    evaluator = make_evaluator(config, problem.task, problem.heldout, device)

    def baseline() -> None:
        view = evaluator._view(method)
        evaluator._look(view, evaluator.predict(method, problem.heldout.target_test.inputs))
        prediction_health(view)
        for domain, part in (("source", problem.task.source_validation), ("target", problem.task.target_validation)):
            if part is not None:
                evaluator.features(method, part.inputs.take(evenly(len(part), 128)), domain)

    every = dict(evaluator.validators)
    plain = {name: validator for name, validator in every.items() if name in PLAIN}
    before, after = [], []
    for _ in range(REPEATS):  # by turns, as other work on the machine slows both
        evaluator.validators = plain
        before.append(seconds(baseline, 1))
        evaluator.validators = every
        after.append(seconds(lambda: evaluator.look(method), 1))
    added = statistics.median(b / a - 1 for a, b in zip(before, after, strict=True))
    b, a = (1000 * statistics.median(taken) for taken in (before, after))
    print(f"look before {b:.0f} ms, with all validators {a:.0f} ms: {added:+.0%}")
    began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return statistics.median(taken[1:])


def main() -> None:
    torch.set_num_threads(1)
    config = typed(composed(["device=cpu", *sys.argv[1:]]))
    components, device = resolve_components(config), torch.device("cpu")
    fingerprints = {group: reader.fingerprint() for group, reader in readers(config, components).items()}
    problem = pose_problem(config, components, fingerprints)
    method = build_method(config, components, problem.task.shape, device)
    problem = extract_features(problem, method, config, components, device, Console())
    evaluator = make_evaluator(config, problem.task, problem.heldout, device)

    def baseline() -> None:
        view = evaluator._view(method)
        evaluator._look(view, evaluator.predict(method, problem.heldout.target_test.inputs))
        prediction_health(view)
        for domain, part in (("source", problem.task.source_validation), ("target", problem.task.target_validation)):
            if part is not None:
                evaluator.features(method, part.inputs.take(evenly(len(part), 128)), domain)

    every = dict(evaluator.validators)
    evaluator.validators = {name: validator for name, validator in every.items() if name in PLAIN}
    before = seconds(baseline)
    evaluator.validators = every
    after = seconds(lambda: evaluator.look(method))
    print(f"look before {1000 * before:.0f} ms, with all validators {1000 * after:.0f} ms: {after / before - 1:+.1%}")
    began = time.process_time()
    view = evaluator._view(method)
    print(f"predictions of both validation parts {1000 * (time.process_time() - began):.1f} ms")
    for name, work in (
        ("features", lambda: (view.source_features, view.target_features)),
        ("weights", lambda: view.weights),
    ):
        began = time.process_time()
        work()
        print(f"{name} {1000 * (time.process_time() - began):.1f} ms")
    for name, validator in every.items():
        print(f"{name} {1000 * seconds(lambda: validator(view)):.2f} ms")  # noqa: B023


if __name__ == "__main__":
    main()
