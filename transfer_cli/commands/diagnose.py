"""`transfer diagnose [OVERRIDES]`: before training, how far apart two domains are, and what may help.

    transfer diagnose source=mnist target=usps backbone=lenet target_labels=5

The overrides are those of `transfer run`; the method plays no part. Several backbones are compared by backbones=resnet18,resnet50.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from transfer_cli.errors import TransferError, check_choice

FORMATS = ("text", "json")
SAMPLES = 1000
METHOD = ("method=no_adaptation", "then=none")  # of any method the domains and the features are the same


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="transfer diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as transfer run takes them")
    parser.add_argument("--format", default="text", metavar="FORMAT", help="text or json (default: text)")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"of each domain, at most (default: {SAMPLES:,})"
    )
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="a configuration folder of your own besides ./conf")
    arguments = parser.parse_intermixed_args(argv)
    form = check_choice(arguments.format, FORMATS, "--format")
    if arguments.samples < 20:
        raise TransferError(f"--samples must be at least 20, not {arguments.samples}.")
    backbones, overrides = split_backbones(arguments.overrides)

    from transfer_cli.config.compose import typed
    from transfer_cli.config.hydra_glue import composed

    flags = [] if arguments.config_dir is None else ["--config-dir", arguments.config_dir]
    configs = {}
    for name in backbones or [""]:
        chosen = [*overrides, *METHOD, *([f"backbone={name}"] if name else [])]
        config = typed(composed(chosen, flags))
        config.method = {
            key: config.method[key] for key in ("name", "implementation")
        }  # an experiment may set others' keys
        configs[name or str(config.backbone.get("name"))] = config

    from transfer_cli.diagnose import diagnose
    from transfer_cli.diagnosis.text import lines

    with redirect_stdout(sys.stderr):  # progress; what is found goes alone to standard output
        found = diagnose(configs, arguments.samples)
    print(json.dumps(found, indent=2) if form == "json" else "\n".join(lines(found)))
    return 0


def split_backbones(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names that `backbones=a,b` or `backbone=a,b` gives, each once, and the other overrides without those of the method.

    Raises:
        TransferError: an argument that is no override, or no name.
    """
    names: list[str] = []
    others = []
    for argument in overrides:
        key, equals, value = argument.partition("=")
        if not equals and not argument.startswith("~"):
            raise TransferError(
                f"'{argument}' is not KEY=VALUE: transfer diagnose takes the overrides of transfer run."
            )
        if key in ("backbone", "backbones"):
            found = [name.strip() for name in value.strip("[]").split(",")]
            if not all(found):
                raise TransferError(f"{argument}: name one backbone, or several between commas.")
            names += found
        elif key not in ("method", "then") and not key.startswith(("method.", "then.")):
            others.append(argument)
    return list(dict.fromkeys(names)), others
