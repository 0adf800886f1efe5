"""Minibatches: a pure function of seed, stream and step, whatever the workers, the start, and the global generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from transfer_cli.data.augment import Augment
from transfer_cli.data.batching import Stream, derive_seed, in_order, to_model
from transfer_cli.data.inputs import ArrayInputs, ImageFiles, Inputs, Padded, SequenceInputs
from transfer_cli.errors import TransferError

CPU = torch.device("cpu")
N, B = 23, 5  # 4 batches a pass, 3 samples left over


def images(n: int = N, size: int = 6) -> ArrayInputs:
    draw = torch.Generator().manual_seed(0)
    return ArrayInputs(torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=draw))


def stream(inputs: Inputs | None = None, labels: Tensor | None = None, **changes: Any) -> Stream:
    if "augment" in changes:
        changes["views"] = [changes.pop("augment")]
    options: dict[str, Any] = {"name": "source", "batch_size": B, "seed": 0, "device": CPU, **changes}
    return Stream(images() if inputs is None else inputs, torch.arange(N) if labels is None else labels, **options)


def take(n: int, start: int = 0, **changes: Any) -> list[tuple[Tensor, Tensor]]:
    iterator = stream(**changes).iterate(start)
    out = [(views[0], y) for views, y in islice(iterator, n)]
    iterator.close()  # type: ignore[attr-defined]
    return out


def order(start: int, n: int, **changes: Any) -> list[int]:
    """Labels are the sample's own number."""
    return torch.cat([y for _, y in take(n, start, **changes)]).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    folder = tmp_path_factory.mktemp("images")
    for i, value in enumerate(images(size=9).values):
        Image.fromarray(value.permute(1, 2, 0).numpy()).save(folder / f"{i:02}.png")
    return ImageFiles([str(p) for p in sorted(folder.iterdir())], channels=3, size=6)


def test_inputs_and_labels_stay_together() -> None:
    for x, y in take(6):
        assert torch.equal(x, images().values[y].float() / 255) and x.dtype == torch.float32


def test_a_stream_without_labels_gives_none() -> None:
    unlabelled = Stream(images(), None, name="target", batch_size=B, seed=0, device=CPU)
    (x,), y = next(unlabelled.iterate(0))
    assert y is None and x.shape == (B, 3, 6, 6)


@pytest.mark.parametrize("start", [1, 3, 4, 9])
def test_starting_at_a_step_is_skipping_to_it(start: int) -> None:
    augment = Augment(rotate=20.0, noise=0.1)
    whole, rest = take(start + 5, augment=augment), take(5, start, augment=augment)
    for (x, y), (x2, y2) in zip(whole[start:], rest, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_batches_depend_on_seed_and_name_alone() -> None:
    assert order(0, 8) == order(0, 8)
    assert order(0, 8) != order(0, 8, seed=1)
    assert order(0, 8) != order(0, 8, name="target")


def test_asking_for_steps_out_of_turn_gives_the_same() -> None:
    one, other = stream(), stream()
    forwards = [one.indices(k).tolist() for k in range(12)]
    assert [other.indices(k).tolist() for k in reversed(range(12))] == forwards[::-1]


def test_each_pass_is_a_permutation_of_its_own_without_the_remainder() -> None:
    per_epoch = N // B
    assert stream().batches_per_epoch == per_epoch == 4
    passes = [order(epoch * per_epoch, per_epoch) for epoch in range(4)]
    for seen in passes:
        assert len(seen) == len(set(seen)) == per_epoch * B, "no sample twice in a pass"
    assert len({tuple(p) for p in passes}) == 4
    assert set().union(*passes) == set(range(N)), "the remainder is another one each time"
    exact = [order(epoch, 1, batch_size=N) for epoch in range(2)]
    assert sorted(exact[0]) == sorted(exact[1]) == list(range(N)) and exact[0] != exact[1]


def test_a_batch_larger_than_the_data_is_an_error() -> None:
    with pytest.raises(TransferError, match=r"trainer\.batch_size=24 is larger than the 23 target samples.*23 or less"):
        stream(batch_size=24, name="target")
    assert stream(batch_size=23).batches_per_epoch == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(files: ImageFiles, workers: int) -> None:
    augment = Augment(flip=0.5, noise=0.1)
    alone = take(7, 2, inputs=files, augment=augment, workers=0)
    shared = take(7, 2, inputs=files, augment=augment, workers=workers)
    for (x, y), (x2, y2) in zip(alone, shared, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_files_and_memory_give_the_same_batches(files: ImageFiles) -> None:
    augment = Augment(rotate=10.0)
    for (x, y), (x2, y2) in zip(
        take(5, inputs=files, augment=augment), take(5, inputs=files.to_memory(), augment=augment), strict=True
    ):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_augmentation_is_repeatable_and_new_at_every_step() -> None:
    grey = ArrayInputs(torch.full((B, 1, 4, 4), 128, dtype=torch.uint8))  # whatever the order, only noise differs

    def noises(**changes: Any) -> list[Tensor]:
        return [x for x, _ in take(3, inputs=grey, labels=torch.arange(B), augment=Augment(noise=0.1), **changes)]

    first = noises()
    assert all(torch.equal(a, b) for a, b in zip(first, noises(), strict=True))
    others = [*first, *noises(name="target"), *noises(seed=1)]
    assert len({tuple(x.flatten().tolist()) for x in others}) == 9, "each step, stream and seed has noise of its own"


def test_vectors_get_noise_and_no_geometry() -> None:
    vectors = ArrayInputs(torch.randn(N, 4))
    x, y = take(1, inputs=vectors, augment=Augment(rotate=10.0, contrast=0.5))[0]
    assert torch.equal(x, vectors.values[y])
    many = ArrayInputs(torch.zeros(B, 5000))
    x, _ = take(1, inputs=many, labels=torch.arange(B), augment=Augment(noise=0.3))[0]
    assert abs(float(x.std()) - 0.3) < 0.01 and abs(float(x.mean())) < 0.01


def test_views_of_a_batch_are_of_the_same_samples_and_differ() -> None:
    grey = ArrayInputs(torch.full((B, 1, 4, 4), 128, dtype=torch.uint8))
    noisy = Augment(noise=0.1)
    views, y = next(stream(grey, torch.arange(B), views=[noisy, None, noisy]).iterate(3))
    assert len(views) == 3 and torch.equal(views[1], torch.full_like(views[1], 128 / 255))
    assert not torch.equal(views[0], views[2])
    (alone,), same = next(stream(grey, torch.arange(B), views=[noisy]).iterate(3))
    assert torch.equal(alone, views[0]) and torch.equal(y, same), "the first view is what it is without the others"


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_generators_are_left_alone(files: ImageFiles, workers: int) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002

    def states() -> tuple[list[int], Any, list[int]]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002

    before = states()
    take(3, augment=Augment(rotate=10.0, noise=0.1))
    take(3, inputs=files, augment=Augment(erase=0.5), workers=workers)
    list(in_order(files, 8, CPU, workers))
    assert states() == before


def test_draws_from_the_global_generator_change_no_batch(files: ImageFiles) -> None:
    wanted = take(4, inputs=files, augment=Augment(noise=0.1))
    torch.manual_seed(77)
    iterator = stream(files, augment=Augment(noise=0.1)).iterate(0)
    for x, _ in wanted:
        torch.rand(3)
        assert torch.equal(next(iterator)[0][0], x)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_file_is_named_in_one_line(files: ImageFiles, tmp_path: Path, workers: int) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    inputs = ImageFiles([*files.paths[:4], str(broken)], channels=3, size=6)
    for read in (
        lambda: take(1, inputs=inputs, labels=torch.arange(5), workers=workers),
        lambda: list(in_order(inputs, 2, CPU, workers)),
    ):
        with pytest.raises(TransferError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f"unreadable image: {broken}") and "skip_unreadable=true" in message
        assert "\n" not in message and "Traceback" not in message


@pytest.mark.parametrize("workers", [0, 2])
def test_in_order_gives_every_sample_once(files: ImageFiles, workers: int) -> None:
    batches = list(in_order(files, 8, CPU, workers))
    assert [len(b) for b in batches] == [8, 8, 7]
    assert torch.equal(torch.cat(batches), files.to_memory().values.float() / 255)


def test_channels_last_is_a_layout_and_changes_no_value() -> None:
    x, _ = take(1, channels_last=True)[0]
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, take(1)[0][0])


def test_sequences_come_padded() -> None:
    inputs = SequenceInputs([torch.full((i % 4 + 1, 2), float(i)) for i in range(N)])
    x, y = take(1, inputs=inputs)[0]
    assert isinstance(x, Padded)
    assert torch.equal(x.mask.sum(1), y % 4 + 1)
    assert torch.equal(x.values[:, 0, 0], y.float())


def test_to_model_makes_floats_of_images_alone() -> None:
    image = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    assert torch.equal(to_model(image, CPU), torch.tensor([[[[0.0, 1.0], [0.2, 0.4]]]]))
    assert image.dtype == torch.uint8 and int(image.max()) == 255, "the kept array is not written to"
    vector = torch.randn(2, 3)
    assert torch.equal(to_model(vector, CPU), vector)


def test_derived_seeds_are_fixed_and_apart() -> None:
    assert derive_seed(0, "source", "order", 3) == 4179287851770393133  # on every machine
    seeds = {derive_seed(s, n, k) for s in range(3) for n in ("source", "target") for k in range(50)}
    assert len(seeds) == 300 and all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(1, 11) != derive_seed(11, 1) and derive_seed("1") != derive_seed(1)


def test_iterators_end_their_workers(files: ImageFiles) -> None:
    import multiprocessing

    def running() -> int:
        return len(multiprocessing.active_children())

    before = running()
    iterator: Iterator[Any] = stream(files, workers=2).iterate(0)
    next(iterator)
    assert running() == before + 2
    iterator.close()  # type: ignore[attr-defined]
    assert running() == before
