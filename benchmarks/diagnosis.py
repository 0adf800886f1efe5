"""Does the advice of `transfer diagnose` point to what works? Pairs with a known kind of shift, and three real ones.

    python benchmarks/diagnosis.py [NAME...]          (TRANSFER_DATA for the real pairs; some minutes)

For each pair the rules that apply, and the score on the target test set (accuracy, in regression R²) of methods on frozen features,
each of which stands for one piece of advice. Scores are for the reader; no rule has seen them.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from transfer_cli.build import build_method, pose_problem, training_labels
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.hydra_glue import composed
from transfer_cli.data.batching import in_order
from transfer_cli.data.inputs import Inputs
from transfer_cli.diagnose import diagnose
from transfer_cli.evaluation.metrics import score
from transfer_cli.methods.base import Method
from transfer_cli.methods.phases import Features, FeatureTask

METHODS = ("no_adaptation", "mean_match", "coral", "ot", "jdot", "kmm")
CPU = torch.device("cpu")
IDENTITY, HOG = "backbone=identity", "backbone=hog"
DIGITS = ["source=digits", "target=digits", "data_seed=0"]
MOONS = ["source=two_moons", "target=two_moons", "source.n=400", "target.n=400", "target.draw=1", IDENTITY]
FRIEDMAN = ["source=friedman", "target=friedman", IDENTITY, "head=ridge"]


def gaussians(folder: Path) -> dict[str, list[str]]:
    """Three classes in eight dimensions, 900 samples a domain, the target drawn anew and changed in one way."""
    draw = np.random.default_rng(0)
    centres = 2.0 * draw.standard_normal((3, 8))
    stretch = np.exp(draw.uniform(-1.2, 1.2, 8))
    rotation, _ = np.linalg.qr(draw.standard_normal((8, 8)))
    each = 2.5 * draw.standard_normal((3, 8))

    def sample(shares: list[float]) -> tuple[np.ndarray, np.ndarray]:
        y = draw.choice(3, 900, p=shares)
        return centres[y] + draw.standard_normal((900, 8)), y

    even = [1 / 3] * 3
    made = {"source": sample(even), "none": sample(even), "labels": sample([0.8, 0.15, 0.05])}
    for name in ("mean", "covariance", "rotation", "classes"):
        x, y = sample(even)
        middle = x.mean(0)
        changed = {
            "mean": x + 2.5,
            "covariance": (x - middle) * stretch + middle,
            "rotation": (x - middle) @ rotation + middle,
            "classes": x + each[y],
        }[name]
        made[name] = changed, y
    for name, (x, y) in made.items():
        np.savez(folder / f"{name}.npz", x=x.astype(np.float32), y=y)
    source = ["source=arrays", f"source.path={folder}/source.npz", "target=arrays", IDENTITY]
    return {f"gaussians, {name}": [*source, f"target.path={folder}/{name}.npz"] for name in made if name != "source"}


def pairs(folder: Path) -> dict[str, list[str]]:
    known = {
        **gaussians(folder),
        "two_moons, drawn anew": MOONS,
        "two_moons, 30 degrees": [*MOONS, "target.angle=30"],
        "two_moons, 60 degrees": [*MOONS, "target.angle=60"],
        "digits, 15 degrees (hog)": [*DIGITS, "target.rotate=15", HOG],
        "digits, 45 degrees (hog)": [*DIGITS, "target.rotate=45", HOG],
        "synth_digits -> digits (pixels)": [IDENTITY],
        "synth_digits -> digits (hog)": [HOG],
        "friedman -> close": [*FRIEDMAN, "target.domain=close"],
        "friedman -> unrelated": [*FRIEDMAN, "target.domain=unrelated"],
    }
    if os.environ.get("TRANSFER_DATA"):
        surf, pacs = "office_caltech_surf", "pacs_squeezenet_features"
        known["SURF, amazon -> webcam"] = [
            f"source={surf}",
            f"target={surf}",
            "source.domain=amazon",
            "target.domain=webcam",
            IDENTITY,
        ]
        known["PACS, photo -> art (SqueezeNet)"] = [
            f"source={pacs}",
            f"target={pacs}",
            "target.domain=art_painting",
            IDENTITY,
        ]
        known["wine, red -> white"] = [
            "source=wine",
            "target=wine",
            "source.domain=red",
            "target.domain=white",
            IDENTITY,
            "head=ridge",
        ]
    return known


def features(method: Method, inputs: Inputs, of_source: bool) -> torch.Tensor:
    function = method.features_source if of_source else method.features
    with torch.no_grad():
        return torch.cat([function(x).double() for x in in_order(inputs, 512, CPU)])


def scores(overrides: list[str]) -> dict[str, float]:
    found = {}
    for name in METHODS:
        config = typed(composed([*overrides, f"method={name}"]))
        components = resolve_components(config)
        problem = pose_problem(config, components)
        task, test = problem.task, problem.heldout.target_test
        try:
            method = build_method(config, components, task.shape, CPU, training_labels(task)).eval()
            source = Features(features(method, task.source.inputs, True), task.source.labels)
            method.fit(
                FeatureTask(source, Features(features(method, task.target_unlabelled.inputs, False), None), None)
            )
            (x,) = in_order(test.inputs, len(test), CPU)
            with torch.no_grad():
                metrics = score(task.kind, method.predict(x), test.labels)
            found[name] = metrics["accuracy" if task.kind == "classification" else "r2"]
        except Exception as error:  # a method that does not do this pair
            found[name] = float("nan")
            print(f"{name}: {error}", file=sys.stderr)
    return found


def main(wanted: list[str]) -> None:
    torch.set_num_threads(1)
    print(
        "| pair | A-distance | MMD² p | means / covariance / classes remove | rules | " + " | ".join(METHODS) + " | s |"
    )
    print("|" + "---|" * (6 + len(METHODS)))
    with tempfile.TemporaryDirectory() as place:
        for name, overrides in pairs(Path(place)).items():
            if wanted and not any(w in name for w in wanted):
                continue
            overrides = [*overrides, f"outputs={place}/outputs", "threads=1", "device=cpu"]
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                config = typed(composed([*overrides, "method=no_adaptation"]))
                found = diagnose({config.backbone["name"]: config}, 1000)
            seconds = time.perf_counter() - began
            (figures,) = found["backbones"].values()
            gone = [figures["removed"].get(key) for key in ("means", "covariance", "class_shares")]
            shown = " / ".join("-" if g is None else f"{100 * g:.0f}" for g in gone)
            rules = ", ".join(dict.fromkeys(entry["rule"] for entry in found["advice"]))
            figure = [f"{figures['a_distance']['value']:.2f}", f"{figures['mmd']['p']:.3f}", shown, rules]
            cells = [f"{100 * value:.1f}" for value in scores(overrides).values()]
            print(f"| {name} | {' | '.join([*figure, *cells])} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
