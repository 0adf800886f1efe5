"""`transfer compare` and `transfer show`, on folders written by hand and on real runs."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from conftest import SMALL, Outcome
from test_report import write_run
from test_report_tables import unfinished, write_looks

from transfer_cli.commands import compare, show
from transfer_cli.errors import TransferError
from transfer_cli.report.differences import compare_samples, config_differences, finished_run
from transfer_cli.run_folder import read_json, write_json

Transfer = Callable[..., Outcome]


def predict(run: Path, labels: list[int], predicted: list[int], ids: list[str] | None = None) -> Path:
    probs = np.full((len(labels), 10), 0.01)
    probs[np.arange(len(labels)), predicted] = 0.91
    names = ids or [f"digits/{i}" for i in range(len(labels))]
    arrays = {"labels": np.array(labels), "probs": probs, "ids": np.array(names)}
    np.savez(run / "predictions.npz", **{f"target_test_{key}": value for key, value in arrays.items()})
    return run


def squeezed(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_two_runs_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = [0] * 10 + [1] * 10
    a = predict(write_run(tmp_path / "a", 0.60, method="source_only"), labels, [0] * 10 + [1, 1] + [0] * 8)
    b = predict(
        write_run(tmp_path / "b", 0.90, config={"optimizer.lr": 0.05, "trainer.clip_norm": 1.0, "workers": 7}),
        labels,
        [1] + [0] * 9 + [1] * 9 + [0],
    )
    write_looks(b, [{"im": 1.0}, {"im": 2.0}], [0.93, 0.90])
    write_json(a / "manifest.json", {"git": "aaaa", "libraries": {"torch": "2.13.0", "numpy": "2"}})
    write_json(b / "manifest.json", {"git": "bbbb", "libraries": {"torch": "2.11.0", "numpy": "2"}})
    assert compare.main([str(a), str(b)]) == 0
    lines = squeezed(capsys.readouterr().out)
    assert {"method source_only dann", "optimizer.lr 0.01 0.05", "trainer.clip_norm - 1"} <= set(lines)
    assert {"git aaaa bbbb", "libraries.torch 2.13.0 2.11.0"} <= set(lines)
    assert not any("workers" in line or "numpy" in line or "search" in line for line in lines)
    assert "accuracy 0.6000 0.9000 +0.3000" in lines
    p = scipy.stats.binomtest(1, 8, 0.5).pvalue  # of class 1 seven more are right, of class 0 one less
    assert (
        "20 target test samples of both: only A is right on 1, only B on 7; McNemar's exact test, two-sided "
        f"p = {p:.2g}" in lines
    )
    start = lines.index("right of each class, % samples A B B - A")
    assert lines[start + 1 : start + 3] == ["1 10 20.0 90.0 +70.0", "0 10 100.0 90.0 -10.0"]
    assert "best by target labels 60 at step 700 93 at step 100" in lines


def test_samples_are_paired_by_their_names(tmp_path: Path) -> None:
    a = predict(write_run(tmp_path / "a"), [0, 1, 2], [0, 1, 9], ["x", "y", "z"])
    b = predict(write_run(tmp_path / "b", seed=1), [2, 0, 5], [2, 7, 5], ["z", "x", "other"])
    found = compare_samples(*(finished_run(path) for path in (a, b)))
    assert found is not None
    assert (found.common, found.only_first, found.only_second, found.p) == (2, 1, 1, 1.0)
    predict(b, [2, 1], [2, 7], ["z", "x"])  # x has another label: other data under the same names
    assert compare_samples(*(finished_run(path) for path in (a, b))) is None
    predict(b, [2], [2], ["w"])
    assert compare_samples(*(finished_run(path) for path in (a, b))) is None


def test_regression_is_compared_by_squared_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    labels, means = rng.normal(size=(50, 2)), rng.normal(size=(2, 50, 2))
    runs = []
    for name, mean in zip("ab", means, strict=True):
        runs.append(write_run(tmp_path / name, 0.3, kind="regression", seed=ord(name)))
        arrays = {"labels": labels, "mean": mean, "ids": np.array([str(i) for i in range(50)])}
        np.savez(runs[-1] / "predictions.npz", **{f"target_test_{key}": value for key, value in arrays.items()})
    errors = np.square(means - labels).mean(2)
    found = compare_samples(*map(finished_run, runs))
    assert found is not None and found.p == pytest.approx(scipy.stats.ttest_rel(*errors).pvalue)
    compare.main([*map(str, runs)])
    assert f"paired t-test of their squared errors, two-sided p = {found.p:.2g}" in capsys.readouterr().out


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", kind="regression")
    with pytest.raises(TransferError, match="no figure in common"):
        compare.main([str(a), str(b)])
    with pytest.raises(TransferError, match="nowhere is not a run's folder"):
        compare.main([str(a), str(tmp_path / "nowhere")])
    with pytest.raises(TransferError, match="is not finished"):
        compare.main([str(a), str(unfinished(tmp_path / "c", "failed"))])
    with pytest.raises(TransferError, match=r"predictions\.npz is missing or damaged"):
        compare.main([str(a), str(write_run(tmp_path / "d", seed=1))])
    (tmp_path / "d" / "predictions.npz").write_bytes(b"PK cut off")
    with pytest.raises(TransferError, match=r"predictions\.npz is missing or damaged"):
        compare.main([str(a), str(tmp_path / "d")])


def test_show_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "a", config={"calibration": "ts"})
    write_looks(run, [{"im": 1.0, "snd": 9.0}, {"im": 3.0, "snd": 1.0}], [0.93, 0.90])
    write_json(run / "validators.json", {"scores": {"reverse": 0.77}})
    command = ["transfer", "run", "method=dann", "subset.target_classes=[0,1]", "source.path=a b.npz"]
    write_json(run / "manifest.json", {"command": command, "transfer": "0.1.0", "threads": 2})
    assert show.main(["a"]) == 0
    out = capsys.readouterr().out
    lines = squeezed(out)
    assert lines[0] == "synth_digits -> digits small_cnn dann seed 0"
    assert "target_labels=0 protocol=inductive label_space=closed calibration=ts" in lines
    start = lines.index("choice among 2 checkpoints score step target accuracy, %")
    assert lines[start + 1 : start + 6] == [
        "im 3 200 (kept) 90",
        "snd 9 100 93",
        "last 200 (kept) 90",
        "oracle (uses target labels) 100 93",
        "of the kept weights alone: reverse 0.77",
    ]
    assert out.rstrip().endswith(
        "repeat it with\n  transfer run method=dann 'subset.target_classes=[0,1]' 'source.path=a b.npz'"
    )
    assert "next: transfer report" not in out and "numpy" not in sys.modules["transfer_cli.commands.show"].__dict__


def test_show_runs_that_are_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for state, said in {
        "failed": "failed: the loss became nan\nretry_failed=true with the command below tries again",
        "running": "interrupted\nthe command below goes on with it",
    }.items():
        show.main([str(unfinished(tmp_path / state, state, method="mcd"))])
        out = capsys.readouterr().out
        assert "synth_digits -> digits" in out and "mcd" in out and said in out
    with pytest.raises(TransferError, match="is not a run's folder"):
        show.main([str(tmp_path)])


def test_show_and_compare_import_no_torch(tmp_path: Path) -> None:
    labels = [0, 1, 2]
    runs = [predict(write_run(tmp_path / name, seed=i), labels, labels) for i, name in enumerate("ab")]
    code = (
        "import sys; from transfer_cli.commands import compare, show; show.main(sys.argv[1:2]);"
        "assert 'numpy' not in sys.modules; compare.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONPATH": str(Path(compare.__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    subprocess.run([sys.executable, "-c", code, *map(str, runs)], check=True, env=environment, capture_output=True)


def test_configurations_differ_by_what_bears_on_results(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"device": "cuda", "method.implementation": "moved:DANN", "method.search": {"x": [1]}}
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", config={**changes, "backbone.widths": [8]})
    assert config_differences(a, b) == [("backbone.widths", "[32,64]", "[8]")]


def test_real_runs(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes is what these commands read."""
    runs = [transfer("run", "method=source_only", f"seed={seed}", *SMALL).run for seed in (0, 1)]
    shown = transfer("show", str(runs[0]))
    assert shown.code == 0 and "choice among 2 checkpoints" in shown.out
    repeat = shown.out.strip().splitlines()[-1].split()
    assert repeat[:2] == ["transfer", "run"]
    assert "finished before" in transfer(*repeat[1:]).out  # the command leads to the same run
    compared = transfer("compare", *map(str, runs))
    assert compared.code == 0 and re.search(r"only A is right on \d+, only B on \d+", compared.out)
    assert "seed" in compared.out
    before = read_json(runs[0] / "result.json")["metrics"]["target_test"]["accuracy"]
    for select in ("im", "source_val", "oracle"):
        report = transfer("report", "--select", select)
        assert report.code == 0, report.err
        assert re.search(r"source_only.*\(2\)", report.out)
    assert f"accuracy  {before:.4f}" in re.sub(r"accuracy +", "accuracy  ", compared.out)
    assert "source_val" in transfer("report", "--validators").out
