"""Where configuration files lie: the user's own folders first, then the packaged one. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transfer_cli.errors import TransferError


def packaged_folder() -> Path:
    """`conf/` inside an installed package, or one level up in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise TransferError(f"the configuration folder is missing from this installation ({package / 'conf'}).")


def config_folders(arguments: Sequence[str] = ()) -> list[Path]:
    """The folder named by `--config-dir` (or `-cd`) in `arguments`, `./conf`, then the packaged one; earlier ones win.

    Raises:
        TransferError: `--config-dir` names no folder.
    """
    folders = []
    named = _option(arguments, "--config-dir", "-cd")
    if named is not None:
        folder = Path(named).resolve()
        if not folder.is_dir():
            raise TransferError(f"--config-dir: there is no folder {named}.")
        folders.append(folder)
    own = Path("conf").resolve()
    if own.is_dir():
        folders.append(own)
    packaged = packaged_folder().resolve()
    return [f for i, f in enumerate(folders) if f != packaged and f not in folders[:i]] + [packaged]


def names_in(group: str, folders: Sequence[Path]) -> list[str]:
    """The names that a group's YAML files offer."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def _option(arguments: Sequence[str], *names: str) -> str | None:
    for i, argument in enumerate(arguments):
        for name in names:
            if argument == name and i + 1 < len(arguments):
                return arguments[i + 1]
            if argument.startswith(name + "="):
                return argument[len(name) + 1 :]
    return None
