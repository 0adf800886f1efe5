"""Data sets that torchvision can download, read from the files as torchvision stores them.

The files are read directly: a data root may be read-only and hold them compressed, where torchvision's own classes
want to unpack first. torchvision is imported for a permitted download only, which also checks the sums.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import pickle
import tarfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from transfer_cli.data.domain import Domain, Part, Place, as_labels, fingerprint_files, numbered
from transfer_cli.data.inputs import ArrayInputs
from transfer_cli.data.readers.digits import DIGIT_NAMES
from transfer_cli.data.readers.files import reading
from transfer_cli.errors import TransferError

FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
KUZUSHIJI_NAMES = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
STL10_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")

Located = Mapping[str, Path]  # a file's published name -> the file, or the archive, that holds it
ImagesAndLabels = tuple[np.ndarray, np.ndarray]  # (N, C, H, W) uint8, (N,)


@dataclass(frozen=True)
class Files:
    """Where torchvision keeps one data set below the data root, and how to read it."""

    torchvision_class: str
    origin: str  # where a person finds the files
    folders: tuple[str, ...]  # the first is where a download puts them
    train: tuple[str, ...]
    test: tuple[str, ...]
    read: Callable[[Located], ImagesAndLabels]
    classes: tuple[str, ...] = ()  # empty: the names stand in `meta`
    meta: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = ("",)  # a file may lie under its name followed by any of these; the first found is read
    archive: str | None = None  # read from it where the folder is absent
    download_to: str = ""  # below the data root


class TorchvisionSet:
    """Both published splits, in memory. Digits carry the same names in every set, so that labels map by name."""

    def __init__(
        self,
        place: Place,
        *,
        dataset: Literal["mnist", "usps", "svhn", "fashion_mnist", "kmnist", "cifar10", "cifar100", "stl10"],
    ) -> None:
        self.place = place
        self.dataset = dataset
        self.files = SETS[dataset]

    def fingerprint(self) -> str:
        return fingerprint_files(set(self._locate().values()))

    def load(self) -> Domain:
        located = self._locate()
        classes = self.files.classes or _cifar_names({name: located[name] for name in self.files.meta})
        train = self._part("train", {name: located[name] for name in self.files.train}, len(classes))
        test = self._part("test", {name: located[name] for name in self.files.test}, len(classes))
        return Domain(self.dataset, "classification", classes, train, test)

    def _part(self, split: str, files: Located, n_classes: int) -> Part:
        images, labels = self.files.read(files)
        with reading(list(files.values())[-1]):
            if len(images) != len(labels):
                raise ValueError(f"{len(labels)} labels for {len(images)} images")
            if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
                raise ValueError(f"labels {labels.min()} to {labels.max()} for {n_classes} classes")
        inputs = ArrayInputs(torch.from_numpy(np.ascontiguousarray(images)))
        return Part(inputs, as_labels(labels.astype(np.int64)), numbered(f"{self.dataset}/{split}", len(labels)))

    def _locate(self) -> dict[str, Path]:
        """The file (or the archive) that holds each name.

        Raises:
            TransferError: one is missing and a download is not permitted, or failed.
        """
        root = self.place.require_root(self.dataset)
        located, missing = self._look(root)
        if missing and self.place.download:
            self._download(root)
            located, missing = self._look(root)
        if missing:
            raise TransferError(
                f"{self.dataset}: missing file {missing}. Either set download=true, "
                f"or place it there yourself, from {self.files.origin}"
            )
        return located

    def _look(self, root: Path) -> tuple[dict[str, Path], Path | None]:
        """Files that are there, and the first that is not."""
        names = [*self.files.train, *self.files.test, *self.files.meta]
        missing = None
        for folder in self.files.folders:
            located = {}
            for name in names:
                candidates = [root / folder / (name + suffix) for suffix in self.files.suffixes]
                present = [path for path in candidates if path.is_file()]
                if not present:
                    missing = missing or candidates[0]
                    break
                located[name] = present[0]
            else:
                return located, None
        if self.files.archive and (root / self.files.archive).is_file():
            return dict.fromkeys(names, root / self.files.archive), None
        return {}, missing

    def _download(self, root: Path) -> None:
        from transfer_cli.torchvision_compat import datasets  # seconds to import, and only needed here

        target = root / self.files.download_to
        constructor = getattr(datasets, self.files.torchvision_class)
        by_split = self.files.torchvision_class in ("SVHN", "STL10")
        try:
            target.mkdir(parents=True, exist_ok=True)
            for split in ("train", "test"):
                which = {"split": split} if by_split else {"train": split == "train"}
                constructor(str(target), download=True, **which)
        except Exception as error:  # sockets, HTTP, checksums, archives and permissions: each has its own type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise TransferError(
                f"{self.dataset}: the download to {target} failed ({reason[:200]}). "
                f"Place the files there yourself, from {self.files.origin}"
            ) from error


def read_idx(path: Path) -> np.ndarray:
    """Bytes in the IDX format, gzipped or not: 0, 0, 8, number of axes, sizes as big-endian uint32, data."""
    with reading(path):
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:3] != b"\0\0\x08":
            raise ValueError("no IDX file of bytes")
        axes = data[3]
        shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, offset=4))
        return np.frombuffer(bytearray(data), np.uint8, offset=4 + 4 * axes).reshape(shape)


def _read_idx_pair(files: Located) -> ImagesAndLabels:
    image_file, label_file = files.values()
    images, labels = read_idx(image_file), read_idx(label_file)
    with reading(image_file):
        n, height, width = images.shape
        return images.reshape(n, 1, height, width), labels


def _read_usps(files: Located) -> ImagesAndLabels:
    """libsvm's text, `label 1:value .. 256:value` a line, labels 1..10, values in [-1, 1]."""
    (path,) = files.values()
    with reading(path), warnings.catch_warnings():
        warnings.simplefilter("error")  # older NumPy warns where text is not a number
        text = bz2.decompress(path.read_bytes())
        if not text.endswith(b"\n"):
            raise ValueError("the last line is incomplete")
        numbers = np.fromstring(text.replace(b":", b" "), dtype=np.float32, sep=" ")
        table = numbers.reshape(text.count(b"\n"), 1 + 2 * 256)
        pixels = ((table[:, 2::2] + 1) / 2 * 255).astype(np.uint8)  # cut off, not rounded: torchvision's own pixels
        return pixels.reshape(-1, 1, 16, 16), table[:, 0].astype(np.int64) - 1


def _read_svhn(files: Located) -> ImagesAndLabels:
    """MATLAB arrays X `(32, 32, 3, N)` and y, in which 10 stands for the digit 0."""
    from scipy.io import loadmat

    (path,) = files.values()
    with reading(path):
        content = loadmat(path, variable_names=["X", "y"])
        return content["X"].transpose(3, 2, 0, 1), content["y"].reshape(-1).astype(np.int64) % 10


def _read_stl10(files: Located) -> ImagesAndLabels:
    """Bytes `(N, 3, 96, 96)`, each channel stored column by column, and labels 1..10."""
    image_file, label_file = files.values()
    with reading(image_file):
        images = np.fromfile(image_file, np.uint8).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
    with reading(label_file):
        return images, np.fromfile(label_file, np.uint8).astype(np.int64) - 1


def _read_cifar(files: Located) -> ImagesAndLabels:
    images, labels = [], []
    for path, batch in _unpickled(files):
        with reading(path):
            images.append(np.asarray(batch["data"]).reshape(-1, 3, 32, 32))
            labels.append(np.asarray(batch["labels" if "labels" in batch else "fine_labels"]))
            if len(images[-1]) != len(labels[-1]):
                raise ValueError(f"{len(labels[-1])} labels for {len(images[-1])} images")
    return np.concatenate(images), np.concatenate(labels)


def _cifar_names(files: Located) -> tuple[str, ...]:
    ((path, meta),) = _unpickled(files)
    with reading(path):
        return tuple(meta["label_names" if "label_names" in meta else "fine_label_names"])


def _unpickled(files: Located) -> list[tuple[Path, dict[str, Any]]]:
    """CIFAR's pickles, each from its own file, or all from one archive."""
    contents = {}
    for path in set(files.values()):
        with reading(path):
            if path.name.endswith(".tar.gz"):
                contents = _members(path, files)
            else:
                contents[path.name] = path.read_bytes()
    pickles = []
    for name, path in files.items():
        with reading(path):
            pickles.append((path, _ArraysOnly(io.BytesIO(contents[name]), encoding="latin1").load()))
    return pickles


def _members(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    wanted = set(names)
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if Path(member.name).name in wanted else None
            if file is not None:
                found[Path(member.name).name] = file.read()
    if wanted - found.keys():
        raise ValueError(f"holds no {', '.join(sorted(wanted - found.keys()))}")
    return found


class _ArraysOnly(pickle.Unpickler):
    """Pickles may run any code: this one knows arrays, numbers and text, which is all that CIFAR's hold."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "_reconstruct": np.zeros(0).__reduce__()[0],  # its module moved between NumPy 1 and 2
            "ndarray": np.ndarray,
            # CIFAR's flags are the integers of 2009; NumPy 2.4 warns about them.
            "dtype": lambda code, *flags: np.dtype(code, *map(bool, flags)),
            "encode": codecs.encode,
        }
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in allowed:
            raise pickle.UnpicklingError(f"a data file must not hold {module}.{name}")
        return allowed[name]


def _idx_files(folder: str, origin: str, classes: tuple[str, ...]) -> Files:
    return Files(
        torchvision_class=folder,
        origin=origin,
        folders=(f"{folder}/raw",),
        train=("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        test=("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        read=_read_idx_pair,
        classes=classes,
        # As published comes first: torchvision unpacks beside it, and that must not change the fingerprint.
        suffixes=(".gz", ""),
    )


SETS = {
    "mnist": _idx_files("MNIST", "https://ossci-datasets.s3.amazonaws.com/mnist/", DIGIT_NAMES),
    "fashion_mnist": _idx_files("FashionMNIST", "https://github.com/zalandoresearch/fashion-mnist", FASHION_NAMES),
    "kmnist": _idx_files("KMNIST", "http://codh.rois.ac.jp/kmnist/", KUZUSHIJI_NAMES),
    "usps": Files(
        torchvision_class="USPS",
        origin="https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass.html#usps",
        folders=("USPS", ""),  # torchvision itself puts them at its root
        train=("usps.bz2",),
        test=("usps.t.bz2",),
        read=_read_usps,
        classes=DIGIT_NAMES,
        download_to="USPS",
    ),
    "svhn": Files(
        torchvision_class="SVHN",
        origin="http://ufldl.stanford.edu/housenumbers/",
        folders=("SVHN", ""),
        train=("train_32x32.mat",),
        test=("test_32x32.mat",),
        read=_read_svhn,
        classes=DIGIT_NAMES,
        download_to="SVHN",
    ),
    "cifar10": Files(
        torchvision_class="CIFAR10",
        origin="https://www.cs.toronto.edu/~kriz/cifar.html",
        folders=("cifar-10-batches-py",),
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        read=_read_cifar,
        archive="cifar-10-python.tar.gz",
        meta=("batches.meta",),
    ),
    "cifar100": Files(
        torchvision_class="CIFAR100",
        origin="https://www.cs.toronto.edu/~kriz/cifar.html",
        folders=("cifar-100-python",),
        train=("train",),
        test=("test",),
        read=_read_cifar,
        archive="cifar-100-python.tar.gz",
        meta=("meta",),
    ),
    "stl10": Files(
        torchvision_class="STL10",
        origin="https://cs.stanford.edu/~acoates/stl10/",
        folders=("stl10_binary",),
        train=("train_X.bin", "train_y.bin"),
        test=("test_X.bin", "test_y.bin"),
        read=_read_stl10,
        classes=STL10_NAMES,
    ),
}
