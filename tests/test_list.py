"""`transfer list`: names, descriptions and needs, read without importing an implementation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from transfer_cli.commands import list as list_command
from transfer_cli.config.torchvision_names import TORCHVISION_NAMES
from transfer_cli.errors import TransferError


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert list_command.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a `conf` and a plugin package that must not be imported."""
    methods = tmp_path / "conf" / "method"
    methods.mkdir(parents=True)
    package = tmp_path / "own_plugin"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "base.py").write_text(
        "class Base:\n    needs: ClassVar[Needs] = Needs(target_labels=True, source_labels=False)\n"
    )
    (package / "method.py").write_text(
        "from .base import Base as Parent\n"
        "class Mine(Parent):\n    x = 1\n"
        "class Odd:\n    needs = replace(A.needs, b=1)\n"
    )
    for name, attribute in {"mine": "Mine", "odd": "Odd", "gone": "Gone"}.items():
        (methods / f"{name}.yaml").write_text(
            f"# @package _global_\n#  About {name}\nimplementation: own_plugin.method:{attribute}\n"
        )
    (methods / "dann.yaml").write_text("implementation: nowhere:X\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_groups_with_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys)
    assert any(line.startswith("method ") for line in lines) and "dann, deep_coral" in " ".join(map(str.strip, lines))
    assert any(line.startswith("dataset ") for line in lines)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("word", ["method", "methods"])
def test_methods_with_citation_and_needs(capsys: pytest.CaptureFixture[str], word: str) -> None:
    lines = listed(capsys, word)
    at = next(i for i, line in enumerate(lines) if line.startswith("dann "))
    assert "Domain-adversarial training (Ganin et al., JMLR 17(59), 2016)" in lines[at]
    assert lines[at + 1].strip() == "needs: source labels, target inputs"


@pytest.mark.parametrize("group", ["augment", "backbone", "dataset", "experiment", "method", "optimizer", "schedule"])
def test_every_packaged_name_has_a_description(capsys: pytest.CaptureFixture[str], group: str) -> None:
    lines = listed(capsys, group)
    described = [line for line in lines[: lines.index("") if "" in lines else None] if not line.startswith(" ")]
    assert described
    assert all(re.match(r"\w+ {2,}\S", line) for line in described)


def test_every_packaged_method_tells_its_needs(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, "method")
    assert len(lines) % 2 == 0
    assert all(line.strip().startswith("needs: ") for line in lines[1::2])


@pytest.mark.parametrize("word", ["source", "targets", "datasets"])
def test_source_and_target_are_datasets(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert listed(capsys, word) == listed(capsys, "dataset")


def test_own_files_win_and_plugins_are_not_imported(capsys: pytest.CaptureFixture[str], own: Path) -> None:
    words = [" ".join(line.split()) for line in listed(capsys, "method")]
    at = words.index("mine About mine")
    assert words[at + 1] == "needs: target labels"
    assert not words[words.index("odd About odd") + 1].startswith("needs")
    assert not words[words.index("gone About gone") + 1].startswith("needs")
    assert "dann" in words  # the user's, which describes nothing
    assert "own_plugin" not in sys.modules


def test_config_dir(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "other.yaml").write_text("# Another one\n")
    assert any(
        line.split() == ["other", "Another", "one"] for line in listed(capsys, "method", "--config-dir", str(tmp_path))
    )


def test_unknown_group() -> None:
    with pytest.raises(TransferError, match=r"no group 'metods'\. Did you mean 'method'\? The groups are"):
        list_command.main(["metods"])


def test_torchvision_names_are_those_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    from transfer_cli.torchvision_compat import models

    assert list(TORCHVISION_NAMES) == sorted(models.list_models(module=models))
    assert all(name in " ".join(listed(capsys, "backbones")) for name in TORCHVISION_NAMES)


def test_list_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from transfer_cli.commands.list import main; main([]); main(['method']); main(['backbone']);"
        "print(sorted({'torch', 'hydra', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules)), file=sys.stderr)"
    )
    environment = {"PYTHONPATH": str(Path(list_command.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stderr.strip() == "[]"
