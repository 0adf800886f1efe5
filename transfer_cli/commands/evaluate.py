"""`transfer evaluate RUN_DIR`: recompute a run's figures from its checkpoint; they must agree with its result.json."""

from __future__ import annotations

import argparse

from transfer_cli.config.compose import load_run, resolve_components
from transfer_cli.errors import TransferError
from transfer_cli.report.closing import result_lines
from transfer_cli.run_folder import read_json, read_object

TOLERANCE = 1e-5  # between machines and devices; on the same one the figures are equal


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="transfer evaluate", description=__doc__)
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-root", default=None, help="where the data lie, if not where the run found them")
    arguments = parser.parse_args(argv)

    folder, config = load_run(arguments.run)
    recorded = read_json(folder.result)
    if recorded is None:
        raise TransferError(f"{arguments.run} has no result.json: the run is not finished.")
    config.device = arguments.device
    config.data_root = arguments.data_root or config.data_root

    from transfer_cli.build import pose_problem, rebuild_model
    from transfer_cli.evaluation.evaluator import make_evaluator
    from transfer_cli.loops.devices import choose_device, use_threads

    device = choose_device(config.device)
    use_threads(read_object(folder.manifest).get("threads"))
    components = resolve_components(config)
    model, _ = rebuild_model(folder, config, components, device)
    problem = pose_problem(config, components)
    evaluator = make_evaluator(config, problem.task, problem.heldout, device)
    metrics, _ = evaluator.figures(evaluator.predictions(model))

    for line in result_lines({**recorded, "metrics": metrics}, folder.path):
        print(line)
    gaps = differences(recorded["metrics"], metrics)
    for line in gaps:
        print(f"differs: {line}")
    print("result.json disagrees" if gaps else "result.json agrees")
    return 1 if gaps else 0


def differences(recorded: dict[str, dict[str, float] | None], found: dict[str, dict[str, float] | None]) -> list[str]:
    """A line for every figure that is off by more than `TOLERANCE`, relative to its size."""
    lines = []
    for split in sorted(recorded):
        before, now = recorded.get(split) or {}, found.get(split) or {}
        for name in sorted(before):  # this version may know figures that the run's did not
            a, b = before[name], now.get(name, float("nan"))
            if not abs(a - b) <= TOLERANCE * max(1.0, abs(a)):
                lines.append(f"{split} {name}: {a} in result.json, {b} now")
    return lines
