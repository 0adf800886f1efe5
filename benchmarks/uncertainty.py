"""Uncertainty of transfer on few labels: Gaussian processes, a head with a source's prior, calibration under a shift, real pairs.

    python benchmarks/uncertainty.py OUTPUTS [processes] [classification] [strangers] [real] [sequences] [priors] > table.md

Every figure is the mean over ten values of `data_seed` (of `seed` too where a network is trained; five for strangers and the real
pairs, three for sequences and priors) with its standard error. RMSE, CRPS and widths are in standard deviations of the target test
labels, those of Friedman's functions in their own unit. Finished runs are found again, so a second start prints the tables.
`strangers`, `real` and `sequences` read the data folder, the others need none.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

MODES = ("scratch", "source", "pooled", "hyper", "icm", "sequential")


class Pair(NamedTuple):
    """A row's name, what chooses it on the command line, and how runs call its domains; `unit`: labels keep their own unit."""

    name: str
    options: tuple[str, ...]
    source: str
    target: str
    unit: bool = False


def domains(name: str, source: str, target: str) -> tuple[str, ...]:
    return (f"source={name}", f"target={name}", f"source.domain={source}", f"target.domain={target}")


PAIRS = (
    Pair("diabetes, women → men", ("diabetes_sex",), "diabetes_female", "diabetes_male"),
    Pair("diabetes, men → women", ("diabetes_sex_back",), "diabetes_male", "diabetes_female"),
    Pair("diabetes, normal → high BMI", ("diabetes_bmi",), "diabetes_low_bmi", "diabetes_high_bmi"),
    Pair("Friedman, close", ("friedman_close",), "friedman_source", "friedman_close", True),
    Pair("Friedman, far", ("friedman_far",), "friedman_source", "friedman_far", True),
    Pair("Friedman, unrelated", ("friedman_unrelated",), "friedman_source", "friedman_unrelated", True),
)
REAL = (
    Pair("wine, red → white", domains("wine", "red", "white"), "wine_red", "wine_white"),
    Pair("wine, white → red", domains("wine", "white", "red"), "wine_white", "wine_red"),
    Pair("schools, mixed → girls", domains("school", "mixed", "girls"), "school_mixed", "school_girls"),
    Pair("C-MAPSS, FD001 → FD003", domains("cmapss", "FD001", "FD003"), "cmapss_FD001", "cmapss_FD003"),
    Pair("GB1, single → more mutations", domains("gb1", "single", "rest"), "gb1_single", "gb1_rest"),
    Pair("ESOL → FreeSolv", ("source=esol_smiles", "target=freesolv_smiles"), "esol_smiles", "freesolv_smiles"),
    Pair("FreeSolv → ESOL", ("source=freesolv_smiles", "target=esol_smiles"), "freesolv_smiles", "esol_smiles"),
)


class Run(NamedTuple):
    result: dict[str, Any]
    config: dict[str, Any]
    folder: Path


def transfer(outputs: Path, *options: str) -> None:
    command = [sys.executable, "-m", "transfer_cli", "run", "-m", *options, f"outputs={outputs}", "threads=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def finished(outputs: Path) -> list[Run]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    paths = [path.parent for path in sorted(outputs.glob("runs/*/*/result.json"))]
    read = [
        (json.loads((p / "result.json").read_text()), yaml.load((p / "config.yaml").read_text(), loader)) for p in paths
    ]
    return [Run(result, config, path) for (result, config), path in zip(read, paths, strict=True)]


def draws(n: int) -> str:
    return "data_seed=" + ",".join(map(str, range(n)))


def told(values: Iterable[float]) -> str:
    """Mean and standard error."""
    several = list(values)
    mean = f"{statistics.fmean(several):.3f}"
    return f"{mean} ± {statistics.stdev(several) / math.sqrt(len(several)):.3f}" if len(several) > 1 else mean


def deviation(run: Run) -> float:
    """Of the target test labels."""
    with np.load(run.folder / "predictions.npz") as arrays:
        return float(arrays["target_test_labels"].std())


def process_table(runs: Sequence[Run], pairs: Sequence[Pair], labels: int, modes: Sequence[str]) -> None:
    head = ("pair", "mode", "RMSE", "NLL", "CRPS", "95 % coverage", "width", "weight of the transfer")
    print(f"\n## Gaussian processes, {labels} target labels\n")
    print(f"| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n")
    for pair in pairs:
        for mode in modes:
            bare, guard = mode.removesuffix(", guarded"), "evidence" if mode.endswith("guarded") else "none"
            chosen = [
                run
                for run in runs
                if (run.result["source"], run.result["target"]) == (pair.source, pair.target)
                and run.result["method"] == "gp"
                and run.config["target_labels"] == labels
                and (run.config["method"]["mode"], run.config["method"]["guard"]) == (bare, guard)
            ]
            if not chosen:
                continue
            scales = [1.0 if pair.unit else deviation(run) for run in chosen]
            metrics = list(zip([run.result["metrics"]["target_test"] for run in chosen], scales, strict=True))
            weights = [r.result["fit"]["transfer_weight"] for r in chosen if "transfer_weight" in r.result["fit"]]
            columns = [
                told(m["rmse"] / scale for m, scale in metrics),
                told(m["nll"] - math.log(scale) for m, scale in metrics),
                told(m["crps"] / scale for m, scale in metrics),
                told(m["coverage_95"] for m, _ in metrics),
                told(m["width_95"] / scale for m, scale in metrics),
                told(weights) if weights else "",
            ]
            print(f"| {' | '.join([pair.name, mode, *columns])} |")


def processes(outputs: Path) -> None:
    every = "experiment=" + ",".join(pair.options[0] for pair in PAIRS)
    transfer(outputs, every, "sweep=gp_modes", draws(10))
    transfer(outputs, "experiment=friedman_unrelated", "target_labels=50", "method.mode=scratch,sequential", draws(10))
    transfer(outputs, "experiment=friedman_unrelated", "target_labels=50", "method.guard=evidence", draws(10))
    runs = finished(outputs)
    process_table(runs, PAIRS, 20, (*MODES, "sequential, guarded"))
    process_table(runs, PAIRS[-1:], 50, ("scratch", "sequential", "sequential, guarded"))


def classes(low: int, high: int) -> str:
    return "[" + ",".join(f"'{c}'" for c in range(low, high)) + "]"


DIGITS = ("source=digits", "target=digits")


def new_digits(outputs: Path, seed: int) -> tuple[str, ...]:
    """Ten labels a class of 5-9, on the frozen network that learnt 0-4; it is trained where it is not there."""
    seeds = (f"seed={seed}", f"data_seed={seed}")
    known = (f"subset.source_classes={classes(0, 5)}", f"subset.target_classes={classes(0, 5)}", "trainer.steps=600")
    new = (f"subset.source_classes={classes(0, 5)}", f"subset.target_classes={classes(5, 10)}", "label_space=separate")
    transfer(outputs, *DIGITS, "method=source_only", *known, *seeds)
    trained = [
        run for run in finished(outputs) if run.config["subset"]["source_classes"] and run.result["seed"] == seed
    ]
    network = next(run.folder for run in trained if run.result["method"] == "source_only")
    return (*DIGITS, *new, "target_labels=10", f"backbone.weights={network}/checkpoints/best.pt", *seeds)


def classification(outputs: Path) -> None:
    for seed in range(10):
        transfer(outputs, *new_digits(outputs, seed), "method=niw_lda,dirichlet_gp")
        turned = ("target.rotate=30", "method=source_only", "calibration_share=1", "trainer.steps=600")
        seeds = (f"seed={seed}", f"data_seed={seed}")
        transfer(outputs, *DIGITS, *turned, *seeds, "target_labels=5", "calibration=ts,ts_map,vector")
    print("\n## Classification, 50 target labels\n")
    print("| task | | accuracy | NLL | ECE |", "|---|---|---|---|---|", sep="\n")
    runs = [run for run in finished(outputs) if run.result["target"] == "digits" and not run.config["ood"]]
    for method in ("niw_lda", "dirichlet_gp"):
        row(
            "digits 0-4 → 5-9",
            method,
            [r.result["metrics"]["target_test"] for r in runs if r.result["method"] == method],
        )
    by_kind = {k: [r.result for r in runs if r.config["calibration"] == k] for k in ("ts", "ts_map", "vector")}
    task = "digits → the same turned by 30°"
    row(task, "source_only", [result["calibration"]["before"]["target_test"] for result in by_kind["ts"]])
    for kind, results in by_kind.items():
        row(task, f"source_only calibration={kind}", [result["metrics"]["target_test"] for result in results])


def strangers(outputs: Path) -> None:
    """Photographs, shrunk and grey, among digits."""
    methods = ("no_adaptation", "bayes_head", "niw_lda", "dirichlet_gp")
    for seed in range(5):
        transfer(outputs, *new_digits(outputs, seed), f"method={','.join(methods)}", "ood=cifar10_jpg")
    print("\n## Strangers (CIFAR-10) among digits 5-9, 50 labels\n")
    print("| | accuracy | AUROC | accepted where 95 % of digits are |", "|---|---|---|---|", sep="\n")
    runs = [run.result for run in finished(outputs) if run.config["ood"]]
    for method in methods:
        metrics = [r["metrics"] for r in runs if r["method"] == method]
        figures = [
            [m["target_test"]["accuracy"] for m in metrics],
            *([m["ood"][k] for m in metrics] for k in ("auroc", "fpr95")),
        ]
        print(f"| `{method}` | {' | '.join(told(values) for values in figures)} |")


def row(task: str, what: str, metrics: Sequence[dict[str, float]]) -> None:
    print(f"| {task} | `{what}` | {' | '.join(told(m[key] for m in metrics) for key in ('accuracy', 'nll', 'ece'))} |")


def real(outputs: Path) -> None:
    common = ("backbone=identity", "method=gp", "target_labels=50", "subset.source=1500", "subset.test=2000", draws(5))
    for pair in REAL:
        transfer(outputs, *pair.options, *common, "method.mode=scratch,source,pooled,sequential")
        transfer(outputs, *pair.options, *common, "method.guard=evidence")
    heart = (*domains("heart", "cleveland", "hungarian"), "backbone=identity", draws(5))
    transfer(outputs, *heart, "target_labels=10", "method=no_adaptation,coral,niw_lda,bayes_head,dirichlet_gp")
    process_table(finished(outputs), REAL, 50, ("scratch", "source", "pooled", "sequential", "sequential, guarded"))
    print("\n## Heart disease, Cleveland → Hungary, 10 labels a class\n")
    print("| task | | accuracy | NLL | ECE |", "|---|---|---|---|---|", sep="\n")
    runs = [run.result for run in finished(outputs) if run.result["target"] == "heart_hungarian"]
    for method in ("no_adaptation", "coral", "niw_lda", "bayes_head", "dirichlet_gp"):
        row("heart", method, [result["metrics"]["target_test"] for result in runs if result["method"] == method])


def sequences(outputs: Path) -> None:
    few = ("backbone=identity", "subset.source=1500", "subset.test=2000", draws(3))
    methods = ("no_adaptation", "niw_lda", "dirichlet_gp")
    strings = domains("promoters", "mouse", "arabidopsis")
    transfer(outputs, *strings, *few, "target_labels=10", f"method={','.join(methods)}")
    svgp = (
        "method=svgp",
        "method.features=frozen",
        "trainer.steps=500",
        "trainer.batch_size=16",
        "trainer.eval_every=500",
    )
    transfer(outputs, *domains("gb1", "single", "rest"), *few, "target_labels=50", *svgp)
    runs = finished(outputs)
    table("Promoters, mouse → Arabidopsis, 10 labels a class", runs, "promoters_arabidopsis", methods)
    print("\n## GB1, single → more mutations, 50 labels\n")
    print("| | RMSE | NLL | CRPS | 95 % coverage | width |", "|---|---|---|---|---|---|", sep="\n")
    chosen = [run for run in runs if run.result["target"] == "gb1_rest" and run.result["method"] == "svgp"]
    scaled = [(run.result["metrics"]["target_test"], deviation(run)) for run in chosen]
    columns = [
        told(m["rmse"] / s for m, s in scaled),
        told(m["nll"] - math.log(s) for m, s in scaled),
        told(m["crps"] / s for m, s in scaled),
        told(m["coverage_95"] for m, _ in scaled),
        told(m["width_95"] / s for m, s in scaled),
    ]
    print(f"| `svgp` | {' | '.join(columns)} |")


def priors(outputs: Path) -> None:
    """A prior of the whole backbone from its training on the source, beside two that know less."""
    methods = ("finetune", "l2_sp", "source_prior")
    new = (f"subset.source_classes={classes(0, 5)}", f"subset.target_classes={classes(5, 10)}", "label_space=separate")
    small = ("backbone.widths=[8,16]", "backbone.features=32", "trainer.steps=300")
    moons = ("source=two_moons", "target=two_moons", "target.angle=40", "backbone=mlp", "trainer.steps=300")
    for seed in range(3):
        own = (f"method={','.join(methods)}", f"seed={seed}", f"data_seed={seed}")
        transfer(outputs, "source=digits", "target=digits", *new, *small, "target_labels=5", *own)
        transfer(outputs, *moons, "target_labels=3", *own)
    runs = finished(outputs)
    small_ones = [run for run in runs if run.config["backbone"].get("widths") == [8, 16]]
    table("Digits 0-4 → 5-9, 5 labels a class, a small network", small_ones, "digits", methods)
    table("Two moons → turned by 40°, 3 labels a class", runs, "two_moons", methods)


def table(title: str, runs: Sequence[Run], target: str, methods: Sequence[str]) -> None:
    print(f"\n## {title}\n")
    print("| task | | accuracy | NLL | ECE |", "|---|---|---|---|---|", sep="\n")
    for method in methods:
        found = [
            run.result for run in runs if run.result["method"] == method and run.result["target"].startswith(target)
        ]
        row(target.split("_")[0], method, [result["metrics"]["target_test"] for result in found])


SECTIONS = {
    "processes": processes,
    "classification": classification,
    "strangers": strangers,
    "real": real,
    "sequences": sequences,
    "priors": priors,
}

if __name__ == "__main__":
    for section in sys.argv[2:] or SECTIONS:
        SECTIONS[section](Path(sys.argv[1]).resolve())
