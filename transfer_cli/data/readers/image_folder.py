"""Folders of images, one folder a class: any of one's own, and the published benchmarks laid out like that."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from transfer_cli.data.domain import Domain, Part, Place, as_labels, fingerprint_values
from transfer_cli.data.inputs import ImageFiles
from transfer_cli.data.readers.files import (
    below_root,
    domain_name,
    fill_domain,
    list_folder,
    list_images,
    reading,
    require,
    size_of,
)
from transfer_cli.errors import TransferError


class Listed(NamedTuple):
    """One image, found in a folder or named by a list; `id` is its path relative to the domain's folder."""

    path: str
    id: str
    label: str
    size: int


class Listing(NamedTuple):
    """What a domain holds, before any file is opened."""

    classes: tuple[str, ...]
    train: list[Listed]
    test: list[Listed] | None


class ImageFolder:
    """`<path>/<class>/<image>`, or `<path>/{<train>,<test>}/<class>/<image>`, or the files that published lists name.

    Args:
        path: the domain's folder, below the data root or absolute; `{domain}` in it stands for `domain`.
        train, test: subfolders that hold published splits.
        domain, domains: the chosen domain, and those there are: names, or names and how the folders spell them.
        class_names: the classes in the order of the labels; others in the folder, or missing ones, are an error.
        expected: number of images a domain, checked only with `strict_counts`: copies in circulation differ.
        train_list, test_list: files of lines `path label`, below the data root; the paths start at the folder of the
            list or at the domain's. A class is named by the folder of its images.
        skip_unreadable: leave out files that cannot be decoded as an image, instead of an error; how many, is said.
        check_headers: open every file on loading, 0.1 ms each; without, a bad one is found when a batch reads it.
    """

    outside_identity = ("expected", "strict_counts", "check_headers")  # they check, they change nothing

    def __init__(
        self,
        place: Place,
        *,
        path: str | None = None,
        train: str | None = None,
        test: str | None = None,
        domain: str | None = None,
        domains: list[str] | dict[str, str] | None = None,
        class_names: list[str] | None = None,
        expected: dict[str, int] | None = None,
        strict_counts: bool = False,
        train_list: str | None = None,
        test_list: str | None = None,
        skip_unreadable: bool = False,
        check_headers: bool = True,
    ) -> None:
        self.place = place
        self.class_names = class_names
        self.expected = (expected or {}).get(str(domain)) if strict_counts else None
        self.skip_unreadable = skip_unreadable
        self.check_headers = check_headers or skip_unreadable
        self.path = fill_domain(path, domain, domains) if path else None
        self.name = domain_name(path, domain) if path else "image_folder"
        self.folders = (train, test)
        self.lists = [
            fill_domain(file, domain, domains) if file and "{domain}" in file else file
            for file in (train_list, test_list)
        ]
        if (test and not train) or (test_list and not train_list):
            key = "test" if test else "test_list"
            raise TransferError(f"{self.name}: {key} needs {key.replace('test', 'train')} too.")

    def fingerprint(self) -> str:
        listing = self._listing
        parts = ([(f.id, f.label, f.size) for f in part] for part in (listing.train, listing.test or []))
        return fingerprint_values(listing.classes, *parts)

    def load(self) -> Domain:
        """Raises TransferError: a folder, class or listed file is missing, or a file does not open as an image."""
        listing = self._listing
        train, test = listing.train, listing.test
        sizes = self._open_headers([*train, *(test or [])] if self.check_headers else train[:16])
        notes: tuple[str, ...] = ()
        if self.skip_unreadable:
            bad = [f.id for f in (*train, *(test or [])) if f.path not in sizes]
            if bad:
                named = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
                notes = (f"{self.name}: {len(bad)} unreadable image{'s' * (len(bad) > 1)} skipped: {named}",)
            train = [f for f in train if f.path in sizes]
            test = [f for f in test if f.path in sizes] if test is not None else None
            lost = {f.label for f in listing.train} - {f.label for f in train}
            if lost:
                names = ", ".join(sorted(lost))
                raise TransferError(f"{self.name}: no readable image is left of {names} in {self.folder}")
        sides = {width if width == height else None for width, height in sizes.values()}
        native = sides.pop() if len(sides) == 1 else None
        return Domain(
            self.name,
            "classification",
            listing.classes,
            _part(train, listing.classes, native),
            _part(test, listing.classes, native) if test is not None else None,
            notes,
        )

    @property
    def folder(self) -> Path:
        if self.path is None:
            raise TransferError("image_folder needs source.path=DIR or target.path=DIR, below data_root or absolute.")
        return below_root(self.place, self.path, self.name)

    @cached_property
    def _listing(self) -> Listing:
        listing = self._from_lists() if self.lists[0] else self._from_folders()
        n = len(listing.train) + len(listing.test or [])
        if self.expected is not None and n != self.expected:
            raise TransferError(
                f"{self.name}: {n} images in {self.folder}, {self.expected} expected; strict_counts=false accepts them."
            )
        if self.class_names is None:
            return listing
        missing = ", ".join(name for name in self.class_names if name not in listing.classes) or "none"
        extra = ", ".join(name for name in listing.classes if name not in self.class_names) or "none"
        if (missing, extra) != ("none", "none"):
            raise TransferError(
                f"{self.name}: the classes in {self.folder} are not class_names: missing {missing}; unexpected {extra}."
            )
        return listing._replace(classes=tuple(self.class_names))

    def _from_folders(self) -> Listing:
        train = self._walk(self.folders[0] or "")
        test = self._walk(self.folders[1]) if self.folders[1] else None
        if test is not None and train.keys() != test.keys():
            alone = ", ".join(sorted(train.keys() ^ test.keys()))
            raise TransferError(
                f"{self.name}: only one of {self.folders[0]} and {self.folders[1]} in {self.folder} has {alone}."
            )
        return Listing(
            tuple(train),
            [f for files in train.values() for f in files],
            [f for files in test.values() for f in files] if test is not None else None,
        )

    def _walk(self, subfolder: str) -> dict[str, list[Listed]]:
        folder = require(self.folder / subfolder, self.name, "<class>/<image>")
        found = {}
        for entry in list_folder(folder):
            if not entry.is_dir():
                continue
            images = list_images(Path(entry.path))
            if not images:
                raise TransferError(f"{self.name}: no image in the class folder {entry.path}")
            prefix = f"{subfolder}/{entry.name}" if subfolder else entry.name
            found[entry.name] = [Listed(f"{entry.path}/{p}", f"{prefix}/{p}", entry.name, size) for p, size in images]
        if not found:
            raise TransferError(f"{self.name}: no class folder in {folder}: images must lie in <class>/<image>.")
        return found

    def _from_lists(self) -> Listing:
        names: dict[int, str] = {}
        train, test = (self._read_list(file, names) if file else None for file in self.lists)
        return Listing(tuple(names[index] for index in sorted(names)), train or [], test)

    def _read_list(self, file: str, names: dict[int, str]) -> list[Listed]:
        """Read lines `path label`, entering in `names` which folder each label stands for."""
        path = require(below_root(self.place, file, self.name), self.name)
        with reading(path):
            lines = [line for line in path.read_text().splitlines() if line.strip()]
            entries = [(text, int(index)) for text, index in (line.rsplit(maxsplit=1) for line in lines)]
            if not entries:
                raise ValueError("an empty list")
        bases = [base for base in (path.parent, self.folder) if (base / entries[0][0]).is_file()]
        base = bases[0] if bases else path.parent
        indices = {name: index for index, name in names.items()}
        listed = []
        for text, index in entries:
            label = Path(text).parent.name
            if names.setdefault(index, label) != label or indices.setdefault(label, index) != index:
                raise TransferError(
                    f"{path}: '{text} {index}' contradicts another line: a label stands for one folder."
                )
            image = str(base / text)
            listed.append(Listed(image, os.path.relpath(image, self.folder), label, size_of(image)))
        return listed

    def _open_headers(self, files: Sequence[Listed]) -> dict[str, tuple[int, int]]:
        """Width and height of every file that opens as an image.

        Raises:
            TransferError: some do not, and they are not to be skipped.
        """
        with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:  # threads wait for the disk side by side
            warnings.simplefilter("ignore")  # an odd tag in a file that opens is nobody's business here
            headers = list(pool.map(_decoded_size if self.skip_unreadable else _header, [f.path for f in files]))
        bad = [f.id for f, header in zip(files, headers, strict=True) if header is None]
        if bad and not self.skip_unreadable:
            named = ", ".join(bad[:3]) + (", ..." if len(bad) > 3 else "")
            raise TransferError(
                f"{self.name}: {len(bad)} of {len(files)} images in {self.folder} are missing or unreadable: {named}. "
                f"Replace or remove them, or set skip_unreadable=true."
            )
        return {f.path: header for f, header in zip(files, headers, strict=True) if header is not None}


def _header(path: str) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _decoded_size(path: str) -> tuple[int, int] | None:
    """As `_header`, of a file whose every pixel can be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _part(files: Sequence[Listed], classes: Sequence[str], native: int | None) -> Part:
    index = {name: i for i, name in enumerate(classes)}
    inputs = ImageFiles([f.path for f in files], channels=3, native=native)
    return Part(inputs, as_labels([index[f.label] for f in files]), tuple(f.id for f in files))
