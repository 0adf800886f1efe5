"""How good each validator's choice of checkpoint would have been, from the looks that runs wrote down: no run is repeated.

    transfer run -m method=source_only,dann,deep_coral,mcc,entropy_min,cdan trainer.steps=200 trainer.eval_every=20
    python benchmarks/validator_regret.py [FOLDER]

Of each validator: the mean over runs of its regret (points of target accuracy between its choice and the run's best look), and of
the rank correlation of its scores with target accuracy. The labels are looked at to judge, never to choose.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from scipy.stats import spearmanr


def main() -> None:
    regret, correlation = defaultdict(list), defaultdict(list)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/runs")
    for file in sorted(folder.rglob("metrics.jsonl")):
        looks: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
        for line in file.read_text().splitlines():
            event = json.loads(line)
            if event["split"] in ("validators", "target_test"):
                looks[event["step"]][event["split"]] = event["values"]
        whole = [look for look in looks.values() if len(look) == 2]
        accuracy = [100 * look["target_test"]["accuracy"] for look in whole]
        if len(whole) < 3:
            continue
        regret["last"].append(max(accuracy) - accuracy[-1])
        for name in whole[0]["validators"]:
            scores = [look["validators"][name] for look in whole]
            best = max(range(len(scores)), key=lambda i: (scores[i], i))
            regret[name].append(max(accuracy) - accuracy[best])
            found = float(spearmanr(scores, accuracy).statistic) if len(set(scores)) > 1 else 0.0
            correlation[name].append(found)
    runs = len(regret["last"])
    print(f"| validator | regret, points | worst | rank correlation | ({runs} runs)\n|---|---|---|---|")
    for name in sorted(regret, key=lambda n: statistics.mean(regret[n])):
        mean = statistics.mean(correlation[name]) if correlation[name] else None
        shown = "" if mean is None else f"{mean:+.2f}"
        print(f"| `{name}` | {statistics.mean(regret[name]):.1f} | {max(regret[name]):.1f} | {shown} |")


if __name__ == "__main__":
    main()
