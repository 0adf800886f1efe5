"""One job of a sweep, in its own process.

The process is forked from a server that has the heavy imports done and nothing else, so it starts at once. It is a session of its
own: Ctrl-C on the terminal reaches the launcher alone, which hands it on once. Nothing that it prints reaches the screen.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.utils import JobRuntime, JobStatus, run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.identity import identify
from transfer_cli.errors import TransferError

HELD = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
}  # blocked in the server, which a signal to the whole group reaches too
GRACE = 30.0  # seconds that a job may go on without its launcher, to save


@dataclass(frozen=True)
class Job:
    """What the process needs: all of it can be pickled."""

    task: Callable[[DictConfig], Any]
    context: HydraContext
    config: DictConfig
    environment: Mapping[str, str]
    directory: str
    log: Path  # takes what the job writes to stderr: warnings, tracebacks, the last words of native code


@dataclass(frozen=True)
class Report:
    """What a job tells its launcher: first where its run lies, at the end how it went."""

    folder: Path | None = None
    ended: bool = False
    error: str | None = None
    value: Any = None


def work(job: Job, pipe: Connection) -> None:
    """The process's whole life. Its exit status is 0, also where the run failed; 130 or 143 where it was stopped and has saved."""
    os.setsid()
    os.environ.clear()
    os.environ.update(job.environment)
    os.chdir(job.directory)
    _redirect(job.log)
    threading.Thread(target=_leave_with_the_launcher, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    setup_globals()
    JobRuntime.instance().set("name", job.config.hydra.job.name)
    pipe.send(Report(_folder(job.config)))
    done = run_job(
        task_function=job.task,
        config=job.config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=job.context,
    )
    if done.status == JobStatus.COMPLETED:
        pipe.send(Report(ended=True, value=done.return_value))
    else:
        error = done._return_value  # its property would print and raise
        said = str(error) if isinstance(error, TransferError) else f"{type(error).__name__}: {error}"
        pipe.send(Report(ended=True, error=" ".join(said.split())))


def _folder(composed: DictConfig) -> Path | None:
    """The run's folder; None where the configuration is wrong, which the run itself will say."""
    with suppress(Exception):
        config = typed(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
        return identify(config, resolve_components(config)).folder(config.outputs).resolve()
    return None


def _redirect(log: Path) -> None:
    """stdout to nowhere, since run.log has the same lines; stderr to `log`, what native code writes included."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_RDWR)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(file, 2)
    os.close(null)
    os.close(file)
    faulthandler.enable()


def _leave_with_the_launcher() -> None:
    """Save and stop once the launcher is gone, however it went; no process is left behind."""
    launcher = parent_process()
    assert launcher is not None
    wait([launcher.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(143)
