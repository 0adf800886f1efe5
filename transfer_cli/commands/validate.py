"""`transfer validate [PATHS...]`: scores of finished runs that need other runs, or a run of their own; without target labels."""

from __future__ import annotations

import argparse
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfer_cli.errors import TransferError, check_choice
from transfer_cli.report.runs import DEFAULT_FOLDER, Run, collect
from transfer_cli.run_folder import RunFolder, read_object, write_json

if TYPE_CHECKING:
    import numpy as np

SCHEMA = 1  # of validators.json


def main(argv: list[str]) -> int:
    """0, or 2 where there was no finished run."""
    parser = argparse.ArgumentParser(
        prog="transfer validate",
        description="Scores finished runs without target labels, in ways too dear for every evaluation, and writes them into "
        "validators.json in each run's folder, where transfer report finds them. A score that is there is not computed again.",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help=f"a run's folder, or one of runs (default: {DEFAULT_FOLDER})",
    )
    parser.add_argument(
        "--validators",
        default=",".join(SCORES),
        metavar="A,B",
        help="agreement: with the other runs' predictions, of files alone; reverse: a short run back to the source (default: both)",
    )
    parser.add_argument("--force", action="store_true", help="compute reverse scores again")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--data-root", default=None, help="where the data lie, if not where the runs found them")
    arguments = parser.parse_args(argv)
    wanted = [check_choice(name.strip(), SCORES, "--validators") for name in arguments.validators.split(",")]
    runs = [record.run for record in collect(arguments.paths) if record.run is not None]
    if not runs:
        raise TransferError("none of these runs is finished.")
    for name in SCORES:
        if name in wanted:
            SCORES[name](runs, arguments)
    return 0


def _agreement(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    """Of every group of runs that predicted the same samples."""
    from transfer_cli.evaluation.validators.agreement import FEWEST, agreement

    groups: dict[Any, list[tuple[Run, np.ndarray]]] = defaultdict(list)
    for run in runs:
        try:
            ids, outputs = _predictions(RunFolder(run.path), run.kind)
        except TransferError as error:
            print(f"agreement: {run.path}  left out: {error}")
            continue
        classes = tuple(read_object(RunFolder(run.path).result).get("classes", ()))
        target = frozenset(run.settings["target"].items())  # samples of one name may be turned, or another version's
        groups[run.kind, run.pair, classes, ids, outputs.shape, target].append((run, outputs))
    for (kind, pair, *_), members in groups.items():
        if len(members) < FEWEST:
            print(f"agreement: {' -> '.join(pair)} has {len(members)} runs on the same samples, and needs {FEWEST}")
            continue
        found = agreement([outputs for _, outputs in members], kind == "classification")
        for (run, _), score in zip(members, found, strict=True):
            _keep(run, "agreement", score, {"runs": len(members)})
        print(f"agreement: {' -> '.join(pair)}, {len(members)} runs, from {min(found):.3f} to {max(found):.3f}")


def _predictions(folder: RunFolder, kind: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The test samples' names and what the run says of them; the labels beside them are not read."""
    import numpy as np

    try:
        with np.load(folder.predictions) as arrays:
            names = tuple(arrays["target_test_ids"].tolist())
            return names, arrays["target_test_probs" if kind == "classification" else "target_test_mean"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise TransferError(f"{folder.predictions} is missing or damaged: force=true runs it again.") from error


def _reverse(runs: Sequence[Run], arguments: argparse.Namespace) -> None:
    settings: dict[str, Any] = {"device": arguments.device}
    if arguments.threads is not None:
        settings["threads"] = arguments.threads
    if arguments.data_root is not None:
        settings["data_root"] = arguments.data_root
    for run in runs:
        known = _kept(run)["scores"].get("reverse")
        if known is not None and not arguments.force:
            print(f"reverse: {run.path}  {known:.3f}, as before")
            continue
        from transfer_cli.reverse import clear, reverse_score

        try:
            score, told = reverse_score(str(run.path), settings)
        except TransferError as error:
            print(f"reverse: {run.path}  left out: {' '.join(str(error).split())}")
            continue
        _keep(run, "reverse", score, told)
        clear(str(run.path))
        print(f"reverse: {run.path}  {score:.3f}", flush=True)


def _kept(run: Run) -> dict[str, Any]:
    found = read_object(RunFolder(run.path).validators)
    whole = all(isinstance(found.get(key), dict) for key in ("scores", "details"))
    return found if whole else {"scores": {}, "details": {}}


def _keep(run: Run, name: str, score: float, details: Mapping[str, Any]) -> None:
    """Beside what is there; a file that would be the same is left alone."""
    before = _kept(run)
    after = {
        "schema_version": SCHEMA,
        "scores": {**before["scores"], name: score},
        "details": {**before["details"], name: dict(details)},
    }
    if after != before:
        write_json(RunFolder(run.path).validators, after)


SCORES: dict[str, Callable[[Sequence[Run], argparse.Namespace], None]] = {"agreement": _agreement, "reverse": _reverse}
