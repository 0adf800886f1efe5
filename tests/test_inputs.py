"""Containers of samples: arrays, sequences, image files; resizing, channels, storage, and the disk cache of decoded files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as Picture
from torch import Tensor

from transfer_cli.config.schema import Image
from transfer_cli.data.decoded import MappedImages, decode_once
from transfer_cli.data.domain import Domain, Part, numbered
from transfer_cli.data.inputs import (
    ArrayInputs,
    ImageFiles,
    Inputs,
    InputSpec,
    Padded,
    SequenceInputs,
    convert_channels,
    read_image,
    resize_square,
)
from transfer_cli.data.reconcile import conform, reconcile
from transfer_cli.errors import TransferError


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(height: int, width: int, channels: int = 3) -> Tensor:
    coarse = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(1)) * 255
    return F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)[0].to(torch.uint8)


def save(path: Path, image: Tensor) -> str:
    array = image.permute(1, 2, 0).numpy()
    Picture.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> ImageFiles:
    folder = tmp_path / "images"
    folder.mkdir()
    shapes = [(12, 12), (20, 10), (9, 15), (8, 8)]
    paths = [save(folder / f"{i}.png", pixels(3, *shape, seed=i)) for i, shape in enumerate(shapes)]
    return ImageFiles(paths, channels=3, size=8)


# --- containers -----------------------------------------------------------------------------------


def test_array_inputs() -> None:
    images, vectors = ArrayInputs(pixels(5, 3, 4, 4)), ArrayInputs(torch.randn(5, 7))
    assert images.spec == InputSpec("image", (3, 4, 4)) and vectors.spec == InputSpec("vector", (7,))
    assert str(images.spec) == "image of 3 x 4 x 4" and images.in_memory
    for inputs in (images, vectors):
        some = inputs.take(torch.tensor([3, 1]))
        assert len(inputs) == 5 and len(some) == 2
        assert torch.equal(some.batch(torch.tensor([1])), inputs.values[[1]])


@pytest.mark.parametrize(
    "values",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.zeros(2, 3, dtype=torch.uint8),
        torch.zeros(2),
    ],
)
def test_arrays_of_another_kind_are_refused(values: Tensor) -> None:
    with pytest.raises(TransferError, match=r"inputs must be uint8 images .* or float32 vectors"):
        ArrayInputs(values)


def test_sequences_are_padded_with_zeros_behind_their_ends() -> None:
    inputs = SequenceInputs([torch.full((n, 2), float(n)) for n in (3, 1, 2)])
    assert inputs.spec == InputSpec("sequence", (2,)) and len(inputs) == 3 and inputs.in_memory
    batch = inputs.batch(torch.tensor([1, 0]))
    assert isinstance(batch, Padded) and batch.values.shape == (2, 3, 2)
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.values[..., 0].tolist() == [[1, 0, 0], [3, 3, 3]]
    shorter = inputs.take(torch.tensor([2, 1])).batch(torch.tensor([0, 1]))
    assert shorter.mask.tolist() == [[True, True], [True, False]], "no longer than the longest of the batch"


def test_padded_batches_move_as_one() -> None:
    moved = Padded(torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool)).to(torch.device("meta"))
    assert isinstance(moved, Padded) and moved.values.device.type == moved.mask.device.type == "meta"


def test_image_files_decode_when_asked(files: ImageFiles) -> None:
    assert files.spec == InputSpec("image", (3, 8, 8)) and len(files) == 4 and not files.in_memory
    batch = files.batch(torch.tensor([3, 0]))
    assert batch.shape == (2, 3, 8, 8) and batch.dtype == torch.uint8
    assert torch.equal(batch[0], pixels(3, 8, 8, seed=3)), "an image of that size is left as it is"
    assert torch.equal(files.take(torch.tensor([2, 1])).decode(1), files.decode(1))
    assert torch.equal(files.to_memory().values, files.batch(torch.arange(4)))
    assert ImageFiles([], channels=1, native=28).spec.shape == (1, 28, 28)
    assert ImageFiles([], channels=3).spec.shape == (3, 0, 0)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_of_picture_is_read(mode: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / ("x.tiff" if mode == "CMYK" else "x.png")
    Picture.fromarray(pixels(3, 6, 5).permute(1, 2, 0).numpy()).convert(mode).save(path)
    image = read_image(str(path), channels)
    assert image.shape == (channels, 6, 5) and image.is_contiguous()
    wanted = np.asarray(Picture.open(path).convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(image.permute(1, 2, 0).numpy().reshape(wanted.shape), wanted)


def test_sixteen_bits_become_eight(tmp_path: Path) -> None:
    """Pillow alone clips at 255: all but black would be white."""
    grey = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Picture.fromarray(grey).save(tmp_path / "x.png")
    assert read_image(str(tmp_path / "x.png"), 1)[0, 0].tolist() == [0, 0, 1, 128, 255]
    assert read_image(str(tmp_path / "x.png"), 3)[2, 0].tolist() == [0, 0, 1, 128, 255]


def test_palettes_with_transparency_are_read_without_a_warning(tmp_path: Path) -> None:
    picture = Picture.new("P", (4, 4), color=1)
    picture.putpalette([0, 0, 0, 10, 20, 30] + [0] * 762)
    picture.save(tmp_path / "x.png", transparency=bytes([0] * 256))
    assert read_image(str(tmp_path / "x.png"), 3)[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_an_unreadable_file_is_named(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "broken.png"
    if isinstance(content, str):
        save(path, pixels(3, 64, 64))
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    inputs = ImageFiles([str(path)], size=8)
    with pytest.raises(TransferError) as caught:
        inputs.batch(torch.tensor([0]))
    assert f"unreadable image: {path}" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(TransferError, match="there is no image "):
        ImageFiles([str(tmp_path / "missing.png")], size=8).to_memory()


# --- resizing and channels ------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(40, 40), (60, 40), (40, 61), (37, 90), (16, 16), (10, 14), (1, 5)])
@pytest.mark.parametrize("size", [16, 8])
def test_resizing_agrees_with_pillow(height: int, width: int, size: int) -> None:
    image = smooth(height, width)
    found = resize_square(image, size)
    assert found.shape == (3, size, size) and found.dtype == torch.uint8
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    picture = Picture.fromarray(image.permute(1, 2, 0).numpy()).resize(shape, Picture.Resampling.BILINEAR)
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    wanted = torch.from_numpy(np.array(picture.crop((left, top, left + size, top + size)))).permute(2, 0, 1)
    assert int((found.int() - wanted.int()).abs().max()) <= 1


def test_shrinking_is_antialiased() -> None:
    board = torch.zeros(1, 64, 64, dtype=torch.uint8)
    board[:, ::2, ::2] = 255
    board[:, 1::2, 1::2] = 255
    small = resize_square(board, 16)[:, 1:-1, 1:-1].int()
    assert int(small.min()) >= 120 and int(small.max()) <= 135


def test_resizing_a_batch_is_resizing_each() -> None:
    images = torch.stack([smooth(20, 30), pixels(3, 20, 30)])
    assert torch.equal(resize_square(images, 8), torch.stack([resize_square(i, 8) for i in images]))
    same = pixels(2, 1, 8, 8)
    assert resize_square(same, 8) is same


def test_channels_are_repeated_or_weighed_as_pillow_does() -> None:
    colour = pixels(4, 3, 9, 9)
    grey = convert_channels(colour, 1)
    wanted = [np.asarray(Picture.fromarray(i.permute(1, 2, 0).numpy()).convert("L")) for i in colour]
    assert grey.shape == (4, 1, 9, 9) and grey.dtype == torch.uint8
    assert int((grey[:, 0].int() - torch.from_numpy(np.array(wanted)).int()).abs().max()) <= 1
    again = convert_channels(grey, 3)
    assert again.shape == (4, 3, 9, 9) and torch.equal(again[:, 2], grey[:, 0])
    assert convert_channels(colour, 3) is colour
    with pytest.raises(TransferError, match="images with 4 channels cannot be turned into 3"):
        convert_channels(pixels(1, 4, 2, 2), 3)


# --- bringing a pair to one shape -----------------------------------------------------------------


class Any28:
    """A backbone's wishes."""

    preferred_size: ClassVar[int | None] = None
    minimum_size: ClassVar[int] = 1
    preferred_channels: ClassVar[int | None] = None


def wishes(**changes: Any) -> Any:
    return type("Wishes", (Any28,), changes)


def domain(name: str, inputs: Inputs, test: Inputs | None = None) -> Domain:
    def part(inputs: Inputs) -> Part:
        return Part(inputs, torch.zeros(len(inputs), dtype=torch.int64), numbered(name, len(inputs)))

    return Domain(name, "classification", ("a",), part(inputs), None if test is None else part(test))


def brought(
    source: Inputs | None, target: Inputs, cache: Path, wants: Any = Any28, **image: Any
) -> tuple[Domain | None, Domain, list[str]]:
    pair = (None if source is None else domain("s", source), domain("t", target, target))
    return reconcile(*pair, Image(**image), wants=wants, cache=cache)


@pytest.mark.parametrize(
    ("source", "target", "wants", "image", "shape", "notes"),
    [
        ((1, 16, 16), (1, 16, 16), {}, {}, (1, 16, 16), []),
        ((1, 16, 16), (3, 28, 28), {}, {}, (3, 28, 28), ["s: grey -> rgb, 16 x 16 -> 28 x 28"]),
        ((3, 28, 28), (1, 16, 16), {}, {}, (3, 28, 28), ["t: grey -> rgb, 16 x 16 -> 28 x 28"]),
        ((3, 28, 28), (1, 28, 28), {}, {"channels": 1}, (1, 28, 28), ["s: rgb -> grey"]),
        ((1, 8, 8), (1, 8, 8), {"minimum_size": 16}, {}, (1, 16, 16), ["s: 8 x 8 -> 16 x 16", "t: 8 x 8 -> 16 x 16"]),
        ((1, 28, 28), (1, 28, 28), {"preferred_size": 32, "preferred_channels": 3}, {}, (3, 32, 32),
         ["s: grey -> rgb, 28 x 28 -> 32 x 32", "t: grey -> rgb, 28 x 28 -> 32 x 32"]),
        ((1, 28, 28), (1, 28, 28), {"preferred_size": 32, "preferred_channels": 3}, {"size": 20, "channels": 1},
         (1, 20, 20), ["s: 28 x 28 -> 20 x 20", "t: 28 x 28 -> 20 x 20"]),
        ((1, 20, 30), (1, 10, 10), {}, {}, (1, 30, 30), ["s: 20 x 30 -> 30 x 30", "t: 10 x 10 -> 30 x 30"]),
        (None, (1, 8, 8), {"minimum_size": 16}, {}, (1, 16, 16), ["t: 8 x 8 -> 16 x 16"]),
    ],
)  # fmt: skip
def test_images_come_to_one_shape_and_it_is_told(
    source: Any, target: Any, wants: Any, image: Any, shape: tuple[int, ...], notes: list[str], tmp_path: Path
) -> None:
    inputs = None if source is None else ArrayInputs(pixels(3, *source))
    s, t, told = brought(inputs, ArrayInputs(pixels(2, *target)), tmp_path, wishes(**wants), **image)
    assert told == notes
    assert t.train.inputs.spec.shape == shape and t.test is not None and t.test.inputs.spec.shape == shape
    assert (s is None) == (source is None)
    if s is not None:
        assert s.train.inputs.spec.shape == shape and s.train.ids == numbered("s", 3)


def test_files_of_any_size_take_the_backbones_or_224(files: ImageFiles, tmp_path: Path) -> None:
    unsized = ImageFiles(files.paths)
    _, t, told = brought(None, unsized, tmp_path, storage="files")
    assert t.train.inputs.spec.shape == (3, 224, 224) and told == ["t: any size -> 224 x 224"]
    _, t, _ = brought(None, unsized, tmp_path, wishes(preferred_size=10), storage="files")
    assert t.train.inputs.spec.shape == (3, 10, 10)
    _, t, _ = brought(ArrayInputs(pixels(2, 3, 12, 12)), unsized, tmp_path, storage="files")
    assert t.train.inputs.spec.shape == (3, 12, 12), "the other domain's"


def test_what_nothing_reconciles_is_refused(tmp_path: Path) -> None:
    vectors, wider, images = (
        ArrayInputs(torch.zeros(2, 5)),
        ArrayInputs(torch.zeros(2, 6)),
        ArrayInputs(pixels(2, 1, 8, 8)),
    )
    with pytest.raises(TransferError, match="differ in kind: s is vector of 5, t is image of 1 x 8 x 8"):
        brought(vectors, images, tmp_path)
    with pytest.raises(TransferError, match="differ in width: s is vector of 5, t is vector of 6"):
        brought(vectors, wider, tmp_path)
    with pytest.raises(TransferError, match="differ in width: x is vector of 5, x is vector of 6"):
        reconcile(
            domain("x", vectors), domain("x", wider), Image(), wants=Any28, cache=tmp_path
        )  # two files of one name
    s, t, told = brought(vectors, vectors, tmp_path)
    assert told == [] and s is not None and s.train.inputs is vectors and t.train.inputs is vectors


def test_large_arrays_are_conformed_by_blocks() -> None:
    images = pixels(4097, 1, 2, 2)
    found = conform(ArrayInputs(images), 3, 3)
    assert isinstance(found, ArrayInputs)
    assert torch.equal(found.values, resize_square(images.expand(-1, 3, -1, -1), 3))


@pytest.mark.parametrize("storage", ["auto", "memory", "files", "decoded"])
def test_storage_changes_no_batch(storage: str, files: ImageFiles, tmp_path: Path) -> None:
    kinds = {"auto": ArrayInputs, "memory": ArrayInputs, "files": ImageFiles, "decoded": MappedImages}
    _, t, _ = brought(None, ImageFiles(files.paths), tmp_path / "cache", size=8, storage=storage)
    inputs = t.train.inputs
    assert type(inputs) is kinds[storage] and inputs.spec == files.spec
    assert inputs.in_memory == (storage != "files")
    for indices in (torch.arange(4), torch.tensor([2, 0])):
        assert torch.equal(inputs.batch(indices), files.batch(indices))  # type: ignore[arg-type]
    some = inputs.take(torch.tensor([3, 1]))
    assert len(some) == 2 and torch.equal(some.batch(torch.tensor([1])), files.batch(torch.tensor([1])))  # type: ignore[arg-type]
    assert (tmp_path / "cache").exists() == (storage == "decoded")


def test_auto_keeps_large_folders_as_files(files: ImageFiles, tmp_path: Path) -> None:
    large = ImageFiles(files.paths * 1400)  # 1400 * 4 * 3 * 8 * 8 bytes: more than a mebibyte
    _, t, _ = brought(None, large, tmp_path, size=8, memory_limit_mb=1)
    assert type(t.train.inputs) is ImageFiles


# --- the disk cache -------------------------------------------------------------------------------


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices that were decoded."""
    seen: list[int] = []
    plain = ImageFiles.decode

    def counted(self: ImageFiles, index: int) -> Tensor:
        seen.append(index)
        return plain(self, index)

    monkeypatch.setattr(ImageFiles, "decode", counted)
    return seen


def test_files_are_decoded_once(files: ImageFiles, tmp_path: Path, decodes: list[int]) -> None:
    first = decode_once(files, tmp_path / "cache")
    assert decodes == [0, 1, 2, 3]
    second = decode_once(files, tmp_path / "cache")
    assert decodes == [0, 1, 2, 3] and torch.equal(first.values, second.values)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"], "no temporary file is left"


def test_what_a_killed_process_left_is_written_over(files: ImageFiles, tmp_path: Path) -> None:
    expected = decode_once(files, tmp_path / "cache").values.clone()
    (path,) = (tmp_path / "cache").iterdir()
    path.rename(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").write_bytes(b"half")
    assert torch.equal(decode_once(files, tmp_path / "cache").values, expected)
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"]


def test_a_changed_file_is_decoded_again(files: ImageFiles, tmp_path: Path, decodes: list[int]) -> None:
    before = decode_once(files, tmp_path / "cache")
    path = Path(files.paths[1])
    stat = path.stat()
    save(path, pixels(3, 20, 10, seed=77))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000))
    after = decode_once(files, tmp_path / "cache")
    assert len(decodes) == 8
    assert not torch.equal(after.values[1], before.values[1]) and torch.equal(after.values[0], before.values[0])


def test_other_sizes_channels_and_subsets_have_a_cache_of_their_own(files: ImageFiles, tmp_path: Path) -> None:
    shapes = [
        tuple(decode_once(f, tmp_path / "cache").values.shape)
        for f in (
            files,
            ImageFiles(files.paths, 3, 6),
            ImageFiles(files.paths, 1, 8),
            files.take(torch.tensor([0, 1])),
            files.take(torch.tensor([1, 0])),
        )
    ]
    assert shapes == [(4, 3, 8, 8), (4, 3, 6, 6), (4, 1, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8)]
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_nothing_written_reaches_the_cache(files: ImageFiles, tmp_path: Path) -> None:
    first = decode_once(files, tmp_path / "cache")
    kept = first.values.clone()
    first.values.zero_()
    assert torch.equal(decode_once(files, tmp_path / "cache").values, kept)


def test_a_failure_leaves_nothing_half_done(files: ImageFiles, tmp_path: Path) -> None:
    Path(files.paths[2]).write_bytes(b"broken")
    with pytest.raises(TransferError, match="unreadable image"):
        decode_once(files, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
