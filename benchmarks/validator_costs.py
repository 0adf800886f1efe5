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
from transfer_cli.evaluation.health import prediction_health
from transfer_cli.evaluation.samples import evenly
from transfer_cli.loops.console import Console

REPEATS = 15
PLAIN = ("source_val", "im", "entropy")


def milliseconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return 1000 * (time.process_time() - began)


def main() -> None:
    torch.set_num_threads(1)
    config = typed(composed(["device=cpu", *sys.argv[1:]]))
    components, device = resolve_components(config), torch.device("cpu")
    fingerprints = {group: reader.fingerprint() for group, reader in readers(config, components).items()}
    problem = pose_problem(config, components, fingerprints)
    method = build_method(config, components, problem.task.shape, device)
    problem = extract_features(problem, method, config, components, device, Console())
    evaluator = make_evaluator(config, problem.task, problem.heldout, device)
    every = dict(evaluator.validators)
    plain = {name: validator for name, validator in every.items() if name in PLAIN}

    def baseline() -> None:
        evaluator.validators = plain
        view = evaluator._view(method)
        evaluator._look(view, evaluator.predict(method, problem.heldout.target_test.inputs))
        prediction_health(view)
        for domain, part in (("source", problem.task.source_validation), ("target", problem.task.target_validation)):
            if part is not None:
                evaluator.features(method, part.inputs.take(evenly(len(part), 128)), domain)

    def full() -> None:
        evaluator.validators = every
        evaluator.look(method)

    taken = [(milliseconds(baseline), milliseconds(full)) for _ in range(REPEATS)][
        1:
    ]  # by turns: other work slows both
    added = statistics.median(after / before - 1 for before, after in taken)
    before, after = (statistics.median(column) for column in zip(*taken, strict=True))
    print(f"a look before {before:.1f}, with all validators {after:.1f}: {added:+.0%}")
    parts: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        view = evaluator._view(method)
        parts.setdefault("features", []).append(milliseconds(lambda: (view.source_features, view.target_features)))  # noqa: B023
        parts.setdefault("weights of iwv and dev", []).append(milliseconds(lambda: view.weights))  # noqa: B023
        for name, validator in every.items():
            parts.setdefault(name, []).append(milliseconds(lambda: validator(view)))  # noqa: B023
    for name, column in parts.items():
        print(f"{name:24}{statistics.median(column):8.2f}")


if __name__ == "__main__":
    main()
