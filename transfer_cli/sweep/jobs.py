"""The jobs of a sweep: the grid of Hydra, the points of a search for each of its jobs, and what became of each job's run."""

from __future__ import annotations

import copy
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from transfer_cli.config.compose import data_root, resolve_components, typed
from transfer_cli.config.identity import component_content, identify
from transfer_cli.config.schema import COMPONENTS, Config, Sweep, check_sweep
from transfer_cli.errors import TransferError
from transfer_cli.registry import Component
from transfer_cli.run_folder import RunFolder, read_object
from transfer_cli.sweep.ranges import Choice, Range, draw, read_ranges, word

SEARCHED = ("method", "then", "optimizer")  # groups whose `search:` is heeded
SEEDS = ("seed", "data_seed")

Components = Mapping[str, Component]


@dataclass(frozen=True)
class Job:
    """`words`: what `transfer run` would be given. `state`: that of the run's folder (`RunFolder.state`); `refused` where the
    configuration is wrong, and `error` says why, as it does where the run failed. A refused job has no folder. `stack`: the folders
    of all its seeds, where they are trained together."""

    words: tuple[str, ...]
    state: str
    error: str | None = None
    folder: RunFolder | None = None
    config: Config | None = None
    components: Components | None = None
    stack: tuple[RunFolder, ...] = ()

    def is_to_run(self) -> bool:
        """Whether `transfer run` would do something: an unfinished run, or whatever it is told to do again."""
        if self.config is None or self.config.force:
            return True
        return self.state != "finished" and (self.state != "failed" or self.config.retry_failed)


class Composer:
    """Configurations of many jobs: those that differ in seeds and in components' values only are composed by Hydra once."""

    def __init__(self, master: DictConfig, loader: ConfigLoader) -> None:
        self.master, self.loader, self.parser = master, loader, OverridesParser.create(config_loader=loader)
        self._composed: dict[tuple[str, ...], tuple[Config, frozenset[str]]] = {}

    def config(self, words: Sequence[str]) -> Config:
        """Raises:
        TransferError: a key, type or value that is wrong."""
        overrides = self.parser.parse_overrides(list(words))
        values = [o for o in overrides if self._is_value(o)]
        rest = tuple(o.input_line or "" for o in overrides if o not in values)
        config, fixed = self._base(rest)
        for override in values:
            found = None if override.key_or_group.split(".")[0] in fixed else _with(config, override)
            if found is None:
                return self._base(tuple(words))[0]
            config = found
        return config

    def _base(self, words: tuple[str, ...]) -> tuple[Config, frozenset[str]]:
        """The configuration, and the keys whose values others refer to or that refer to others."""
        if words not in self._composed:
            composed = self.loader.load_sweep_config(self.master, list(words))
            composed = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
            plain = OmegaConf.to_container(composed, resolve=False)
            assert isinstance(plain, dict)
            own = {str(key) for key, node in plain.items() if "${" in json.dumps(node, default=str)}
            # torchvision's name refers to its own group; a reference elsewhere may be to any key
            fixed = frozenset(own if own <= {"backbone"} else [*SEEDS, *COMPONENTS])
            self._composed[words] = (typed(composed), fixed)
        return self._composed[words]

    def _is_value(self, override: Override) -> bool:
        key = override.key_or_group
        plain = override.type == OverrideType.CHANGE and override.package is None and not override.is_sweep_override()
        return plain and (key in SEEDS or ("." in key and key.split(".")[0] in COMPONENTS))


def _with(config: Config, override: Override) -> Config | None:
    """The configuration with one value set; None where Hydra has to look at it: another key, a mapping, an odd type."""
    head, *path = override.key_or_group.split(".")
    value = override.value()
    if isinstance(value, dict) or (isinstance(value, str) and "${" in value):
        return None
    if not path:
        changed: dict[str, Any] = {head: value}
        return replace(config, **changed) if type(value) is int else None
    node = copy.deepcopy(getattr(config, head))
    inner = node
    for part in path[:-1]:
        inner = inner.get(part) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or path[-1] not in inner or isinstance(inner[path[-1]], dict):
        return None
    inner[path[-1]] = value
    return replace(config, **{head: node})


def jobs_of(arguments: Sequence[str], master: DictConfig, loader: ConfigLoader) -> list[Job]:
    """The jobs of `transfer run -m ARGUMENTS`, each once; `master` is the configuration without what is swept.

    A search goes through the grid point by point, so that a sweep that is stopped has tried each combination alike.

    Raises:
        TransferError: a word of the sweep's own that makes no sense.
    """
    composer = Composer(master, loader)
    sweep = OmegaConf.to_object(master.sweep)
    assert isinstance(sweep, Sweep)
    check_sweep(sweep)
    overrides = composer.parser.parse_overrides(list(arguments))
    for override in overrides:
        if is_sweep_word(override.key_or_group) and override.is_sweep_override():
            raise TransferError(f"{override.key_or_group} takes one value: it describes the whole sweep.")
    words = [o for o in overrides if not is_sweep_word(o.key_or_group)]
    grid = BasicSweeper.split_arguments(words, None)[0]
    found: dict[tuple[str, ...], Job] = {}
    look = Look(composer)
    if sweep.kind == "random":
        points = [_points(job, sweep, composer) for job in grid]
    elif sweep.kind == "points":
        listed = _listed(sweep, composer)
        points = [[[*job, *setting] for setting in listed] for job in grid]
    else:
        points = [[job] for job in grid]
    for number in range(max((len(of_job) for of_job in points), default=0)):
        for of_job in points:
            if number < len(of_job):
                job = tuple(w for w in of_job[number] if not _is_range(w))
                if job not in found:
                    found[job] = look.at(of_job[number], job)
    _refuse_another_sweep(found.values(), sweep)
    _refuse_stacks_that_overlap(found.values())
    return list(found.values())


def is_sweep_word(key: str) -> bool:
    """Whether a key is about the sweep as a whole, and no run's."""
    return key == "sweep" or key.startswith("sweep.")


def _is_range(text: str) -> bool:
    """Whether an override narrows a range, which the run itself has no use for."""
    return any(text.lstrip("+~").startswith(f"{group}.search") for group in SEARCHED)


def _listed(sweep: Sweep, composer: Composer) -> list[list[str]]:
    """The settings of `sweep.points`, as words; one that has several values of a key is a grid of its own.

    Raises:
        TransferError: one of a word of the sweep's own.
    """
    found = []
    for setting in sweep.points:
        overrides = composer.parser.parse_overrides(shlex.split(setting))
        if any(is_sweep_word(o.key_or_group) for o in overrides):
            raise TransferError(f"sweep.points: '{setting}' is about the whole sweep, and no setting of a run.")
        found += BasicSweeper.split_arguments(overrides, None)[0]
    return found


def _points(words: Sequence[str], sweep: Sweep, composer: Composer) -> list[list[str]]:
    """The points of one job of the grid, as words; where they coincide, the first."""
    try:
        config = composer.config(words)
        frozen = trains_nothing(resolve_components(config))
    except TransferError:
        return [list(words)]  # what is wrong is said once
    taken = {w.lstrip("+").partition("=")[0] for w in words}
    ranges, defaults = ranges_of(config, "optimizer" if frozen else None, taken)
    method = "+".join(str(node["name"]) for node in (config.method, config.then) if node.get("name"))
    points: dict[str, list[str]] = {}
    for number in range(sweep.n or 0):
        values = defaults if number == 0 and sweep.default else draw(ranges, sweep.seed, method, number)
        content = json.dumps({key: _comparable(value) for key, value in values.items()}, sort_keys=True)
        chosen = [] if values is defaults else [_key_word(config, key, value) for key, value in values.items()]
        points.setdefault(content, [*words, *chosen])
    return list(points.values())


def trains_nothing(components: Components) -> bool:
    """Whether all is closed forms on frozen features, so that no optimizer is used."""
    methods = [components[group].implementation for group in ("method", "then") if group in components]
    return all(getattr(method, "frozen_backbone", False) for method in methods)


def ranges_of(
    config: Config, unused: str | None = None, taken: Sequence[str] | set[str] = ()
) -> tuple[dict[str, Range | Choice], dict[str, Any]]:
    """What is searched and the present values, by key (`method.weight`); neither the group `unused` nor the keys `taken`.

    Raises:
        TransferError: something under `search:` that is no range.
    """
    ranges: dict[str, Range | Choice] = {}
    defaults = {}
    for group in SEARCHED:
        node = getattr(config, group)
        if not node.get("implementation") or group == unused:
            continue
        for key, range_ in read_ranges(f"{group}.search", node.get("search")).items():
            if f"{group}.{key}" not in taken:
                ranges[f"{group}.{key}"], defaults[f"{group}.{key}"] = range_, node.get(key)
    return ranges, defaults


def _key_word(config: Config, key: str, value: Any) -> str:
    """With a plus where the YAML leaves the key out."""
    group, _, name = key.partition(".")
    return ("" if name in getattr(config, group) else "+") + word(key, value)


def _comparable(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Look:
    """Finds what became of jobs' runs."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer
        self._fingerprints: dict[str, str] = {}

    def at(self, words: Sequence[str], shown: tuple[str, ...]) -> Job:
        """The job of `words`, called `shown`."""
        try:
            config = self.composer.config(words)
            components = resolve_components(config)
            seeds = [replace(config, seed=config.seed + i) for i in range(config.seeds_together)]
            folders = [RunFolder(identify(own, components).folder(config.outputs)) for own in seeds]
            folder = next((f for f in folders if f.state() != "finished"), folders[0])  # where there is work left
            state, error = folder.state(), None
            if state == "finished":
                self._check_data(folder, config, components)
            elif state == "failed":
                error = str(read_object(folder.status).get("error"))
            stack = tuple(folders) if config.seeds_together > 1 else ()
            return Job(shown, state, error, folder, config, components, stack)
        except TransferError as problem:
            return Job(shown, "refused", str(problem))

    def _check_data(self, folder: RunFolder, config: Config, components: Components) -> None:
        """Raises:
        TransferError: the data of a finished run are others now."""
        from transfer_cli.build import readers
        from transfer_cli.outputs import check_same_ground

        groups = [group for group in ("source", "target", "ood") if group in components]
        keys = {g: json.dumps([component_content(components[g]), str(data_root(config))]) for g in groups}
        if not all(key in self._fingerprints for key in keys.values()):
            for group, reader in readers(config, components).items():
                self._fingerprints[keys[group]] = reader.fingerprint()
        check_same_ground(folder, {group: self._fingerprints[key] for group, key in keys.items()}, None)


def _refuse_another_sweep(jobs: Any, sweep: Sweep) -> None:
    for job in jobs:
        if job.config is not None and job.config.sweep.kind not in ("grid", sweep.kind):
            raise TransferError("an experiment that sets sweep= cannot be swept over itself: name one experiment.")


def _refuse_stacks_that_overlap(jobs: Iterable[Job]) -> None:
    for folder, times in Counter(folder for job in jobs for folder in job.stack).items():
        if times > 1:
            raise TransferError(
                f"{folder.path.name} would be in {times} stacks of seeds_together: sweep seed in strides of it (seed=0,8)."
            )


def launch(jobs: Sequence[Job], config: DictConfig, task: Any, launcher: Launcher, batch_size: int | None) -> list[Any]:
    """Run what is not finished, in one call of the launcher (or in batches of `batch_size`); what failed before only where
    that is asked for. Says at the end how many finished; `task`, which is `commands.run.Task`, keeps the errors."""
    folder = Path(str(config.hydra.sweep.dir))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "multirun.yaml")

    todo = [job for job in jobs if job.is_to_run()]
    before = sum(job.state == "finished" and not job.is_to_run() for job in jobs)
    if config.sweep.kind in ("points", "random") or before:
        known = f", {before} finished before" if before else ""
        print(f"a sweep of {len(jobs)} run{'s' * (len(jobs) != 1)}{known}: transfer plan tells more", flush=True)
    for job in jobs:
        if job.state == "failed" and not job.is_to_run():
            task.failed_elsewhere(f"failed before: {job.error} (--retry-failed tries again)", " ".join(job.words))
    returns: list[Any] = []
    words = [list(job.words) for job in todo]
    for batch in BasicSweeper.split_overrides_to_chunks(words, batch_size) if words else ():
        for overrides, returned in zip(batch, launcher.launch(batch, initial_job_idx=len(returns)), strict=True):
            returns.append(returned)
            if returned.status == JobStatus.FAILED:  # in a process of its own
                task.failed_elsewhere(str(returned._return_value), " ".join(overrides))
    print(
        f"{len(jobs)} run{'s' * (len(jobs) != 1)}: {len(jobs) - len(task.errors)} finished, {len(task.errors)} failed"
    )
    return returns
