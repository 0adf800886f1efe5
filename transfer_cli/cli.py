"""The front door: picks the subcommand. Standard library only, so that help is instant."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from transfer_cli import __version__
from transfer_cli.errors import TransferError, suggest

COMMANDS = {
    "run": "run one experiment, or a sweep with -m: transfer run method=dann",
    "plan": "what a sweep would run, and how long it takes: transfer plan method=dann,coral seed=0,1",
    "diagnose": "before training: how far apart two domains are, and what may help: transfer diagnose source=mnist target=usps",
    "list": "what there is to choose from: transfer list methods",
    "report": "finished runs as a table: transfer report --format md",
    "show": "one run: state, figures, choices, how to repeat it: transfer show RUN_DIR",
    "compare": "two runs beside each other, with a paired test: transfer compare RUN_A RUN_B",
    "reproduce": "a published table, run and compared: transfer reproduce office_caltech_surf",
    "predict": "classes and probabilities for new samples: transfer predict RUN_DIR FILES...",
    "evaluate": "recompute a run's figures from its checkpoint: transfer evaluate RUN_DIR",
    "validate": "scores of finished runs that cost more: transfer validate --validators agreement,reverse",
    "cache": "features that runs share: transfer cache --clear",
}

USAGE = f"""transfer {__version__}: transfer learning and domain adaptation under one honest protocol

usage: transfer COMMAND [ARGUMENTS]

{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

transfer COMMAND --help tells more of each. Completion for bash: eval "$(transfer -sc install=bash)"
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `transfer`; ends the process with 0, 1 (a check failed), 2 (bad input), 130 or 143 (interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.exit(_main(arguments))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name.startswith(("-sc", "--shell-completion", "--shell_completion")):
        name, rest = "completion", arguments
    elif name not in COMMANDS:
        return _complain(f"there is no command '{name}'.{suggest(name, COMMANDS)} transfer --help shows all.")
    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"  # read before Hydra's own handling is switched off
    try:
        status: int = importlib.import_module(f"transfer_cli.commands.{name}").main(rest)
        return status
    except TransferError as error:
        if full_error:
            traceback.print_exc()
        return _complain(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _complain(message: str) -> int:
    print(f"transfer: {' '.join(message.split())}", file=sys.stderr)
    return 2
