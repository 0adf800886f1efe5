"""What readers of files share: finding them below the data root, naming them in errors, listing images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from transfer_cli.data.domain import Place
from transfer_cli.errors import TransferError, check_choice

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"}


def below_root(place: Place, path: str, name: str) -> Path:
    """`path` as it is where absolute, else below the data root; what is not there may lie where the command was typed."""
    expanded = Path(path).expanduser()
    if expanded.is_absolute():
        return expanded
    if expanded.exists() and (place.root is None or not (place.root / expanded).exists()):
        return expanded.resolve()
    return place.require_root(name) / expanded


Domains = list[str] | dict[str, str] | None
"""The domains that a data set has, where that is known: their names, or names and how their files spell them."""


def fill_domain(text: str, domain: str | None, domains: Domains) -> str:
    """`text` with its placeholder `{domain}` filled in, as the files spell it.

    Raises:
        TransferError: the domain is missing, not one of `domains`, or `text` has no place for it.
    """
    if "{domain}" not in text:
        if domain is not None:
            raise TransferError(f"domain={domain} has no effect: the path '{text}' has no place '{{domain}}' for it.")
        return text
    if domain is None:
        known = f": one of {', '.join(domains)}" if domains else ""
        raise TransferError(f"the path '{text}' needs domain=NAME{known}.")
    if domains is not None:
        check_choice(domain, domains, "domain")
    return text.replace("{domain}", domains[domain] if isinstance(domains, dict) else domain)


def domain_name(path: str, domain: str | None) -> str:
    """A name for people, e.g. `pacs/{domain}` -> `pacs_photo`, `features/mine.npz` -> `mine`."""
    parts = PurePath(path).parts
    if domain is None:
        return PurePath(path).stem
    position = next(i for i, part in enumerate(parts) if "{domain}" in part)
    return f"{parts[position - 1]}_{domain}" if position > 0 and parts[position - 1] != os.sep else domain


def require(path: Path, name: str, layout: str = "") -> Path:
    """`path`, if something is there; otherwise an error for data that is not downloaded."""
    if not path.exists():
        how = f" as {path}/{layout}" if layout else ""
        raise TransferError(
            f"{name}: missing {path}. It is not downloaded: place it there yourself{how}; "
            f"the comments in the dataset's YAML say where to get it."
        )
    return path


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a parser throws at a broken file into one line that names the file.

    Raises:
        TransferError: the block raised.
    """
    try:
        yield
    except TransferError:
        raise
    except FileNotFoundError as error:
        raise TransferError(f"missing file: {path}") from error
    except PermissionError as error:
        raise TransferError(f"no permission to read {path}.") from error
    except Exception as error:  # zlib, zipfile, pickle and scipy.io agree on no type for bytes that make no sense
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TransferError(f"truncated or corrupt file: {path} ({reason[:160]}). Replace it.") from error


def size_of(path: str | os.PathLike[str]) -> int:
    """Size in bytes, -1 where there is nothing: a listing holds missing files too, and reading counts them."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def list_images(folder: Path) -> list[tuple[str, int]]:
    """Relative path and size of every image below `folder`, sorted; hidden files and folders are left out.

    Raises:
        TransferError: there is no such folder, or it cannot be listed.
    """
    found: list[tuple[str, int]] = []
    waiting = [""]
    while waiting:
        relative = waiting.pop()
        for entry in list_folder(folder / relative):
            inner = relative + entry.name
            if entry.is_dir():
                waiting.append(inner + "/")
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                found.append((inner, size_of(entry)))
    return sorted(found)


def list_folder(folder: Path) -> list[os.DirEntry[str]]:
    """Entries by name, without hidden ones, e.g. the `._x.jpg` that macOS leaves in archives.

    Raises:
        TransferError: there is no such folder, or it cannot be listed.
    """
    if not folder.is_dir():
        raise TransferError(f"missing folder: {folder}")
    with reading(folder), os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
