"""Readers: every on-disk format, what is inside it, and one-line errors for what is missing, broken or mistyped."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from transfer_cli.data.domain import Domain, Part, Place
from transfer_cli.data.inputs import ArrayInputs, ImageFiles
from transfer_cli.data.readers.digits import DIGIT_NAMES
from transfer_cli.data.readers.files import below_root
from transfer_cli.errors import TransferError
from transfer_cli.registry import component, keyword_schema

DATASETS = Path(__file__).parents[1] / "conf" / "dataset"
IDX_FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
MINE = sorted(
    path.stem
    for path in DATASETS.glob("*.yaml")
    if yaml.safe_load(path.read_text())["implementation"].split(":")[0].rsplit(".", 1)[-1]
    in ("torchvision_sets", "image_folder", "mnist_m", "arrays")
)


def reader(name: str, root: Path | None, download: bool = False, **changes: Any) -> Any:
    node = {**yaml.safe_load((DATASETS / f"{name}.yaml").read_text()), **changes}
    return component("dataset", node).build(Place(root, download))


def load(name: str, root: Path | None, **changes: Any) -> Domain:
    return reader(name, root, **changes).load()


def refused(name: str, root: Path | None, **changes: Any) -> str:
    """The error of loading, which must be one line."""
    with pytest.raises(TransferError) as caught:
        load(name, root, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pixels(part: Part) -> torch.Tensor:
    assert isinstance(part.inputs, ArrayInputs)
    return part.inputs.values


def random_images(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(root: Path, folder: str = "MNIST", packed: bool = True, n: int = 6) -> dict[str, np.ndarray]:
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    images = {"train": random_images(0, n, 28, 28), "t10k": random_images(1, 4, 28, 28)}
    for split, array in images.items():
        labels = (np.arange(len(array)) % 10).astype(np.uint8)
        for name, content in (("images-idx3", array), ("labels-idx1", labels)):
            data = gzip.compress(idx(content)) if packed else idx(content)
            (raw / f"{split}-{name}-ubyte{'.gz' if packed else ''}").write_bytes(data)
    return images


def write_usps(folder: Path) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = {"usps.bz2": random_images(2, 5, 256), "usps.t.bz2": random_images(3, 3, 256)}
    for name, array in images.items():
        values = (array + 0.5) / 127.5 - 1
        lines = [
            f"{i % 10 + 1} " + " ".join(f"{j + 1}:{v:.6f}" for j, v in enumerate(row)) for i, row in enumerate(values)
        ]
        (folder / name).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))
    return images


def write_svhn(folder: Path) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = random_images(4, 3, 3, 32, 32)
    for split in ("train", "test"):
        savemat(folder / f"{split}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [9]])})
    return images


def cifar_files(fine: bool = False) -> dict[str, bytes]:
    """Two images a batch; the pickles name NumPy's modules as NumPy 1 did, and their flags are integers."""
    names = ("train", "test") if fine else (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
    content: dict[str, Any] = {
        name: {
            "data": random_images(i, 2, 3072),
            ("fine_labels" if fine else "labels"): [i, 9],
            "filenames": ["a", "b"],
        }
        for i, name in enumerate(names)
    }
    if fine:
        content["meta"] = {"fine_label_names": [f"class {i}" for i in range(100)]}
    else:
        content["batches.meta"] = {
            "label_names": yaml.safe_load((DATASETS / "cifar10_jpg.yaml").read_text())["class_names"]
        }
    files = {name: pickle.dumps(value, protocol=2) for name, value in content.items()}
    modern, old = pickle.dumps(np.dtype("u1"), protocol=2), b"K\x00K\x01\x87"
    assert b"\x89\x88\x87" in modern
    return {
        name: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray").replace(b"\x89\x88\x87", old)
        for name, data in files.items()
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def write_archive(path: Path, folder: str, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write_images(folder: Path, names: list[str], size: tuple[int, int] = (12, 12), seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.fromarray(random_images(seed + i, size[1], size[0], 3)).save(folder / name)


def write_pets(root: Path, folder: str = "pets") -> Path:
    write_images(root / folder / "cat", ["1.jpg", "2.PNG", "3.bmp"])
    write_images(root / folder / "dog", ["1.jpeg", "2.tif"], seed=7)
    return root / folder


def snapshot(root: Path) -> set[str]:
    return {str(path) for path in root.rglob("*")}


@pytest.mark.parametrize("name", MINE)
def test_yaml_has_exactly_the_keys_of_its_reader(name: str, tmp_path: Path) -> None:
    text = (DATASETS / f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    assert text.startswith("# ")
    assert node["name"] == name
    resolved = component("dataset", node)
    assert set(resolved.parameters) == set(keyword_schema(resolved.implementation))
    resolved.build(Place(tmp_path))  # reads nothing


@pytest.mark.parametrize("name", sorted(set(MINE) - {"arrays", "image_folder"}))
def test_absent_files_and_an_absent_root_are_named(name: str, tmp_path: Path) -> None:
    message = refused(name, tmp_path)
    assert str(tmp_path) in message and "missing" in message
    assert "data_root=DIR" in refused(name, None)
    assert snapshot(tmp_path) == set()
    with pytest.raises(TransferError, match="missing"):
        reader(name, tmp_path).fingerprint()


@pytest.mark.parametrize("name", ["arrays", "image_folder"])
def test_generic_readers_ask_for_a_path(name: str, tmp_path: Path) -> None:
    assert "source.path=" in refused(name, tmp_path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", sorted(IDX_FOLDERS))
def test_idx_files(name: str, packed: bool, tmp_path: Path) -> None:
    images = write_idx(tmp_path, IDX_FOLDERS[name], packed)
    before = snapshot(tmp_path)
    domain = load(name, tmp_path)
    assert domain.test is not None
    assert torch.equal(pixels(domain.train), torch.from_numpy(images["train"])[:, None])
    assert torch.equal(pixels(domain.test), torch.from_numpy(images["t10k"])[:, None])
    assert domain.train.labels.tolist() == list(range(6)) and domain.train.labels.dtype == torch.int64
    assert domain.train.ids[0] == f"{name}/train/0" and domain.test.ids[-1] == f"{name}/test/3"
    assert len(domain.classes) == 10
    assert snapshot(tmp_path) == before  # nothing was unpacked


def test_published_names() -> None:
    from transfer_cli.data.readers.torchvision_sets import SETS

    assert {SETS[name].classes for name in ("mnist", "usps", "svhn")} == {DIGIT_NAMES}
    assert SETS["fashion_mnist"].classes[9] == "Ankle boot"
    assert SETS["kmnist"].classes[1] == "ki"
    assert SETS["stl10"].classes[7] == "monkey"


def test_idx_fingerprint_ignores_copies_unpacked_beside_and_notices_changes(tmp_path: Path) -> None:
    write_idx(tmp_path)
    first = reader("mnist", tmp_path).fingerprint()
    write_idx(tmp_path, packed=False)
    assert reader("mnist", tmp_path).fingerprint() == first
    write_idx(tmp_path, n=7)
    assert reader("mnist", tmp_path).fingerprint() != first


@pytest.mark.parametrize("packed", [True, False])
def test_truncated_idx(packed: bool, tmp_path: Path) -> None:
    write_idx(tmp_path, packed=packed)
    path = next((tmp_path / "MNIST/raw").glob("train-images*"))
    path.write_bytes(path.read_bytes()[:-50])
    message = refused("mnist", tmp_path)
    assert "truncated or corrupt" in message and str(path) in message


def test_wrong_idx_content(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(5, np.uint8))))
    assert "5 labels for 6 images" in refused("mnist", tmp_path)
    labels.write_bytes(gzip.compress(idx(np.full(6, 10, np.uint8))))
    assert "10 for 10 classes" in refused("mnist", tmp_path)
    labels.write_bytes(b"<html>not found</html>")
    assert str(labels) in refused("mnist", tmp_path)


def test_idx_one_file_missing(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz").unlink()
    message = refused("mnist", tmp_path)
    assert "t10k-labels-idx1-ubyte.gz" in message and "download=true" in message and "https://" in message


@pytest.mark.parametrize("folder", ["USPS", "."])
def test_usps(folder: str, tmp_path: Path) -> None:
    images = write_usps(tmp_path / folder)
    domain = load("usps", tmp_path)
    assert domain.test is not None
    assert torch.equal(pixels(domain.train).reshape(5, 256), torch.from_numpy(images["usps.bz2"]))
    assert pixels(domain.test).shape == (3, 1, 16, 16)
    assert domain.train.labels.tolist() == [0, 1, 2, 3, 4]


def test_usps_and_mnist_agree_with_torchvision(tmp_path: Path) -> None:
    from transfer_cli.torchvision_compat import datasets

    write_usps(tmp_path)
    write_idx(tmp_path, packed=False)
    for name, theirs in (
        ("usps", datasets.USPS(tmp_path, train=False)),
        ("mnist", datasets.MNIST(tmp_path, train=False)),
    ):
        test = load(name, tmp_path).test
        assert test is not None
        assert torch.equal(pixels(test)[:, 0], torch.as_tensor(theirs.data))
        assert test.labels.tolist() == [int(t) for t in theirs.targets]


@pytest.mark.parametrize("damage", ["cut", "short line", "text"])
def test_broken_usps(damage: str, tmp_path: Path) -> None:
    write_usps(tmp_path)
    path = tmp_path / "usps.bz2"
    data = path.read_bytes()
    text = bz2.decompress(data)
    path.write_bytes(
        {
            "cut": data[:-20],
            "short line": bz2.compress(text[:-30] + b"\n"),
            "text": bz2.compress(text.replace(b"1:", b"1:x", 1)),
        }[damage]
    )
    assert str(path) in refused("usps", tmp_path)


@pytest.mark.parametrize("folder", ["SVHN", "."])
def test_svhn(folder: str, tmp_path: Path) -> None:
    images = write_svhn(tmp_path / folder)
    domain = load("svhn", tmp_path)
    assert torch.equal(pixels(domain.train), torch.from_numpy(images))
    assert domain.train.labels.tolist() == [0, 1, 9]  # 10 stands for 0


def test_truncated_svhn(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-200])
    assert str(path) in refused("svhn", tmp_path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, packed: bool, tmp_path: Path) -> None:
    fine = name == "cifar100"
    files, folder = cifar_files(fine), "cifar-100-python" if fine else "cifar-10-batches-py"
    if packed:
        write_archive(tmp_path / name.replace("cifar", "cifar-").__add__("-python.tar.gz"), folder, files)
    else:
        write_files(tmp_path / folder, files)
    before = snapshot(tmp_path)
    domain = load(name, tmp_path)
    assert domain.test is not None
    assert torch.equal(pixels(domain.train)[:2].reshape(2, -1), torch.from_numpy(random_images(0, 2, 3072)))
    assert domain.train.labels.tolist() == ([0, 9] if fine else [0, 9, 1, 9, 2, 9, 3, 9, 4, 9])
    assert domain.classes[1] == ("class 1" if fine else "automobile")
    assert len(domain.test) == 2
    assert snapshot(tmp_path) == before
    assert reader(name, tmp_path).fingerprint()


def test_cifar10_and_its_jpeg_folder_share_their_names(tmp_path: Path) -> None:
    write_files(tmp_path / "cifar-10-batches-py", cifar_files())
    assert list(load("cifar10", tmp_path).classes) == reader("cifar10_jpg", tmp_path).class_names


def test_broken_cifar(tmp_path: Path) -> None:
    files = cifar_files()
    write_files(tmp_path / "cifar-10-batches-py", files)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(files["data_batch_3"][:-4000])
    assert str(path) in refused("cifar10", tmp_path)
    path.write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}))
    assert "2 labels for 1 images" in refused("cifar10", tmp_path)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(tmp_path / "owned"),)

    write_files(tmp_path / "cifar-10-batches-py", {**cifar_files(), "data_batch_1": pickle.dumps(Bad())})
    assert "mkdir" in refused("cifar10", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_broken_cifar_archive(tmp_path: Path) -> None:
    files = cifar_files()
    del files["test_batch"]
    path = tmp_path / "cifar-10-python.tar.gz"
    write_archive(path, "cifar-10-batches-py", files)
    assert "holds no test_batch" in refused("cifar10", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refused("cifar10", tmp_path)


def test_stl10(tmp_path: Path) -> None:
    images = random_images(5, 2, 3, 96, 96)
    stored = images.transpose(0, 1, 3, 2).tobytes()
    files = {f"{s}_{k}.bin": d for s in ("train", "test") for k, d in (("X", stored), ("y", bytes([1, 10])))}
    write_files(tmp_path / "stl10_binary", files)
    domain = load("stl10", tmp_path)
    assert torch.equal(pixels(domain.train), torch.from_numpy(images))
    assert domain.train.labels.tolist() == [0, 9]
    (tmp_path / "stl10_binary/test_X.bin").write_bytes(stored[:-1])
    assert "test_X.bin" in refused("stl10", tmp_path)


def test_download_is_asked_of_torchvision_only_where_permitted_and_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transfer_cli.torchvision_compat import datasets

    calls = []

    def fetch(root: str, **options: Any) -> None:
        calls.append((root, options))
        write_usps(Path(root))

    monkeypatch.setattr(datasets, "USPS", fetch)
    refused("usps", tmp_path / "new")
    assert not calls
    for _ in range(2):
        assert len(reader("usps", tmp_path / "new", download=True).load().train) == 5
    target = str(tmp_path / "new" / "USPS")
    assert calls == [(target, {"download": True, "train": True}), (target, {"download": True, "train": False})]


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_cli.torchvision_compat import datasets

    def fetch(root: str, **options: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(datasets, "STL10", fetch)
    with pytest.raises(TransferError, match=r"stl10: the download to .* failed \(no route to host\)"):
        reader("stl10", tmp_path, download=True).load()


def test_unknown_set_is_listed(tmp_path: Path) -> None:
    with pytest.raises(TransferError, match="must be mnist or usps"):
        reader("mnist", tmp_path, dataset="mnits")


def test_image_folder(tmp_path: Path) -> None:
    folder = write_pets(tmp_path)
    (folder / "cat" / "._1.jpg").write_bytes(b"left by macOS")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    domain = load("image_folder", tmp_path, path="pets")
    assert domain.name == "pets" and domain.test is None and domain.classes == ("cat", "dog")
    assert domain.train.ids == ("cat/1.jpg", "cat/2.PNG", "cat/3.bmp", "dog/1.jpeg", "dog/2.tif")
    assert domain.train.labels.tolist() == [0, 0, 0, 1, 1]
    inputs = domain.train.inputs
    assert isinstance(inputs, ImageFiles)
    assert inputs.native == 12 and inputs.channels == 3 and str(inputs.spec) == "image of 3 x 12 x 12"
    assert load("image_folder", None, path=str(folder)).train.ids == domain.train.ids  # absolute: needs no root


@pytest.mark.parametrize("size", [(12, 10), (20, 20)])
def test_native_side_only_where_all_agree(size: tuple[int, int], tmp_path: Path) -> None:
    folder = write_pets(tmp_path)
    write_images(folder / "dog", ["odd.png"], size)
    inputs = load("image_folder", tmp_path, path="pets").train.inputs
    assert isinstance(inputs, ImageFiles) and inputs.native is None


def test_published_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / "hymenoptera" / split / "ants", ["a.jpg"])
        write_images(tmp_path / "hymenoptera" / split / "bees", ["b.jpg", "c.jpg"])
    domain = load("hymenoptera", tmp_path)
    assert domain.test is not None and len(domain.train) == len(domain.test) == 3
    assert domain.test.ids[0] == "val/ants/a.jpg"
    (tmp_path / "hymenoptera/val/ants/a.jpg").unlink()
    (tmp_path / "hymenoptera/val/ants").rmdir()
    assert "only one of train and val" in refused("hymenoptera", tmp_path)
    assert "test needs train too" in refused("hymenoptera", tmp_path, train=None)


def test_imagenet_by_its_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            write_images(tmp_path / "imagenet" / split / wnid, ["1.jpg"], (9, 7))
            os.rename(tmp_path / f"imagenet/{split}/{wnid}/1.jpg", tmp_path / f"imagenet/{split}/{wnid}/1.JPEG")
    domain = load("imagenet", tmp_path)
    assert domain.classes == ("n01440764", "n01443537") and domain.test is not None
    for path in (tmp_path / "imagenet/val").rglob("*.JPEG"):
        path.rename(tmp_path / "imagenet/val" / f"{path.parent.name}.JPEG")
    for path in (tmp_path / "imagenet/val").iterdir():
        if path.is_dir():
            path.rmdir()
    assert "no class folder" in refused("imagenet", tmp_path)


def test_domains(tmp_path: Path) -> None:
    for name in yaml.safe_load((DATASETS / "pacs.yaml").read_text())["class_names"]:
        write_images(tmp_path / "pacs" / "sketch" / name, ["1.png"])
    domain = load("pacs", tmp_path, domain="sketch")
    assert domain.name == "pacs_sketch" and len(domain.train) == 7
    assert "Did you mean 'sketch'?" in refused("pacs", tmp_path, domain="sketches")
    assert "one of photo" in refused("pacs", tmp_path, domain=None)
    assert "pacs/cartoon" in refused("pacs", tmp_path, domain="cartoon")
    assert "3929 expected" in refused("pacs", tmp_path, domain="sketch", strict_counts=True)
    assert len(load("pacs", tmp_path, domain="sketch", strict_counts=True, expected={"sketch": 7}).train) == 7
    assert "no place '{domain}'" in refused("image_folder", tmp_path, path="pacs", domain="photo")


def test_a_domain_spelled_otherwise_in_its_files(tmp_path: Path) -> None:
    write_images(tmp_path / "office_home" / "Real World" / "Mug", ["1.png"])
    domain = load("office_home", tmp_path, domain="Real_World", class_names=None)
    assert domain.name == "office_home_Real_World" and domain.classes == ("Mug",)


def test_class_names_are_checked_and_give_the_order(tmp_path: Path) -> None:
    write_pets(tmp_path)
    domain = load("image_folder", tmp_path, path="pets", class_names=["dog", "cat"])
    assert domain.classes == ("dog", "cat") and domain.train.labels.tolist() == [1, 1, 1, 0, 0]
    message = refused("image_folder", tmp_path, path="pets", class_names=["cat", "cow"])
    assert "missing cow" in message and "unexpected dog" in message


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    (write_pets(tmp_path) / "eel").mkdir()
    assert str(tmp_path / "pets" / "eel") in refused("image_folder", tmp_path, path="pets")


def test_unreadable_images_are_counted_and_named_or_skipped(tmp_path: Path) -> None:
    folder = write_pets(tmp_path)
    (folder / "cat" / "bad.jpg").write_bytes(b"<html>")
    (folder / "dog" / "empty.png").write_bytes(b"")
    (folder / "dog" / "gone.png").symlink_to(folder / "nowhere.png")
    whole = (folder / "cat" / "1.jpg").read_bytes()
    (folder / "cat" / "cut.jpg").write_bytes(whole[:100])
    message = refused("image_folder", tmp_path, path="pets")
    assert "4 of 9 images" in message and "cat/bad.jpg, cat/cut.jpg, dog/empty.png, ..." in message
    domain = load("image_folder", tmp_path, path="pets", skip_unreadable=True, check_headers=False)
    assert len(domain.train) == 5 and "cat/bad.jpg" not in domain.train.ids
    for image in ("1.jpeg", "2.tif"):
        (folder / "dog" / image).write_bytes(b"")
    assert "no readable image is left of dog" in refused("image_folder", tmp_path, path="pets", skip_unreadable=True)


def test_an_image_cut_in_its_body_is_named_when_decoded(tmp_path: Path) -> None:
    folder = write_pets(tmp_path)
    write_images(folder / "cat", ["4.jpg"], (64, 64))
    data = (folder / "cat" / "4.jpg").read_bytes()
    (folder / "cat" / "4.jpg").write_bytes(data[: len(data) // 2])
    inputs = load("image_folder", tmp_path, path="pets").train.inputs
    assert isinstance(inputs, ImageFiles)
    with pytest.raises(TransferError, match=r"4\.jpg"):
        ImageFiles(inputs.paths, size=12).batch(torch.arange(len(inputs)))


def test_folder_fingerprint_follows_the_listing(tmp_path: Path) -> None:
    folder = write_pets(tmp_path)
    first = reader("image_folder", tmp_path, path="pets").fingerprint()
    assert reader("image_folder", None, path=str(folder)).fingerprint() == first
    write_images(folder / "dog", ["9.png"])
    assert reader("image_folder", tmp_path, path="pets").fingerprint() != first


def write_lists(root: Path, train: str, test: str) -> None:
    for name in ("ape", "bee"):
        write_images(root / "domainnet" / "real" / name, ["1.jpg", "2 b.jpg"])
    (root / "domainnet" / "real_train.txt").write_text(train)
    (root / "domainnet" / "real_test.txt").write_text(test)


def test_list_files(tmp_path: Path) -> None:
    write_lists(tmp_path, "real/bee/1.jpg 1\nreal/ape/1.jpg 2\n", "real/bee/2 b.jpg 1\n\n")
    domain = load("domainnet", tmp_path)
    assert domain.name == "domainnet_real" and domain.classes == ("bee", "ape")  # in the order of the lists' labels
    assert domain.train.ids == ("bee/1.jpg", "ape/1.jpg") and domain.train.labels.tolist() == [0, 1]
    assert domain.test is not None and domain.test.ids == ("bee/2 b.jpg",) and domain.test.labels.tolist() == [0]
    first = reader("domainnet", tmp_path).fingerprint()
    write_lists(tmp_path, "real/bee/1.jpg 1\n", "real/ape/1.jpg 2\nreal/bee/2 b.jpg 1\n")  # one moved to the test list
    assert reader("domainnet", tmp_path).fingerprint() != first


def test_list_relative_to_the_domain_folder(tmp_path: Path) -> None:
    write_lists(tmp_path, "bee/1.jpg 0\n", "ape/1.jpg 1\n")
    assert load("domainnet", tmp_path).train.ids == ("bee/1.jpg",)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("real/bee/1.jpg 1\nreal/ape/1.jpg 1\n", "contradicts"),
        ("real/bee/1.jpg 1\nreal/bee/1.jpg 2\n", "contradicts"),
        ("real/bee/1.jpg one\n", "corrupt"),
        ("real/bee/1.jpg\n", "corrupt"),
        ("", "an empty list"),
        ("real/bee/1.jpg 1\nreal/bee/7.jpg 1\n", "1 of 3 images"),
    ],
)
def test_broken_lists(train: str, expected: str, tmp_path: Path) -> None:
    write_lists(tmp_path, train, "real/ape/1.jpg 3\n")
    assert expected in refused("domainnet", tmp_path)


def test_published_mnist_m(tmp_path: Path) -> None:
    images = random_images(0, 4, 32, 32, 3)
    (tmp_path / "mnist_m").mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "mnist_m" / f"mnist_m_{split}.npz", x=images, y=np.array([3, 1, 0, 9], np.uint8))
    domain = load("mnist_m", tmp_path)
    assert torch.equal(pixels(domain.train), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert domain.train.labels.tolist() == [3, 1, 0, 9] and domain.classes == DIGIT_NAMES
    path = tmp_path / "mnist_m" / "mnist_m_test.npz"
    path.write_bytes(path.read_bytes()[:500])
    assert str(path) in refused("mnist_m", tmp_path)
    path.unlink()
    assert "found none" in refused("mnist_m", tmp_path)


def test_built_mnist_m(tmp_path: Path) -> None:
    digits = write_idx(tmp_path, n=40)["train"]
    for i, value in enumerate((0, 255, 100)):
        (tmp_path / "photos" / "deeper").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30 + i, 28), (value, 10, 20)).save(tmp_path / "photos" / "deeper" / f"{i}.png")
    domain = load("mnist_m", tmp_path, photographs="photos")
    built = pixels(domain.train).numpy().astype(int)
    assert built.shape == (40, 3, 28, 28)
    reds = [
        [np.array_equal(image[0], abs(v - digit.astype(int))) for v in (0, 255, 100)]
        for image, digit in zip(built, digits, strict=True)
    ]
    assert (np.sum(reds, 1) == 1).all() and np.any(reds, 0).all()  # each on one photograph, and all are used
    assert np.array_equal(built[:, 1], abs(10 - digits.astype(int)))
    again = load("mnist_m", tmp_path, photographs="photos")
    other = load("mnist_m", tmp_path, photographs="photos", seed=1)
    assert torch.equal(pixels(again.train), pixels(domain.train))
    assert not torch.equal(pixels(other.train), pixels(domain.train))
    assert len({reader("mnist_m", tmp_path, photographs="photos", seed=s).fingerprint() for s in (0, 1)}) == 2


def test_mnist_m_patches_are_cut_from_anywhere(tmp_path: Path) -> None:
    from transfer_cli.data.readers.mnist_m import blend

    write_images(tmp_path, ["photo.png"], (31, 30))
    photo = np.asarray(Image.open(tmp_path / "photo.png")).transpose(2, 0, 1)
    cut = blend(np.zeros((400, 1, 28, 28), np.uint8), [str(tmp_path / "photo.png")], [0])
    windows = {photo[:, t : t + 28, left : left + 28].tobytes() for t in range(3) for left in range(4)}
    assert {patch.tobytes() for patch in cut} == windows  # the outermost ones included


def test_mnist_m_with_unfit_photographs(tmp_path: Path) -> None:
    write_idx(tmp_path)
    assert "missing" in refused("mnist_m", tmp_path, photographs="photos")
    (tmp_path / "photos").mkdir()
    assert "no image" in refused("mnist_m", tmp_path, photographs="photos")
    write_images(tmp_path / "photos", ["small.png"], (40, 20))
    assert "smaller than 28 x 28" in refused("mnist_m", tmp_path, photographs="photos")


def test_npz_features(tmp_path: Path) -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    np.savez(tmp_path / "a.npz", features=features, label=np.array([7, 3, 3, 9, 7]), files=np.array([{}], dtype=object))
    domain = load("arrays", tmp_path, path="a.npz")
    assert domain.name == "a" and domain.kind == "classification" and domain.test is None
    assert torch.equal(pixels(domain.train), torch.from_numpy(features.astype(np.float32)))
    assert domain.classes == ("3", "7", "9") and domain.train.labels.tolist() == [1, 0, 0, 2, 1]
    named = load("arrays", tmp_path, path="a.npz", class_names=["a", "b", "c"])
    assert named.classes == ("a", "b", "c")
    assert "class_names has 2" in refused("arrays", tmp_path, path="a.npz", class_names=["a", "b"])


def test_named_keys_and_unknown_ones(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", left=np.ones((2, 3)), right=np.zeros((2, 4)), kind=np.array(["b", "a"]))
    domain = load("arrays", tmp_path, path="a.npz", inputs="right", labels="kind")
    assert pixels(domain.train).shape == (2, 4) and domain.classes == ("a", "b")
    assert "it holds: left, right, kind." in refused("arrays", tmp_path, path="a.npz")
    assert "Did you mean 'right'?" in refused("arrays", tmp_path, path="a.npz", inputs="rigth")


@pytest.mark.parametrize("sparse", [False, True])
def test_mat_features(sparse: bool, tmp_path: Path) -> None:
    features = np.array([[0.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    savemat(tmp_path / "a.mat", {"fea": csc_matrix(features) if sparse else features, "gnd": [[1], [2], [1]]})
    domain = load("arrays", tmp_path, path="a.mat")
    assert torch.equal(pixels(domain.train), torch.from_numpy(features).float())
    assert domain.classes == ("1", "2") and domain.train.labels.tolist() == [0, 1, 0]


def test_npy_features(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.int32))
    np.save(tmp_path / "b.npy", np.array([1.0, 0.0]))
    domain = load("arrays", tmp_path, path="a.npy", labels="b.npy")
    assert domain.train.labels.tolist() == [1, 0] and domain.classes == ("0", "1")
    assert "labels=FILE.npy" in refused("arrays", tmp_path, path="a.npy")
    assert str(tmp_path / "c.npy") in refused("arrays", tmp_path, path="a.npy", labels="c.npy")
    first = reader("arrays", tmp_path, path="a.npy", labels="b.npy").fingerprint()
    np.save(tmp_path / "b.npy", np.array([0.0, 1.0]))
    assert reader("arrays", tmp_path, path="a.npy", labels="b.npy").fingerprint() != first


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (4, 3, 5, 6), (4, 5, 6, 1)])
def test_array_images(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = random_images(0, *shape)
    np.savez(tmp_path / "a.npz", images=images, y=[0, 1, 0, 1])
    values = pixels(load("arrays", tmp_path, path="a.npz").train)
    assert values.shape == (4, 3 if 3 in shape else 1, 5, 6)
    expected = images if shape == (4, 3, 5, 6) else np.moveaxis(images.reshape(4, 5, 6, -1), 3, 1)
    assert np.array_equal(values.numpy(), expected)
    assert "is for features" in refused("arrays", tmp_path, path="a.npz", normalise=["l2"])


def test_regression_targets(tmp_path: Path) -> None:
    for targets in (np.array([0.5, 1.5]), np.array([[0.5, 1.0], [1.5, 2.0]])):
        np.savez(tmp_path / "a.npz", x=np.ones((2, 3)), y=targets)
        domain = load("arrays", tmp_path, path="a.npz", kind="regression")
        assert domain.kind == "regression" and domain.classes == ()
        assert domain.train.labels.dtype == torch.float32
        assert np.array_equal(domain.train.labels.numpy(), targets.reshape(2, -1))
    assert "kind=regression" in refused("arrays", tmp_path, path="a.npz")


def test_array_test_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", x=np.array([[1.0], [3.0]]), y=["u", "v"])
    np.savez(tmp_path / "test.npz", x=np.array([[5.0]]), y=["v"])
    domain = load("arrays", tmp_path, path="train.npz", test_path="test.npz", normalise=["zscore"])
    assert domain.test is not None and domain.test.labels.tolist() == [1]
    assert pixels(domain.train).tolist() == [[-1], [1]] and pixels(domain.test).tolist() == [[3]]
    np.savez(tmp_path / "test.npz", x=np.array([[5.0]]), y=["w"])
    assert "label w does not occur" in refused("arrays", tmp_path, path="train.npz", test_path="test.npz")


def test_normalisation_steps(tmp_path: Path) -> None:
    features = np.array([[1.0, 3.0], [0.0, 0.0], [4.0, 4.0]])
    np.savez(tmp_path / "a.npz", x=features, y=[0, 1, 0])
    rows = pixels(load("arrays", tmp_path, path="a.npz", normalise=["row_sum"]).train)
    assert rows.tolist() == [[0.25, 0.75], [0, 0], [0.5, 0.5]]
    lengths = pixels(load("arrays", tmp_path, path="a.npz", normalise=["l2"]).train).norm(dim=1)
    assert torch.allclose(lengths, torch.tensor([1.0, 0.0, 1.0]))
    both = pixels(load("arrays", tmp_path, path="a.npz", normalise=["row_sum", "zscore"]).train).double()
    assert torch.allclose(both.mean(0), torch.zeros(2).double(), atol=1e-6)
    assert torch.allclose(both.std(0, correction=0), torch.ones(2).double(), atol=1e-6)
    with pytest.raises(TransferError, match="normalise"):
        reader("arrays", tmp_path, path="a.npz", normalise=["z-score"])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"x": np.array([[1, np.nan], [np.inf, 2]]), "y": [0, 1]}, "2 of 4 values in the inputs"),
        ({"x": np.array([[1e300, 1.0]]), "y": [0]}, "1 of 2 values in the inputs"),
        ({"x": np.ones((2, 2)), "y": [0, np.nan]}, "1 of 2 values in the labels"),
        ({"x": np.ones((3, 2)), "y": [0, 1]}, "do not fit"),
        ({"x": np.ones((2, 2)), "y": np.ones((2, 2))}, "must be (N,)"),
        ({"x": np.ones((2, 4, 4, 3)), "y": [0, 1]}, "features (N, D) or uint8 images"),
        ({"x": np.array([["a"], ["b"]]), "y": [0, 1]}, "features (N, D) or uint8 images"),
        ({"x": np.array([[{}], [{}]]), "y": [0, 1]}, "corrupt"),
    ],
)
def test_unfit_arrays(content: dict[str, Any], expected: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **content)
    message = refused("arrays", tmp_path, path="a.npz")
    assert expected in message and str(tmp_path / "a.npz") in message


@pytest.mark.parametrize("suffix", ["npz", "npy", "mat"])
def test_truncated_arrays(suffix: str, tmp_path: Path) -> None:
    path, arrays = tmp_path / f"a.{suffix}", {"x": np.random.default_rng(0).normal(size=(50, 8)), "y": np.arange(50)}
    {
        "npz": lambda: np.savez(path, **arrays),
        "npy": lambda: np.save(path, arrays["x"]),
        "mat": lambda: savemat(path, arrays),
    }[suffix]()
    np.save(tmp_path / "y.npy", arrays["y"])
    labels = "y.npy" if suffix == "npy" else None
    assert len(load("arrays", tmp_path, path=path.name, labels=labels).train) == 50
    path.write_bytes(path.read_bytes()[:-200])
    message = refused("arrays", tmp_path, path=path.name, labels=labels)
    assert "truncated or corrupt" in message and str(path) in message


def test_other_suffixes_and_domains_of_arrays(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2\n")
    assert "only .npz, .npy and .mat" in refused("arrays", tmp_path, path="a.csv")
    assert "Did you mean 'caltech'?" in refused("office_caltech_surf", tmp_path, domain="caltec")
    assert "Caltech10_SURF_L10.mat" in refused("office_caltech_surf", tmp_path, domain="caltech")


@pytest.fixture
def real() -> Path:
    root = os.environ.get("TRANSFER_DATA")
    if not root:
        pytest.skip("TRANSFER_DATA does not name a folder with the real data sets")
    return Path(root)


def has(real: Path, folder: str) -> None:
    if not (real / folder).exists():
        pytest.skip(f"TRANSFER_DATA holds no {folder}")


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder", "changes", "shape", "n_test", "n_classes"),
    [
        ("mnist", "MNIST", {}, (60000, 1, 28, 28), 10000, 10),
        ("usps", "USPS", {}, (7291, 1, 16, 16), 2007, 10),
        ("mnist_m", "mnist_m", {}, (3500, 3, 32, 32), 1500, 10),
        ("office_caltech_surf", "office_caltech_surf", {"domain": "caltech"}, (1123, 800), None, 10),
        ("pacs_squeezenet_features", "pacs_squeezenet_features", {"domain": "art_painting"}, (2048, 512), None, 7),
    ],
)
def test_real_arrays(
    real: Path,
    name: str,
    folder: str,
    changes: dict[str, Any],
    shape: tuple[int, ...],
    n_test: int | None,
    n_classes: int,
) -> None:
    has(real, folder)
    domain = load(name, real, **changes)
    assert pixels(domain.train).shape == shape
    assert (len(domain.test) if domain.test else None) == n_test
    assert len(domain.classes) == n_classes == len(domain.train.labels.unique())


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n_train", "n_test", "native"),
    [("cifar10_jpg", 4000, 1000, 32), ("hymenoptera", 100, 60, None), ("pacs", 224, None, 227)],
)
def test_real_folders(real: Path, name: str, n_train: int, n_test: int | None, native: int | None) -> None:
    has(real, name)
    domain = load(name, real)
    assert isinstance(domain.train.inputs, ImageFiles)
    assert domain.train.inputs.native == native
    if n_train == len(domain.train):  # a subset may be larger elsewhere
        assert (len(domain.test) if domain.test else None) == n_test


@pytest.mark.data
def test_real_digits_agree_with_the_known_counts(real: Path) -> None:
    has(real, "MNIST")
    has(real, "USPS")
    mnist, usps = load("mnist", real), load("usps", real)
    assert mnist.train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert usps.train.labels.bincount().tolist() == [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]


@pytest.mark.data
def test_office_caltech_gives_the_published_nearest_neighbour_figure(real: Path) -> None:
    """1-NN, caltech to amazon: 23.7 % in Long et al. (ICCV 2013)."""
    has(real, "office_caltech_surf")
    source, target = (load("office_caltech_surf", real, domain=d).train for d in ("caltech", "amazon"))
    nearest = torch.cdist(pixels(target).double(), pixels(source).double()).argmin(1)
    accuracy = (source.labels[nearest] == target.labels).double().mean().item()
    assert round(100 * accuracy, 1) == 23.7


def test_two_moons_are_turned_scaled_and_a_function_of_their_keys(tmp_path: Path) -> None:
    from transfer_cli.data.readers.two_moons import TwoMoons

    place = Place(None)
    flat, turned = TwoMoons(place, noise=0.0).load(), TwoMoons(place, noise=0.0, angle=90.0, scale=2.0).load()
    x, y = flat.train.inputs.values, turned.train.inputs.values  # type: ignore[attr-defined]
    torch.testing.assert_close(y, 2 * torch.stack([-x[:, 1], x[:, 0]], 1))
    assert flat.train.labels.bincount().tolist() == [75, 75]
    upper = x[flat.train.labels == 0] + torch.tensor([0.5, 0.25])
    torch.testing.assert_close(upper.norm(dim=1), torch.ones(75))  # a half-circle around the origin
    keys = [{}, {"draw": 1}, {"angle": 5.0}, {"noise": 0.1}, {"n": 151}, {"scale": 2.0}]
    assert len({TwoMoons(place, **key).fingerprint() for key in keys}) == len(keys)  # type: ignore[arg-type]


def test_digits_are_turned_anticlockwise() -> None:
    from transfer_cli.data.readers.digits import Digits

    plain, turned, quarter = (Digits(Place(None), rotate=angle) for angle in (0.0, 30.0, 90.0))
    assert len({reader.fingerprint() for reader in (plain, turned, quarter)}) == 3
    images = {reader: reader.load().train.inputs.values for reader in (plain, turned, quarter)}  # type: ignore[attr-defined]
    assert torch.equal(images[quarter], torch.rot90(images[plain], 1, (2, 3)))
    assert images[turned].dtype == torch.uint8 and not torch.equal(images[turned], images[plain])


def test_a_file_that_is_not_below_the_root_lies_where_the_command_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, root = tmp_path / "here", tmp_path / "root"
    for folder, names in ((here, ("mine.csv", "both.csv")), (root, ("both.csv", "theirs.csv"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("1")
    monkeypatch.chdir(here)
    for name, folder in (("mine.csv", here), ("both.csv", root), ("theirs.csv", root), ("none.csv", root)):
        assert below_root(Place(root), name, "data") == folder / name
    assert below_root(Place(None), "mine.csv", "data") == here / "mine.csv"
    with pytest.raises(TransferError, match="data needs a data folder"):
        below_root(Place(None), "theirs.csv", "data")
