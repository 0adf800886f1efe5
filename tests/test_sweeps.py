"""Points of a search, the jobs of a sweep, `transfer plan`, and sweeps that are killed and typed again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SMALL, Outcome

from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.folders import names_in, packaged_folder
from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.identity import identify
from transfer_cli.errors import TransferError
from transfer_cli.sweep.ranges import Choice, Range, draw, read_ranges, uniform, word

Transfer = Callable[..., Outcome]

FAST = [*SMALL, "source=two_moons", "target=two_moons", "backbone=identity", "method=no_adaptation"]
"""Overrides of a run of a closed form on points of the plane."""


def planned(transfer: Transfer, *words: str) -> list[str]:
    """The words of each run, as `transfer plan --runs` lists them."""
    outcome = transfer("plan", *words, "--runs")
    assert outcome.code == 0, outcome.err
    return [line[12:].partition("  about")[0] for line in outcome.out.split("\n\n")[-1].splitlines()]


# ---- ranges


def test_a_range_covers_its_scale_evenly() -> None:
    us = [(i + 0.5) / 1000 for i in range(1000)]
    linear = [Range(2, 6).at(u) for u in us]
    assert min(linear) >= 2 and max(linear) <= 6 and sum(v < 3 for v in linear) == 250
    log = [Range(0.01, 100, log=True).at(u) for u in us]
    assert [sum(10.0**k <= v < 10.0 ** (k + 1) for v in log) for k in (-2, -1, 0, 1)] == [250] * 4
    whole = [Range(1, 4, integer=True).at(u) for u in us]
    assert [whole.count(k) for k in (1, 2, 3, 4)] == [250] * 4 and all(type(v) is int for v in whole)
    both = {Range(1, 64, log=True, integer=True).at(u) for u in us}
    assert {1, 2, 63, 64} <= both <= set(range(1, 65))
    choices = [Choice(("a", None, 3)).at(u) for u in us]
    assert {choices.count("a"), choices.count(None), choices.count(3)} <= {333, 334}


def test_the_ends_of_a_range_are_not_passed() -> None:
    """Rounding to four digits would."""
    assert Range(0.12344, 0.12356).at(0.0) == 0.12344 and Range(0.12344, 0.12356).at(0.999999) == 0.12356
    assert Range(3, 3, log=True).at(0.5) == 3


def test_uniform_is_uniform_and_a_function_of_all_its_arguments() -> None:
    from scipy.stats import kstest

    drawn = [uniform(0, "dann", i, "method.weight") for i in range(2000)]
    assert kstest(drawn, "uniform").pvalue > 0.01
    others = {uniform(*a) for a in ((1, "dann", 0, "k"), (0, "cdan", 0, "k"), (0, "dann", 1, "k"), (0, "dann", 0, "l"))}
    assert len(others | {uniform(0, "dann", 0, "k")}) == 5


def test_points_are_pinned() -> None:
    """If this fails, sweeps typed again no longer find their runs."""
    ranges = read_ranges("search", {"weight": {"low": 0.1, "high": 3.0, "log": True}, "hidden": [64, 256, 1024]})
    assert draw(ranges, 0, "dann", 1) == PINNED[0]
    assert draw(ranges, 0, "dann", 19) == PINNED[1]


PINNED = ({"weight": 1.578, "hidden": 64}, {"weight": 0.9464, "hidden": 1024})


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"low": 0, "high": 1, "log": True}, "log scale"),
        ({"low": 2, "high": 1}, "low <= high"),
        ({"low": 0}, "low <= high"),
        ({"low": 0.5, "high": 2, "integer": True}, "whole numbers"),
        ({"low": 0, "hihg": 1}, "Did you mean 'high'"),
        ([], "empty list"),
        (3, "a list of choices"),
    ],
)
def test_what_is_no_range_is_refused(node: Any, said: str) -> None:
    with pytest.raises(TransferError, match=said):
        read_ranges("method.search", {"weight": node})


@pytest.mark.parametrize(
    "value", [1.5, 1e-07, 3, True, None, "features", "a b", "1e3", "null", "it's", [0.1, 2], ["x", None]]
)
def test_a_value_is_written_as_hydra_reads_it(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override(word("method.key", value)).value()
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("group", ["method", "optimizer"])
def test_packaged_ranges_hold_their_defaults_and_fit_their_components(group: str) -> None:
    from transfer_cli.registry import component

    without = []
    for name in names_in(group, [packaged_folder()]):
        node = yaml.safe_load((packaged_folder() / group / f"{name}.yaml").read_text())
        ranges = read_ranges(f"{name}.search", node.get("search"))
        without += [] if ranges else [name]
        for key, range_ in ranges.items():
            assert key in node, f"{name}: {key} is searched and not there"
            assert range_.holds(node[key]), f"{name}: {key}={node[key]} is outside of what is searched"
            for u in (0.0, 0.3, 0.6, 0.999999):  # the type is that of the constructor
                component(group, {**node, key: range_.at(u)})
    assert without == {"method": ["no_adaptation", "source_only"], "optimizer": ["lbfgs"]}[group]


def test_learning_rates_are_searched_on_a_log_scale() -> None:
    for name in ("sgd", "sam", "adam", "adamw"):
        node = yaml.safe_load((packaged_folder() / "optimizer" / f"{name}.yaml").read_text())
        lr = read_ranges(name, node["search"])["lr"]
        assert isinstance(lr, Range) and lr.log and lr.low < node["lr"] < lr.high


# ---- the jobs of a sweep


def test_the_line_of_the_issue(transfer: Transfer) -> None:
    """n points a method, which seeds share; the default configuration is the first."""
    jobs = planned(transfer, "-m", "method=dann,coral", "sweep=random", "n=20", "seed=0,1,2")
    assert len(jobs) == len(set(jobs)) == 2 * 20 * 3
    assert jobs[:2] == ["method=dann seed=0", "method=dann seed=1"]
    for method, searched in (("dann", {"method.weight", "method.hidden", "optimizer.lr"}), ("coral", {"method.ridge"})):
        by_seed = {
            seed: [j.split()[2:] for j in jobs if j.startswith(f"method={method} seed={seed}")] for seed in (0, 1, 2)
        }
        assert by_seed[0] == by_seed[1] == by_seed[2]
        assert len(by_seed[0]) == 20 and by_seed[0][0] == []
        assert all({w.partition("=")[0] for w in point} == searched for point in by_seed[0][1:])
        weights = sorted(float(point[0].partition("=")[2]) for point in by_seed[0][1:])
        low, high = (0.1, 3.0) if method == "dann" else (0.001, 10.0)
        assert low <= weights[0] < weights[-1] <= high and weights[9] < (low + high) / 3  # a log scale


def test_more_points_extend_fewer_and_another_sweep_seed_moves_them(transfer: Transfer) -> None:
    line = ["method=coral", "sweep=random"]
    few, many = planned(transfer, *line, "n=5"), planned(transfer, *line, "n=8")
    assert many[:5] == few and len(many) == 8
    assert set(planned(transfer, *line, "n=5", "sweep.seed=1")) & set(few) == {"method=coral"}
    all_random = planned(transfer, *line, "n=5", "sweep.default=false")
    assert all_random[1:] == few[1:] and "method.ridge" in all_random[0]


def test_a_fixed_key_is_not_searched_and_moves_no_other(transfer: Transfer) -> None:
    free = planned(transfer, "method=dann", "sweep=random", "n=4")
    fixed = planned(transfer, "method=dann", "sweep=random", "n=4", "method.weight=2", "optimizer.lr=0.01")
    assert all(j.split()[:3] == ["method=dann", "method.weight=2", "optimizer.lr=0.01"] for j in fixed)
    hidden = [[w for w in j.split() if w.startswith("method.hidden")] for j in free]
    assert [j.split()[3:] for j in fixed] == [h for i, h in enumerate(hidden) if h not in hidden[:i]]  # each point once
    swept = planned(transfer, "method=dann", "sweep=random", "n=2", "method.weight=1,2", "method.search.hidden=null")
    assert [j.partition(" optimizer")[0] for j in swept] == [
        "method=dann method.weight=1",
        "method=dann method.weight=2",
    ] * 2


def test_a_range_is_narrowed_from_the_command_line_and_alters_no_identity(transfer: Transfer) -> None:
    line = ["method=coral", "sweep=random", "n=12"]
    narrow = planned(transfer, *line, "method.search.ridge.high=0.01")
    ridges = [float(j.partition("ridge=")[2]) for j in narrow[1:]]
    assert max(ridges) <= 0.01 and not any("search" in j for j in narrow)
    assert planned(transfer, *line, "method.search=null") == ["method=coral"]
    for override in ("method.search.ridge.high=1", "sweep=random", "sweep.seed=5"):
        plain, other = (typed(composed(["method=coral", *more])) for more in ([], [override]))
        assert identify(plain, resolve_components(plain)) == identify(other, resolve_components(other))


def test_listed_settings_are_tried_with_each_combination(transfer: Transfer, tmp_path: Path) -> None:
    listed = "sweep.points=['method=coral method.ridge=0.1,2','method=mean_match features.normalise=[l2]']"
    words = [*SMALL, "seed=0,1", "sweep=points", listed]
    runs = [line.removeprefix(" ".join(SMALL) + " ") for line in planned(transfer, *words)]
    assert runs == [
        f"seed={seed} {setting}"
        for setting in (
            "method=coral method.ridge=0.1",
            "method=coral method.ridge=2",
            "method=mean_match features.normalise=[l2]",
        )
        for seed in (0, 1)
    ]
    modes = planned(transfer, "experiment=diabetes_sex", "sweep=gp_modes")
    assert len(modes) == 7 and modes[-1].endswith("method.mode=sequential method.guard=evidence")
    ran = transfer("run", "-m", *FAST, "sweep=points", "sweep.points=['head.l2=0.01','method=coral head=ridge']")
    assert ran.code == 0 and "2 runs: 2 finished, 0 failed" in ran.out, ran.err
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / "outputs/runs").glob("*/*/config.yaml")]
    assert sorted(config["method"]["name"] for config in configs) == ["coral", "no_adaptation"]
    for wrong, said in (
        (["sweep=points"], "sweep=points needs sweep.points, a list of settings"),
        (["sweep.points=['seed=1']"], "sweep.points needs sweep=points"),
        (["sweep=points", "sweep.points=['seed=1 sweep.n=3']"], "'seed=1 sweep.n=3' is about the whole sweep"),
        (["sweep=points", "sweep.points=['seed=1']", "n=3"], "n=3 counts the points of a search"),
    ):
        outcome = transfer("plan", *FAST, *wrong)
        assert outcome.code == 2 and said in outcome.err and len(outcome.err.splitlines()) == 1, outcome.err


def test_quick_composition_is_that_of_hydra(transfer: Transfer) -> None:
    """Jobs that differ in values are not composed by Hydra one by one; their identities must be those of their runs."""
    outcome = transfer("plan", "method=dann,mcd", "sweep=random", "n=4", "seed=0,1", "backbone=lenet,resnet18")
    assert outcome.code == 0
    found: list[tuple[tuple[str, ...], str]] = []

    from transfer_cli.commands import plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_show", lambda jobs, each: found.extend((j.words, str(j.folder.path)) for j in jobs))
        transfer("plan", "method=dann,mcd", "sweep=random", "n=3", "seed=0,1", "trainer.steps=7", "source.n=100,200")
    assert len(found) == 2 * 3 * 2 * 2
    for words, folder in found[:: len(found) // 6]:
        config = typed(composed(words))
        assert str(identify(config, resolve_components(config)).folder("outputs")) == folder


def test_words_of_a_sweep_in_the_wrong_place(transfer: Transfer) -> None:
    for words, said in (
        (["run", "sweep=random"], "sweep=random is of many runs: add -m"),
        (["run", "-m", "n=4", "seed=0,1"], "add sweep=random"),
        (["run", "-m", "sweep=random", "n=0"], "at least 1"),
        (["run", "-m", "sweep=random", "n=2,3"], "takes one value"),
        (["run", "-m", "sweep=randm"], "Did you mean 'random'?"),
        (["run", "-m", "sweep=random", "n=2", "method.search.weight=3"], "method.search.weight must be a list"),
        (["plan", "sweep=optuna"], "cannot be planned"),
    ):
        outcome = transfer(*words, *([] if words[0] == "plan" else FAST[:3]))
        assert outcome.code == 2 and said in outcome.err, (words, outcome.err)
    assert not list(Path().glob("outputs/runs/*/*"))


def test_list_knows_sweeps(transfer: Transfer) -> None:
    listed = transfer("list", "sweeps").out
    assert all(any(line.startswith(name) for line in listed.splitlines()) for name in ("grid", "random", "optuna"))


# ---- running, planning, running again

SWEEP = ["-m", *FAST[:-1], "method=mean_match,coral", "sweep=random", "n=3", "seed=0,1"]
RUNS = 2 * 2 + 2 * 3  # mean_match has two values


def test_a_sweep_is_planned_run_and_found_again(transfer: Transfer, tmp_path: Path) -> None:
    before = transfer("plan", *SWEEP)
    assert "unknown" in before.out and not (tmp_path / "outputs").exists()
    ran = transfer("run", *SWEEP)
    assert ran.code == 0, ran.err
    assert ran.out.count("next: transfer report") == RUNS and ran.out.endswith(
        f"{RUNS} runs: {RUNS} finished, 0 failed\n"
    )
    commands = [json.loads(p.read_text())["command"] for p in (tmp_path / "outputs").rglob("manifest.json")]
    assert len(commands) == RUNS and not any("sweep" in word or "n=" in word for c in commands for word in c)
    states = transfer("plan", *SWEEP, "n=5").out.splitlines()
    assert "unknown" not in states[1] + states[2]  # runs like those to come were timed
    again = transfer("run", *SWEEP)
    assert again.code == 0 and f"{RUNS} finished before" in again.out and "next: transfer report" not in again.out
    more = transfer("run", *[w if w != "n=3" else "n=4" for w in SWEEP])
    assert more.out.count("next: transfer report") == 2  # coral's new point


def test_one_failure_stops_nothing_and_is_counted(transfer: Transfer, tmp_path: Path) -> None:
    """One run of a bad range, one that is refused before it begins; then the plan's reasons, and the retry."""
    sweep = ["-m", *SMALL, "trainer.steps=5", "method=source_only", "optimizer.lr=1e30,0.01"]
    ran = transfer("run", *sweep)
    assert ran.code == 2 and ran.out.endswith("2 runs: 1 finished, 1 failed\n")
    plan = transfer("plan", *sweep)
    assert "failed (--retry-failed runs them again)" in plan.out and "loss term" in plan.out
    header, row = plan.out.splitlines()[:2]
    assert header.split()[:4] == ["runs", "finished", "failed", "to"] and row.split()[-3:] == ["2", "1", "1"]
    again = transfer("run", *sweep)
    assert again.code == 2 and "2 runs: 1 finished, 1 failed" in again.out and "loss term" in again.err
    stamp = next(p for p in (tmp_path / "outputs").rglob("status.json") if "failed" in p.read_text())
    first = stamp.read_text()
    assert transfer("plan", *sweep, "--retry-failed").out.splitlines()[1].split()[4:8] == ["2", "1", "1", "1"]
    retried = transfer("run", "--retry-failed", *sweep)
    assert retried.code == 2 and stamp.read_text() != first and "failed before" not in retried.err
    refused = transfer("plan", *FAST, "head=logistic", "+method.wieght=1")
    assert "refused" in refused.out and "has no key 'wieght'" in refused.out


def test_interrupted_and_running_runs_are_told_apart(transfer: Transfer, tmp_path: Path) -> None:
    run = transfer("run", *FAST).run
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert transfer("plan", *FAST).out.splitlines()[0].split()[:2] == ["runs", "interrupted"]
    code = f"import fcntl, sys; f = open({str(run / 'lock')!r}, 'ab'); fcntl.lockf(f, fcntl.LOCK_EX);"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "print('held', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None and holder.stdout is not None
    try:
        holder.stdout.readline()
        assert transfer("plan", *FAST).out.splitlines()[0].split()[:2] == ["runs", "running"]
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def test_a_finished_run_of_other_data_is_not_skipped(transfer: Transfer, tmp_path: Path) -> None:
    import numpy as np

    draw_ = np.random.default_rng(0)
    for shift in (0.0, 1.0):
        values = draw_.normal(size=(90, 5)) + shift
        np.savez(tmp_path / "a.npz", x=values.astype(np.float32), y=np.arange(90) % 3)
        data = ["source=arrays", "source.path=a.npz", "target=arrays", "target.path=a.npz", "data_root=."]
        outcome = transfer("run", "-m", *SMALL, *data, "backbone=identity", "method=no_adaptation", "seed=0,1")
    assert outcome.code == 2 and "data changed since this run" in outcome.err and "0 finished, 2 failed" in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_killed_twice_and_typed_again_loses_nothing(tmp_path: Path, transfer: Transfer, number: int) -> None:
    sweep = ["-m", *SMALL, "method=source_only,coral", "sweep=random", "n=3", "seed=0,1", "trainer.steps=30"]
    total = 2 * 3 * 2
    command = [sys.executable, "-m", "transfer_cli", "run", *sweep]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(packaged_folder().parent)}
    finished: dict[Path, str] = {}

    def results() -> dict[Path, str]:
        return {p: p.read_text() for p in (tmp_path / "outputs").rglob("result.json")}

    for wanted in (2, 6):
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            end = time.monotonic() + 300
            while time.monotonic() < end and len(results()) < wanted and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(number)
            code = process.wait(timeout=60)
        assert code in ({143, -15} if number == signal.SIGTERM else {-9})
        now = results()
        assert wanted <= len(now) < total and finished.items() <= now.items()  # none is run twice
        finished = now
    last = transfer("run", *sweep)
    assert last.code == 0, last.err
    assert f"{len(finished)} finished before" in last.out and f"{total} runs: {total} finished, 0 failed" in last.out
    assert len(results()) == total and finished.items() <= results().items()


def test_a_seed_is_in_one_stack(transfer: Transfer) -> None:
    words = ["experiment=smoke", "method=source_only", "seeds_together=8"]
    refused = transfer("plan", *words, "seed=0,1")
    assert refused.code == 2 and "source_only-seed1-" in refused.err and "in strides" in refused.err
    assert transfer("plan", *words, "seed=0,8").code == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries below an old Optuna
def test_optuna_says_what_it_needs_or_searches(transfer: Transfer, tmp_path: Path) -> None:
    sweep = ["-m", *FAST[:-1], "method=coral", "sweep=optuna", "n=3"]
    try:
        import optuna  # noqa: F401
    except ImportError:
        outcome = transfer("run", *sweep)
        assert outcome.code == 2 and "pip install 'transfer-cli[optuna]'" in outcome.err
        pytest.skip("Optuna's sweeper is not installed")
    outcome = transfer("run", *sweep)
    assert outcome.code == 0, outcome.err
    best = yaml.safe_load(next((tmp_path / "outputs").rglob("optimization_results.yaml")).read_text())
    results = [json.loads(p.read_text()) for p in (tmp_path / "outputs").rglob("result.json")]
    assert len(results) == 3 and best["best_value"] == max(r["selection"]["score"] for r in results)
    assert transfer("run", *sweep).out.count("finished before") == 3
    refused = transfer("run", *sweep, "selection=oracle")
    assert refused.code == 2 and "looks at target labels" in refused.err
