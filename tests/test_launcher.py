"""Jobs side by side: what one costs the others, what stopping leaves, what a job gets of the machine."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SMALL, Outcome
from test_resume import assert_same, outcome_of

from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.launchers import written_out
from transfer_cli.errors import TransferError
from transfer_cli.launcher import local, screen
from transfer_cli.launcher.local import prepare, threads_of_a_job, visible_gpus
from transfer_cli.launcher.screen import Screen, duration

Transfer = Callable[..., Outcome]

METHODS = '''
import os
import signal
import time

from transfer_cli.methods.adversarial.dann import DANN


class Odd(DANN):
    """Kills itself with signal `number`, or takes its time over each step."""

    def __init__(self, context, *, number: int = 0, seconds: float = 0.0, built: str = "well") -> None:
        super().__init__(context)
        if built == "never":
            os.kill(os.getpid(), signal.SIGKILL)
        if built == "badly":
            raise RuntimeError("cannot be built")
        if built == "wrongly":
            raise ValueError("built takes another word")
        self.number, self.seconds = number, seconds

    def losses(self, batch, progress):
        if self.number:
            os.kill(os.getpid(), self.number)
        time.sleep(self.seconds)
        return super().losses(batch, progress)
'''
SLOW = ["plugins=[odd]", "method=odd", "method.seconds=0.05"]


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(METHODS)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "odd.yaml").write_text(
        "name: odd\nimplementation: odd:Odd\nnumber: 0\nseconds: 0.0\nbuilt: well\n"
    )


def runs(folder: Path) -> dict[str, Path]:
    """Run folders by their jobs' own word."""
    return {
        next(w for w in json.loads(p.read_text())["command"] if w.startswith("method.number=")): p.parent
        for p in folder.rglob("manifest.json")
    }


def status(run: Path) -> dict[str, str]:
    return json.loads((run / "status.json").read_text())


def test_a_job_that_dies_costs_itself_alone(tmp_path: Path, transfer: Transfer) -> None:
    sweep = ["-m", *SMALL, "plugins=[odd]", "method=odd", "trainer.steps=5", "jobs=2", "method.number=11,9,0"]
    outcome = transfer("run", *sweep)
    assert outcome.code == 2 and "2 of the sweep's runs failed:" in outcome.err
    found = runs(tmp_path)
    assert status(found["method.number=11"]) | {"error": "killed by signal SIGSEGV"} == status(
        found["method.number=11"]
    )
    assert status(found["method.number=9"])["error"] == "killed by signal SIGKILL"
    assert [status(run)["state"] for run in found.values()].count("failed") == 2
    assert status(found["method.number=0"])["state"] == "finished"

    *lines, last = outcome.out.splitlines()
    assert last == "3 runs: 1 finished, 2 failed"
    assert len(lines) == 3 and all(f"[{i + 1}/3]" in line for i, line in enumerate(lines)), "nothing of the jobs' own"
    assert sum("SIGSEGV" in line for line in lines) == 1 and sum("target accuracy" in line for line in lines) == 1
    assert "Segmentation fault" in (found["method.number=11"] / "run.log").read_text()
    assert list(tmp_path.rglob("*.err")) == []

    again = transfer("run", *sweep)
    assert again.code == 2 and again.err.count("failed before: killed by signal") == 2
    assert "1 finished before" in again.out and "--retry-failed" in again.err


@pytest.mark.parametrize(
    ("how", "more"), [("apart", ["jobs=2"]), ("one after another", []), ("together", ["seeds_together=2"])]
)
def test_what_breaks_before_the_first_step_is_a_failed_cell(
    tmp_path: Path, transfer: Transfer, how: str, more: list[str]
) -> None:
    """Bad input leaves nothing."""
    words = "badly,wrongly,well" + ",never" * (how == "apart")
    sweep = ["-m", *SMALL, "plugins=[odd]", "method=odd", "trainer.steps=2", f"method.built={words}", *more]
    outcome = transfer("run", *sweep)
    assert outcome.code == 2 and "1 finished" in outcome.out, outcome.err
    told = transfer("report").out
    assert "odd method.built=badly" in told and "RuntimeError: cannot be built" in told
    assert ("odd method.built=never" in told and "killed by signal SIGKILL" in told) == (how == "apart")
    assert "wrongly" not in told and "another word" not in told
    again = transfer("run", *sweep)
    assert "failed before: RuntimeError: cannot be built" in again.err


def test_a_job_is_the_run_that_it_would_be_alone(tmp_path: Path, transfer: Transfer) -> None:
    chosen = [*SMALL, "trainer.steps=10", "trainer.eval_every=5"]
    alone = transfer("run", *chosen, "outputs=alone")
    assert transfer("run", "-m", *chosen, "launcher=local", "launcher.jobs=2", "seed=0,1").code == 0
    run = tmp_path / "outputs" / alone.run.relative_to(tmp_path / "alone")
    assert_same(run, outcome_of(alone.run))
    assert len(list(run.parent.iterdir())) == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_every_job_and_the_sweep_goes_on(
    tmp_path: Path, transfer: Transfer, number: int, code: int
) -> None:
    sweep = ["-m", *SMALL, *SLOW, "trainer.steps=30", "trainer.log_every=2", "jobs=2", "seed=0,1,2"]

    def strike() -> None:
        end = time.monotonic() + 200
        while time.monotonic() < end and sum(p.stat().st_size > 0 for p in tmp_path.rglob("metrics.jsonl")) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=strike)
    thread.start()
    stopped = transfer("run", *sweep)
    thread.join()
    assert stopped.code == code, stopped.err
    assert "stopping: 2 jobs at work" in stopped.out and "3 of its runs left" in stopped.err
    logs = [p.read_text() for p in tmp_path.rglob("run.log")]
    assert len(logs) == 2 and all("stopped and saved at step" in log for log in logs)
    again = transfer("run", *[word for word in sweep if word != "jobs=2"])  # one after another, in this process
    assert again.code == 0 and again.out.count("going on at step") == 2


def start(tmp_path: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """A sweep in a process of its own, as the head of a group."""
    return subprocess.Popen(
        [sys.executable, "-m", "transfer_cli", "run", *arguments],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_no_job_outlives_a_launcher_that_was_killed(tmp_path: Path) -> None:
    process = start(tmp_path, ["-m", *SMALL, *SLOW, "trainer.steps=4000", "jobs=2", "seed=0,1"])
    end = time.monotonic() + 300
    while time.monotonic() < end and len(list(tmp_path.rglob("metrics.jsonl"))) < 2:
        time.sleep(0.05)
    pids = [int(status(p.parent)["pid"]) for p in tmp_path.rglob("metrics.jsonl")]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    process.kill()
    process.communicate()
    end = time.monotonic() + 60
    while time.monotonic() < end and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert all("stopped and saved" in p.read_text() for p in tmp_path.rglob("run.log"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looks at processes in /proc")
def test_the_process_that_jobs_are_forked_from_is_deaf_to_the_signals_of_the_group() -> None:
    """Or Ctrl-C while it imports, and SIGTERM at any time, would end it under the launcher's feet."""
    code = """
from multiprocessing import forkserver
from pathlib import Path
from transfer_cli.launcher.job import HELD
from transfer_cli.launcher.local import start_server

start_server(1)
(line,) = [l for l in Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").open() if l.startswith("SigBlk")]
assert all(int(line.split()[1], 16) >> (number - 1) & 1 for number in HELD), line
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
def test_a_storm_of_signals_loses_nothing(tmp_path: Path, transfer: Transfer) -> None:
    """To the whole group, at random moments, until the sweep gets through; SIGKILL among them."""
    sweep = ["-m", *SMALL, *SLOW, "trainer.steps=60", "trainer.checkpoint_every=5", "jobs=2", "seed=0,1,2,3"]
    expected = {seed: outcome_of(transfer("run", *SMALL, *SLOW, "trainer.steps=60", "trainer.checkpoint_every=5",
                                          f"seed={seed}", "outputs=alone").run) for seed in range(4)}  # fmt: skip
    draw = random.Random(0)
    for _ in range(30):
        process = start(tmp_path, sweep)
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=draw.uniform(4, 16))
        if process.returncode == 0:
            break
        number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.communicate(timeout=60)
        assert process.returncode in (130, 143, -number), process.returncode
        time.sleep(2)  # jobs of a launcher that was killed save
    assert process.returncode == 0
    for seed, outcome in expected.items():
        assert_same(next((tmp_path / "outputs").rglob(f"odd-seed{seed}-*")), outcome)


@pytest.mark.slow
def test_what_is_imported_before_the_fork_neither_starts_threads_nor_looks_for_a_gpu() -> None:
    """An initialised driver or a pool of threads does not survive a fork."""
    program = """
import torch
def refuse(*_): raise AssertionError("looked for a GPU")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse
import transfer_cli.launcher.heavy
assert not torch.cuda.is_initialized()
import os
print(len(os.listdir("/proc/self/task")))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == 1


# --- what a job gets ------------------------------------------------------------------------------


def test_threads_are_a_fair_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [threads_of_a_job(jobs) for jobs in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_a_job(2) == 3


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert visible_gpus([0, 2]) == ["0", "2"]
    with pytest.raises(TransferError, match="auto or a list"):
        visible_gpus("all")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    assert visible_gpus("auto") == ["1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus("auto") == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus("auto") == [], "no driver"
    said = "GPU 0: NVIDIA H100 (UUID: GPU-aa-1)\nGPU 1: NVIDIA H100 (UUID: GPU-bb-2)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus("auto") == ["GPU-aa-1", "GPU-bb-2"]
    said += "  MIG 1g.10gb Device 0: (UUID: MIG-cc-3)\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    assert visible_gpus("auto") == ["MIG-cc-3"]


def prepared(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> local.Job:
    """The job of a configuration, on a machine with GPU 7."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    config = composed([])
    from omegaconf import OmegaConf, open_dict

    with open_dict(config):
        for override in overrides:
            key, _, value = override.partition("=")
            OmegaConf.update(config, key, value)
        config.hydra = {"job": {}, "overrides": {"task": list(overrides)}}
    loader = SimpleNamespace(load_sweep_config=lambda master, words: master)
    launcher = SimpleNamespace(context=SimpleNamespace(config_loader=loader), config=config, task=None)
    return prepare(launcher, 3, overrides, 4, "7", Path("sweep"))


def test_a_job_has_a_gpu_and_its_threads_unless_it_names_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepared(monkeypatch)
    assert job.environment["CUDA_VISIBLE_DEVICES"] == "7" and job.environment["OMP_NUM_THREADS"] == "4"
    assert job.config.threads == 4 and list(job.config.hydra.overrides.task) == ["threads=4"]
    own = prepared(monkeypatch, "device=cuda:1", "threads=2")
    assert own.environment["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert own.config.threads == 2 and list(own.config.hydra.overrides.task) == ["device=cuda:1", "threads=2"]


# --- words and the screen -------------------------------------------------------------------------


def test_short_words() -> None:
    assert written_out(["-m", "seed=0,1", "jobs=3"]) == [
        "-m", "seed=0,1", "hydra.launcher.jobs=3", "hydra/launcher=local",
    ]  # fmt: skip
    assert written_out(["launcher=slurm", "launcher.mem_gb=8"]) == ["hydra/launcher=slurm", "hydra.launcher.mem_gb=8"]
    assert written_out(["hydra/launcher=local", "jobs=3"]) == ["hydra/launcher=local", "hydra.launcher.jobs=3"]


@pytest.mark.parametrize("jobs", ["0", "many", "1.5"])
def test_a_number_of_jobs_that_makes_no_sense(transfer: Transfer, jobs: str) -> None:
    outcome = transfer("run", "-m", *SMALL, "seed=0,1", f"jobs={jobs}")
    assert outcome.code == 2 and "hydra.launcher.jobs" in outcome.err and len(outcome.err.splitlines()) == 1


def test_a_launcher_that_does_not_exist(transfer: Transfer) -> None:
    outcome = transfer("run", "-m", *SMALL, "launcher=locale")
    assert outcome.code == 2 and "no launcher 'locale'" in outcome.err and "local" in outcome.err


PRESETS = {"joblib_pool": ("joblib", "joblib"), "slurm": ("submitit", "submitit"), "ray_here": ("ray", "ray")}
"""By preset: what its package adds to `hydra_plugins`, and the extra."""


def installed(package: str) -> bool:
    return find_spec("hydra_plugins") is not None and find_spec(f"hydra_plugins.hydra_{package}_launcher") is not None


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_names_the_extra_that_it_needs(transfer: Transfer, preset: str) -> None:
    package, extra = PRESETS[preset]
    if installed(package):
        shown = transfer("run", f"launcher={preset}", "--cfg", "hydra", "--package", "hydra.launcher")
        assert shown.code == 0 and f"hydra_plugins.hydra_{package}_launcher" in shown.out
    else:
        outcome = transfer("run", "-m", *SMALL, f"launcher={preset}")
        assert outcome.code == 2 and f"pip install 'transfer-cli[{extra}]'" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "package"), [("joblib_pool", "joblib"), ("slurm_here", "submitit"), ("ray_here", "ray")]
)
def test_a_sweep_under_a_launcher_of_an_extra(tmp_path: Path, preset: str, package: str) -> None:
    if not installed(package):
        pytest.skip(f"needs pip install 'transfer-cli[{package}]'")
    sweep = ["-m", *SMALL, "method=no_adaptation", "seed=0,1", f"launcher={preset}"]
    process = start(tmp_path, sweep)
    _, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    assert len(list(tmp_path.rglob("result.json"))) == 2


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    monkeypatch.setattr(screen.shutil, "get_terminal_size", lambda: os.terminal_size((60, 24)))
    shown = Screen(10, 2)
    shown.terminal = True
    yield shown


def test_the_table_on_a_terminal(terminal: Screen, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.ended("done", "seed=0", 20.0, "target accuracy 0.9")
    terminal.ended("failed", "seed=1", 40.0, "killed by signal SIGSEGV")
    terminal.show([("seed=2", 10.0, "adapt step 3"), ("seed=3", 90.0, "x" * 100)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/10]  done  20 s  seed=0  target accuracy 0.9"
    assert lines[1] == "[2/10]  failed  40 s  seed=1  killed by signal SIGSEGV"
    assert lines[2] == "2 running   1 done   1 failed   6 to go   about 1:40 left"  # (20 + 0 + 6 * 30) / 2
    assert lines[3] == "      10 s  seed=2    adapt step 3" and len(lines[4]) == 59
    terminal.ended("done", "seed=2", 30.0, "")
    assert capsys.readouterr().out.startswith("\033[3F\033[J"), "the table gives way to the line"


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3599, 7325)] == ["0 s", "59 s", "1:01", "59:59", "2:02:05"]
