"""From a component's YAML to the object it names: `implementation: module:attribute`, imported on use.

A configuration chooses, it never executes: only modules of this package and of the listed plugins resolve.
The keyword-only parameters of an implementation are the schema of its YAML; their defaults are the values
that leave a run's identity unchanged.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

from transfer_cli.errors import TransferError, suggest

PACKAGE = "transfer_cli"
PLUGIN_GROUP = "transfer_cli.plugins"
DESCRIPTIVE_KEYS = {"name", "implementation", "search"}  # of a component's YAML, not handed to its constructor

FilePath = Annotated[str, "file"]
"""A parameter that may name a file: the file's content, not its path, enters a run's identity."""


@dataclass(frozen=True)
class Component:
    """One resolved choice of a config group, e.g. `method=dann`, checked against its implementation's signature."""

    group: str
    name: str
    reference: str
    implementation: Callable[..., Any]
    parameters: dict[str, Any]

    @property
    def version(self) -> int:
        """Raised by the implementation's author when its numbers change."""
        return int(getattr(self.implementation, "version", 1))

    def build(self, *arguments: Any) -> Any:
        """Raises:
        TransferError: a value that the implementation refuses."""
        try:
            return self.implementation(*arguments, **self.parameters)
        except ValueError as error:
            raise TransferError(f"{self.group} '{self.name}': {error}") from error


def installed_plugins() -> list[str]:
    """Modules that installed packages announce in the entry-point group `transfer_cli.plugins`."""
    return sorted(point.value.split(":")[0] for point in entry_points(group=PLUGIN_GROUP))


def resolve(reference: str, plugins: Sequence[str] = (), where: str = "config") -> Any:
    """Import `module:attribute`.

    Raises:
        TransferError: the reference is malformed, names a module outside this package and the plugins, or does not exist.
    """
    module_name, _, attribute = str(reference).partition(":")
    if not module_name or not attribute:
        raise TransferError(f"{where}: implementation must read 'module:attribute', not '{reference}'.")
    listed = (PACKAGE, *plugins)
    if not _within(module_name, listed) and not _within(module_name, installed_plugins()):  # which takes milliseconds
        raise TransferError(
            f"{where}: module '{module_name}' is not part of {PACKAGE} or of a plugin; "
            f"list it to allow it: plugins=[{module_name}]"
        )
    add_working_directory()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise TransferError(
                f"{where}: there is no module '{module_name}' (looked in the working directory too)."
            ) from error
        raise TransferError(f"{where}: module '{module_name}' needs '{error.name}', which is not installed.") from error
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise TransferError(f"{where}: module '{module_name}' has no '{attribute}'.{suggest(attribute, names)}")
    return getattr(module, attribute)


def _within(module: str, allowed: Sequence[str]) -> bool:
    return any(module == a or module.startswith(a + ".") for a in allowed)


def component(group: str, node: Mapping[str, Any], plugins: Sequence[str] = ()) -> Component:
    """Resolve a group's node and check its keys and types.

    Raises:
        TransferError: an unknown or missing key (with a suggestion), or a value of the wrong type.
    """
    if "implementation" not in node:
        raise TransferError(f"{group}: the YAML needs a key 'implementation' (module:attribute).")
    name = str(node.get("name") or group)
    implementation = resolve(node["implementation"], plugins, where=f"{group} '{name}'")
    schema = keyword_schema(implementation)
    parameters = {key: value for key, value in node.items() if key not in DESCRIPTIVE_KEYS}
    for key, value in parameters.items():
        if key not in schema:
            known = ", ".join(schema) or "none"
            raise TransferError(f"{group} '{name}' has no key '{key}'.{suggest(key, schema)} Known keys: {known}.")
        annotation = schema[key][0]
        if not _fits(value, annotation):
            raise TransferError(f"{group}.{key} must be {_describe(annotation)}, not {value!r}.")
        if float in _alternatives(annotation) and isinstance(value, int) and not isinstance(value, bool):
            parameters[key] = float(value)
    for key, (_, default) in schema.items():
        if default is inspect.Parameter.empty and key not in parameters:
            raise TransferError(f"{group} '{name}' needs a value: {group}.{key}=...")
    return Component(group, name, str(node["implementation"]), implementation, parameters)


def find_plugin(name: str) -> None:
    """Raises:
    TransferError: no such module, in the working directory or among what is installed."""
    add_working_directory()
    try:
        found = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        found = None
    if found is None:
        raise TransferError(f"plugins: there is no module '{name}' (looked in the working directory too).")


def add_working_directory() -> None:
    """Console scripts leave the working directory out of the module path; a user's own plugin lies there."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


@cache
def keyword_schema(implementation: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """`{key: (annotation, default)}` of the keyword-only parameters of a constructor or function."""
    target = implementation.__init__ if inspect.isclass(implementation) else implementation
    hints = typing.get_type_hints(target, include_extras=True)
    return {
        key: (hints.get(key, Any), parameter.default)
        for key, parameter in inspect.signature(target).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def names_a_file(annotation: Any) -> bool:
    """Whether a parameter was declared as `FilePath` (or an alternative of it)."""
    if typing.get_origin(annotation) is Annotated:
        return "file" in annotation.__metadata__
    return any(names_a_file(a) for a in typing.get_args(annotation))


def _alternatives(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is Annotated:
        return _alternatives(annotation.__origin__)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [b for a in typing.get_args(annotation) for b in _alternatives(a)]
    return [annotation]


def _fits(value: Any, annotation: Any) -> bool:
    return any(_fits_one(value, a) for a in _alternatives(annotation))


def _fits_one(value: Any, annotation: Any) -> bool:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if annotation is None or annotation is type(None):
        return value is None
    if origin is typing.Literal:
        return value in arguments and type(value) in {type(a) for a in arguments}
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if origin is tuple and Ellipsis not in arguments:  # a pair and its like
        same = isinstance(value, list | tuple) and len(value) == len(arguments)
        return same and all(_fits(v, a) for v, a in zip(value, arguments, strict=True))
    if origin in (list, Sequence, tuple) or annotation in (list, tuple):
        items = [a for a in arguments if a is not Ellipsis]
        return isinstance(value, list | tuple) and all(not items or any(_fits(v, a) for a in items) for v in value)
    return isinstance(value, annotation) if isinstance(annotation, type) else True


def _describe(annotation: Any) -> str:
    words = {
        float: "a number",
        int: "a whole number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        None: "null",
    }
    parts: list[str] = []
    for alternative in _alternatives(annotation):
        if typing.get_origin(alternative) is typing.Literal:
            parts.extend(str(a) for a in typing.get_args(alternative))
        else:
            parts.append(words.get(alternative, str(alternative).replace("typing.", "")))
    return " or ".join(parts)
