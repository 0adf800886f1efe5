"""Every method on one pair as a Markdown table, with its gain over training on the source alone, seed by seed.

    python benchmarks/comparison.py outputs/runs synth_digits digits > table.md

It reads finished runs of seeds 0 to 4 and runs nothing. They are made by

    transfer run -m method=source_only,dann,cdan,... seed=0,1,2,3,4                        (and with target_labels=5)
    transfer run -m seed=S backbone.weights=RUN/checkpoints/best.pt method=tca,coral,...   RUN: source_only of that seed
    transfer run -m seed=S source=none source_model=RUN target_labels=5 method=finetune,lp_ft,...
    transfer run -m label_space=partial 'subset.target_classes=[0,1,2,3,4]' method=source_only,pada,... seed=0,1,2,3,4
    transfer run -m label_space=open 'subset.source_classes=[0,1,2,3,4]' method=source_only,osbp,... seed=0,1,2,3,4

A gain is the mean over seeds of the difference to the baseline with the same seed and label budget, with its standard error;
`helped` and `hurt` are gains beyond two of them. Seconds are the median over seeds, of one thread.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transfer_cli.report.runs import collect


@dataclass(frozen=True)
class One:
    """A run: accuracy in percent, the label-free score, seconds of fitting."""

    method: str
    seed: int
    figure: float
    im: float
    seconds: float
    settings: dict[str, Any]


def read(folder: Path, source: str, target: str) -> list[One]:
    found = []
    for run in (record.run for record in collect([folder]) if record.run is not None):
        if run.pair not in ((source, target), ("none", target)):
            continue
        result = json.loads((run.path / "result.json").read_text())
        settings = {k: v for owner in run.settings.values() for k, v in owner.items()}
        seconds = float(result["seconds"]["fit"])
        found.append(One(run.method, run.seeds[0], run.figure, run.scores.get("im", math.nan), seconds, settings))
    return found


def pretrained(run: One) -> bool:
    """Whether it starts from another run's network."""
    return run.settings.get("backbone.weights", "none") != "none" or run.settings.get("source_model") is not None


def frozen(run: One) -> bool:
    return run.settings.get("backbone.weights", "none") != "none"


def spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def table(runs: Iterable[One], baseline: str) -> list[str]:
    """Markdown rows, the best first."""
    by_method: dict[str, dict[int, One]] = defaultdict(dict)
    for run in runs:
        if run.seed in by_method[run.method]:
            sys.exit(
                f"{run.method}, seed {run.seed}: several runs of other settings; leave one configuration in the folder."
            )
        by_method[run.method][run.seed] = run
    start = by_method.get(baseline, {})
    lines = ["| method | accuracy | runs | gain | | `im` | seconds |", "|---|---|---|---|---|---|---|"]
    for method, seeds in sorted(
        by_method.items(), key=lambda item: -statistics.fmean(r.figure for r in item[1].values())
    ):
        gains = [run.figure - start[seed].figure for seed, run in seeds.items() if seed in start]
        gain, verdict = "", ""
        if len(gains) > 1 and method != baseline:
            error = statistics.stdev(gains) / math.sqrt(len(gains))
            mean = statistics.fmean(gains)
            gain = f"{mean:+.1f} ± {error:.1f}"
            verdict = "helped" if mean > 2 * error else "hurt" if mean < -2 * error else ""
        figures = [run.figure for run in seeds.values()]
        im = statistics.fmean(run.im for run in seeds.values())
        seconds = statistics.median(run.seconds for run in seeds.values())
        lines.append(
            f"| `{method}` | {spread(figures)} | {len(figures)} | {gain} | {verdict} | {im:.2f} | {seconds:.0f} |"
        )
    return lines


def main(folder: str, source: str, target: str) -> None:
    runs = [run for run in read(Path(folder), source, target) if run.seed < 5 and run.settings.get("data_seed", 0) == 0]

    def those(label_space: str, labels: int, chosen: Callable[[One], bool]) -> list[One]:
        fits = ("label_space", label_space), ("target_labels", labels)
        return [r for r in runs if all(r.settings[k] == v for k, v in fits) and chosen(r)]

    plain = those("closed", 0, lambda r: not pretrained(r))
    sections = {
        "No target label": table(plain, "source_only"),
        "No target label, on frozen features of the `source_only` network": table(
            those("closed", 0, frozen), "no_adaptation"
        ),
        "Five target labels a class": table(those("closed", 5, lambda r: not frozen(r)), "source_only"),
        "Partial: the target has five of ten classes": table(those("partial", 0, lambda r: True), "source_only"),
        "Open: the source has five of ten classes": table(those("open", 0, lambda r: True), "source_only"),
    }
    for title, lines in sections.items():
        print(f"## {title}\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
