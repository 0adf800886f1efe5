"""Features of a frozen backbone: extracted once, shared, verified, bounded, and safe from kills and from each other's processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from transfer_cli.backbones.base import Backbone
from transfer_cli.backbones.digits import SmallCNN
from transfer_cli.build import build_method, pose_problem, readers
from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.config.hydra_glue import composed
from transfer_cli.data import extraction, feature_cache
from transfer_cli.data.domain import Domain, Origin, Part, numbered
from transfer_cli.data.extraction import Extractor, make_extractor, state_digest, with_features
from transfer_cli.data.feature_cache import Entry, FeatureCache, checksums
from transfer_cli.data.inputs import ArrayInputs, Extracted, FeatureInputs, ImageFiles, Inputs, InputSpec, ResizedArrays
from transfer_cli.data.task import Heldout, TransferTask, match_labels, split_pair
from transfer_cli.errors import TransferError

Transfer = Callable[..., Outcome]

CPU = torch.device("cpu")
GIGABYTE = 2**30


class Net(Backbone):
    """Two layers of fixed weights that count the samples passing through them, fillings included."""

    def __init__(self, spec: InputSpec, width: int = 24) -> None:
        super().__init__(spec)
        draw = torch.Generator().manual_seed(0)
        n = int(np.prod(spec.shape))
        self.a = torch.nn.Parameter(torch.randn(n, 40, generator=draw))
        self.b = torch.nn.Parameter(torch.randn(40, width, generator=draw))
        self.out_features = width
        self.seen: list[int] = []
        self.on_batch: Callable[[int], None] = lambda count: None

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        self.on_batch(len(self.seen))
        assert not self.training and not torch.is_grad_enabled()
        return torch.relu(x.flatten(1) @ self.a) @ self.b


class Words:
    """A console that keeps what it is told."""

    terminal = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, name: str, done: int, total: int) -> None: ...
    def advance(self, done: int, values: dict[str, float]) -> None: ...
    def stop(self) -> None: ...
    def log(self, line: str) -> None: ...
    def say(self, line: str) -> None:
        self.lines.append(line)


def images(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 1, 6, 6), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def domain(name: str, classes: str, inputs: Inputs, test: Inputs | None = None) -> Domain:
    def part(inputs: Inputs, split: str) -> Part:
        n = len(inputs)
        origin = Origin(f"{name}-{split}", f"{name} {split}", torch.arange(n), n)
        return Part(inputs, torch.arange(n) % len(classes), numbered(name, n), origin)

    return Domain(
        name, "classification", tuple(classes), part(inputs, "train"), None if test is None else part(test, "test")
    )


def posed(protocol: str = "inductive", **changes: Any) -> tuple[TransferTask, Heldout]:
    source = domain("s", "abc", ArrayInputs(images(300, 1)), ArrayInputs(images(90, 2)))
    target = domain("t", "cab", ArrayInputs(images(200, 3)))
    options: dict[str, Any] = {
        "target_labels": 2, "test_share": 0.25, "validation_share": 0.1, "data_seed": 0,
        "subset": {"source": None, "target": None, "test": None},
    }  # fmt: skip
    return split_pair(
        source, target, match_labels(source, target, "closed"), protocol=protocol, **{**options, **changes}
    )


def parts_of(task: TransferTask, heldout: Heldout) -> dict[str, Any]:
    found = {f.name: getattr(owner, f.name) for owner in (task, heldout) for f in fields(owner)}
    return {name: part for name, part in found.items() if hasattr(part, "inputs")}


def extractor(net: Backbone | None = None, **changes: Any) -> Extractor:
    net = Net(InputSpec("image", (1, 6, 6))) if net is None else net
    return Extractor(net, identity="net", about={"backbone": "net"}, device=CPU, **{"batch": 64, **changes})


def features(part: Any) -> Tensor:
    found = part.inputs.batch(torch.arange(len(part)))
    assert isinstance(part.inputs, FeatureInputs) and isinstance(found, Extracted)
    return found.values


def extracted(
    folder: Path | None, problem: tuple[TransferTask, Heldout] | None = None, extract: Extractor | None = None
) -> tuple[dict[str, Tensor], list[str], list[int]]:
    """Every part's features, what was said, and the batches that the backbone saw."""
    words, extract = Words(), extract or extractor()
    cache = None if folder is None else FeatureCache(folder, GIGABYTE)
    problem = with_features(*(problem or posed()), extract, cache, words)
    return {name: features(part) for name, part in parts_of(*problem).items()}, words.lines, extract.backbone.seen  # type: ignore[return-value]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def entry_of(folder: Path, data: str) -> Path:
    metas = {path.parent: json.loads(path.read_text()) for path in folder.glob("*/meta.json")}
    return next(path for path, meta in metas.items() if meta["data"] == data)


# --- each part gets its own samples' features -------------------------------------------------------


@pytest.mark.parametrize("protocol", ["inductive", "transductive"])
@pytest.mark.parametrize("cached", [False, True])
def test_each_part_has_the_features_of_its_own_samples(protocol: str, cached: bool, tmp_path: Path) -> None:
    raw = posed(protocol)
    extract = extractor()
    found = with_features(*raw, extract, FeatureCache(tmp_path, GIGABYTE) if cached else None, Words())
    names = {"source", "source_validation", "target_unlabelled", "target_validation", "target_labelled"}
    assert parts_of(*found).keys() == names | {"source_test", "target_test"}
    extract.backbone.eval()
    for name, part in parts_of(*found).items():
        before = parts_of(*raw)[name]
        with torch.no_grad():
            wanted = extract.backbone(before.inputs.batch(torch.arange(len(before))).float() / 255)
        torch.testing.assert_close(features(part), wanted)
        assert part.ids == before.ids and part.inputs.raw is before.inputs
        assert part.inputs.spec == InputSpec("vector", (24,)) and part.inputs.in_memory
        assert not hasattr(part, "labels") or torch.equal(part.labels, before.labels)
    assert found[0].input == raw[0].input, "the task's own samples are still images"


def test_taking_from_features_takes_from_the_inputs_too() -> None:
    raw = ArrayInputs(images(5, 0))
    inputs = FeatureInputs(torch.arange(16.0).view(8, 2), torch.tensor([7, 1, 2, 3, 4]), raw).take(torch.tensor([4, 0]))
    assert inputs.batch(torch.tensor([0, 1])).values.tolist() == [[8, 9], [14, 15]]
    assert len(inputs) == 2 and torch.equal(inputs.raw.values, raw.values[[4, 0]])  # type: ignore[attr-defined]


def test_parts_keep_their_origin() -> None:
    task, heldout = posed()
    for name, part in parts_of(task, heldout).items():
        assert [f"{part.origin.name.split()[0]}/{row}" for row in part.origin.rows.tolist()] == list(part.ids), name
    assert heldout.source_test is not None and heldout.source_test.origin is not None
    assert heldout.source_test.origin.key == "s-test" and heldout.target_test.origin.size == 200  # type: ignore[union-attr]


# --- once ------------------------------------------------------------------------------------------


def test_the_second_time_nothing_passes_the_backbone(tmp_path: Path) -> None:
    first, said, seen = extracted(tmp_path)
    assert len(seen) >= 10 and set(seen) == {64} and said == []
    second, said, seen = extracted(tmp_path)
    assert seen == [] and said == [] and same(first, second)
    assert same(first, extracted(None)[0]), "and without a cache the values are the same bits"
    assert sorted(p.name for p in tmp_path.glob("*/*")) == sorted(
        ["checks.u64", "features.f32", "lock", "meta.json"] * 3
    ), "an entry a split"


def test_only_the_rows_asked_for_are_extracted_and_larger_subsets_add_the_others(tmp_path: Path) -> None:
    few = {"source": 20, "target": 30, "test": 10}
    small, _, seen = extracted(tmp_path, posed(subset=few), extractor(batch=1))
    assert len(seen) == 20 + 30 + 2 * 10
    there = np.fromfile(entry_of(tmp_path, "s train") / "checks.u64", np.uint64) != 0
    assert there.sum() == 20 and len(there) == 300
    whole, _, seen = extracted(tmp_path, extract=extractor(batch=1))
    assert len(seen) == 300 + 90 + 200 - 70 and same(whole, extracted(None, extract=extractor(batch=1))[0])
    again, _, seen = extracted(tmp_path, posed(subset=few), extractor(batch=1))
    assert seen == [] and same(small, again)


def test_rows_of_several_parts_are_extracted_once() -> None:
    """Transductive: the target's training, validation and test samples are the same ones, but for the grants."""
    extract = extractor(batch=1)
    extracted(None, posed("transductive"), extract)
    assert len(extract.backbone.seen) == 300 + 90 + 200


def test_a_row_has_the_same_bits_whatever_is_extracted_with_it() -> None:
    extract = extractor(SmallCNN(InputSpec("image", (1, 16, 16))))
    inputs = ArrayInputs(torch.randint(0, 256, (150, 1, 16, 16)).to(torch.uint8))
    whole = np.concatenate(list(extract(inputs)))
    for rows in ([3], [149, 2, 77], list(range(100, 31, -1))):
        assert np.array_equal(np.concatenate(list(extract(inputs.take(torch.tensor(rows))))), whole[rows])


def test_extraction_leaves_the_backbone_as_it_was() -> None:
    net = Net(InputSpec("image", (1, 6, 6)))
    for mode in (True, False):
        net.train(mode)
        extracted(None, extract=extractor(net))
        assert net.training is mode


# --- damage ----------------------------------------------------------------------------------------


def test_a_damaged_row_is_found_and_extracted_again(tmp_path: Path) -> None:
    whole, _, _ = extracted(tmp_path)
    file = entry_of(tmp_path, "s train") / "features.f32"
    content = bytearray(file.read_bytes())
    for row in (5, 211):
        content[row * 24 * 4 + 13] ^= 1  # one bit
    file.write_bytes(content)
    again, said, seen = extracted(tmp_path)
    assert said == ["features of s train: 2 rows in the cache are damaged; extracted again"]
    assert sum(seen) <= 2 * 64 and same(whole, again)
    assert extracted(tmp_path)[1:] == ([], [])


@pytest.mark.parametrize("name", ["features.f32", "checks.u64"])
@pytest.mark.parametrize("length", [0, 1000, 10**6])
def test_a_file_of_the_wrong_size_is_extracted_again(name: str, length: int, tmp_path: Path) -> None:
    whole, _, _ = extracted(tmp_path)
    os.truncate(entry_of(tmp_path, "t train") / name, length)
    again, said, seen = extracted(tmp_path)
    assert said == ["features of t train: a file in the cache has the wrong size; extracted again"]
    assert len(seen) == 3 + 1 + 1 and same(whole, again)
    assert extracted(tmp_path)[1:] == ([], [])


@pytest.mark.parametrize("name", ["features.f32", "checks.u64", "meta.json", "lock"])
def test_a_missing_file_is_made_again(name: str, tmp_path: Path) -> None:
    whole, _, _ = extracted(tmp_path)
    (entry_of(tmp_path, "t train") / name).unlink()
    again, _, seen = extracted(tmp_path)
    assert same(whole, again) and bool(seen) == (name in ("features.f32", "checks.u64"))
    (next(tmp_path.glob("*/features.f32"))).unlink()
    extracted(tmp_path)
    assert len(list(tmp_path.glob("*/meta.json"))) >= 2


def test_who_has_features_mapped_keeps_them_when_the_entry_is_cleared_or_made_anew(tmp_path: Path) -> None:
    problem = with_features(*posed(), extractor(), FeatureCache(tmp_path, GIGABYTE), Words())
    before = {name: features(part).clone() for name, part in parts_of(*problem).items()}
    os.truncate(entry_of(tmp_path, "t train") / "checks.u64", 8)
    extracted(tmp_path)
    cache = FeatureCache(tmp_path)
    assert cache.clear([entry.key for entry in cache.stored()]) == [] and list(tmp_path.iterdir()) == []
    assert same(before, {name: features(part) for name, part in parts_of(*problem).items()})


def test_a_file_of_the_wrong_size_is_not_mended_in_place(tmp_path: Path) -> None:
    entry = filled(tmp_path, "a", 0)
    values = entry.read(np.arange(100))
    os.truncate(entry.path / "checks.u64", 8)
    with entry.locked(lambda: None):
        assert entry.prepare({})
    assert values is not None and (values == 1).all() and not entry.values().any()


def test_nothing_written_to_features_reaches_the_cache(tmp_path: Path) -> None:
    whole, _, _ = extracted(tmp_path)
    problem = with_features(*posed(), extractor(), FeatureCache(tmp_path, GIGABYTE), Words())
    for part in parts_of(*problem).values():
        part.inputs.values.zero_()
    again, said, seen = extracted(tmp_path)
    assert said == seen == [] and same(whole, again)


def test_every_single_change_of_a_value_changes_the_checksum() -> None:
    draw = np.random.default_rng(0)
    row = draw.standard_normal((1, 7)).astype(np.float32)
    number = np.array([12])
    kept = checksums(row, number)
    for column in range(7):
        for bit in range(32):
            changed = row.copy()
            changed.view(np.uint32)[0, column] ^= np.uint32(1 << bit)
            assert checksums(changed, number) != kept
    assert checksums(row, number + 1) != kept and checksums(row[:, ::-1].copy(), number) != kept
    torn = row.copy()
    torn[0, 3:] = 0
    assert checksums(torn, number) != kept and checksums(np.zeros((1, 7), np.float32), np.array([0])) != 0
    many = draw.standard_normal((50, 7)).astype(np.float32)
    rows = draw.permutation(50)
    byhand = [
        sum(int(v) * pow(0x9E3779B97F4A7C15, i + 1, 2**64) for i, v in enumerate([*x.view(np.uint32), row])) % 2**64
        for x, row in zip(many, rows.tolist(), strict=True)
    ]
    assert checksums(many, rows).tolist() == byhand


# --- other processes, and being killed --------------------------------------------------------------


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """A process that does `work` and ends with status 0, or 1 after an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        with suppress(ChildProcessError):  # it has ended, and was asked for its status
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_myself(at: int) -> Callable[[int], None]:
    def on_batch(count: int) -> None:
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_batch


fork = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@fork
@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_killed_extraction_goes_on_and_ends_in_the_same_bits(at: int, tmp_path: Path) -> None:
    def work() -> None:
        extract = extractor(batch=32)
        extract.backbone.on_batch = kill_myself(at)
        extracted(tmp_path / "killed", extract=extract)

    with child(work) as pid:
        assert status_of(pid) == -signal.SIGKILL
        again, said, seen = extracted(tmp_path / "killed", extract=extractor(batch=32))
    whole, _, all_seen = extracted(tmp_path / "whole", extract=extractor(batch=32))
    assert said == [] and len(seen) == len(all_seen) - (at - 1), "the batches that were written are not computed again"
    assert same(whole, again)
    for path in (tmp_path / "whole").glob("*/*.[fu]*"):
        assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@fork
def test_a_row_without_its_checksum_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the rows of a batch and their checksums."""

    def work() -> None:
        calls: list[int] = []

        def checked(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
            calls.extend([len(rows)] * bool(len(rows)))
            return checksums(values, rows)

        class Dying(np.ndarray):
            """Checksums at whose writing the process dies."""

            def __getitem__(self, key: Any) -> Any:
                if isinstance(key, slice) and len(calls) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitem__(key)

        monkeypatch.setattr("transfer_cli.data.feature_cache.checksums", lambda v, r: checked(v, r).view(Dying))
        extracted(tmp_path)

    with child(work) as pid:
        assert status_of(pid) == -signal.SIGKILL
    entry = entry_of(tmp_path, "s train")
    there = np.fromfile(entry / "checks.u64", np.uint64) != 0
    written = np.fromfile(entry / "features.f32", np.float32).reshape(300, 24).any(1)
    assert there.sum() == 128 and written.sum() == 192, "rows come first"
    again, said, _ = extracted(tmp_path)
    assert said == [] and same(again, extracted(None)[0])


@fork
def test_two_processes_at_once_make_one_whole_entry(tmp_path: Path) -> None:
    def slow(count: int) -> None:
        time.sleep(0.02)

    def work() -> None:
        extract = extractor(batch=16)
        extract.backbone.on_batch = slow
        found, said, seen = extracted(tmp_path / "cache", extract=extract)
        assert same(found, extracted(None, extract=extractor(batch=16))[0])
        (tmp_path / f"{os.getpid()}.json").write_text(json.dumps([len(seen), said]))

    with child(work) as first, child(work) as second, child(work) as third:
        assert [status_of(pid) for pid in (first, second, third)] == [0, 0, 0]
    batches, words = zip(*(json.loads(path.read_text()) for path in tmp_path.glob("*.json")), strict=True)
    alone = extracted(tmp_path / "alone", extract=extractor(batch=16))
    assert sum(batches) == len(alone[2]), "no row was extracted twice"
    assert any("waiting for another process that extracts them" in line for said in words for line in said)
    for path in (tmp_path / "alone").glob("*/*.[fu]*"):
        assert (tmp_path / "cache" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()


@fork
def test_extracting_while_another_process_clears(tmp_path: Path) -> None:
    """Neither fails, and what is extracted is right, whichever moment the clearing hits."""
    wanted = extracted(None)[0]

    def clearing() -> None:
        cache = FeatureCache(tmp_path)
        while True:
            cache.clear([entry.key for entry in cache.stored()])

    with child(clearing) as pid:
        for _ in range(20):
            found, said, _ = extracted(tmp_path)
            assert same(found, wanted) and not any("damaged" in line or "size" in line for line in said)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)


def test_a_lock_on_a_folder_that_was_cleared_meanwhile_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = filled(tmp_path, "a", 0)
    plain, calls = feature_cache._take, []

    def cleared_first(file: Any) -> bool:
        if not calls:
            shutil.rmtree(entry.path)
        calls.append(file)
        return plain(file)

    monkeypatch.setattr(feature_cache, "_take", cleared_first)
    with entry.locked(lambda: None):
        assert len(calls) == 2 and not entry.prepare({})
        assert entry.missing(np.arange(100))[0].all()


@fork
def test_a_kill_leaves_no_lock_even_if_workers_live_on(tmp_path: Path, folder_of_images: list[str]) -> None:
    inputs = ImageFiles(folder_of_images, channels=1, size=6)
    source = domain("f", "ab", inputs)
    options: dict[str, Any] = {
        "target_labels": 0, "test_share": 0.2, "validation_share": 0.1, "data_seed": 0, "protocol": "inductive",
        "subset": {"source": None, "target": None, "test": None},
    }  # fmt: skip

    def problem() -> tuple[TransferTask, Heldout]:
        return split_pair(None, source, match_labels(None, source, "closed"), **options)

    def work() -> None:
        extract = extractor(batch=8, workers=2)
        extract.backbone.on_batch = kill_myself(4)
        extracted(tmp_path / "cache", problem(), extract)

    wanted = extracted(None, problem(), extractor(batch=8))[0]
    with child(work) as pid:
        assert status_of(pid) == -signal.SIGKILL
        found, said, seen = extracted(tmp_path / "cache", problem(), extractor(batch=8))
    assert said == [], "nobody was waited for"
    assert len(seen) == 11 - 3 and same(found, wanted)  # 58 + 6 + 16 samples


@pytest.fixture
def folder_of_images(tmp_path: Path) -> list[str]:
    draw = np.random.default_rng(0)
    paths = []
    for name in ("dark", "light"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            path = tmp_path / "pictures" / name / f"{i}.png"
            pixels = draw.integers(0, 120, (16, 18, 3)) + 120 * (name == "light")
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            paths.append(str(path))
    return paths


# --- the bound -------------------------------------------------------------------------------------


def filled(folder: Path, key: str, age: float, rows: int = 100) -> Entry:
    """An entry of `rows` KiB, unused for `age` seconds."""
    entry = FeatureCache(folder).entry(key, rows, 256)
    with entry.locked(lambda: None):
        entry.prepare({"data": key})
        entry.write(np.arange(rows), np.ones((rows, 256), np.float32))
    os.utime(entry.path / "meta.json", (time.time() - age,) * 2)
    return entry


def disk(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def test_the_longest_unused_go_first_and_the_bound_holds(tmp_path: Path) -> None:
    for key, age in (("b", 20), ("c", 30), ("a", 10), ("d", 40)):
        filled(tmp_path, key, age)
    cache = FeatureCache(tmp_path, 350 * 1024)  # three
    assert cache.make_room(cache.entry("new", 100, 256), 100)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    filled(tmp_path, "new", 0)
    assert disk(tmp_path) <= 350 * 1024
    assert [entry.key for entry in cache.stored()] == ["new", "a", "b"]


def test_reading_counts_as_use(tmp_path: Path) -> None:
    for key, age in (("old", 40), ("older", 50)):
        filled(tmp_path, key, age)
    assert FeatureCache(tmp_path).entry("older", 100, 256).read(np.arange(100)) is not None
    cache = FeatureCache(tmp_path, 250 * 1024)
    assert cache.make_room(cache.entry("new", 100, 256), 100)
    assert [path.name for path in tmp_path.iterdir()] == ["older"]


@fork
def test_entries_in_use_or_being_written_are_not_evicted(tmp_path: Path) -> None:
    for key, age in (("mine", 90), ("theirs", 80), ("free", 10)):
        filled(tmp_path, key, age)
    cache = FeatureCache(tmp_path, 350 * 1024)
    mine = cache.entry("mine", 100, 256)
    assert mine.read(np.arange(100)) is not None
    os.utime(mine.path / "meta.json", (1, 1))

    def holding() -> None:
        with Entry(tmp_path / "theirs", 100, 256).locked(lambda: None):
            (tmp_path / "held").touch()
            time.sleep(60)

    with child(holding):
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        assert cache.make_room(cache.entry("new", 100, 256), 100)
        assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"mine", "theirs"}
        assert not cache.make_room(cache.entry("large", 300, 256), 300)
        assert cache.clear(["theirs"]) == ["theirs"]
    assert cache.clear(["theirs"]) == [], "its lock died with it"


def test_features_that_do_not_fit_stay_in_memory(tmp_path: Path) -> None:
    words, extract = Words(), extractor()
    found = with_features(*posed(), extract, FeatureCache(tmp_path, 30_000), words)
    assert "features of s train: no room within features.cache_gb, kept in memory" in words.lines
    assert [entry.meta["data"] for entry in FeatureCache(tmp_path).stored()] == ["t train"]
    assert disk(tmp_path) <= 30_000
    assert same({name: features(part) for name, part in parts_of(*found).items()}, extracted(None)[0])


def test_what_a_killed_clearing_left_is_swept(tmp_path: Path) -> None:
    filled(tmp_path, "a", 0)
    (tmp_path / "a").rename(tmp_path / ".a.123")
    assert FeatureCache(tmp_path).stored() == [] and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TransferError, match=r"cannot keep features in .*file.*features.cache_gb=0 keeps them in memory"
    ):
        extracted(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    entry = filled(tmp_path, "a", 0)
    entry._features = Path("/dev/full")
    with pytest.raises(TransferError, match=r"cannot keep features in .*No space left on device"):
        entry.write(np.arange(100), np.ones((100, 256), np.float32))


# --- whole runs ------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """Overrides of a run on small arrays of images, with a backbone whose weights come from a file."""
    draw = np.random.default_rng(0)
    for name, shift in (("lab", 0), ("field", 30)):
        labels = np.arange(240) % 3
        pixels = draw.integers(0, 100, (240, 16, 16)) + 40 * labels[:, None, None] + shift
        np.savez(tmp_path / f"{name}.npz", images=pixels.astype(np.uint8), labels=labels)
    torch.manual_seed(7)
    torch.save(SmallCNN(InputSpec("image", (1, 16, 16))).state_dict(), tmp_path / "weights.pt")
    return [
        "source=arrays", f"source.path={tmp_path}/lab.npz", "target=arrays", f"target.path={tmp_path}/field.npz",
        "backbone=small_cnn", f"backbone.weights={tmp_path}/weights.pt", "threads=1", "device=cpu",
    ]  # fmt: skip


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that pass the backbone, two blank samples at its making aside."""
    seen: list[int] = []
    plain = SmallCNN.forward

    def counted(self: SmallCNN, x: Tensor) -> Tensor:
        if len(x) > 2:
            seen.append(len(x))
        return plain(self, x)

    monkeypatch.setattr(SmallCNN, "forward", counted)
    return seen


def test_methods_seeds_heads_and_subsets_share_one_extraction(
    transfer: Transfer, pair: list[str], batches: list[int]
) -> None:
    first = transfer("run", *pair, "method=linear_probe")
    assert first.code == 0, first.err
    assert len(batches) == 2 * (3 + 1 + 2)  # 240: 160 to train, a tenth of them to validate, 80 to test; batches of 64
    batches.clear()
    for more in (
        ["method=linear_probe", "seed=1"], ["method=coral"], ["method=tca", "head=knn", "method.components=5"],
        ["method=linear_probe", "subset.source=50", "target_labels=3"], ["method=sa", "features.normalise=[zscore]"],
        ["method=linear_probe", "protocol=transductive", "data_seed=5"],
    ):  # fmt: skip
        outcome = transfer("run", *pair, *more)
        assert outcome.code == 0, outcome.err
        assert batches == [], more


def test_results_are_the_same_bits_without_a_cache_and_with_a_cold_or_a_warm_one(
    transfer: Transfer, pair: list[str], tmp_path: Path
) -> None:
    def outcome(*more: str) -> list[bytes]:
        run = transfer("run", *pair, "method=coral", *more).run
        return [(run / name).read_bytes() for name in ("predictions.npz", "features.npz", "examples.npz")]

    without = outcome("outputs=without", "features.cache_gb=0")
    assert not (tmp_path / "without" / "cache").exists()
    cold = outcome("outputs=with")
    warm = outcome("outputs=with", "force=true")
    transfer("run", *pair, "method=coral", "outputs=other", "subset.source=30", "subset.test=7", "data_seed=3")
    partly = outcome("outputs=other")
    other_workers = outcome("outputs=without", "workers=0", "force=true")
    assert without == cold == warm == partly == other_workers


def test_evaluate_and_predict_take_the_plain_way_and_agree(
    transfer: Transfer, pair: list[str], batches: list[int], tmp_path: Path
) -> None:
    run = transfer("run", *pair, "method=coral").run
    batches.clear()
    evaluated = transfer("evaluate", str(run))
    assert evaluated.code == 0 and "result.json agrees" in evaluated.out
    assert sum(batches) == 80 + 80, "from the inputs: both test sets"
    predicted = transfer("predict", str(run), "--dataset", "arrays", f"path={tmp_path}/field.npz")
    assert predicted.code == 0 and len(predicted.out.splitlines()) == 241


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_features_of_low_precision_are_those_that_evaluate_finds(
    precision: str, transfer: Transfer, pair: list[str]
) -> None:
    full = transfer("run", *pair, "method=coral").run
    outcome = transfer("run", *pair, "method=coral", f"trainer.precision={precision}")
    assert outcome.code == 0, outcome.err
    low, high = (np.load(run / "features.npz")["target_test"] for run in (outcome.run, full))
    gap = np.abs(low - high).max() / np.abs(high).max()
    assert 1e-5 < gap < 3e-2, "computed in that precision, and kept apart"
    assert "result.json agrees" in transfer("evaluate", str(outcome.run)).out


def test_examples_are_still_images(transfer: Transfer, pair: list[str], tmp_path: Path) -> None:
    run = transfer("run", *pair, "method=coral").run
    examples, ids = np.load(run / "examples.npz"), np.load(run / "predictions.npz")["target_test_ids"]
    shown, index = examples["target_test"], examples["target_test_index"]
    rows = [int(ids[i].split("/")[1]) for i in index]
    assert len(index) == 80 and len(examples["source_test"]) == 64, "of small images more of the target's"
    assert np.array_equal(shown[:, 0], np.load(tmp_path / "field.npz")["images"][rows])


def test_a_folder_of_images_is_read_by_workers_once_and_not_again(
    transfer: Transfer, folder_of_images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [
        "source=image_folder", "source.path=pictures", "target=image_folder", "target.path=pictures", "data_root=.",
        "backbone=small_cnn", "image.size=16", "method=linear_probe", "threads=1", "device=cpu",
    ]  # fmt: skip
    first = transfer("run", *chosen, "workers=2")
    assert first.code == 0, first.err
    memory = transfer("run", *chosen, "outputs=memory", "image.storage=memory")
    assert (memory.run / "predictions.npz").read_bytes() == (first.run / "predictions.npz").read_bytes()
    decoded: list[int] = []
    plain = ImageFiles.decode
    monkeypatch.setattr(ImageFiles, "decode", lambda self, index: (decoded.append(index), plain(self, index))[1])
    assert transfer("run", *chosen, "workers=0", "method.l2=1").code == 0
    assert len(decoded) == 2 * 27, "only the examples for the report"
    assert "result.json agrees" in transfer("evaluate", str(first.run)).out


def test_arrays_are_resized_only_where_features_are_missing(
    transfer: Transfer, pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [*pair[:4], "backbone=lenet", *pair[-2:], "method=linear_probe"]  # 28 x 28
    first = transfer("run", *chosen)
    assert first.code == 0 and "16 x 16 -> 28 x 28" in first.out
    memory = transfer("run", *chosen, "outputs=memory", "image.storage=memory")
    assert (memory.run / "predictions.npz").read_bytes() == (first.run / "predictions.npz").read_bytes()
    assert (memory.run / "examples.npz").read_bytes() == (first.run / "examples.npz").read_bytes()
    resized: list[int] = []
    plain = ResizedArrays.batch
    monkeypatch.setattr(ResizedArrays, "batch", lambda self, rows: (resized.append(len(rows)), plain(self, rows))[1])
    assert transfer("run", *chosen, "method.l2=1").code == 0
    assert resized == [64, 80], "the examples for the report"


def test_given_features_are_used_as_they_are(transfer: Transfer, pair: list[str], tmp_path: Path) -> None:
    outcome = transfer("run", *pair[:4], "backbone=identity", "method=coral", "threads=1", "device=cpu")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "outputs" / "cache").exists()


def test_a_run_says_what_it_mended(transfer: Transfer, pair: list[str], tmp_path: Path) -> None:
    transfer("run", *pair, "method=coral")
    cache = tmp_path / "outputs" / "cache" / "features"
    os.truncate(entry_of(cache, "lab") / "features.f32", 100)
    outcome = transfer("run", *pair, "method=linear_probe")
    line = "features of lab: a file in the cache has the wrong size; extracted again"
    assert line in outcome.out.splitlines() and line in (outcome.run / "run.log").read_text().splitlines()


def test_long_extractions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "LONG", 0)
    monkeypatch.setattr(extraction, "EVERY", 0)
    _, said, _ = extracted(None)
    assert said[0] == "features of s train: 64 of 300" and "features of s train: 300 extracted in 0 s" in said


# --- what has an entry of its own ------------------------------------------------------------------


def key_of(config: DictConfig, *changes: str) -> str:
    """The key of the source's entry, after changes `key=value`."""
    changed = typed(OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes))))
    components = resolve_components(changed)
    prints = {group: reader.fingerprint() for group, reader in readers(changed, components).items()}
    problem = pose_problem(changed, components, prints)
    method = build_method(changed, components, problem.task.shape, CPU)
    assert isinstance(method.backbone, Backbone)
    assert problem.task.source is not None and problem.task.source.origin is not None
    extract = make_extractor(method.backbone, components["backbone"], problem.task.input, changed, CPU)
    return extract.key(problem.task.source.origin)


def test_the_key_holds_all_that_features_depend_on_and_nothing_else(
    pair: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = composed([*pair, "method=coral"])
    key = key_of(config)
    assert key_of(composed([*pair, "method=tca", "head=knn"])) == key
    (tmp_path / "same.pt").write_bytes((tmp_path / "weights.pt").read_bytes())
    for shared in (
        "seed=3", "data_seed=3", "subset.source=100", "protocol=transductive", "target_labels=2", "features.whiten=true",
        "split.validation=0.3", "workers=0", f"backbone.weights={tmp_path}/same.pt", "trainer.steps=9", "source.name=x",
    ):  # fmt: skip
        assert key_of(config, shared) == key, shared
    torch.manual_seed(8)
    torch.save(SmallCNN(InputSpec("image", (1, 16, 16))).state_dict(), tmp_path / "others.pt")
    others = [
        ["backbone.weights=none"], ["backbone.weights=none", "seed=1"], [f"backbone.weights={tmp_path}/others.pt"],
        ["backbone.weights=none", "image.size=20"], ["trainer.precision='bf16'"], ["trainer.eval_batch_size=8"],
        [f"source.path={tmp_path}/field.npz"], ["trainer.channels_last=false"],
    ]  # fmt: skip
    assert len({key, *(key_of(config, *other) for other in others)}) == 1 + len(others)


def test_changed_data_have_an_entry_of_their_own(transfer: Transfer, pair: list[str], tmp_path: Path) -> None:
    before = transfer("run", *pair, "method=coral")
    content = dict(np.load(tmp_path / "field.npz"))
    content["images"] = 255 - content["images"]
    np.savez(tmp_path / "field.npz", **content)
    after = transfer("run", *pair, "method=coral", "force=true")
    assert after.run == before.run
    wanted = transfer("run", *pair, "method=coral", "force=true", "features.cache_gb=0")
    assert after.out == wanted.out and after.out != before.out


def test_a_changed_backbone_file_is_noticed(transfer: Transfer, pair: list[str], tmp_path: Path) -> None:
    """One's own backbone while one works on it: no parameter changes, and no version is raised."""
    code = (
        "from transfer_cli.backbones.base import Backbone\n\n\nclass Own(Backbone):\n    def __init__(self, spec):\n"
        "        super().__init__(spec)\n        self.out_features = 16\n\n"
        "    def forward(self, x):\n        return x.{}(2).flatten(1)\n"
    )
    (tmp_path / "conf" / "backbone").mkdir(parents=True)
    (tmp_path / "conf" / "backbone" / "own.yaml").write_text("name: own\nimplementation: own_backbone:Own\n")
    arguments = [*pair[:4], "backbone=own", "plugins=[own_backbone]", "method=coral", "threads=1", "device=cpu"]
    found = []
    for function in ("sum", "amax"):
        (tmp_path / "own_backbone.py").write_text(code.format(function))
        sys.modules.pop("own_backbone", None)
        outcome = transfer("run", *arguments, "force=true")
        assert outcome.code == 0, outcome.err
        found.append(np.load(outcome.run / "features.npz")["target_test"])
    sys.modules.pop("own_backbone", None)
    assert found[1].max() <= 1 < found[0].max()


def test_the_digest_of_weights_sees_names_types_shapes_and_values() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    digests = {state_digest(net)}
    assert state_digest(net.to(memory_format=torch.preserve_format)) in digests
    net[1].running_mean[1] = 1e-30
    digests.add(state_digest(net))
    net[0].weight.data = net[0].weight.data.T.contiguous()
    digests.add(state_digest(net))
    digests.add(state_digest(net.bfloat16()))
    digests.add(state_digest(torch.nn.ModuleDict({"a": net[0], "b": net[1]})))
    assert len(digests) == 5


# --- transfer cache --------------------------------------------------------------------------------


def test_the_command_lists_and_clears(transfer: Transfer, pair: list[str], tmp_path: Path) -> None:
    assert transfer("cache").out == "nothing in outputs/cache/features\n"
    assert transfer("cache", "--clear").out == "0 removed, 0.0 MB\n"
    transfer("run", *pair, "method=coral", "subset.source=100")
    lines = transfer("cache").out.splitlines()
    assert lines[0].split() == ["key", "data", "backbone", "rows", "MB", "last", "used"]
    rows = {line.split()[1]: line.split() for line in lines[1:-1]}
    assert rows["lab"][2:5] == ["small_cnn", "180/240", "0.1"] and rows["field"][3] == "240/240"
    assert lines[-1].endswith("MB in outputs/cache/features")
    key = rows["lab"][0]
    assert [line.split()[0] for line in transfer("cache", key).out.splitlines()[1:-1]] == [key]
    wrong = transfer("cache", "--clear", key[:-1] + "x")
    assert wrong.code == 2 and f"Did you mean '{key}'?" in wrong.err
    assert transfer("cache", "--clear", key).out.startswith("1 removed, 0.1 MB")
    assert [line.split()[1] for line in transfer("cache").out.splitlines()[1:-1]] == ["field"]
    assert transfer("cache", "--outputs", "elsewhere").out == "nothing in elsewhere/cache/features\n"
    assert transfer("cache", "--clear").code == 0 and list((tmp_path / "outputs/cache/features").iterdir()) == []


def test_entries_without_words_are_listed_too(transfer: Transfer, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "cache" / "features"
    filled(folder, "a", 0)
    (folder / "a" / "meta.json").write_text("{")
    (folder / "b").mkdir()
    out = transfer("cache").out
    assert "a    ?" in out and "100/?" in out and "0/?" in out
    assert transfer("cache", "--clear").out.startswith("2 removed")


@fork
def test_the_command_leaves_what_is_being_written(transfer: Transfer, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "cache" / "features"
    filled(folder, "a", 0)
    filled(folder, "b", 0)

    def holding() -> None:
        with Entry(folder / "a", 100, 256).locked(lambda: None):
            (tmp_path / "held").touch()
            time.sleep(60)

    with child(holding):
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        outcome = transfer("cache", "--clear")
    assert outcome.out == "1 removed, 0.1 MB\na stays: a run is writing it\n"
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_the_command_imports_no_torch() -> None:
    code = "import sys; from transfer_cli.commands.cache import main; main([]); print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("False\n")
