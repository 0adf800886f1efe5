"""From Hydra's composed configuration to the typed `Config` and its resolved components."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from transfer_cli.config.schema import COMPONENTS, Config, check
from transfer_cli.errors import TransferError, suggest
from transfer_cli.registry import Component, component


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
    check(config)
    return config


def _check_keys(plain: dict[Any, Any], defaults: Any, prefix: str) -> None:
    known = {f.name: getattr(defaults, f.name) for f in fields(defaults)}
    for key, value in plain.items():
        if key not in known:
            raise TransferError(f"there is no key '{prefix}{key}'.{suggest(str(key), known)}")
        if is_dataclass(known[key]) and isinstance(value, dict):
            _check_keys(value, known[key], f"{prefix}{key}.")


def resolve_components(config: Config) -> dict[str, Component]:
    """Each group's choice, checked against its implementation's signature; `source` is left out where it is none."""
    nodes = {group: getattr(config, group) for group in COMPONENTS}
    if not nodes["source"].get("implementation"):
        del nodes["source"]
    return {group: component(group, node, config.plugins) for group, node in nodes.items()}


def data_root(config: Config) -> Path | None:
    """`data_root`, or else the environment variable TRANSFER_DATA."""
    place = config.data_root or os.environ.get("TRANSFER_DATA")
    return Path(place).expanduser() if place else None
