"""Features of a frozen backbone: computed once, kept, and put in the place of a task's inputs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from transfer_cli.config.identity import component_content
from transfer_cli.config.schema import Config
from transfer_cli.data.batching import in_order
from transfer_cli.data.domain import Origin, Part, fingerprint_code, fingerprint_values
from transfer_cli.data.feature_cache import Entry, FeatureCache
from transfer_cli.data.inputs import FeatureInputs, Inputs, InputSpec, Padded
from transfer_cli.data.task import Heldout, TransferTask, Unlabelled
from transfer_cli.registry import Component

VERSION = 1  # raised when reading images, resizing or extraction change a feature
BATCH = {"cuda": 256}  # samples a forward pass, where `trainer.eval_batch_size` does not ask for fewer
BATCH_ELSEWHERE = 64
LONG = 5  # seconds: what takes longer is told
EVERY = 60  # seconds between lines where no bar shows the way

Write = Callable[[np.ndarray, np.ndarray], None]


class Reporter(Protocol):
    terminal: bool

    def start(self, name: str, done: int, total: int) -> None: ...
    def advance(self, done: int, values: dict[str, float]) -> None: ...
    def stop(self) -> None: ...
    def say(self, line: str) -> None: ...
    def log(self, line: str) -> None: ...


@dataclass(frozen=True)
class Extractor:
    """A backbone and the way in which it is used. Batches all have one size, the last filled up, so that (on the CPU, sequences
    apart) a sample's features are the same bits whatever others are in its batch."""

    backbone: nn.Module
    identity: str  # all that its features depend on besides their inputs
    about: Mapping[str, str]  # the same for people
    device: torch.device
    batch: int
    workers: int = 0
    channels_last: bool = False

    @property
    def width(self) -> int:
        return int(self.backbone.out_features)  # type: ignore[arg-type]

    def key(self, origin: Origin) -> str:
        return fingerprint_values(origin.key, origin.size, self.identity, self.batch)

    def __call__(self, inputs: Inputs) -> Generator[np.ndarray, None, None]:
        """Features `(B, D)` float32 of all the inputs, in order, a batch at a time."""
        training = self.backbone.training
        self.backbone.eval()
        try:
            with closing(in_order(inputs, self.batch, self.device, self.workers, self.channels_last)) as batches:
                for x in batches:
                    n = len(x.values if isinstance(x, Padded) else x)
                    with torch.no_grad():
                        features = self.backbone(_filled(x, self.batch) if n < self.batch else x)[:n]
                    yield features.float().cpu().numpy()
        finally:
            self.backbone.train(training)


def make_extractor(
    backbone: nn.Module, chosen: Component, spec: InputSpec, config: Config, device: torch.device
) -> Extractor:
    """Of a backbone that was just built from `chosen`; `spec` is that of its inputs."""
    trainer, content = config.trainer, component_content(chosen)
    built_from = (chosen.reference, content["version"], content["parameters"], fingerprint_code(chosen.implementation))
    ways = (trainer.precision, trainer.channels_last, trainer.compile, device.type, torch.__version__)
    return Extractor(
        backbone,
        identity=fingerprint_values(VERSION, built_from, state_digest(backbone), ways),
        about={"backbone": chosen.name, "input": str(spec), "precision": trainer.precision, "device": device.type},
        device=device,
        batch=min(trainer.eval_batch_size, BATCH.get(device.type, BATCH_ELSEWHERE)),
        workers=config.workers,
        channels_last=trainer.channels_last,
    )


def state_digest(module: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def with_features(
    task: TransferTask, heldout: Heldout, extract: Extractor, cache: FeatureCache | None, console: Reporter
) -> tuple[TransferTask, Heldout]:
    """The task with features in the place of every part's inputs: those in the cache, and the others extracted now.

    Without a cache, or where it has no room, they are kept in memory. Every part must have an origin.

    Raises:
        TransferError: the cache cannot be written, or an image cannot be read.
    """
    parts = [*_parts(task).values(), *_parts(heldout).values()]
    found = iter(on_features(parts, extract, cache, console))

    def changed(owner: Any) -> Any:
        return replace(owner, **{name: next(found) for name in _parts(owner)})

    return changed(task), changed(heldout)


def on_features(
    parts: Sequence[Part | Unlabelled], extract: Extractor, cache: FeatureCache | None, console: Reporter
) -> list[Part | Unlabelled]:
    """The parts, each with features in the place of its inputs, as `with_features` has them."""
    shared: dict[str, list[Part | Unlabelled]] = {}
    for part in parts:
        shared.setdefault(_origin(part).key, []).append(part)
    values = {key: torch.from_numpy(_features(same, extract, cache, console)) for key, same in shared.items()}
    return [
        replace(part, inputs=FeatureInputs(values[_origin(part).key], _origin(part).rows, part.inputs))
        for part in parts
    ]


def _parts(owner: TransferTask | Heldout) -> dict[str, Part | Unlabelled]:
    found = {field.name: getattr(owner, field.name) for field in fields(owner)}
    return {name: part for name, part in found.items() if isinstance(part, Part | Unlabelled)}


def _origin(part: Part | Unlabelled) -> Origin:
    assert part.origin is not None, "pose_problem was given no fingerprints"
    return part.origin


def _features(
    parts: list[Part | Unlabelled], extract: Extractor, cache: FeatureCache | None, console: Reporter
) -> np.ndarray:
    """`(S, D)` float32 of the split that the parts are of; rows that they have no use for are undefined."""
    origin = _origin(parts[0])
    rows = torch.cat([_origin(part).rows for part in parts]).unique().numpy()
    what = f"features of {origin.name}"
    if cache is not None:
        entry = cache.entry(extract.key(origin), origin.size, extract.width)
        if (values := entry.read(rows)) is not None:
            return values
        if cache.make_room(entry, len(rows)):
            return _completed(entry, rows, parts, extract, console, what)
        console.say(f"{what}: no room within features.cache_gb, kept in memory")
    values = np.zeros((origin.size, extract.width), np.float32)  # rows that nobody writes take no memory
    _fill(parts, rows, extract, values.__setitem__, console, what)
    return values


def _completed(
    entry: Entry, rows: np.ndarray, parts: list[Part | Unlabelled], extract: Extractor, console: Reporter, what: str
) -> np.ndarray:
    """The entry's values after extracting what it lacks."""
    with entry.locked(lambda: console.say(f"{what}: waiting for another process that extracts them")):
        if entry.prepare({"data": _origin(parts[0]).name, **extract.about}):
            console.say(f"{what}: a file in the cache has the wrong size; extracted again")
        missing, damaged = entry.missing(rows)
        if damaged:
            console.say(f"{what}: {damaged:,} rows in the cache are damaged; extracted again")
        _fill(parts, rows[missing], extract, entry.write, console, what)
        return entry.values()


def _fill(
    parts: list[Part | Unlabelled], rows: np.ndarray, extract: Extractor, write: Write, console: Reporter, what: str
) -> None:
    """Extract `rows`, each from the first of the parts that has it."""
    if not len(rows):
        return
    wanted = np.zeros(_origin(parts[0]).size, bool)
    wanted[rows] = True
    done, began = 0, time.monotonic()
    told = began
    console.start(what, 0, len(rows))
    try:
        for part in parts:
            own = _origin(part).rows.numpy()
            mine = np.flatnonzero(wanted[own])
            if not len(mine):
                continue
            at = np.split(own[mine], range(extract.batch, len(mine), extract.batch))
            with closing(extract(part.inputs.take(torch.from_numpy(mine)))) as blocks:
                for block_rows, block in zip(at, blocks, strict=True):
                    write(block_rows, block)
                    done += len(block)
                    console.advance(done, {})
                    if not console.terminal and time.monotonic() - told > EVERY:
                        told = time.monotonic()
                        console.say(f"{what}: {done:,} of {len(rows):,}")
            wanted[own] = False
    finally:
        console.stop()
    seconds = time.monotonic() - began
    if seconds > LONG:
        tell = console.log if console.terminal else console.say
        tell(f"{what}: {done:,} extracted in {seconds:.0f} s")


def _filled(x: Any, size: int) -> Any:
    """The batch with its last sample repeated, `size` in all."""
    if isinstance(x, Padded):
        return Padded(_filled(x.values, size), _filled(x.mask, size))
    at = torch.arange(size, device=x.device).clamp_max(len(x) - 1)
    filled: Tensor = x[at]
    return filled if x.is_contiguous() else filled.contiguous(memory_format=torch.channels_last)
