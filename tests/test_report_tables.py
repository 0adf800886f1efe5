"""Tables one can believe: tests behind the best, bounds, ranks, choices by validators, formats; against figures worked out by hand
and scipy."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import yaml
from test_report import write_run

from transfer_cli.commands import report
from transfer_cli.errors import TransferError
from transfer_cli.report.latex import escape
from transfer_cli.report.paired import holm, incomplete_beta, mcnemar, paired_t, ranks, spearman, top_weights
from transfer_cli.report.ranking import rank_validators
from transfer_cli.report.runs import collect, read_config
from transfer_cli.report.tables import Table, aggregate
from transfer_cli.run_folder import read_json, write_json

OTHER = ("mnist", "usps")


def table_of(folder: Path, select: str | None = None) -> Table:
    (table,) = aggregate(collect([folder]), select)
    return table


def write_seeds(folder: Path, method: str, accuracies: list[float], **options: Any) -> None:
    for seed, accuracy in enumerate(accuracies):
        name = "-".join([method, str(seed), *(f"{k}{v}" for k, v in sorted(options.items()))])
        write_run(folder / re.sub(r"[^\w.-]", "_", name), accuracy, method=method, seed=seed, **options)


def write_looks(run: Path, scores: list[dict[str, float]], figures: list[float], figure: str = "accuracy") -> None:
    """Evaluations at steps 100, 200, ...; the last is kept, as `im` would have it or not."""
    lines = []
    for i, (score, value) in enumerate(zip(scores, figures, strict=True), start=1):
        where = {"step": 100 * i, "phase": "adapt"}
        values = {figure: value, "nll": 1.0}
        for split, content in (
            ("train", {"loss": 1.0}),
            ("validators", score),
            ("target_test", values),
            ("health", {}),
        ):
            lines.append(json.dumps({**where, "split": split, "values": content}) + "\n")
    (run / "metrics.jsonl").write_text("".join(lines))
    result = read_json(run / "result.json")
    result["selection"] |= {"step": 100 * len(figures), "candidates": len(figures)}
    result["metrics"]["target_test"] |= {figure: figures[-1]}
    write_json(run / "result.json", {**result, "validators": scores[-1]})


# Statistics


@pytest.mark.parametrize("n", [3, 5, 30, 2000])
def test_paired_t_is_scipy_s(n: int) -> None:
    rng = np.random.default_rng(n)
    a, b = rng.normal(0.3, 1, n), rng.normal(0, 2, n)
    assert paired_t((a - b).tolist()) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, rel=1e-9)


def test_paired_t_says_nothing_where_there_is_nothing_to_say() -> None:
    assert all(
        math.isnan(paired_t(each)) for each in ([], [1.0, 2.0], [0.0, 0.0, 0.0], [4.0, 4.0, 4.0], [0.1, 0.1, 0.1])
    )


def test_the_incomplete_beta_function_is_scipy_s() -> None:
    for a in (0.5, 1.0, 2.5, 50.0, 1e4):
        for b in (0.5, 3.0, 40.0):
            for x in (0.0, 1e-9, 0.1, 0.5, 0.9, 0.9999, 1.0):
                expected = scipy.special.betainc(a, b, x)
                assert incomplete_beta(a, b, x) == pytest.approx(expected, rel=1e-8, abs=1e-300), (a, b, x)


@pytest.mark.parametrize(("one", "two"), [(0, 0), (0, 1), (0, 6), (3, 3), (8, 21), (119, 7), (5000, 5200), (9000, 1)])
def test_mcnemar_is_the_binomial_test(one: int, two: int) -> None:
    expected = scipy.stats.binomtest(one, one + two, 0.5).pvalue if one + two else 1.0
    assert mcnemar(one, two) == pytest.approx(expected, rel=1e-8)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # x 3, 1 (made monotone), 2, 4
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    adjusted = holm([0.02, math.nan])  # a comparison that cannot be made counts
    assert adjusted[0] == 0.04 and math.isnan(adjusted[1])


def test_rank_correlations() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 8, 30).astype(float), rng.normal(size=30)
    y += x
    assert ranks(x.tolist()) == scipy.stats.rankdata(x).tolist()
    assert spearman(x.tolist(), y.tolist()) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    weights = top_weights(x.tolist(), y.tolist())
    dense = [scipy.stats.rankdata(v, method="dense") for v in (x, y)]
    assert weights == pytest.approx(np.maximum(*(d / d.max() for d in dense)) ** 2)
    covariance = np.cov(scipy.stats.rankdata(x), scipy.stats.rankdata(y), aweights=weights)
    expected = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
    assert spearman(x.tolist(), y.tolist(), top_weights) == pytest.approx(expected)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3])) and math.isnan(spearman([1, 2], [1, 2]))


# The best of a pair


BASE, CLEAR, NEAR = [0.70, 0.71, 0.69, 0.70], [0.90, 0.92, 0.89, 0.90], [0.90, 0.89, 0.90, 0.91]


def test_the_best_is_marked_where_a_test_supports_it(tmp_path: Path) -> None:
    write_seeds(tmp_path, "source_only", BASE)
    write_seeds(tmp_path, "dann", CLEAR)
    write_seeds(tmp_path, "coral", [0.80, 0.79, 0.81, 0.79])
    table = table_of(tmp_path)
    (best,) = table.best
    assert (best.row.method, best.supported) == ("dann", True)
    expected = {
        "source_only": scipy.stats.ttest_rel(CLEAR, BASE).pvalue,
        "coral": scipy.stats.ttest_rel(CLEAR, [0.80, 0.79, 0.81, 0.79]).pvalue,
    }
    assert {c.row.method: c.p for c in best.comparisons} == pytest.approx(expected)
    largest = max(expected.values())  # the smaller is doubled, the larger stays, or is raised to it
    assert max(c.adjusted for c in best.comparisons) == pytest.approx(max(largest, 2 * min(expected.values())))
    assert [c.seeds for c in best.comparisons] == [4, 4]
    assert table.supports(best.row, ("synth_digits", "digits"))


def test_no_best_where_another_is_as_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds(tmp_path, "source_only", BASE)
    write_seeds(tmp_path, "dann", CLEAR)
    write_seeds(tmp_path, "coral", NEAR)
    assert not any(best.supported for best in table_of(tmp_path).best)
    report.main([str(tmp_path)])
    assert "no best is marked" in capsys.readouterr().out


def test_the_comparisons_are_adjusted_for_their_number(tmp_path: Path) -> None:
    """Each alone has p = 0.04; five of them prove nothing."""
    spread = next(
        s for s in np.linspace(0.001, 0.1, 10000) if scipy.stats.ttest_1samp([0.1, 0.1 + s, 0.1 - s], 0).pvalue > 0.04
    )
    write_seeds(tmp_path, "dann", [0.9, 0.9, 0.9])
    for i in range(5):
        write_seeds(tmp_path, f"m{i}", [0.8, 0.8 - spread, 0.8 + spread])
        (best,) = table_of(tmp_path).best
        assert best.supported == (i == 0), i


def test_two_seeds_or_seeds_that_change_nothing_support_no_best(tmp_path: Path) -> None:
    write_seeds(tmp_path / "two", "source_only", [0.7, 0.7])
    write_seeds(tmp_path / "two", "dann", [0.9, 0.91])
    write_seeds(tmp_path / "same", "no_adaptation", [0.7, 0.7, 0.7])  # closed forms: each seed the same figure
    write_seeds(tmp_path / "same", "coral", [0.9, 0.9, 0.9])
    write_seeds(tmp_path / "other", "dann", [0.9, 0.91, 0.9])
    for seed in (7, 8, 9):
        write_run(tmp_path / f"other/source_only{seed}", 0.5, method="source_only", seed=seed)
    for name in ("two", "same", "other"):
        (best,) = table_of(tmp_path / name).best
        assert not best.supported, name


def test_more_labels_and_the_oracle_compete_for_no_best(tmp_path: Path) -> None:
    write_seeds(tmp_path, "source_only", BASE)
    write_seeds(tmp_path, "dann", [0.80, 0.82, 0.79, 0.80])
    write_seeds(tmp_path, "mme", [0.95, 0.96, 0.95, 0.96], config={"target_labels": 5})
    write_seeds(tmp_path, "mcc", [0.97, 0.98, 0.97, 0.96], config={"selection": "oracle"}, validator="oracle")
    write_seeds(tmp_path, "finetune", [0.98, 0.99, 0.98, 0.98], config={"target_labels": "all"})
    table = table_of(tmp_path)
    assert [str(best.row) for best in table.best if best.supported] == ["dann target_labels=0"]
    assert [str(row) for row in table.rows] == [
        "source_only target_labels=0",
        "dann target_labels=0",
        "mcc (oracle) target_labels=0",
        "mme target_labels=5",
        "finetune (bound)",
    ]


def test_in_regression_the_smallest_error_is_the_best(tmp_path: Path) -> None:
    write_seeds(tmp_path, "source_only", [0.70, 0.71, 0.69], kind="regression")
    write_seeds(tmp_path, "gp", [0.30, 0.32, 0.30], kind="regression")
    (best,) = table_of(tmp_path).best
    assert (best.row.method, best.supported) == ("gp", True)


# Averages, ranks, bounds, what is missing


def test_averages_and_ranks_by_hand(tmp_path: Path) -> None:
    for method, one, two in (("source_only", 0.6, 0.5), ("dann", 0.9, 0.7), ("mcc", 0.8, 0.7), ("coral", 0.7, None)):
        write_run(tmp_path / f"{method}1", one, method=method)
        if two is not None:
            write_run(tmp_path / f"{method}2", two, method=method, pair=OTHER)
    table = table_of(tmp_path)
    average = {row.method: value for row, value in table.average.items()}
    assert average == pytest.approx({"source_only": 55.0, "dann": 80.0, "mcc": 75.0})
    # mnist -> usps: dann and mcc share 1 and 2; coral, which has no figure there, has no rank anywhere
    assert {row.method: value for row, value in table.rank.items()} == {"source_only": 3.0, "dann": 1.25, "mcc": 1.75}


def test_the_best_average_is_tested_on_averages_of_each_seed(tmp_path: Path) -> None:
    for pair in (("synth_digits", "digits"), OTHER):
        write_seeds(tmp_path, "source_only", BASE, pair=pair)
        write_seeds(tmp_path, "dann", CLEAR, pair=pair)
    table = table_of(tmp_path)
    (best,) = (best for best in table.best if best.pair is None)
    assert best.supported and best.row.method == "dann"
    assert best.comparisons[0].p == pytest.approx(scipy.stats.ttest_rel(CLEAR, BASE).pvalue)


def test_a_chosen_table_compares_with_a_baseline_of_other_hyperparameters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says so."""
    for method, rate, score, accuracy in (
        ("source_only", 0.1, 1.0, 0.9), ("source_only", 0.01, 2.0, 0.8), ("dann", 0.1, 2.0, 0.7), ("dann", 0.01, 1.0, 0.95)
    ):  # fmt: skip
        run = write_run(tmp_path / f"{method}{rate}", accuracy, method=method, config={"optimizer.lr": rate})
        write_looks(run, [{"im": score}], [accuracy])
    for more, said in (
        ([], "the same settings, by"),
        (["--select", "im"], "the same settings, hyper-parameters apart, by"),
    ):
        report.main([str(tmp_path), *more])
        shown = capsys.readouterr().out
        assert f"↓ worse than source_only with {said} this figure" in shown
        assert "70.0 (1) ↓" in shown


def test_no_average_is_best_where_another_has_no_seed_on_every_pair(tmp_path: Path) -> None:
    write_seeds(tmp_path, "dann", [0.80, 0.81, 0.82, 0.83])
    write_seeds(tmp_path, "dann", [0.80, 0.82, 0.81, 0.83], pair=OTHER)
    write_seeds(tmp_path, "mcd", [0.70, 0.71, 0.73, 0.72])
    write_seeds(tmp_path, "mcd", [0.70, 0.71, 0.72, 0.73], pair=OTHER)
    table = table_of(tmp_path)
    assert table.supports(next(r for r in table.rows if r.method == "dann"), None)
    write_run(tmp_path / "one", 0.95, method="cdan", seed=0)
    write_run(tmp_path / "two", 0.95, method="cdan", seed=1, pair=OTHER)
    table = table_of(tmp_path)
    assert max(table.average, key=lambda row: table.average[row]).method == "cdan"
    assert not any(table.supports(row, None) for row in table.rows), "dann is not the best, and cdan has no test"


def test_errors_of_several_pairs_have_ranks_and_no_average(tmp_path: Path) -> None:
    for method, errors in (("source_only", (0.5, 20.0)), ("gp", (0.3, 30.0))):
        for pair, error in zip((("a", "b"), ("c", "d")), errors, strict=True):
            write_run(tmp_path / f"{method}{pair[0]}", error, method=method, pair=pair, kind="regression")
    table = table_of(tmp_path)
    assert table.average == {}
    assert {row.method: value for row, value in table.rank.items()} == {"source_only": 1.5, "gp": 1.5}


def test_a_bound_without_a_source_stands_in_the_columns_of_its_target(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.7, method="source_only")
    write_run(tmp_path / "b", 0.6, method="source_only", pair=("mnist", "digits"), config={"source": {"name": "mnist"}})
    write_run(tmp_path / "c", 0.5, method="source_only", pair=OTHER, config={"target": {"name": "usps"}})
    config = {"target_labels": "all", "source": {}}
    write_run(tmp_path / "bound", 0.95, method="finetune", pair=("none", "digits"), config=config)
    table = table_of(tmp_path)
    (row,) = (row for row in table.rows if row.bound)
    assert table.rows[-1] == row
    assert {pair for found, pair in table.cells if found == row} == {("mnist", "digits"), ("synth_digits", "digits")}
    assert table.pairs == [("mnist", "digits"), OTHER, ("synth_digits", "digits")]
    assert "target_labels=0" in table.common
    assert table.older == []


def test_alone_a_run_with_all_labels_bounds_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0.9, config={"target_labels": "all"})
    table = table_of(tmp_path)
    assert [str(row) for row in table.rows] == ["dann"] and "target_labels=all" in table.common


def unfinished(path: Path, state: str, **options: Any) -> Path:
    write_run(path, **options)
    (path / "result.json").unlink()
    write_json(path / "status.json", {"state": state, "error": "the loss became nan" if state == "failed" else None})
    return path


def test_failed_and_unfinished_cells_are_seen_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds(tmp_path, "source_only", [0.7, 0.72])
    unfinished(tmp_path / "f", "failed", method="dann", seed=0)
    unfinished(tmp_path / "g", "failed", method="dann", seed=1)
    unfinished(tmp_path / "r", "running", method="dann", seed=2)
    unfinished(tmp_path / "s", "failed", method="source_only", seed=2)
    unfinished(tmp_path / "t", "failed", method="mcd", config={"method.weight": 3.0})
    unfinished(tmp_path / "u", "failed", method="mcd", config={"method.weight": 1.0})
    (tmp_path / "x").mkdir()
    write_json(tmp_path / "x/status.json", {"state": "failed"})  # before its config.yaml: in the list alone
    report.main([str(tmp_path), "--format", "md"])
    lines = capsys.readouterr().out.splitlines()
    assert "| source_only | 71.0 ± 1.4 (2) +1 failed |" in lines
    assert "| dann | 2 failed, 1 unfinished |" in lines
    assert "| mcd method.weight=1 | 1 failed |" in lines and "| mcd method.weight=3 | 1 failed |" in lines
    report.main([str(tmp_path), "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["runs"], r["mean"], r["failed"], r["unfinished"]) for r in rows if r["method"] == "dann"] == [
        ("0", "", "2", "1")
    ]


# The choice of hyper-parameters


def write_sweep(folder: Path) -> None:
    """Two settings, two seeds, three evaluations: `im` likes the heavier weight, target labels the lighter."""
    for seed in (0, 1):
        light = write_run(folder / f"light{seed}", seed=seed, config={"method.weight": 0.1})
        write_looks(light, [{"im": 1.0, "snd": 5.0}, {"im": 1.2, "snd": 1.0}, {"im": 1.1, "snd": 2.0}], [0.9, 0.7, 0.8])
        heavy = write_run(folder / f"heavy{seed}", seed=seed, config={"method.weight": 3.0, "optimizer.lr": 0.1})
        write_looks(
            heavy, [{"im": 1.0, "snd": 0.0}, {"im": 1.3, "snd": 0.0}, {"im": 2.0, "snd": 3.0}], [0.5, 0.6, 0.65]
        )


def test_a_validator_chooses_hyper_parameters_and_checkpoints(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    write_run(tmp_path / "base", 0.4, method="source_only")
    write_looks(tmp_path / "base", [{"im": 0.1, "snd": 0.1}], [0.4])
    assert len(table_of(tmp_path).rows) == 3
    table = table_of(tmp_path, "im")
    assert [str(row) for row in table.rows] == ["source_only", "dann"]
    dann = table.rows[1]
    cell = table.cells[dann, ("synth_digits", "digits")]
    assert (cell.mean, len(cell.runs)) == (65.0, 2) and all(run.kept for run in cell.runs)
    choice = next(choice for choice in table.choices if choice.method == "dann")
    assert choice.chosen.settings == ("method.weight=3", "optimizer.lr=0.1")
    assert (choice.chosen.score, len(choice.compared)) == (2.0, 2)

    cell = table_of(tmp_path, "snd").cells[dann, ("synth_digits", "digits")]  # step 100 of the lighter
    assert cell.mean == pytest.approx(90.0)
    assert {(run.step, run.kept, run.figures["accuracy"]) for run in cell.runs} == {(100, False, 0.9)}
    assert "selection=snd" in table_of(tmp_path, "snd").common


def test_the_oracle_may_choose_and_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path)
    report.main([str(tmp_path), "--select", "oracle"])
    out = capsys.readouterr().out
    assert re.search(r"dann \(oracle\) +90\.0 ± 0\.0 \(2\) °", out)
    assert "upper bounds, not results" in out.splitlines()[2]
    report.main([str(tmp_path), "--select", "oracle", "--format", "json"])
    (table,) = json.loads(capsys.readouterr().out)["tables"]
    assert table["uses_target_labels"] and table["choices"][0]["uses_target_labels"] and table["rows"][0]["oracle"]


def test_points_are_compared_over_the_same_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path)
    lucky = write_run(tmp_path / "lucky", seed=0, config={"method.weight": 9.0})
    write_looks(lucky, [{"im": 99.0}], [0.1])
    unfinished(tmp_path / "lucky1", "failed", seed=1, config={"method.weight": 9.0})
    table = table_of(tmp_path, "im")
    (choice,) = table.choices
    assert choice.chosen.settings[0] == "method.weight=3"
    assert [point.note for point in choice.left_out] == ["has seeds 0, not 0 1"]
    assert len(table.missing[table.rows[0], table.pairs[0]].failed) == 1  # in the row of its method
    report.main([str(tmp_path), "--select", "im"])
    assert "65.0 ± 0.0 (2) +1 failed" in capsys.readouterr().out


def test_one_and_one_point_nought_are_one_setting(tmp_path: Path) -> None:
    for name, pair in (("a", ("synth_digits", "digits")), ("b", OTHER)):
        write_run(tmp_path / f"{name}1", pair=pair, config={"method.weight": 1 if name == "a" else 1.0})
        write_run(tmp_path / f"{name}2", pair=pair, config={"method.weight": 0.5})
    assert [str(row) for row in table_of(tmp_path).rows] == ["dann method.weight=0.5", "dann method.weight=1"]


def test_other_settings_are_no_hyper_parameters(tmp_path: Path) -> None:
    for name, config in {"a": {}, "b": {"target_labels": 5}, "c": {"backbone.widths": [8]}}.items():
        write_looks(write_run(tmp_path / name, config=config), [{"im": 1.0}], [0.5])
    assert len(table_of(tmp_path, "im").rows) == 3


def test_keys_that_the_method_searches_are_hyper_parameters(tmp_path: Path) -> None:
    for steps, score in ((100, 1.0), (200, 2.0)):
        run = write_run(
            tmp_path / str(steps), config={"trainer.steps": steps, "method.search": {"trainer.steps": [100, 200]}}
        )
        write_looks(run, [{"im": score}], [0.5])
    (choice,) = table_of(tmp_path, "im").choices
    assert choice.chosen.settings == ("trainer.steps=200",)


def test_runs_without_the_score_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path)
    write_looks(write_run(tmp_path / "old", method="coral"), [{"im": 1.0}], [0.5])
    report.main([str(tmp_path), "--select", "snd"])
    out = capsys.readouterr().out
    assert re.search(r"coral +1 unscored", out)
    assert f"without the score snd, and so left out\n  {tmp_path}/old" in out
    with pytest.raises(
        TransferError, match=r"--select sdn: no run has such a score\. Did you mean 'snd'.*im, snd, oracle"
    ):
        report.main([str(tmp_path), "--select", "sdn"])
    with pytest.raises(TransferError, match="the newest checkpoint has no score"):
        report.main([str(tmp_path), "--select", "last"])


def test_scores_that_were_computed_afterwards_choose_too(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    for name, score in {"light0": 0.8, "light1": 0.9, "heavy0": 0.1, "heavy1": 0.2}.items():
        write_json(tmp_path / name / "validators.json", {"scores": {"reverse": score}})
    (record, *_) = collect([tmp_path / "light0"])
    assert record.run is not None and record.run.scores["reverse"] == 0.8
    table = table_of(tmp_path, "reverse")
    (cell,) = table.cells.values()
    assert cell.mean == pytest.approx(80.0)  # of the kept weights, the last
    assert table.choices[0].chosen.score == pytest.approx(0.85) and "selection=im" in table.common


# The ranking of validators


def test_regret_and_correlation_by_hand(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (ranking,) = rank_validators(collect([tmp_path]))
    found = {ranked.name: ranked for ranked in ranking.ranked}
    # im takes 70 of 90 with the light weight, 65 of 65 with the heavy; two seeds each
    assert sorted(found["im"].checkpoints.regrets) == pytest.approx([0, 0, 20, 20])
    assert sorted(found["im"].checkpoints.correlations) == pytest.approx([-1, -1, 1, 1])  # 1.0 1.2 1.1 against 90 70 80
    assert found["im"].points.regrets == pytest.approx([90 - 65])
    assert sorted(found["snd"].checkpoints.regrets) == pytest.approx([0, 0, 0, 0])
    assert found["snd"].points.regrets == pytest.approx([0])
    assert sorted(found["last"].checkpoints.regrets) == pytest.approx([0, 0, 10, 10])
    assert sorted(found["random"].checkpoints.regrets) == pytest.approx([65 - 175 / 3] * 2 + [10, 10])
    assert (
        found["random"].points.regrets == pytest.approx([90 - (80 + 175 / 3) / 2]) and not found["last"].points.regrets
    )
    assert [ranked.name for ranked in ranking.ranked] == ["snd", "random", "im", "last"]


def test_regret_in_regression_is_relative(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", kind="regression", validator="source_val")
    write_looks(run, [{"source_val": 1.0}, {"source_val": 3.0}, {"source_val": 2.0}], [2.0, 3.0, 4.0], "rmse")
    (ranking,) = rank_validators(collect([tmp_path]))
    assert ranking.ranked[0].checkpoints.regrets == pytest.approx([50.0])  # 3 where 2 was possible


@pytest.mark.parametrize("form", ["text", "md", "csv", "latex", "json"])
def test_the_ranking_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str) -> None:
    write_sweep(tmp_path)
    report.main([str(tmp_path), "--validators", "--format", form])
    out = capsys.readouterr().out
    assert "random" in out
    if form == "json":
        (kind,) = json.loads(out)
        im = next(v for v in kind["validators"] if v["name"] == "im")
        assert im["checkpoints"] == pytest.approx(
            {
                "regret": 10.0,
                "n": 4,
                "spearman": 0.0,
                "weighted_spearman": im["checkpoints"]["weighted_spearman"],
                "n_correlations": 4,
            }
        )
    if form == "latex":
        check_latex(out, tmp_path)


def test_nothing_to_rank(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    with pytest.raises(TransferError, match="several checkpoints"):
        report.main([str(tmp_path), "--validators"])
    with pytest.raises(TransferError, match="leave out --select"):
        report.main([str(tmp_path), "--validators", "--select", "im"])


# Formats


def check_latex(text: str, folder: Path) -> None:
    """By rules that hold without an engine, and by pdflatex where there is one."""
    assert text.isascii()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    bare = re.sub(r"\\[&%$#_{}\\]", "", body)  # what is escaped counts for nothing
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0 and "%" not in bare and "#" not in bare
    assert not re.search(r"[_^]", re.sub(r"\$[^$]*\$|\\label\{[^}]*\}", "", bare))
    for tabular in re.findall(r"\\begin\{tabular\}\{(l r*|lr*)\}(.*?)\\end\{tabular\}", body, re.DOTALL):
        rows = [line for line in tabular[1].splitlines() if line.endswith("\\\\")]
        assert rows and all(len(re.findall(r"(?<!\\)&", row)) == len(tabular[0]) - 1 for row in rows)
    if shutil.which("pdflatex") is None:
        return
    document = f"\\documentclass{{article}}\\usepackage{{booktabs}}\\begin{{document}}\n{text}\\end{{document}}\n"
    (folder / "table.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "table.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_latex_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds(tmp_path, "source_only", BASE, pair=("a_b & c", "50%{x}"))
    write_seeds(tmp_path, "dann", CLEAR, pair=("a_b & c", "50%{x}"))
    write_seeds(tmp_path, "mcc", [0.5, 0.4, 0.5, 0.5], pair=("a_b & c", "50%{x}"))
    write_seeds(
        tmp_path,
        "coral",
        [0.5, 0.4, 0.5, 0.5],
        pair=("a_b & c", "50%{x}"),
        config={"backbone.weights": "~/é$^#\\虫.pt"},
    )
    write_seeds(tmp_path, "finetune", [0.99], pair=("a_b & c", "50%{x}"), config={"target_labels": "all"})
    unfinished(tmp_path / "f", "failed", method="mcd", pair=("a_b & c", "50%{x}"))
    report.main([str(tmp_path), "--format", "latex"])
    out = capsys.readouterr().out
    check_latex(out, tmp_path)
    assert r"\textbf{90.2 $\pm$ 1.3 (4)}" in out
    assert r" & a\_b \& c" in out and r" & $\to$ 50\%\{x\}" in out  # two lines: a column as wide as its figures
    assert r"\texttt{selection=im}" in out and r"\texttt{target\_labels=0}" in out  # the rule and the budget
    assert "p \\textless{} 0.05" in out and "Holm" in out
    assert r"$\downarrow$ worse than source\_only with the same settings" in out
    order = [out.index(text) for text in ("\nsource\\_only", "\ndann", "\nmcd", "\nfinetune (bound)", r"\bottomrule")]
    assert order == sorted(order)


def test_escaping() -> None:
    assert escape(r"a_b^c~\{x}%$#&<|>") == (
        r"a\_b\textasciicircum{}c\textasciitilde{}\textbackslash{}\{x\}\%\$\#\&\textless{}\textbar{}\textgreater{}"
    )
    assert escape("é 虫 a -> b") == r"e U+866B a $\to$ b"


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds(tmp_path, "source_only", BASE)
    write_seeds(tmp_path, "dann", CLEAR)
    write_run(tmp_path / "one", 0.5, method="coral")
    unfinished(tmp_path / "f", "failed", method="mcd")
    report.main([str(tmp_path), "--format", "json"])
    content = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    (table,) = content["tables"]
    by_row = {table["rows"][cell["row"]]["name"]: cell for cell in table["cells"]}
    assert (
        by_row["dann"]["mean"] == pytest.approx(90.25) and not by_row["dann"]["best"]
    )  # coral's one seed proves nothing
    assert by_row["coral"]["std"] is None and by_row["mcd"]["failed"] == [str(tmp_path / "f")]
    assert [run["seed"] for run in by_row["dann"]["runs"]] == [0, 1, 2, 3]
    assert by_row["dann"]["figures"]["nll"] == {"mean": 0.4123, "std": pytest.approx(0), "n": 4}
    assert by_row["dann"]["negative_transfer"]["baseline"] == "source_only"
    p_values = {table["rows"][c["row"]]["name"]: c["p"] for c in table["tests"][0]["comparisons"]}
    assert p_values["source_only"] == pytest.approx(scipy.stats.ttest_rel(CLEAR, BASE).pvalue)
    assert p_values["coral"] is None
    assert content["failed"] == [{"path": str(tmp_path / "f"), "error": "the loss became nan"}]


def test_the_best_is_bold_in_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_seeds(tmp_path, "source_only", BASE)
    write_seeds(tmp_path, "dann", CLEAR)
    report.main([str(tmp_path), "--format", "md"])
    out = capsys.readouterr().out
    assert "| dann | **90.2 ± 1.3 (4)** |" in out and "| source_only | 70.0 ± 0.8 (4) |" in out
    assert "Bold: the best of its column, supported by a paired t-test over common seeds" in out


# Reading config.yaml by blocks


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: {c: [1, 2]}\nplugins:\n- x\n- y\ntext: 'two\n  lines'\n",
        "# by hand\na: 1\n\n# more\nb:\n  c: 2\n",
        "a: &one {x: 1}\nb: *one\n",
        "---\na: 1\nb: 2\n",
        "a: 1\na: 2\n",
        "a: |\n  b: 1\n\n  c\nd: 3\n",
        "{a: 1, b: 2}\n",
    ],
)
def test_a_configuration_reads_as_yaml_does(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path / "config.yaml") == yaml.safe_load(text)
    (tmp_path / "config.yaml").write_text(text.replace("1", "7"))
    assert read_config(tmp_path / "config.yaml") == yaml.safe_load(text.replace("1", "7"))


@pytest.mark.parametrize("text", ["", "- a\n", "a: [1\n", "word\n", "a: 1\n b: 2\n"])
def test_a_damaged_configuration_is_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path / "config.yaml") == {}
