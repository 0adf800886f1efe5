"""A run's identity: the folder name that its configuration determines.

The hash covers each component (name, version, parameters that differ from its constructor's defaults) and the other keys
that differ from the schema's defaults; files enter by content. Keys that change no result stay out: the schema's
`OUTSIDE_IDENTITY`, and those that an implementation names in its `outside_identity`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from transfer_cli.config.schema import COMPONENTS, FILES, OUTSIDE_IDENTITY, Config
from transfer_cli.registry import PACKAGE, Component, keyword_schema, names_a_file

MACHINERY_VERSION = 2  # raised when the splits, loops or metrics change the numbers of every run


@dataclass(frozen=True)
class Identity:
    pair: str  # source-target
    run: str  # method-seed0-1a2b3c4d
    hash: str

    def folder(self, outputs: str | Path) -> Path:
        return Path(outputs) / "runs" / self.pair / self.run


def identify(config: Config, components: Mapping[str, Component]) -> Identity:
    """`components` by group; `source` may be absent."""
    content = {
        "machinery": MACHINERY_VERSION,
        **{g: component_content(c) for g, c in components.items()},
        **_differences(config, Config()),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    pair = f"{label(components.get('source'))}-{label(components['target'])}"
    return Identity(pair, f"{method_label(components)}-seed{config.seed}-{digest}", digest)


def method_label(components: Mapping[str, Component]) -> str:
    """`dann`, or `simclr+linear_probe` where one follows another."""
    return "+".join(components[group].name for group in ("method", "then") if group in components)


def label(dataset: Component | None) -> str:
    """What a data set is called in folders and tables."""
    return dataset_label(None, {}) if dataset is None else dataset_label(dataset.name, dataset.parameters)


def dataset_label(name: str | None, parameters: Mapping[str, Any]) -> str:
    """Its name, and its domain where it has several; `none` where there is none."""
    if name is None:
        return "none"
    domain, path = parameters.get("domain"), parameters.get("path")
    if domain is not None:
        return f"{name}_{domain}"
    # The general readers' own names say nothing; what they read does.
    general = name in ("arrays", "image_folder", "table", "sequences")
    return Path(path).stem if general and isinstance(path, str) and path else name


def component_content(component: Component) -> dict[str, Any]:
    """What of a component decides a run's numbers: name, version, parameters that differ from its defaults, files by content."""
    changed = {}
    for key, (annotation, default) in keyword_schema(component.implementation).items():
        if key in getattr(component.implementation, "outside_identity", ()):
            continue
        value = component.parameters.get(key, default)
        if _plain(value) != _plain(default):
            changed[key] = _content(value) if names_a_file(annotation) else _plain(value)
    content = {"name": component.name, "version": component.version, "parameters": changed}
    if not component.reference.startswith(PACKAGE + "."):  # a user's own may bear a packaged name
        content["implementation"] = component.reference
    return content


def _differences(config: Any, defaults: Any, prefix: str = "") -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for field in fields(config):
        key = prefix + field.name
        value = getattr(config, field.name)
        if key in COMPONENTS or key in OUTSIDE_IDENTITY:
            continue
        if is_dataclass(value):
            changed.update(_differences(value, getattr(defaults, field.name), key + "."))
        elif _plain(value) != _plain(getattr(defaults, field.name)):
            changed[key] = _content(value) if key in FILES else _plain(value)
    return changed


def _plain(value: Any) -> Any:
    """Lists for tuples and floats for whole numbers where JSON would tell them apart; a missing default equals nothing."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, str | float | bool | None) else f"<{MISSING}>"


def _content(value: Any) -> Any:
    """A file's digest instead of its path."""
    path = Path(str(value)).expanduser()
    if not path.is_file():
        return _plain(value)
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
