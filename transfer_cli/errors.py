"""Errors that a user can cause and mend: shown as one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class TransferError(Exception):
    """Says what is wrong, where, and what to write instead; the process exits with code 2."""


def suggest(word: str, options: Iterable[str]) -> str:
    """` Did you mean 'x'?`, or the empty string where nothing comes close."""
    names, typed = {str(option).lower(): str(option) for option in options}, str(word).lower()
    swapped = [name for name in names if sorted(name) == sorted(typed)]  # the commonest slip
    close = swapped or get_close_matches(typed, names, n=1, cutoff=0.5)
    return f" Did you mean '{names[close[0]]}'?" if close else ""


def check_choice(value: Any, options: Iterable[str], key: str) -> str:
    """`value`, if it is one of `options`; otherwise an error that names the key."""
    options = list(options)
    if value not in options:
        raise TransferError(f"{key} must be one of {', '.join(options)}; not '{value}'.{suggest(value, options)}")
    return value
