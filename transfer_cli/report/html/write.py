"""`transfer report --html`: one file that can be mailed, or a folder whose pages of runs are files beside it.

In one file the details of every run lie packed (deflate, base64) until its page is opened; in a folder each lies in
`runs/<name>.js`, and only those of runs that have changed since are written again. Nothing is fetched from a network, which
the page's own policy forbids. Standard library only; details bring NumPy.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import multiprocessing
import os
import string
import time
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from transfer_cli import __version__
from transfer_cli.errors import TransferError
from transfer_cli.report.html.details import details
from transfer_cli.report.html.grid import ranking_section, remarks_section, table_section
from transfer_cli.report.html.index import describe
from transfer_cli.report.ranking import Ranking
from transfer_cli.report.runs import Record
from transfer_cli.report.tables import Table
from transfer_cli.run_folder import RunFolder, write_atomically

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
BESIDE = " 'self' file:"  # scripts from the folder, opened as a file or served
FOLDER = "runs"
ALONE = 24  # runs whose details one process makes before a second is worth its start
CHUNK = 8  # runs that a process takes at once, neighbours having a baseline in common
LAYOUT = 1  # raised when the details of a run change, so that folders written before are written again
FILES = (
    "status.json",
    "result.json",
    "metrics.jsonl",
    "predictions.npz",
    "features.npz",
    "examples.npz",
)  # that they come from


class Job(NamedTuple):
    id: str
    path: Path
    baseline: Path | None
    how: str


def write_html(
    tables: Sequence[Table],
    records: Sequence[Record],
    where: Path,
    how: str = "pca",
    rankings: Sequence[Ranking] = (),
) -> int:
    """Write the report to `where`: a file if its name ends in `.html` or `.htm`, else a folder with an `index.html`. `how`: the
    map of features, of `maps.MAPS`; `rankings`: of validators, to show as well. Returns the number of runs whose details were made.

    Raises:
        TransferError: `how` needs a package that is missing, or nothing can be written there.
    """
    content = describe(tables, records)
    jobs = _jobs(content["runs"], how)
    try:
        if is_file(where):
            where.parent.mkdir(parents=True, exist_ok=True)
            packed = _packed(jobs)
            write_atomically(where, _page(tables, records, rankings, content, packed).encode())
            return len(packed)
        folder = where / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            where / "index.html", _page(tables, records, rankings, content | {"folder": FOLDER}, {}).encode()
        )
        signed = {job.id: _signature(job) for job in jobs}
        stale = [job for job in jobs if _first_line(folder / f"{job.id}.js") != signed[job.id]]
        for name, text in _packed(stale).items():
            script = f"{signed[name]}\ntransferRun({_json(name)}, {_json(text)});\n"
            write_atomically(folder / f"{name}.js", script.encode())
    except OSError as error:
        raise TransferError(f"cannot write the report to {where}: {error.strerror}.") from error
    return len(stale)


def is_file(where: Path) -> bool:
    return where.suffix.lower() in (".html", ".htm")


def _page(
    tables: Sequence[Table],
    records: Sequence[Record],
    rankings: Sequence[Ranking],
    content: Mapping[str, Any],
    packed: Mapping[str, str],
) -> str:
    files = resources.files(__package__)
    page, css, js = (files.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    index = {record.path: i for i, record in enumerate(records)}
    finished = sum(record.run is not None for record in records)
    title = "Report on " + ("one run" if len(records) == 1 else f"{len(records):,} runs")
    made = time.strftime("%Y-%m-%d %H:%M")
    return string.Template(page).substitute(
        policy=POLICY + (BESIDE if "folder" in content else ""),
        title=title,
        subtitle=f"{finished:,} finished of {len(records):,}; made on {made} by transfer {__version__}",
        css=css,
        js=js,
        tables="\n".join(table_section(i, table, index) for i, table in enumerate(tables)),
        remarks=remarks_section(tables, records) + "".join(map(ranking_section, rankings)),
        data=_json({"title": title, **content}),
        details="\n".join(
            f'<script type="text/plain" id="run:{html.escape(name)}">{text}</script>' for name, text in packed.items()
        ),
    )


def _json(content: Any) -> str:
    """JSON that may stand inside a script element: no `<` that could end it."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


# The details of each run


def _jobs(runs: Sequence[Mapping[str, Any]], how: str) -> list[Job]:
    paths = [Path(run["path"]) for run in runs]
    return [
        Job(run["id"], path, None if run["baseline"] is None else paths[run["baseline"]], how)
        for run, path in zip(runs, paths, strict=True)
    ]


def _packed(jobs: Sequence[Job]) -> dict[str, str]:
    """Details by the run's id, deflated and in base64; by several processes where there are many."""
    ordered = sorted(jobs, key=lambda job: (str(job.baseline or job.path), str(job.path)))
    processes = min(os.cpu_count() or 1, len(jobs) // ALONE)
    if processes < 2:
        return dict(map(_pack, ordered))
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_single_thread) as pool:
        return dict(pool.map(_pack, ordered, chunksize=CHUNK))


def _single_thread() -> None:
    """Before NumPy comes: the processes share the cores as it is."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _pack(job: Job) -> tuple[str, str]:
    found = details(RunFolder(job.path), None if job.baseline is None else RunFolder(job.baseline), job.how)
    squeeze = zlib.compressobj(6, wbits=-15)  # raw, as DecompressionStream("deflate-raw") takes it
    data = squeeze.compress(_json(found).encode()) + squeeze.flush()
    return job.id, base64.b64encode(data).decode()


def _signature(job: Job) -> str:
    """A comment that differs as soon as a file does that the details come from."""
    stamps: list[Any] = [LAYOUT, job.how, str(job.baseline)]
    for folder in filter(None, (job.path, job.baseline)):
        for name in FILES:
            try:
                stat = os.stat(folder / name)
            except OSError:
                continue
            stamps.append((name, stat.st_mtime_ns, stat.st_size))
    return "// " + hashlib.sha256(repr(stamps).encode()).hexdigest()


def _first_line(path: Path) -> str | None:
    try:
        with path.open() as file:
            return file.readline().rstrip()
    except OSError:
        return None
