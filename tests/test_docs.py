"""The documentation is held to what it says: its examples run as written, and no key or name is left out."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from conftest import SMALL, Outcome

from transfer_cli.config.folders import names_in, packaged_folder
from transfer_cli.config.schema import Config

Transfer = Callable[..., Outcome]

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = {
    "method": ("nuclear_norm.py", "conf/method/nuclear_norm.yaml"),
    "dataset": ("moons.py", "conf/dataset/moons.yaml"),
    "backbone": ("fourier.py", "conf/backbone/fourier.yaml"),
}
LIMIT = 40  # lines of Python and YAML together, fewer than this


def examples() -> dict[str, str]:
    """The files that docs/adding.md holds: by name (the first comment that ends in .py or .yaml), exactly as written."""
    text = (ROOT / "docs" / "adding.md").read_text()
    blocks = re.findall(r"^```(?:python|yaml)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return {re.findall(r"^# (\S+\.(?:py|yaml))$", block, re.MULTILINE)[0]: block for block in blocks}


@pytest.fixture
def own_folder(tmp_path: Path) -> Iterator[Path]:
    """A user's folder with the examples in it; their modules are forgotten afterwards."""
    for name, content in examples().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    yield tmp_path
    for python, _ in EXAMPLES.values():
        sys.modules.pop(python.removesuffix(".py"), None)


def test_the_examples_of_the_docs_run_together(own_folder: Path, transfer: Transfer) -> None:
    plugins = "plugins=[nuclear_norm,moons,fourier]"
    chosen = ["source=moons", "target=moons", "target.angle=20", "backbone=fourier", "method=nuclear_norm"]
    outcome = transfer("run", plugins, *chosen, *SMALL)
    assert outcome.code == 0, outcome.err
    result = json.loads((outcome.run / "result.json").read_text())
    assert result["method"] == "nuclear_norm"
    assert (result["source"], result["target"], result["backbone"]) == ("moons", "moons", "fourier")
    assert result["metrics"]["source_test"]["accuracy"] > 0.7
    events = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
    assert {"supervised", "nuclear"} == set(next(e["values"] for e in events if e["split"] == "train"))
    assert transfer("evaluate", str(outcome.run)).code == 0
    predicted = transfer("predict", str(outcome.run), "--dataset", "moons", "angle=20")
    assert len(predicted.out.splitlines()) == 1 + 600, predicted.err
    assert "nuclear_norm" in transfer("list", "methods").out


def test_the_experiment_of_the_docs_runs(own_folder: Path, transfer: Transfer) -> None:
    outcome = transfer("run", "experiment=moons", "trainer.steps=20", "threads=1", "device=cpu")
    assert outcome.code == 0, outcome.err
    result = json.loads((outcome.run / "result.json").read_text())
    assert (result["method"], result["source"], result["backbone"]) == ("nuclear_norm", "moons", "fourier")


def test_a_plugin_that_is_not_listed_is_not_imported(own_folder: Path, transfer: Transfer) -> None:
    outcome = transfer("run", "method=nuclear_norm", *SMALL)
    assert outcome.code == 2 and "plugins=[nuclear_norm]" in outcome.err


@pytest.mark.parametrize("component", EXAMPLES)
def test_each_example_is_short(component: str) -> None:
    files = examples()
    assert sum(len(files[name].splitlines()) for name in EXAMPLES[component]) < LIMIT


def keys(config: object, prefix: str = "") -> Iterator[str]:
    for field in fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert [key for key in keys(Config()) if f"`{key}`" not in text] == []


@pytest.mark.parametrize("group", ["method", "dataset", "backbone", "optimizer", "schedule", "augment", "experiment"])
def test_every_name_is_documented(group: str) -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in names_in(group, [packaged_folder()]) if f"`{name}`" not in text] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
