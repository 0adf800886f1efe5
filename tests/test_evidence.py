"""What the README claims, run in full. Minutes to an hour long: `make slow`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

Transfer = Callable[..., Outcome]


def accuracies(pair: str, method: str) -> list[float]:
    """Target-test accuracies in percent of every seed, of the checkpoints chosen without target labels."""
    results = [json.loads(p.read_text()) for p in Path("outputs/runs", pair).glob(f"{method}-*/result.json")]
    assert results and not any(r["selection"]["uses_target_labels"] for r in results)
    return [100 * r["metrics"]["target_test"]["accuracy"] for r in results]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_dann_beats_a_tuned_baseline_on_the_default_pair(transfer: Transfer) -> None:
    assert transfer("run", "-m", "method=source_only,dann", "seed=0,1,2,3,4").code == 0
    baseline, adapted = (accuracies("synth_digits-digits", m) for m in ("source_only", "dann"))
    assert len(baseline) == len(adapted) == 5
    assert statistics.mean(adapted) - statistics.mean(baseline) >= 5
    for path in Path("outputs/runs").rglob("result.json"):  # the baseline is no straw man on its own ground
        assert json.loads(path.read_text())["metrics"]["source_test"]["accuracy"] > 0.98


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(("pair", "lowest", "highest"), [("mnist-usps", 75, 88), ("usps-mnist", 57, 75)])
def test_digits_under_the_published_protocol(
    transfer: Transfer, data_root: Path, pair: str, lowest: float, highest: float
) -> None:
    experiment = f"experiment={pair.replace('-', '_')}"
    # the default weight of deep CORAL, chosen without target labels, does not help from MNIST to USPS
    coral = ["method=deep_coral", "method.layer=features", "method.weight=1000"]
    for chosen in (["method=source_only,dann"], coral):
        assert transfer("run", "-m", experiment, *chosen, "seed=0,1,2", f"data_root={data_root}").code == 0
    baseline = statistics.mean(accuracies(pair, "source_only"))
    assert lowest <= baseline <= highest
    for method in ("dann", "deep_coral"):
        assert statistics.mean(accuracies(pair, method)) > baseline


@pytest.mark.slow
def test_a_compiled_run_agrees_with_an_eager_one(transfer: Transfer) -> None:
    from conftest import SMALL

    eager, compiled = (transfer("run", *SMALL, *extra).run for extra in ([], ["trainer.compile=true"]))
    assert eager != compiled
    figures = [
        json.loads((run / "result.json").read_text())["metrics"]["source_test"]["nll"] for run in (eager, compiled)
    ]
    assert figures[0] == pytest.approx(figures[1], rel=0.05)
    assert transfer("evaluate", str(compiled)).code == 0
