"""The story of one run. Each step is one named thing; whoever reads this file knows the program."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from transfer_cli import outputs
from transfer_cli.announce import opening_lines
from transfer_cli.build import build_method, extract_features, labelled_sizes, pose_problem, readers, training_labels
from transfer_cli.config.compose import resolve_components
from transfer_cli.config.identity import identify
from transfer_cli.config.schema import Config
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.calibrated import calibrate
from transfer_cli.evaluation.evaluator import make_evaluator
from transfer_cli.loops.console import Console
from transfer_cli.loops.devices import choose_device, reproducible, use_threads
from transfer_cli.loops.interrupt import Interrupt
from transfer_cli.loops.session import make_session, run_phases
from transfer_cli.report.closing import result_lines
from transfer_cli.report.figures import draw_figures
from transfer_cli.run_folder import RunFolder, read_json, read_object
from transfer_cli.sinks import Sinks, check_sinks


def run(config: Config, command: Sequence[str] = ()) -> RunFolder:
    """Run one experiment, go on with it where it stopped, or find it finished. `command`, for the manifest, would repeat it.

    Raises:
        TransferError: what the user can mend.
        SystemExit: interrupted, after saving.
    """
    console, began = Console(), time.perf_counter()

    # what is asked for, and where its outcome lies
    components = resolve_components(config)
    check_sinks(config.sinks, config.plugins)
    identity = identify(config, components)
    folder = RunFolder(identity.folder(config.outputs))
    device = choose_device(config.device)
    fingerprints = {group: reader.fingerprint() for group, reader in readers(config, components).items()}

    with folder.locked():
        if not is_to_do(folder, config, fingerprints, device, console):
            return folder
        reproducible(device)
        use_threads(read_object(folder.manifest).get("threads") or config.threads)
        with outputs.begun(folder, config, components, identity, fingerprints, device, command):
            # the domains, the task they pose, the method on its backbone; features instead of inputs, if that is never trained
            problem = pose_problem(config, components, fingerprints)
            method = build_method(
                config,
                components,
                problem.task.shape,
                device,
                training_labels(problem.task),
                sizes=labelled_sizes(problem.task),
            )
            for line in opening_lines(config, components, problem, method, device):
                console.say(line)
            problem = extract_features(problem, method, config, components, device, console)
            evaluator = make_evaluator(config, problem.task, problem.heldout, device)
            loaded = time.perf_counter() - began

            interrupt = Interrupt()
            session = make_session(
                config, components, problem.task, method, evaluator, folder, identity, device, console, interrupt
            )

        console.log_to(folder.log)
        sinks, state = Sinks(config, folder, device, console.say), "interrupted"
        session.metrics.listeners.append(sinks.write)
        try:
            with interrupt.watching():
                # the method's phases
                steps = run_phases(session)

                # the weights that the selection kept, recalibrated where that is asked for
                session.load_best()
                model, found = calibrate(evaluator, method, config)

                # held-out source and target
                result = outputs.write_result(
                    session, model, found, folder, config, components, loaded=loaded, steps=steps
                )
                sinks.finish(result)
                folder.set_status("finished")
                state = "finished"
        except Exception as error:
            state = "failed"
            folder.set_status(
                "failed", error=str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
            )
            raise
        finally:
            sinks.close(state)
            console.stop()
        draw_figures(folder)
        for line in result_lines(result, folder.path):
            console.say(line)
        interrupt.heed()
    return folder


def is_to_do(
    folder: RunFolder,
    config: Config,
    fingerprints: dict[str, str],
    device: torch.device,
    console: Console,
    brief: bool = False,
) -> bool:
    """Whether there is work left: a finished run is shown (its figures, if not `brief`), a failed one needs the user's word, an
    interrupted one goes on.

    Raises:
        TransferError: it failed, or stands on other ground.
    """
    status = read_object(folder.status)
    state = status.get("state")
    if config.force:
        outputs.clear(folder)
        return True
    if state == "finished":
        outputs.check_same_ground(folder, fingerprints, None)
        if not folder.figures.exists():  # killed between the last figure of the result and the first of these
            draw_figures(folder)
        console.say(f"finished before on {status.get('time', '?')}; force=true runs it again")
        for line in () if brief else result_lines(read_json(folder.result), folder.path):
            console.say(line)
        return False
    if state == "failed" and not config.retry_failed:
        raise TransferError(
            f"this run failed before: {status.get('error')} ({folder.path}). retry_failed=true tries again."
        )
    if state is not None:
        outputs.check_same_ground(folder, fingerprints, device)
    return True
