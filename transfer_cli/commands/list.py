"""`transfer list [GROUP]`: what there is to choose from, the user's own included. Imports no implementation.

A description is the first comment of a component's YAML; what a method needs is read off its class by `ast`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.machinery
import importlib.util
import re
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from transfer_cli.config.folders import config_folders, names_in
from transfer_cli.errors import TransferError, suggest
from transfer_cli.registry import add_working_directory

ALIASES = {"source": "dataset", "target": "dataset", "ood": "dataset", "then": "method", "strong": "augment"}
LONGEST_CHAIN = 20  # of base classes


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="transfer list",
        description="The names that each configuration group offers, or what one group's names stand for.",
    )
    parser.add_argument("group", nargs="?", metavar="GROUP", help="method, dataset, backbone, ...")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a configuration folder of your own besides ./conf")
    arguments = parser.parse_args(argv)
    folders = config_folders([] if arguments.config_dir is None else ["--config-dir", arguments.config_dir])
    groups = sorted({path.parent.name for folder in folders for path in folder.glob("*/*.yaml")})
    lines = (
        _overview(groups, folders) if arguments.group is None else _members(_group(arguments.group, groups), folders)
    )
    print("\n".join(lines))
    return 0


def _group(word: str, groups: Sequence[str]) -> str:
    """The group that `word` means: its name, its plural, or `source` and `target`."""
    for name in (word, word.removesuffix("s")):
        if (group := ALIASES.get(name, name)) in groups:
            return group
    hint = suggest(word, [*groups, *ALIASES])
    raise TransferError(f"there is no group '{word}'.{hint} The groups are {', '.join(groups)}.")


def _overview(groups: Sequence[str], folders: Sequence[Path]) -> list[str]:
    width = max(map(len, groups)) + 2
    lines = []
    for group in groups:
        lines += _paragraph(f"{group:{width}}", ", ".join(names_in(group, folders)))
    return [*lines, "", "transfer list GROUP describes them."]


def _members(group: str, folders: Sequence[Path]) -> list[str]:
    names = names_in(group, folders)
    width = max(map(len, names)) + 2
    lines = []
    for name in names:
        path = next(
            folder / group / f"{name}.yaml" for folder in folders if (folder / group / f"{name}.yaml").is_file()
        )
        text = path.read_text()
        lines.append(f"{name:{width}}{_description(text)}".rstrip())
        if group == "method" and (needs := _needs(text)) is not None:
            lines.append(f"{'':{width}}needs: {', '.join(needs) or 'nothing'}")
    if group == "backbone":
        from transfer_cli.config.torchvision_names import TORCHVISION_NAMES

        lines += ["", *_paragraph("torchvision's, by name: ", ", ".join(TORCHVISION_NAMES), indent="  ")]
    return lines


def _paragraph(head: str, text: str, indent: str | None = None) -> list[str]:
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    following = " " * len(head) if indent is None else indent
    return textwrap.wrap(head + text, width, subsequent_indent=following, break_on_hyphens=False)


def _description(yaml: str) -> str:
    """The first comment line that is none of Hydra's (`# @package`)."""
    found = re.search(r"^#[ \t]*(?!@)(\S.*)$", yaml, re.MULTILINE)
    return found[1].strip() if found else ""


def _needs(yaml: str) -> list[str] | None:
    """What the implementation's `needs` asks for, in words; None where it cannot be read without running code."""
    found = re.search(r"^implementation:\s*[\"']?([\w.]+):(\w+)", yaml, re.MULTILINE)
    if found is None:
        return None
    add_working_directory()
    module, name = found[1], found[2]
    for _ in range(LONGEST_CHAIN):
        tree = _source(module)
        if tree is None:
            return None
        found_class = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
        if found_class is not None:
            value = _attribute(found_class, "needs")
            if value is not None:
                return _true_keywords(value)
            base = found_class.bases[0] if found_class.bases else None
            if not isinstance(base, ast.Name):
                return None
            name = base.id
        else:
            origin = _imported_from(tree, name, module)
            if origin is None:
                return None
            module, name = origin
    return None


def _attribute(node: ast.ClassDef, name: str) -> ast.expr | None:
    """The value that the class's body gives to `name`."""
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            targets: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            continue
        if any(isinstance(t, ast.Name) and t.id == name for t in targets):
            return statement.value
    return None


def _true_keywords(value: ast.expr) -> list[str] | None:
    """Of `Needs(source_labels=True, ...)`: `["source labels", ...]`."""
    if not isinstance(value, ast.Call) or value.args:
        return None
    words = []
    for keyword in value.keywords:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            return None
        if keyword.value.value:
            words.append(keyword.arg.replace("_", " "))
    return words


def _imported_from(tree: ast.Module, name: str, module: str) -> tuple[str, str] | None:
    """Module and name that `from module import name` stands for."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    relative = "." * statement.level + (statement.module or "")
                    return importlib.util.resolve_name(relative, module.rpartition(".")[0]), alias.name
    return None


def _source(module: str) -> ast.Module | None:
    """The module's syntax tree; neither it nor its packages are imported, as `importlib.util.find_spec` would."""
    top, *below = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        name = top
        for part in below:
            name = f"{name}.{part}"
            places = None if spec is None else spec.submodule_search_locations
            spec = None if places is None else importlib.machinery.PathFinder.find_spec(name, list(places))
        return None if spec is None or spec.origin is None else ast.parse(Path(spec.origin).read_text())
    except (OSError, ValueError, ImportError, SyntaxError):
        return None
