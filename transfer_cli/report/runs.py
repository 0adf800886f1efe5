"""Run folders as records. Reads files alone; never torch or numpy."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transfer_cli.config.schema import COMPONENTS, OPTIONAL_COMPONENTS, OUTSIDE_IDENTITY, Config
from transfer_cli.errors import TransferError
from transfer_cli.run_folder import HEADLINE, RESULT_SCHEMA, RunFolder, read_json

DEFAULT_FOLDER = Path("outputs") / "runs"
DATA = ("source", "target")
SEEDS = ("seed", "data_seed")

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Run:
    """A finished run.

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
    scores: Mapping[str, float] = field(default_factory=dict)  # of the label-free validators
    warnings: tuple[str, ...] = ()  # of training that went wrong, in words
    figures: Mapping[str, float] = field(default_factory=dict)  # every one on the target test set


@dataclass(frozen=True)
class Record:
    """A run folder in any state; `run` where it is finished and readable."""

    path: Path
    state: str
    error: str | None = None
    run: Run | None = None


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
    return [_read(RunFolder(short(path))) for path in sorted(folders)]


def short(path: Path) -> Path:
    """Relative to the working directory where it lies below it."""
    full, here = path.resolve(), Path.cwd().resolve()
    return full.relative_to(here) if full.is_relative_to(here) else full


def damage(result: Any) -> str | None:
    """What is wrong with the content of a result.json, if anything."""
    if not isinstance(result, Mapping):
        return "result.json is missing or damaged"
    if result.get("schema_version") != RESULT_SCHEMA:
        return f"result.json has schema_version {result.get('schema_version')}, and this version reads {RESULT_SCHEMA}"
    return None


def _run_folders(path: Path) -> Iterator[Path]:
    for folder, below, files in os.walk(path):
        if "status.json" in files:
            below.clear()
            yield Path(folder).resolve()


def read_run(path: Path) -> Run | None:
    """The run in a folder, if it is finished and readable."""
    return _read(RunFolder(path)).run


def _read(folder: RunFolder) -> Record:
    status, state = read_json(folder.status) or {}, folder.state()
    if state != "finished":
        error = status.get("error")
        return Record(folder.path, state, None if error is None else " ".join(str(error).split()))
    result, config = read_json(folder.result), _read_yaml(folder.config)
    problem = damage(result) or (None if config else "config.yaml is missing or damaged")
    if problem:
        return Record(folder.path, "failed", problem)
    return Record(folder.path, state, None, _run(folder.path, str(status.get("time", "")), result, config))


def _run(path: Path, time: str, result: Mapping[str, Any], config: Mapping[str, Any]) -> Run:
    settings = _settings(config)
    settings[""]["selection"] = result["selection"]["validator"]  # where `auto` is configured: what it chose
    manifest = read_json(RunFolder(path).manifest) or {}
    for group, component in manifest.get("components", {}).items():  # runs of two versions are not one row
        owner = next((o for o in settings if o.partition("=")[0] == group), "")
        settings[owner][f"{group}.version"] = component["version"]
    settings[""]["machinery"] = manifest.get("machinery")
    figure = float(result["metrics"]["target_test"][HEADLINE[result["kind"]]])
    return Run(
        path=path,
        time=time,
        kind=result["kind"],
        method=result["method"],
        pair=(result["source"], result["target"]),
        oracle=result["selection"]["uses_target_labels"],
        seeds=tuple(result[key] for key in SEEDS),
        figure=100 * figure if result["kind"] == "classification" else figure,
        settings=settings,
        scores={**result.get("validators", {}), **(read_json(RunFolder(path).validators) or {}).get("scores", {})},
        figures=result["metrics"]["target_test"],
        warnings=tuple(warning["text"] for warning in result.get("health", {}).get("warnings", ())),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """The content, or nothing where the file is missing or not a mapping."""
    import yaml  # the end of a run has no use for it

    try:
        content = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _settings(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`Run.settings`; keys that the schema gained later have its defaults."""
    common = {**_flat(asdict(Config())), **_flat({k: v for k, v in config.items() if k not in COMPONENTS})}
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
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = _hashable(value)
    return flat


def _hashable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple((key, _hashable(v)) for key, v in sorted(value.items()))
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
