"""A run's folder name: pinned for ten configurations, and what does and does not change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from transfer_cli.config import hydra_glue
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.folders import packaged_folder
from transfer_cli.config.hydra_glue import composed
from transfer_cli.config.identity import identify


def identity_of(*overrides: str) -> str:
    hydra_glue._store_schema([packaged_folder()])
    with initialize_config_dir(str(packaged_folder()), version_base="1.3"):
        config = typed(compose("config", list(overrides)))
    found = identify(config, resolve_components(config))
    return f"{found.pair}/{found.run}"


GOLDEN: dict[str, str] = yaml.safe_load((Path(__file__).parent / "golden_identities.yaml").read_text())


@pytest.mark.parametrize("overrides", GOLDEN)
def test_ten_identities_are_pinned(overrides: str) -> None:
    """If this fails, old runs are no longer found: raise a component's `version` on purpose, or mend the change."""
    assert identity_of(*overrides.split()) == GOLDEN[overrides]


def test_there_are_ten_and_all_differ() -> None:
    assert len(GOLDEN) == len(set(GOLDEN.values())) == 10


@pytest.mark.parametrize(
    "override",
    ["workers=7", "threads=1", "device=cpu", "data_root=/x", "force=true", "retry_failed=true", "outputs=o", "download=true",
     "image.storage=files", "method.weight=1", "trainer.steps=1500", "plugins=[]", "optimizer.lr=0.02"],
)  # fmt: skip
def test_what_leaves_the_identity_alone(override: str) -> None:
    assert identity_of(override) == identity_of()


@pytest.mark.parametrize(
    "override",
    ["seed=1", "data_seed=1", "method.weight=2", "trainer.precision=bf16", "trainer.compile=true", "selection=last",
     "backbone.features=64",
     "target_labels=1", "protocol=transductive", "optimizer=adam", "schedule.alpha=9", "augment=none",
     "source.n=100", "image.size=20"],
)  # fmt: skip
def test_what_changes_the_identity(override: str) -> None:
    assert identity_of(override).rsplit("-", 1)[1] != identity_of().rsplit("-", 1)[1]


def test_a_raised_version_changes_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_cli.methods.adversarial.dann import DANN

    before = identity_of()
    monkeypatch.setattr(DANN, "version", 2)
    assert identity_of() != before


def test_files_enter_by_content(tmp_path: Path) -> None:
    def with_weights(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return identity_of(f"backbone.weights={tmp_path / name}")

    assert with_weights("a.pt", b"one") == with_weights("b.pt", b"one")
    assert with_weights("a.pt", b"one") != with_weights("a.pt", b"two")


def test_a_default_added_to_a_component_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_cli.methods.baseline.source_only import SourceOnly

    before = identity_of("method=source_only")

    def extended(self: Any, context: Any, *, novelty: float = 3.0) -> None: ...

    monkeypatch.setattr(SourceOnly, "__init__", extended)
    assert identity_of("method=source_only") == before


def test_an_implementation_of_ones_own_under_a_packaged_name_is_another_run() -> None:
    from dataclasses import replace

    config = typed(composed([]))
    components = resolve_components(config)
    own = {**components, "backbone": replace(components["backbone"], reference="mine:SmallCNN")}
    assert identify(config, components).hash != identify(config, own).hash
