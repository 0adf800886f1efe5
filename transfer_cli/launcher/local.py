"""The launcher's own process: starts jobs while there is room, watches them, and tells what became of each.

A job that ends by a signal (a segmentation fault, the kernel short of memory, `kill -9`) costs itself alone: its run's status
becomes `failed` and names the signal. Ctrl-C or SIGTERM is handed on to every job once, so that each saves and stops; a second
one stops them at once. Should the launcher itself be killed, the jobs notice, save and stop.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides, setup_globals
from omegaconf import DictConfig, OmegaConf, open_dict

from transfer_cli.errors import TransferError
from transfer_cli.launcher.job import HELD, Job, Report, work
from transfer_cli.launcher.screen import Screen
from transfer_cli.run_folder import HEADLINE, RunFolder, read_json

TICK = 0.5  # seconds between looks at what is shown
STOPPED = "stopped"  # a job that a signal stopped and that goes on when it is typed again


@dataclass
class Running:
    """A job at work."""

    index: int
    overrides: str
    words: str  # those that not every job has, as it is called on the screen
    slot: int
    log: Path
    process: multiprocessing.process.BaseProcess
    pipe: Connection
    began: float
    report: Report = field(default_factory=Report)
    silent: bool = False  # it has closed its end

    def listen(self) -> None:
        """Take in what it has told."""
        try:
            while not self.silent and self.pipe.poll():
                told: Report = self.pipe.recv()
                folder = told.folder or self.report.folder
                self.report = Report(folder, told.ended, told.error, told.value)
        except (EOFError, OSError):
            self.silent = True

    def last_line(self) -> str:
        """Of its run.log, or nothing."""
        with suppress(OSError):
            if self.report.folder is not None:
                with RunFolder(self.report.folder).log.open("rb") as file:
                    file.seek(max(0, os.fstat(file.fileno()).st_size - 400))
                    return file.read().decode(errors="replace").rstrip("\n").rpartition("\n")[2].strip()
        return ""


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run the jobs of a sweep, `launcher.jobs` at once; their returns in order.

    Raises:
        TransferError: a setting that makes no sense.
        SystemExit: 130 after Ctrl-C, 143 after SIGTERM.
    """
    jobs, config = launcher.jobs, launcher.config
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise TransferError(f"hydra.launcher.jobs is a number of jobs at once, at least 1; not {jobs!r}.")
    setup_globals()
    gpus, threads = visible_gpus(launcher.gpus), threads_of_a_job(jobs)
    sweep = Path(str(config.hydra.sweep.dir)).resolve()
    sweep.mkdir(parents=True, exist_ok=True)
    server = start_server(threads)
    shared = set.intersection(*map(set, job_overrides)) if len(job_overrides) > 1 else set()
    waiting = [(first + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
    waiting.reverse()
    running: list[Running] = []
    returns: dict[int, JobReturn] = {}
    free = list(range(jobs))
    screen = Screen(len(waiting), jobs)
    with stop_signals() as stop:
        try:
            while running or (waiting and not stop.numbers):
                while waiting and free and not stop.numbers:
                    index, overrides = waiting.pop()
                    slot = free.pop(0)
                    made = prepare(launcher, index, overrides, threads, gpus[slot % len(gpus)] if gpus else None, sweep)
                    running.append(start(server, made, index, overrides, shared, slot))
                stop.hand_on([job.process for job in running], screen)
                screen.show([(job.words, time.monotonic() - job.began, job.last_line()) for job in running])
                talking = [job.pipe for job in running if not job.silent]
                wait([*(job.process.sentinel for job in running), *talking], TICK)
                for job in running:
                    job.listen()
                for job in [job for job in running if job.process.exitcode is not None]:
                    running.remove(job)
                    free.append(job.slot)
                    returns[job.index] = end(job, launcher.task, bool(stop.numbers), screen)
        finally:
            for job in running:  # only where this process fails itself
                job.process.terminate()
            screen.close()
    if stop.numbers:
        left = len(waiting) + screen.counts[STOPPED]
        print(f"transfer: the sweep was stopped, {left} of its runs left; typed again it goes on", file=sys.stderr)
        raise SystemExit(128 + stop.numbers[0])
    return [returns[index] for index in sorted(returns)]


def threads_of_a_job(jobs: int) -> int:
    """A fair share of the cores, or what OMP_NUM_THREADS says of every process: the same whenever the sweep is typed again."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(said) if said.isdigit() and int(said) else max(1, cores // jobs)


def visible_gpus(wanted: Any) -> list[str]:
    """The GPUs that jobs are dealt out to, as CUDA_VISIBLE_DEVICES writes them; asks the driver, since torch would hold them.

    Raises:
        TransferError: `wanted` is neither `auto` nor a list.
    """
    if wanted != "auto":
        if isinstance(wanted, str) or not hasattr(wanted, "__iter__"):
            raise TransferError(f"hydra.launcher.gpus is auto or a list, such as [0,1]; not {wanted!r}.")
        return [str(gpu) for gpu in wanted]
    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return [gpu.strip() for gpu in said.split(",") if gpu.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"UUID: (MIG-[^)\s]+)", listed) or re.findall(r"UUID: (GPU-[^)\s]+)", listed)


def start_server(threads: int) -> Any:
    """The process that jobs are forked from, with the heavy imports done; deaf to the signals of the whole group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transfer_cli.launcher.heavy"])
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # it would lift the mask below when the server starts it
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # BLAS reads it once, when numpy is imported
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # it inherits this; each job lifts it
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
    return context


def prepare(launcher: Any, index: int, overrides: Sequence[str], threads: int, gpu: str | None, sweep: Path) -> Job:
    """The job's configuration and surroundings: its number of threads, unless it sets one, and its GPU, unless it names one."""
    config: DictConfig = launcher.context.config_loader.load_sweep_config(launcher.config, list(overrides))
    with open_dict(config):
        config.hydra.job.id, config.hydra.job.num = str(index), index
        if OmegaConf.select(config, "threads") is None:
            config.threads = threads
            config.hydra.overrides.task.append(f"threads={threads}")  # the command that would repeat the run
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if gpu is not None and ":" not in str(OmegaConf.select(config, "device")):
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return Job(launcher.task, launcher.context, config, environment, str(Path.cwd()), sweep / f"{index}.err")


def start(context: Any, job: Job, index: int, overrides: Sequence[str], shared: Set[str], slot: int) -> Running:
    """Its process."""
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, theirs), name=f"transfer job {index}")
    process.start()
    theirs.close()
    own = filter_overrides(overrides)
    words = " ".join(word for word in own if word not in shared)
    return Running(index, " ".join(own), words, slot, job.log, process, ours, time.monotonic())


def end(job: Running, task: Any, stopping: bool, screen: Screen) -> JobReturn:
    """What became of it: told on the screen, noted in its run's status where the job could not do so itself."""
    job.process.join()
    job.pipe.close()
    seconds, folder = time.monotonic() - job.began, None
    if job.report.folder is not None:
        folder = RunFolder(job.report.folder)
    error = job.report.error
    if not job.report.ended:
        error = _last_words(job.process.exitcode, folder, stopping)
    _keep_log(job.log, folder)
    state = "done" if error is None else STOPPED if error == STOPPED else "failed"
    screen.ended(state, job.words, seconds, _figure(folder) if error in (None, STOPPED) else str(error))
    value = job.report.value
    if error is not None and not stopping:
        value = task.failed_elsewhere("stopped; typed again it goes on" if error == STOPPED else error, job.overrides)
    returned = JobReturn(overrides=job.overrides.split(), status=JobStatus.COMPLETED)
    returned.return_value = value
    return returned


def _last_words(code: int | None, folder: RunFolder | None, stopping: bool) -> str | None:
    """Of a job that died without a report: None where its run was finished already."""
    if code in (130, 143) or stopping:
        return STOPPED
    assert code is not None
    error = f"its process ended with status {code}" if code >= 0 else f"killed by signal {_name(-code)}"
    if folder is None:
        return error
    if folder.state() == "finished":
        return None
    with suppress(TransferError), folder.locked():  # held by nobody, unless somebody has started the run anew
        folder.set_status("failed", error=error)
    return error


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _keep_log(log: Path, folder: RunFolder | None) -> None:
    """What a job wrote to stderr joins its run.log; it stays where it is if there is no such file."""
    with suppress(OSError):
        said = log.read_bytes()
        if said and folder is not None and folder.path.is_dir() and folder.status.exists():
            with folder.log.open("ab") as file:
                file.write(said)
            said = b""
        if not said:
            log.unlink()


def _figure(folder: RunFolder | None) -> str:
    """The headline figure on the target and the folder, for a line."""
    if folder is None:
        return ""
    with suppress(Exception):
        result = read_json(folder.result)
        name = HEADLINE[result["kind"]]
        return f"target {name} {result['metrics']['target_test'][name]:.3g}  {os.path.relpath(folder.path)}"
    return os.path.relpath(folder.path)


class Stop:
    """The signals that have come, and have been handed on."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self._handed = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)

    def hand_on(self, processes: Sequence[multiprocessing.process.BaseProcess], screen: Screen) -> None:
        """Each signal to each job; a third one of them kills."""
        while self._handed < len(self.numbers):
            self._handed += 1
            if self._handed == 1:
                count = f"{len(processes)} job{'s' * (len(processes) != 1)}"
                screen.say(f"stopping: {count} at work, each saves first; once more stops at once")
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, self.numbers[self._handed - 1] if self._handed < 3 else signal.SIGKILL)  # type: ignore[arg-type]


@contextmanager
def stop_signals() -> Iterator[Stop]:
    stop = Stop()
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
