"""Shell completion: the shell calls `transfer -sc query=bash` with the line so far in COMP_LINE; Hydra completes behind `run`."""

from __future__ import annotations

import os

from transfer_cli.cli import COMMANDS
from transfer_cli.config.hydra_glue import call_hydra


def main(argv: list[str]) -> int:
    line = os.environ.get("COMP_LINE", "")
    words = line.split(" ")
    if any("query" in a for a in argv) and len(words) <= 2:
        print(" ".join(name for name in COMMANDS if name.startswith(words[-1] if len(words) == 2 else "")))
        return 0
    if any("query" in a for a in argv) and words[1] != "run":
        return 0  # other commands take files, which the shell completes itself
    if len(words) > 1:
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    call_hydra(lambda composed: None, argv)
    return 0
