"""What Optuna is asked to search: the ranges under `search:` of the method and of its optimizer (hook of hydra-optuna-sweeper)."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from transfer_cli.config.compose import resolve_components, typed
from transfer_cli.errors import TransferError
from transfer_cli.sweep.jobs import ranges_of, trains_nothing
from transfer_cli.sweep.ranges import Range, word


def search_space(composed: DictConfig, trial: Any) -> None:
    """Draw the trial's point; `trial` is an `optuna.trial.Trial`, whose user attributes are the fixed keys.

    Raises:
        TransferError: a selection that would search by target labels, or by nothing.
    """
    config = typed(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    if config.selection in ("oracle", "last"):
        why = "it looks at target labels" if config.selection == "oracle" else "it has no score"
        raise TransferError(f"sweep=optuna cannot search by selection={config.selection}: {why}.")
    for key in trial.params:
        if "." not in key:
            raise TransferError(
                f"sweep=optuna searches one combination: {key} takes one value. sweep=random takes several."
            )
    components = resolve_components(config)
    frozen = trains_nothing(components)
    taken = {key.lstrip("+") for key in (*trial.user_attrs, *trial.params)}
    for key, range_ in ranges_of(config, "optimizer" if frozen else None, taken)[0].items():
        if not isinstance(range_, Range):
            trial.suggest_categorical(key, [word(key, value).partition("=")[2] for value in range_.values])
        elif range_.integer:
            trial.suggest_int(key, int(range_.low), int(range_.high), log=range_.log)
        else:
            trial.suggest_float(key, range_.low, range_.high, log=range_.log)
