"""The real `hydra.main` under `transfer run`: its flags, sweeps, launchers and completion all work. What is added here: the
schema, the groups `source`, `target` and `ood` that all read `dataset/`, torchvision's names as backbones, the user's own folder
before the packaged one, and errors in one line.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from transfer_cli.config.folders import config_folders, names_in, packaged_folder
from transfer_cli.config.launchers import what_to_install, written_out
from transfer_cli.config.schema import COMPONENTS, Config
from transfer_cli.config.torchvision_names import TORCHVISION_NAMES
from transfer_cli.errors import TransferError, suggest

NEEDING = {"hydra/sweeper/optuna": "optuna"}  # choices that Hydra has with an extra of ours only


class OwnFolderFirst(SearchPathPlugin):
    """Hydra appends a user's folder, where a file of a packaged name would be ignored; this puts it before."""

    folders: Sequence[Path] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(self.folders):
            search_path.prepend(provider="transfer-user", path=f"file://{folder}")


def call_hydra(task: Callable[[DictConfig], Any], arguments: Sequence[str]) -> None:
    """Compose the configuration from `arguments` and call `task` with it, once or, under -m, for every job.

    Raises:
        TransferError: for what the user can mend in the configuration.
    """
    folders = _prepare(arguments)
    arguments = written_out([f"sweep.{a}" if a.startswith("n=") else a for a in arguments])
    arguments = _keys_of_each_job(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands errors on instead of printing them
    sys.argv = ["transfer run", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(packaged_folder()), config_name="config")(task)()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        explained = explain(error, folders)
        if explained is None:
            raise
        raise TransferError(explained) from error


def composed(overrides: Sequence[str], flags: Sequence[str] = ()) -> DictConfig:
    """The configuration that `transfer run` would have with `overrides`, without running anything; of `flags`, `--config-dir DIR`
    counts.

    Raises:
        TransferError: for what the user can mend in the configuration.
    """
    folders = _prepare(flags)
    try:
        with initialize_config_dir(str(packaged_folder()), version_base="1.3"):
            return compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        explained = explain(error, folders)
        if explained is None:
            raise
        raise TransferError(explained) from error


def _keys_of_each_job(arguments: Sequence[str]) -> list[str]:
    """Where a sweep goes over experiments, or over a group, overrides of what these choose as sweeps over one value.

    Hydra first composes a sweep without what is swept, and would hold `method.mode=icm` against the default's method.
    """
    parser = OverridesParser.create()

    def read(argument: str) -> Override | None:
        with suppress(HydraException):  # which says what is wrong when its turn comes
            return parser.parse_override(argument)
        return None

    overrides = {a: read(a) for a in arguments if "=" in a and not a.startswith("-")}
    swept = {o.key_or_group for o in overrides.values() if o and o.is_sweep_override()}
    found = []
    for argument in arguments:
        override, (key, _, value) = overrides.get(argument), argument.partition("=")
        one = f"{key}=choice({value})"
        group, dot, _ = override.key_or_group.partition(".") if override is not None else ("", "", "")
        alone = bool(dot) and override is not None and not override.is_sweep_override()
        alone = alone and group not in ("hydra", "sweep")  # of the sweep as a whole
        alone = alone and ("experiment" in swept or group in swept)
        found.append(one if alone and read(one) is not None else argument)
    return found


def _prepare(arguments: Sequence[str]) -> list[Path]:
    """The configuration folders, with Hydra told of them."""
    folders = config_folders(arguments)
    OwnFolderFirst.folders = folders[:-1]
    if OwnFolderFirst not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(OwnFolderFirst)
    _store_schema(folders)
    return folders


def _store_schema(folders: Sequence[Path]) -> None:
    store = ConfigStore.instance()
    store.store(name="base_schema", node=Config)
    for name in names_in("dataset", folders):
        for group in ("source", "target", "ood"):
            store.store(group=group, name=name, node={"defaults": [{"/dataset@_here_": name}]})
    store.store(group="then", name="none", node={})
    for group, choices in (("then", "method"), ("strong", "augment")):
        for name in names_in(choices, folders):
            store.store(group=group, name=name, node={"defaults": [{f"/{choices}@_here_": name}]})
    own_backbones = names_in("backbone", folders)
    for name in TORCHVISION_NAMES:
        if name not in own_backbones:
            store.store(group="backbone", name=name, node={"defaults": ["torchvision", "_self_"], "model": name})


def explain(error: BaseException, folders: Sequence[Path]) -> str | None:
    """One line for an error of the configuration; None for an error that is not the user's."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    for link in chain:
        if isinstance(link, MissingConfigException) and link.missing_cfg_file:
            return _missing(str(link.missing_cfg_file), link.options or ())
        if isinstance(link, yaml.YAMLError):
            where = getattr(link, "problem_mark", None)
            return f"not valid YAML: {getattr(link, 'problem', link)}{f' in {where.name}, line {where.line + 1}' if where else ''}"
    inner = chain[-1]
    if isinstance(inner, OmegaConfBaseException):
        return _bad_key(inner, chain)
    if "Config group override must be" in str(error):
        return "no group of the configuration can be null: choose a NAME with group=NAME, or none where there is one."
    if isinstance(error, OverrideParseException):
        return f"cannot read the override '{error.override}': {str(error).splitlines()[0]}."
    if isinstance(error, HydraException):
        return str(error).splitlines()[0]
    return None


def _missing(path: str, options: Sequence[str]) -> str:
    group, _, name = path.rpartition("/")
    group = group.removeprefix("/") or "config"
    if path.removeprefix("/") in NEEDING:
        return f"{group}={name} needs another package: pip install 'transfer-cli[{NEEDING[path.removeprefix('/')]}]'."
    if group == "hydra/launcher":
        return what_to_install(name) or f"there is no launcher '{name}'. There are: {', '.join(options)}."
    return f"no {group} named '{name}'.{suggest(name, options)} `transfer list {group}` shows all."


def _bad_key(error: OmegaConfBaseException, chain: Sequence[BaseException]) -> str:
    message = str(error.msg or error).splitlines()[0]
    key = str(error.full_key or error.key or "")
    siblings: Sequence[str] = ()
    parent = error.parent_node
    if parent is not None and hasattr(parent, "keys"):
        siblings = [str(k) for k in parent.keys() if k is not None]  # noqa: SIM118 - a DictConfig
    said = " ".join(str(c) for c in chain)
    if "@experiment." in said:
        return "an experiment's YAML must begin with the line '# @package _global_'."
    override = re.search(r"Could not override '([^']+)'", said)
    key = override.group(1) if override else key
    if "is not a ListConfig" in message:
        return f"{key} is a list: write {key}=[...], with brackets."
    if "not in" not in message:
        return f"{key}: {message}" if key else message
    group, _, last = key.rpartition(".")
    owner = parent.get("name") if parent is not None and group in COMPONENTS else None
    where = f" in {group} '{owner}'" if owner else ""
    hint = suggest(last, siblings) or (f" +{key}=... adds one that its YAML leaves out." if owner else "")
    return f"there is no key '{key}'{where}.{hint}"
