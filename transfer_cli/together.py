"""The story of several seeds of one experiment in one process: that of `experiment.py`, with one loop over a stack of networks.

Each seed keeps a run folder of its own, the one that it would have by itself: its identity does not say with whom it was trained.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from transfer_cli import outputs
from transfer_cli.announce import opening_lines
from transfer_cli.build import Components, build_method, labelled_sizes, pose_problem, readers, training_labels
from transfer_cli.config.compose import resolve_components
from transfer_cli.config.identity import identify
from transfer_cli.config.schema import Config
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.calibrated import calibrate
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.experiment import is_to_do
from transfer_cli.loops.console import Console, SeedConsole
from transfer_cli.loops.devices import choose_device, reproducible, use_threads
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.session import Clock, Session, make_session
from transfer_cli.loops.stack import CannotStack
from transfer_cli.loops.stacked import check_stackable, run_together
from transfer_cli.report.closing import result_lines, seed_lines
from transfer_cli.report.figures import draw_figures
from transfer_cli.run_folder import RunFolder, read_json, read_object
from transfer_cli.sinks import Sinks, check_sinks


def run_seeds(config: Config, command: Sequence[str] = ()) -> list[RunFolder]:
    """Run seeds `seed`, `seed + 1`, ... (`seeds_together` of them), go on with them, or find them finished.

    Raises:
        TransferError: what the user can mend, or that a seed failed (after the others ended).
        SystemExit: interrupted, after saving.
    """
    console, began = Console(), time.perf_counter()
    configs = [replace(config, seed=config.seed + i) for i in range(config.seeds_together)]

    # what is asked for, and where its outcomes lie
    components = resolve_components(config)
    check_sinks(config.sinks, config.plugins)
    identities = [identify(own, components) for own in configs]
    folders = [RunFolder(identity.folder(config.outputs)) for identity in identities]
    device = choose_device(config.device)
    fingerprints = {group: reader.fingerprint() for group, reader in readers(config, components).items()}
    errors: dict[int, TransferError] = {}

    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(folder.locked())
        voices = [SeedConsole(own.seed) for own in configs]
        todo = []
        for i, folder in enumerate(folders):
            try:
                if is_to_do(folder, configs[i], fingerprints, device, voices[i], brief=True):
                    todo.append(i)
            except TransferError as error:
                errors[i] = error
        if todo:
            reproducible(device)
            use_threads(read_object(folders[todo[0]].manifest).get("threads") or config.threads)
            with ExitStack() as building:
                for i in todo:
                    own = replace(configs[i], seeds_together=len(todo))
                    building.enter_context(
                        outputs.begun(folders[i], own, components, identities[i], fingerprints, device, command)
                    )

                # the domains and the task they pose, and for each seed the method on its backbone
                problem = pose_problem(config, components, fingerprints)
                if components["method"].implementation.frozen_backbone:  # type: ignore[attr-defined]
                    raise CannotStack(
                        f"method {components['method'].name} trains no backbone, so there is nothing to stack"
                    )
                interrupt, sessions = Interrupt(), list[Session]()
                for i in todo:
                    method = build_method(
                        configs[i],
                        components,
                        problem.task.shape,
                        device,
                        training_labels(problem.task),
                        sizes=labelled_sizes(problem.task),
                    )
                    evaluator = make_evaluator(configs[i], problem.task, problem.heldout, device)
                    session = make_session(
                        configs[i],
                        components,
                        problem.task,
                        method,
                        evaluator,
                        folders[i],
                        identities[i],
                        device,
                        voices[i],
                        interrupt,
                    )
                    check_stackable(session)
                    sessions.append(session)
            lines = opening_lines(config, components, problem, sessions[0].method, device)
            for n, line in enumerate(lines):
                console.say(line if n else line.replace(f"seed {config.seed}", _seeds([configs[i].seed for i in todo])))
            loaded, sinks = (time.perf_counter() - began) / len(todo), list[Sinks]()

            for i, session in zip(todo, sessions, strict=True):
                for line in opening_lines(configs[i], components, problem, session.method, device):
                    voices[i].log(line)
                voices[i].log_to(folders[i].log)
                session.clock = Clock(1 / len(todo))
                sinks.append(Sinks(configs[i], folders[i], device, console.say))
                session.metrics.listeners.append(sinks[-1].write)
            try:
                with interrupt.watching():
                    # the method's phases, of all seeds
                    steps, failed = run_together(sessions, console)
                    errors |= {todo[n]: error for n, error in failed.items()}
                    for session in sessions:
                        session.clock.stop()

                    # each seed's outcome
                    for n, i in enumerate(todo):
                        if i in errors:
                            continue
                        try:
                            _finish(sessions[n], folders[i], configs[i], components, sinks[n], loaded, steps)
                        except TransferError as error:
                            errors[i] = error
            except CannotStack:
                for i in todo:  # what was begun before stays; of the others nothing does
                    if not folders[i].checkpoints.exists():
                        outputs.clear(folders[i])
                raise
            except Exception as error:
                for i in todo:
                    if read_object(folders[i].status).get("state") != "finished":
                        folders[i].set_status("failed", error=f"{type(error).__name__}: {error}")
                raise
            finally:
                console.stop()
                for n, i in enumerate(todo):
                    if i in errors:
                        folders[i].set_status("failed", error=str(errors[i]))
                    state = read_object(folders[i].status).get("state")
                    sinks[n].close(state if state in ("finished", "failed") else "interrupted")
        done = [folder for i, folder in enumerate(folders) if i not in errors]
        for line in seed_lines([(read_json(folder.result), folder.path) for folder in done]):
            console.say(line)
    if errors:
        told = "; ".join(f"seed {configs[i].seed}: {error}" for i, error in sorted(errors.items()))
        raise TransferError(f"{len(errors)} of {len(configs)} seeds failed. {told}")
    return folders


def _finish(
    session: Session,
    folder: RunFolder,
    config: Config,
    components: Components,
    sinks: Sinks,
    loaded: float,
    steps: int,
) -> None:
    session.load_best()
    model, found = calibrate(session.monitor.evaluator, session.method, config)
    result = outputs.write_result(session, model, found, folder, config, components, loaded=loaded, steps=steps)
    sinks.finish(result)
    folder.set_status("finished")
    draw_figures(folder)
    for line in result_lines(result, folder.path):
        session.console.log(line)


def _seeds(numbers: Sequence[int]) -> str:
    whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return (
        f"seeds {numbers[0]} to {numbers[-1]}"
        if whole and len(numbers) > 1
        else f"seeds {', '.join(map(str, numbers))}"
    )
