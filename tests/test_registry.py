"""From a YAML to the object it names: what resolves, what is refused, and every packaged YAML in agreement with its code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml

from transfer_cli.config.folders import packaged_folder
from transfer_cli.errors import TransferError
from transfer_cli.registry import DESCRIPTIVE_KEYS, FilePath, component, keyword_schema, names_a_file, resolve

GROUPS = ("dataset", "backbone", "method", "optimizer", "schedule", "augment")
YAMLS = [path for group in GROUPS for path in sorted((packaged_folder() / group).glob("*.yaml"))]

PLUGIN = """
from collections.abc import Sequence
from typing import Literal

from transfer_cli.registry import FilePath


class Toy:
    version = 3

    def __init__(
        self,
        context,
        *,
        rate: float = 0.5,
        steps: int = 10,
        on: bool = True,
        words: str = "a",
        mode: Literal["fast", "slow"] = "fast",
        pair: tuple[float, float] = (0.0, 1.0),
        widths: Sequence[int] = (1, 2),
        limit: int | None = None,
        weights: FilePath = "none",
        table: dict[str, int] | None = None,
        needed: str,
    ):
        self.context, self.rate = context, rate
"""
NEEDED = {"needed": "x"}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module that lies in the working directory alone, as a user's own does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "toy.py").write_text(PLUGIN)
    (package / "broken.py").write_text("import surely_not_installed\n")
    yield "toy_package"
    for name in [n for n in sys.modules if n.split(".")[0] == "toy_package"]:
        del sys.modules[name]


def toy(plugin: str, **keys: Any) -> Any:
    return component(
        "method", {"name": "toy", "implementation": f"{plugin}.toy:Toy", **NEEDED, **keys}, plugins=[plugin]
    )


def test_modules_of_the_package_resolve() -> None:
    from transfer_cli.methods.adversarial.dann import DANN

    assert resolve("transfer_cli.methods.adversarial.dann:DANN") is DANN


@pytest.mark.parametrize(
    "reference", ["os:system", "transfer_cli_evil:x", "transfer_clix.methods:x", "torch.nn:Linear"]
)
def test_modules_outside_the_package_and_the_plugins_are_refused(reference: str) -> None:
    with pytest.raises(TransferError, match=r"method 'x'.*not part of transfer_cli or of a plugin.*plugins=\["):
        resolve(reference, where="method 'x'")


def test_a_module_that_is_refused_is_not_imported(plugin: str) -> None:
    with pytest.raises(TransferError, match="not part of"):
        resolve(f"{plugin}.toy:Toy", plugins=["another"])
    assert plugin not in sys.modules


@pytest.mark.parametrize("listed", ["toy_package", "toy_package.toy"])
def test_a_plugin_in_the_working_directory_resolves_by_its_name_or_its_package(plugin: str, listed: str) -> None:
    assert resolve(f"{plugin}.toy:Toy", plugins=[listed]).__name__ == "Toy"


def test_a_name_that_only_begins_like_a_plugin_is_refused(plugin: str) -> None:
    with pytest.raises(TransferError, match="not part of"):
        resolve("toy_package_two:Toy", plugins=[plugin])


def test_installed_plugins_need_not_be_listed(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        value = "toy_package.toy:Toy"

    monkeypatch.setattr(
        "transfer_cli.registry.entry_points", lambda group: [Point()] if group == "transfer_cli.plugins" else []
    )
    assert resolve(f"{plugin}.toy:Toy").__name__ == "Toy"


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("transfer_cli.methods", "must read 'module:attribute', not 'transfer_cli.methods'"),
        (":DANN", "must read 'module:attribute'"),
        ("", "must read 'module:attribute'"),
        ("transfer_cli.methods.nothing:X", "no module 'transfer_cli.methods.nothing'"),
        ("transfer_cli.methods.adversarial.dann:Dann", "has no 'Dann'. Did you mean 'DANN'?"),
        ("toy_package.broken:X", "'toy_package.broken' needs 'surely_not_installed', which is not installed"),
    ],
)
def test_a_reference_that_does_not_resolve_says_why(plugin: str, reference: str, message: str) -> None:
    with pytest.raises(TransferError) as caught:
        resolve(reference, plugins=[plugin])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_component_keeps_its_version_and_builds(plugin: str) -> None:
    part = toy(plugin, rate=2.0, search={"rate": [1, 2]})
    assert (part.group, part.name, part.version) == ("method", "toy", 3)
    assert part.parameters == {"needed": "x", "rate": 2.0}, "name, implementation and search stay behind"
    built = part.build("context")
    assert (built.context, built.rate) == ("context", 2.0)
    plain = component("optimizer", {"implementation": "transfer_cli.loops.optimizers:adam"})
    assert (plain.version, plain.name) == (1, "optimizer")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rat": 1.0}, "method 'toy' has no key 'rat'. Did you mean 'rate'? Known keys: rate, steps"),
        ({"zzz": 1.0}, "method 'toy' has no key 'zzz'. Known keys"),
        ({"context": 1}, "has no key 'context'"),
        ({"rate": "fast"}, "method.rate must be a number, not 'fast'"),
        ({"rate": True}, "method.rate must be a number"),
        ({"rate": None}, "method.rate must be a number"),
        ({"steps": 1.5}, "method.steps must be a whole number, not 1.5"),
        ({"steps": True}, "method.steps must be a whole number"),
        ({"on": 1}, "method.on must be true or false, not 1"),
        ({"words": 3}, "method.words must be text, not 3"),
        ({"mode": "fats"}, "method.mode must be fast or slow, not 'fats'"),
        ({"pair": [1.0]}, "method.pair must be"),
        ({"pair": [1.0, 2.0, 3.0]}, "method.pair must be"),
        ({"pair": ["a", 2.0]}, "method.pair must be"),
        ({"pair": 2.0}, "method.pair must be"),
        ({"widths": [1, 2.5]}, "method.widths must be"),
        ({"widths": 3}, "method.widths must be"),
        ({"limit": "x"}, "method.limit must be a whole number or null, not 'x'"),
        ({"weights": 3}, "method.weights must be text"),
        ({"table": [1]}, "method.table must be"),
    ],
)
def test_wrong_keys_and_types_are_named(plugin: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError) as caught:
        toy(plugin, **keys)
    assert message in str(caught.value)


def test_values_that_fit_pass(plugin: str) -> None:
    keys = {
        "rate": 0.1, "steps": 3, "on": False, "words": "b", "mode": "slow", "pair": [0, 2.5], "widths": [4, 5, 6],
        "limit": None, "weights": "file.pt", "table": {"a": 1},
    }  # fmt: skip
    assert toy(plugin, **keys).parameters == {**keys, **NEEDED}
    assert toy(plugin, limit=3).parameters["limit"] == 3


def test_a_whole_number_becomes_a_float_where_one_is_due(plugin: str) -> None:
    parameters = toy(plugin, rate=2, steps=2).parameters
    assert type(parameters["rate"]) is float and type(parameters["steps"]) is int


def test_a_required_key_is_asked_for(plugin: str) -> None:
    with pytest.raises(TransferError, match=r"method 'toy' needs a value: method\.needed=\.\.\."):
        component("method", {"name": "toy", "implementation": f"{plugin}.toy:Toy"}, plugins=[plugin])
    with pytest.raises(TransferError, match="method: the YAML needs a key 'implementation'"):
        component("method", {"name": "toy"})


def test_file_parameters_are_known_as_such() -> None:
    schema = keyword_schema(resolve("transfer_cli.backbones.torchvision:Torchvision"))
    assert [key for key, (annotation, _) in schema.items() if names_a_file(annotation)] == ["weights"]
    assert names_a_file(FilePath | None)
    assert not names_a_file(str) and not names_a_file(Annotated[str, "other"]) and not names_a_file(Literal["file"])


def test_the_schema_is_the_keyword_only_part() -> None:
    def function(context: int, *, a: Sequence[int] = (1,), b: str) -> None: ...

    schema = keyword_schema(function)
    assert list(schema) == ["a", "b"] and schema["a"][1] == (1,) and schema["b"][1] is inspect.Parameter.empty


def plain(value: Any) -> Any:
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("path", YAMLS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_packaged_yaml_agrees_with_its_implementation(path: Path) -> None:
    text, group = path.read_text(), path.parent.name
    assert text.startswith("# ") and len(text.splitlines()[0]) > 10, "the first line tells `transfer list` what it is"
    node = yaml.safe_load(text)
    assert set(DESCRIPTIVE_KEYS) - {"search"} <= set(node)
    assert node["name"] in (path.stem, "${.model}")
    if path.stem == "none" and group == "dataset":
        assert node["implementation"] == ""
        return
    values = {key: value for key, value in node.items() if key not in DESCRIPTIVE_KEYS}
    schema = keyword_schema(resolve(node["implementation"]))
    component(group, node)  # the values are of the right type
    if group == "augment":
        assert set(values) <= set(schema)  # a preset names what it changes
    else:
        assert set(values) == set(schema)
    assert set(node.get("search", {})) <= set(schema)
    if group in ("backbone", "method", "optimizer", "schedule"):
        differing = {
            key: (value, schema[key][1])
            for key, value in values.items()
            if schema[key][1] is not inspect.Parameter.empty and plain(schema[key][1]) != plain(value)
        }
        assert differing == {}, "the values of a YAML are its constructor's defaults"


def test_there_is_a_yaml_of_every_group() -> None:
    assert {path.parent.name for path in YAMLS} == set(GROUPS) and len(YAMLS) > 40
