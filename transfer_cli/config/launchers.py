"""How launchers are called on the command line, and what to install for those that are packages of their own.

`launcher=local` and `launcher.jobs=2` are short for Hydra's `hydra/launcher=local` and `hydra.launcher.jobs=2`; `jobs=2` is short
for both.
"""

from __future__ import annotations

from collections.abc import Sequence

EXTRAS = {
    "joblib": "joblib",
    "submitit_local": "submitit",
    "submitit_slurm": "submitit",
    "ray": "ray",
    "ray_aws": "ray",
}
LAUNCHER = "hydra/launcher="


def written_out(arguments: Sequence[str]) -> list[str]:
    """The arguments with the short words in Hydra's own."""
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key == "launcher":
            argument = LAUNCHER + value
        elif equals and key.startswith("launcher."):
            argument = f"hydra.{argument}"
        elif equals and key == "jobs":
            argument = f"hydra.launcher.jobs={value}"
        found.append(argument)
    short = any(argument.startswith("jobs=") for argument in arguments)
    if short and not any(argument.startswith(LAUNCHER) for argument in found):
        found.append(LAUNCHER + "local")
    return found


def what_to_install(launcher: str) -> str | None:
    """The line for a launcher whose package is not there; None for a name that no package here has."""
    extra = EXTRAS.get(launcher)
    return extra and f"launcher {launcher} needs a package that is not installed: pip install 'transfer-cli[{extra}]'"
