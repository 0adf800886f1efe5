"""`transfer diagnose` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from PIL import Image

from transfer_cli.data.readers.digits import Digits
from transfer_cli.data.readers.two_moons import TwoMoons

Transfer = Callable[..., Outcome]
FEW = ["subset.source=300", "subset.target=300", "subset.test=100", "threads=1", "device=cpu", "--samples", "200"]
MOONS = ["source=two_moons", "target=two_moons", "backbone=identity", "threads=1", "device=cpu"]


def found(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    known = json.loads(outcome.out)
    assert json.loads(Path(known["path"]).read_text()) == known
    return known


def rules(known: dict[str, Any]) -> list[str]:
    return [entry["rule"] for entry in known["advice"]]


def test_the_default_pair_as_text(transfer: Transfer) -> None:
    outcome = transfer("diagnose", *FEW)
    assert outcome.code == 0, outcome.err
    for words in (
        "synth_digits -> digits",
        "A-distance [95 %]",
        "10 shared",
        "random weights",
        "what this suggests",
        "[A-distance",
    ):
        assert words in outcome.out
    assert "outputs/diagnose/synth_digits-digits-" in outcome.out.splitlines()[-1]
    assert max(map(len, outcome.out.splitlines())) <= 120


def test_several_backbones_and_granted_labels_as_json(transfer: Transfer) -> None:
    command = ["diagnose", "backbones=hog,identity", "target_labels=5", "method=dann", *FEW, "--format", "json"]
    known = found(transfer(*command))
    assert list(known["backbones"]) == ["hog", "identity"] and known["advised"] == "hog"
    assert known["samples"]["granted"] == 50
    for figures in known["backbones"].values():
        assert {"logme", "leep", "nce", "h_score_shrunk"} <= figures["transferability"].keys()
        assert figures["a_distance"]["low"] <= figures["a_distance"]["value"] <= figures["a_distance"]["high"]
    assert "backbone" in rules(known) and "granted" in rules(known)
    again = found(transfer(*command))
    assert again["path"] == known["path"] and again["backbones"]["hog"]["mmd"] == known["backbones"]["hog"]["mmd"]
    assert transfer("cache").out.count("hog") == 2, "the features are those that runs share"


def test_what_a_diagnosis_extracts_a_run_finds(transfer: Transfer) -> None:
    small = ["backbone=hog", "subset.source=60", "subset.target=60", "subset.test=20", "threads=1", "device=cpu"]
    assert transfer("diagnose", *small).code == 0
    keys = {line.split()[0] for line in transfer("cache").out.splitlines()[1:-1]}
    assert transfer("run", "method=no_adaptation", *small).code == 0
    after = {line.split()[0] for line in transfer("cache").out.splitlines()[1:-1]}
    assert len(keys) == 2 and keys < after and len(after) == 3, "of the source's test split alone there was nothing"


def test_ungranted_target_labels_change_nothing(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them turned by three classes; with none granted, a diagnosis cannot know."""
    command = ["diagnose", "source=synth_digits", "target=digits", "backbone=identity", *FEW, "--format", "json"]
    before = found(transfer(*command))
    load = Digits.load

    def other_labels(self: Digits) -> Any:
        domain = load(self)
        return replace(domain, train=replace(domain.train, labels=(domain.train.labels + 3) % 10))

    monkeypatch.setattr(Digits, "load", other_labels)
    after = found(transfer(*command))
    for known in (before, after):
        known.pop("seconds")
        for figures in known["backbones"].values():
            figures.pop("seconds")
    assert before == after


def test_domains_that_are_one_distribution_need_nothing(transfer: Transfer) -> None:
    known = found(transfer("diagnose", *MOONS, "target.draw=1", "target.n=400", "source.n=400", "--format", "json"))
    assert "alike" in rules(known) and "duplicates" not in rules(known)


def test_the_same_data_twice_is_a_leak(transfer: Transfer) -> None:
    known = found(transfer("diagnose", *MOONS, "--format", "json"))
    assert rules(known)[0] == "duplicates"
    assert known["duplicates"]["source train / target test"]["exact"] > 10


def test_in_the_transductive_protocol_the_target_is_tested_by_design(transfer: Transfer) -> None:
    known = found(transfer("diagnose", *MOONS, "target.angle=30", "protocol=transductive", "--format", "json"))
    assert known["by_design"] == ["target train / target test"]
    assert "duplicates" not in rules(known)


@pytest.mark.parametrize("budget", [0, 20])
def test_regression(transfer: Transfer, budget: int) -> None:
    pair = ["source=friedman", "target=friedman", "target.domain=far", "backbone=identity", f"target_labels={budget}"]
    known = found(transfer("diagnose", *pair, "threads=1", "--format", "json"))
    (figures,) = known["backbones"].values()
    assert set(figures["transferability"]) == {"logme"} and "label_shift" not in figures
    assert ("p" in known["labels"]) == bool(budget)
    text = transfer("diagnose", *pair, "threads=1")
    assert "source targets: mean" in text.out and "Regression:" in text.out
    assert ("Kolmogorov-Smirnov" in text.out) == bool(budget)


def test_a_partial_label_space_is_told(transfer: Transfer) -> None:
    classes = ["subset.target_classes=['0','1','2']", "label_space=partial", "backbone=identity"]
    known = found(transfer("diagnose", *classes, *FEW, "--format", "json"))
    assert known["label_space"]["shared"] == ["0", "1", "2"] and "label_space" in rules(known)
    assert any("BBSE needs the same classes" in s for s in known["sentences"])


def test_image_files_with_a_copy_among_them(transfer: Transfer, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for domain in ("one", "two"):
        for label in ("cat", "dog"):
            folder = tmp_path / domain / label
            folder.mkdir(parents=True)
            for i in range(30):
                coarse = Image.fromarray(draw.integers(0, 255, (5, 5, 3), dtype=np.uint8))
                coarse.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    copied = Image.open(tmp_path / "one" / "cat" / "3.png")
    for i in range(60):  # wherever the splits put them, some pair is in different parts
        copied.save(tmp_path / "two" / "cat" / f"copy{i}.jpg", quality=80)
    pair = [f"source=image_folder source.path={tmp_path}/one target=image_folder target.path={tmp_path}/two"]
    command = ["diagnose", *pair[0].split(), "source.name=one", "target.name=two", "image.size=12", "backbone=identity"]
    known = found(transfer(*command, "threads=1", "workers=0", "--format", "json"))
    near = {pair: counts["near"] for pair, counts in known["duplicates"].items()}
    assert near["target train / target test"] + known["duplicates"]["target train / target test"]["exact"] >= 10
    assert sum(n for pair, n in near.items() if pair.startswith("source") and "target" in pair) >= 30
    assert {"duplicates", "near_duplicates"} <= set(rules(known))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["source=none"], "set source=NAME"),
        (["source=mnsit"], "Did you mean 'mnist'"),
        (["backbone=hog,,identity"], "between commas"),
        (["backbones=hogg"], "hog"),
        (["digits"], "is not KEY=VALUE"),
        (["--samples", "3"], "at least 20"),
        (["--format", "html"], "text, json"),
        (["target_labels=-1"], "target_labels"),
        (["target=friedman"], "cannot be paired"),
        (["--config-dir", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(transfer: Transfer, arguments: list[str], words: str) -> None:
    outcome = transfer("diagnose", *arguments)
    assert outcome.code == 2 and words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1 and not outcome.out


def test_an_experiment_that_sets_keys_of_its_method_is_composed(transfer: Transfer, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /method: dann\nmethod:\n  weight: 2\nsubset: {source: 200, target: 200}\n"
    (folder / "mine.yaml").write_text(text)
    outcome = transfer("diagnose", "experiment=mine", "backbone=identity", "threads=1")
    assert outcome.code == 0, outcome.err
    assert "200 of 180" not in outcome.out and "180 of 180 labelled source samples" in outcome.out


def test_features_that_do_not_vary_are_refused(transfer: Transfer, monkeypatch: pytest.MonkeyPatch) -> None:
    load = TwoMoons.load

    def constant(self: TwoMoons) -> Any:
        domain = load(self)
        inputs = replace(domain.train.inputs, values=torch.ones_like(domain.train.inputs.values))
        return replace(domain, train=replace(domain.train, inputs=inputs))

    monkeypatch.setattr(TwoMoons, "load", constant)
    outcome = transfer("diagnose", *MOONS)
    assert outcome.code == 2 and "nothing can be compared" in outcome.err
