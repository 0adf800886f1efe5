"""From Hydra's composed configuration to the typed `Config` and its resolved components."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transfer_cli.config.schema import COMPONENTS, OPTIONAL_COMPONENTS, Config, check
from transfer_cli.errors import TransferError, suggest
from transfer_cli.registry import Component, component, find_plugin
from transfer_cli.run_folder import RunFolder


def typed(composed: DictConfig | dict[str, Any]) -> Config:
    """Check every key and type outside the components' own; `+key=` on the command line gets past Hydra, not past this.

    Raises:
        TransferError: an unknown key (with a suggestion) or a value of the wrong type.
    """
    plain = OmegaConf.to_container(composed, resolve=True) if isinstance(composed, DictConfig) else composed
    assert isinstance(plain, dict)
    _check_keys(plain, Config(), "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or getattr(error, "key", None)
        raise TransferError(f"{key}: {str(error.msg or error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    if config.source_model is not None:
        config.source_model = _checkpoint(config.source_model)
    if config.prior is not None and Path(config.prior).expanduser().is_dir():
        config.prior = str(Path(config.prior).expanduser() / "source_posterior.safetensors")
    check(config)
    return config


def _check_keys(plain: dict[Any, Any], defaults: Any, prefix: str) -> None:
    known = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
    for key, value in plain.items():
        if key not in known:
            raise TransferError(f"there is no key '{prefix}{key}'.{suggest(str(key), known)}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _check_keys(value, known[key], f"{prefix}{key}.")


def load_run(path: str) -> tuple[RunFolder, Config]:
    """A run's folder and its own configuration, for what its checkpoint is used for.

    Raises:
        TransferError: not a run's folder.
    """
    folder = RunFolder(Path(path))
    if not folder.config.is_file():
        raise TransferError(f"{path} is not a run's folder: it has no config.yaml. transfer report lists runs.")
    plain = yaml.safe_load(folder.config.read_text())
    plain.pop("source_model", None)  # what its training started from may be gone, and is not needed again
    return folder, typed(plain)


def resolve_components(config: Config) -> dict[str, Component]:
    """Each group's choice, checked against its implementation's signature; left out are `source`, `then` and `ood` where they are
    none, and `head` and `strong` where no method has a use for them."""
    for plugin in config.plugins:
        find_plugin(plugin)
    nodes = {group: getattr(config, group) for group in COMPONENTS}
    for group in ("source", "then", "ood"):
        if not (nodes[group] or {}).get("implementation"):
            del nodes[group]
    for group in COMPONENTS:
        if group not in OPTIONAL_COMPONENTS and not nodes[group]:
            raise TransferError(f"no {group} is chosen: set {group}=NAME. `transfer list {group}` shows all.")
    if not nodes["target"].get("implementation"):
        raise TransferError("a run needs a target: set target=NAME. `transfer list dataset` shows all.")
    used = {group: nodes.pop(group) for group in ("head", "strong")}
    components = {group: component(group, node, config.plugins) for group, node in nodes.items()}
    methods = [components[group].implementation for group in ("method", "then") if group in components]
    for group, node in used.items():
        if any(getattr(method, f"uses_{group}", False) for method in methods):
            components[group] = component(group, node, config.plugins)
    return components


def _checkpoint(path: str) -> str:
    """The checkpoint that a run's folder stands for.

    Raises:
        TransferError: there is no such file.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "checkpoints" / "best.pt"
    if not file.is_file():
        raise TransferError(
            f"source_model: there is no checkpoint {file}; it is a run's folder, or its checkpoints/best.pt."
        )
    return str(file)


def data_root(config: Config) -> Path | None:
    """`data_root`, or else the environment variable TRANSFER_DATA."""
    place = config.data_root or os.environ.get("TRANSFER_DATA")
    return Path(place).expanduser() if place else None
