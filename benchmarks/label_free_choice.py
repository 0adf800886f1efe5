"""Chooses among settings by a label-free score alone: never reads a figure that target labels had a part in.

    transfer run -m experiment=mnist_usps,usps_mnist method=deep_coral method.weight=10,100,1000 seed=300,301 \\
        outputs=outputs/choice
    python benchmarks/label_free_choice.py outputs/choice [--score im]

For each pair the settings are ranked by their mean score over seeds; the choice is the best mean rank over the pairs.
This is how the defaults that the documentation calls "chosen without target labels" were chosen.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

OWNERS = ("method", "augment", "optimizer")


def flat(config: dict[str, Any]) -> dict[str, str]:
    keys = {f"{owner}.{key}": value for owner in OWNERS for key, value in config[owner].items() if key != "search"}
    return {key: json.dumps(value) for key, value in keys.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--score", default="im", help="one of result.json's validators")
    arguments = parser.parse_args()
    scores: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))  # pair, setting
    runs = []
    for path in sorted(arguments.folder.rglob("result.json")):
        result = json.loads(path.read_text())
        validators = result["validators"]  # the only figures that are looked at
        runs.append(
            (
                f"{result['source']} -> {result['target']}",
                flat(yaml.safe_load(path.with_name("config.yaml").read_text())),
                validators,
            )
        )
    varied = sorted(
        {key for _, one, _ in runs for key in one if any(one[key] != other.get(key) for _, other, _ in runs)}
    )
    for pair, settings, validators in runs:
        name = " ".join(f"{key}={settings[key]}" for key in varied if key in settings)
        scores[pair][name].append((validators[arguments.score], validators["source_val"]))
    ranks: dict[str, list[int]] = defaultdict(list)
    for pair, by_setting in scores.items():
        means = {name: statistics.mean(s for s, _ in found) for name, found in by_setting.items()}
        print(f"\n{pair}: mean {arguments.score} (source_val), best first")
        for rank, name in enumerate(sorted(means, key=lambda n: -means[n]), 1):
            found = by_setting[name]
            ranks[name].append(rank)
            print(f"  {means[name]:8.4f}  ({statistics.mean(v for _, v in found):8.4f})  n={len(found)}  {name}")
    print("\nmean rank over the pairs")
    for name in sorted(ranks, key=lambda n: statistics.mean(ranks[n])):
        print(f"  {statistics.mean(ranks[name]):5.2f}  {name}")


if __name__ == "__main__":
    main()
