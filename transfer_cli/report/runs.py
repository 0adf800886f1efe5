"""Run folders as records. Reads files alone; never torch or numpy."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from transfer_cli.config.identity import dataset_label
from transfer_cli.config.schema import COMPONENTS, OPTIONAL_COMPONENTS, OUTSIDE_IDENTITY, Config
from transfer_cli.errors import TransferError
from transfer_cli.run_folder import HEADLINE, RESULT_SCHEMA, RunFolder, read_json, read_object

DEFAULT_FOLDER = Path("outputs") / "runs"
DATA = ("source", "target")
SEEDS = ("seed", "data_seed")
ALWAYS = ("source", "target", "method", *SEEDS)  # what a table cannot do without in a result.json, figures apart
OF_SELECTION = ("validator", "uses_target_labels", "step", "candidates")

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A finished run; or what another was to become, with a `figure` of nan and no `kind`.

    `settings`: by owner, the keys and hashable values that determine the figures, seeds apart. The owner `""` has what
    every run has, the components' names among it; an owner such as `optimizer=sgd` that component's parameters, and
    `source` and `target` those of the data.
    """

    path: Path
    time: str
    kind: str
    method: str
    pair: tuple[str, str]
    oracle: bool  # target labels chose the checkpoint
    seeds: tuple[int, ...]
    figure: float  # on the target test set: accuracy in percent, or RMSE
    settings: Settings
    scores: Mapping[str, float] = field(default_factory=dict)  # of the label-free validators, for the kept weights
    warnings: tuple[str, ...] = ()  # of training that went wrong, in words
    figures: Mapping[str, float] = field(default_factory=dict)  # every one on the target test set
    step: int = 0  # of the kept weights
    candidates: int = 1  # evaluations that they were chosen from
    searched: frozenset[str] = frozenset()  # the settings' keys that the method's `search:` names
    kept: bool = True  # whether weights with these figures were kept: `--select` may name others


@dataclass(frozen=True)
class Record:
    """A run folder in any state; `run` where it is finished and readable, `asked` where it is not but its config.yaml is."""

    path: Path
    state: str
    error: str | None = None
    run: Run | None = None
    asked: Run | None = None


def collect(paths: Sequence[Path] = ()) -> list[Record]:
    """The run folders at or below `paths` (by default `outputs/runs`), in the order of their paths.

    Raises:
        TransferError: a path that is no folder, or no run anywhere.
    """
    folders: set[Path] = set()
    for path in paths or (DEFAULT_FOLDER,):
        if paths and not path.is_dir():
            raise TransferError(f"there is no folder {path}.")
        folders.update(_run_folders(path))
    if not folders:
        where = ", ".join(str(path) for path in paths or (DEFAULT_FOLDER,))
        raise TransferError(f"no runs under {where}: start one with `transfer run`, or name a folder that has some.")
    here = Path.cwd().resolve()
    return [_read(RunFolder(_below(here, path))) for path in sorted(folders)]


def short(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    return _below(Path.cwd().resolve(), path.resolve())


def _below(here: Path, full: Path) -> Path:
    return full.relative_to(here) if full.is_relative_to(here) else full


def damage(result: Any) -> str | None:
    """What is wrong with the content of a result.json, if anything."""
    if not isinstance(result, Mapping):
        return "result.json is missing or damaged"
    if result.get("schema_version") != RESULT_SCHEMA:
        return f"result.json has schema_version {result.get('schema_version')}, and this version reads {RESULT_SCHEMA}"
    try:
        float(result["metrics"]["target_test"][HEADLINE[result["kind"]]])
        lacking = set(ALWAYS) - result.keys() or set(OF_SELECTION) - result["selection"].keys()
    except (KeyError, TypeError, ValueError, AttributeError):
        lacking = {"figures"}
    return f"result.json is damaged: it lacks {', '.join(sorted(lacking))}" if lacking else None


def _run_folders(path: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(path.resolve()):
        if "status.json" in files:
            below.clear()
            yield Path(folder)


def read_run(path: Path) -> Run | None:
    """The run in a folder, if it is finished and readable."""
    return _read(RunFolder(path)).run


def _read(folder: RunFolder) -> Record:
    status = read_object(folder.status)
    state = str(status.get("state", "new"))
    if state != "finished":
        state, error = folder.state(), status.get("error")
        told = None if error is None else " ".join(str(error).split())
        return Record(folder.path, state, told, asked=_asked(folder, status))
    result, config = read_json(folder.result), read_config(folder.config)
    problem = damage(result) or (None if config else "config.yaml is missing or damaged")
    if problem:
        return Record(folder.path, "failed", f"{problem}: force=true runs it again", asked=_asked(folder, status))
    return Record(folder.path, state, None, _run(folder, str(status.get("time", "")), result, config))


def _run(folder: RunFolder, time: str, result: Mapping[str, Any], config: Mapping[str, Any]) -> Run:
    selection = result["selection"]
    settings = _all_settings(folder, config)
    settings[""]["selection"] = selection["validator"]  # where `auto` is configured: what it chose
    figure = float(result["metrics"]["target_test"][HEADLINE[result["kind"]]])
    later = read_object(folder.validators).get("scores")  # of those that cost too much for every evaluation
    return Run(
        path=folder.path,
        time=time,
        kind=result["kind"],
        method=result["method"],
        pair=(result["source"], result["target"]),
        oracle=selection["uses_target_labels"],
        seeds=tuple(result[key] for key in SEEDS),
        figure=100 * figure if result["kind"] == "classification" else figure,
        settings=settings,
        scores={**result.get("validators", {}), **(later if isinstance(later, dict) else {})},
        figures=result["metrics"]["target_test"],
        warnings=tuple(warning["text"] for warning in result.get("health", {}).get("warnings", ())),
        step=selection["step"],
        candidates=selection["candidates"],
        searched=_searched(config),
    )


def _asked(folder: RunFolder, status: Mapping[str, Any]) -> Run | None:
    """What a run without a result was to be, by its config.yaml."""
    config = read_config(folder.config)
    if not config or not all(isinstance(config.get(group), Mapping) for group in ("target", "method")):
        return None
    settings = _all_settings(folder, config)
    nodes = [config.get(group) or {} for group in DATA]
    return Run(
        path=folder.path,
        time=str(status.get("time", "")),
        kind="",
        method="+".join(config[group].get("name", group) for group in ("method", "then") if config.get(group)),
        pair=(dataset_label(nodes[0].get("name"), nodes[0]), dataset_label(nodes[1].get("name"), nodes[1])),
        oracle=settings[""]["selection"] == "oracle",
        seeds=tuple(config.get(key, 0) for key in SEEDS),
        figure=math.nan,
        settings=settings,
        searched=_searched(config),
    )


def _all_settings(folder: RunFolder, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`Run.settings`, with the versions that the manifest tells: runs of two versions are not one row."""
    settings = _settings(config)
    owners = {owner.partition("=")[0]: owner for owner in settings}
    manifest = read_object(folder.manifest)
    for group, component in manifest.get("components", {}).items():
        settings[owners.get(group, "")][f"{group}.version"] = component["version"]
    settings[""]["machinery"] = manifest.get("machinery")
    return settings


def _searched(config: Mapping[str, Any]) -> frozenset[str]:
    """The keys of the method's `search:` as settings have them; those with the name of another group are that group's."""
    search = (config.get("method") or {}).get("search")
    if not isinstance(search, Mapping):
        return frozenset()
    groups = {*COMPONENTS, *(key.partition(".")[0] for key in _defaults())}
    return frozenset(k if "." in k and k.partition(".")[0] in groups else f"method.{k}" for k in map(str, search))


TOP_LEVEL = re.compile(r"^(?=[A-Za-z_])", re.MULTILINE)  # where a block of a mapping begins that is not indented


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.yaml, or nothing where the file is missing or not a mapping. Not to be changed in place."""
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return {}
    # Runs of a sweep differ in few of their blocks, and a parser of YAML is slow: each block is parsed once.
    parts = [_yaml(block) for block in TOP_LEVEL.split(text) if block]
    if parts and all(isinstance(part, dict) and len(part) == 1 for part in parts):
        whole = {key: value for part in parts for key, value in part.items()}
        if len(whole) == len(parts):
            return whole
    content = _yaml(text)  # written by hand: comments, aliases between blocks, ...
    return content if isinstance(content, dict) else {}


@lru_cache(maxsize=4096)
def _yaml(text: str) -> Any:
    """The content, or None where it is no YAML."""
    import yaml  # the end of a run has no use for it

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (ValueError, yaml.YAMLError):
        return None


@cache
def _defaults() -> dict[str, Any]:
    return _flat(asdict(Config()))


def _settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`Run.settings`; keys that the schema gained later have its defaults."""
    common = {**_defaults(), **_flat({k: v for k, v in config.items() if k not in COMPONENTS})}
    settings = {"": {key: value for key, value in common.items() if key not in (*SEEDS, *OUTSIDE_IDENTITY)}}
    for group in COMPONENTS:
        node = {k: v for k, v in (config.get(group) or {}).items() if k not in ("implementation", "search")}
        if group not in DATA and group in OPTIONAL_COMPONENTS and not node:  # the method has no use for it
            continue
        owner = group
        if group not in DATA:
            settings[""][group] = name = node.pop("name", group)
            owner = f"{group}={name}"
        settings[owner] = _flat(node, group + ".")
    return settings


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):  # as YAML has them, and quicker to ask than Mapping
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _hashable(value)
    return flat


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _hashable(v)) for key, v in sorted(value.items()))
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
