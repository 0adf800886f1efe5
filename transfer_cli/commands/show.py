"""`transfer show RUN`: one run: what it is, how far it is, its figures and choices, and the command that repeats it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transfer_cli.commands.compare import grid
from transfer_cli.errors import TransferError
from transfer_cli.report.closing import result_lines
from transfer_cli.report.looks import LAST, ORACLE, choose, read_looks, score_of
from transfer_cli.report.runs import Record, Run, collect, short
from transfer_cli.run_folder import HEADLINE, RunFolder, read_object


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="transfer show", description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    folder = RunFolder(parser.parse_args(argv).run)
    if not folder.status.is_file():
        raise TransferError(f"{folder.path} is not a run's folder: it has no status.json. transfer report lists runs.")
    (record,) = collect([folder.path])
    print("\n\n".join("\n".join(part) for part in _parts(record, folder) if part))
    return 0


def _parts(record: Record, folder: RunFolder) -> Iterator[list[str]]:
    run, manifest, result = record.run or record.asked, read_object(folder.manifest), read_object(folder.result)
    yield [*(_what(run, result) if run is not None else []), *_state(record, folder), str(short(folder.path))]
    if record.run is not None:
        *lines, _ = result_lines(result, folder.path)
        yield lines
        yield _choices(record.run)
        if warnings := [f"  {text}" for text in record.run.warnings]:
            yield ["training went wrong (docs/health.md)", *warnings]
        yield _took(result)
    yield _made_by(manifest)
    yield _repeat(manifest)


def _what(run: Run, result: Mapping[str, Any]) -> list[str]:
    common = run.settings[""]
    size = f" ({result['parameters'] / 1e6:.1f} M parameters)" if "parameters" in result else ""
    data_seed = f", data_seed {run.seeds[1]}" if run.seeds[1] else ""
    keys = ("target_labels", "protocol", "label_space", "calibration", "conformal")
    return [
        f"{run.pair[0]} -> {run.pair[1]}    {common['backbone']}{size}    {run.method}    seed {run.seeds[0]}{data_seed}",
        " ".join(f"{key}={common[key]}" for key in keys if common.get(key) not in (None, "none")),
    ]


def _state(record: Record, folder: RunFolder) -> list[str]:
    status = read_object(folder.status)
    begun = f", begun {status['time']} on {status.get('host', '?')}" if "time" in status else ""
    if record.state == "finished":
        return [f"finished on {status.get('time', '?')}"]
    if record.state == "failed":
        return [
            f"failed: {record.error or 'no reason was recorded'}",
            "retry_failed=true with the command below tries again",
        ]
    going = [] if record.state == "running" else ["the command below goes on with it"]
    return [f"{record.state}{begun}", *going]


def _choices(run: Run) -> list[str]:
    """Which checkpoint each validator would have chosen."""
    looks = read_looks(run)
    names = sorted({name for look in looks for name in look.scores})
    if len(looks) < 2:
        scores = ", ".join(f"{name} {score:.4g}" for name, score in sorted(run.scores.items()))
        return [f"scores: {scores}"] if scores else []
    figure = "accuracy, %" if HEADLINE[run.kind] == "accuracy" else "RMSE"
    rows = [(f"choice among {len(looks)} checkpoints", "score", "step", f"target {figure}")]
    for name in [*names, LAST, ORACLE]:
        look = choose(looks, name)
        if look is not None:
            mark = " (uses target labels)" if name == ORACLE else ""
            kept = " (kept)" if look.step == run.step else ""
            score = "" if name in (LAST, ORACLE) else f"{score_of(look, name):.4g}"
            rows.append((name + mark, score, f"{look.step:,}{kept}", f"{look.figure:.4g}"))
    later = [f"{name} {score:.4g}" for name, score in sorted(run.scores.items()) if name not in names]
    return [*grid(rows), *([f"of the kept weights alone: {', '.join(later)}"] if later else [])]


def _took(result: Mapping[str, Any]) -> list[str]:
    seconds = result.get("seconds", {})
    shown = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    return [f"{result.get('steps', 0):,} steps on {result.get('device', '?')}; {shown}"]


def _made_by(manifest: Mapping[str, Any]) -> list[str]:
    if not manifest:
        return []
    libraries = manifest.get("libraries", {})
    told = [f"transfer {manifest.get('transfer')}", f"code {manifest.get('git') or 'without a git commit'}"]
    told += [
        f"Python {manifest.get('python')}",
        *(f"{name} {libraries[name]}" for name in ("torch",) if name in libraries),
    ]
    return [", ".join([*told, f"{manifest.get('threads')} threads", f"host {manifest.get('host')}"])]


def _repeat(manifest: Mapping[str, Any]) -> list[str]:
    command = manifest.get("command")
    return (
        ["repeat it with", f"  {shlex.join(command)}"] if command else ["no command was recorded: see its config.yaml"]
    )
