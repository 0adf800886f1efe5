"""What a run writes besides its checkpoints and metrics: manifest, result, predictions, samples for the report."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from transfer_cli import __version__
from transfer_cli.build import Components
from transfer_cli.config.identity import MACHINERY_VERSION, Identity, label, method_label
from transfer_cli.config.schema import OPTIONAL_COMPONENTS, Config
from transfer_cli.errors import TransferError
from transfer_cli.evaluation.calibrated import Calibrated
from transfer_cli.evaluation.health import proxy_a_distance
from transfer_cli.loops.checkpoints import serialise
from transfer_cli.loops.session import Session
from transfer_cli.run_folder import RESULT_SCHEMA, RunFolder, read_json, read_object, write_atomically, write_json

LIBRARIES = ("torch", "torchvision", "hydra-core", "omegaconf", "gpytorch", "numpy", "scipy", "scikit-learn")


def prepare(
    folder: RunFolder,
    config: Config,
    components: Components,
    identity: Identity,
    fingerprints: dict[str, str],
    device: torch.device,
    command: Sequence[str],
) -> None:
    """Write the configuration, the manifest and the status `running`; sweep away temporary files of a process that was killed."""
    for leftover in folder.path.rglob("*.tmp"):
        leftover.unlink()
    kept = {
        **asdict(config),
        "force": False,
        "retry_failed": False,
        "seeds_together": 1,
    }  # words to one start, not to the run
    kept |= {group: {} for group in OPTIONAL_COMPONENTS if group not in components}
    write_atomically(folder.config, yaml.safe_dump(kept, sort_keys=False).encode())
    if not folder.manifest.exists():
        write_json(
            folder.manifest,
            {
                "identity": identity.hash,
                "components": {group: {"name": c.name, "version": c.version} for group, c in components.items()},
                "machinery": MACHINERY_VERSION,
                "transfer": __version__,
                "python": platform.python_version(),
                "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
                "git": git_commit(),
                "command": list(command),
                "host": socket.gethostname(),
                "platform": platform.platform(),
                "device": device.type,
                "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                "threads": torch.get_num_threads(),
                "seeds_together": config.seeds_together,
                "seed": config.seed,
                "data_seed": config.data_seed,
                "fingerprints": fingerprints,
            },
        )
    folder.set_status("running")


@contextmanager
def begun(folder: RunFolder, *about: Any) -> Iterator[None]:
    """`prepare`d with `about`, and inside data and model are built: a process that dies there leaves a run that tables show, and
    what breaks there one that failed; bad input leaves what was there before."""
    before = read_json(folder.status)
    prepare(folder, *about)
    try:
        yield
    except TransferError:
        if before is None:
            clear(folder)
        else:
            write_json(folder.status, before)
        raise
    except Exception as error:
        folder.set_status("failed", error=f"{type(error).__name__}: {error}")
        raise


def clear(folder: RunFolder) -> None:
    """Everything but the lock."""
    for entry in folder.path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def check_same_ground(folder: RunFolder, fingerprints: dict[str, str], device: torch.device | None) -> None:
    """Refuse to go on with, or to trust, a run of other data; and to go on with one of another kind of device.

    Raises:
        TransferError: saying which changed.
    """
    manifest = read_object(folder.manifest)
    recorded = manifest.get("fingerprints", fingerprints)
    changed = [group for group in fingerprints if recorded.get(group) != fingerprints[group]]
    if changed:
        raise TransferError(
            f"the {' and '.join(changed)} data changed since this run ({folder.path}): force=true runs it again."
        )
    if device is not None and manifest.get("device", device.type) != device.type:
        raise TransferError(
            f"this run began on {manifest['device']} and cannot go on exactly on {device.type}: "
            f"set device={manifest['device']}, or force=true to start afresh."
        )


def write_result(
    session: Session,
    model: Calibrated,
    found: dict[str, Any],
    folder: RunFolder,
    config: Config,
    components: Components,
    *,
    loaded: float,
    steps: int,
) -> dict[str, Any]:
    """Evaluate the model: the session's method with its kept weights, recalibrated as `found` says; write predictions.npz,
    features.npz, examples.npz and, last, result.json.

    `loaded`: the seconds that data and model took to build.
    """
    fitted, began = session.clock.seconds(), time.perf_counter()
    evaluator, monitor, task = session.monitor.evaluator, session.monitor, session.task
    plain = evaluator.predictions(session.method)
    validators = evaluator.scores(session.method, plain["target_test"])
    metrics, arrays = evaluator.figures(model.finish_all(evaluator, plain))
    if model.calibration is not None:
        found["calibration"]["before"], others = evaluator.figures(plain)
        arrays |= {f"{name}_before": value for name, value in others.items() if name.endswith(("_probs", "_variance"))}
    if model.calibration is not None or model.conformal is not None:
        write_atomically(folder.calibration, serialise(model.state()))
    features, examples = evaluator.samples(model)
    for path, content in ((folder.predictions, arrays), (folder.features, features), (folder.examples, examples)):
        write_arrays(path, content)
    for name, data in session.method.artefacts().items():
        write_atomically(folder.path / name, data)
    seconds = {"load": loaded, "fit": fitted, "evaluate": time.perf_counter() - began}
    result = {
        "schema_version": RESULT_SCHEMA,
        "source": label(components.get("source")),
        "target": label(components["target"]),
        "backbone": components["backbone"].name,
        "method": method_label(components),
        "seed": config.seed,
        "data_seed": config.data_seed,
        "kind": task.kind,
        "classes": list(task.label_space.evaluated),
        "parameters": sum(p.numel() for p in session.method.parameters()),
        "setting": {
            "target_labels": config.target_labels,
            "protocol": config.protocol,
            "label_space": config.label_space,
            "source_free": task.source is None,
        },
        "metrics": metrics,
        "selection": {
            "validator": evaluator.selection,
            "uses_target_labels": evaluator.uses_target_labels,
            "candidates": monitor.candidates,
            "step": monitor.chosen_step,
            "score": monitor.chosen_score,
            "oracle": {"step": monitor.oracle_step, "score": monitor.oracle_score, "uses_target_labels": True},
        },
        "validators": validators,
        "fit": monitor.fit,
        **found,
        "health": {"proxy_a_distance": _a_distance(features, config.seed), "warnings": session.health.warnings},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "steps": steps,
        "device": str(session.device),
    }
    write_json(folder.result, result)
    return result


def _a_distance(features: dict[str, Any], seed: int) -> float | None:
    """Between the domains' kept samples; None where there is no source."""
    if not {"source_test", "target_test"} <= features.keys():
        return None
    source, target = (torch.from_numpy(features[f"{side}_test"]) for side in ("source", "target"))
    return proxy_a_distance(source, target, seed)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def git_commit() -> str | None:
    """Of the checkout that the code runs from, `-dirty` where it was changed; None outside one."""
    where = Path(__file__).resolve().parent.parent
    if not (where / ".git").exists():  # an installed package may lie inside some other project's checkout
        return None
    try:
        command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
