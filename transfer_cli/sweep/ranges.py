"""The ranges under `search:` of a component's YAML, and points drawn from them.

    search:
      weight: {low: 0.1, high: 10.0, log: true}     a number, uniform on the scale named
      layers: {low: 1, high: 4, integer: true}      a whole number, both ends included
      layer: [features, logits]                     one of these
      ramp: null                                    not searched

Each key of a point is a function of (sweep seed, method, number of the point, key) alone: u = SHA-256(...) in [0, 1), placed in the
range. So a sweep typed again finds its runs, a larger n adds points and moves none, seeds share points, and a key that is
fixed, added or narrowed moves no other.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transfer_cli.errors import TransferError, suggest

DIGITS = 4  # significant ones of a number that is drawn: short to read and type, and the same on every machine


@dataclass(frozen=True)
class Range:
    low: float
    high: float
    log: bool = False
    integer: bool = False

    def at(self, u: float) -> float | int:
        """The value at `u` in [0, 1)."""
        low, high = (self.low - 0.5, self.high + 0.5) if self.integer else (self.low, self.high)
        value = low * (high / low) ** u if self.log else low + (high - low) * u
        if self.integer:
            return int(min(max(math.floor(value + 0.5), self.low), self.high))
        return min(max(float(f"{value:.{DIGITS}g}"), float(self.low)), float(self.high))

    def holds(self, value: Any) -> bool:
        whole = not self.integer or (isinstance(value, int | float) and float(value).is_integer())
        return _is_number(value) and whole and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    values: tuple[Any, ...]

    def at(self, u: float) -> Any:
        """The value at `u` in [0, 1)."""
        return self.values[int(u * len(self.values))]

    def holds(self, value: Any) -> bool:
        return value in self.values


def read_ranges(where: str, search: Any) -> dict[str, Range | Choice]:
    """A YAML's `search:`, by key. `where`: what the error calls it, as in `method.search`.

    Raises:
        TransferError: something that is no range.
    """
    if search is None:
        return {}
    if not isinstance(search, Mapping):
        raise TransferError(f"{where} must hold ranges by key, not {search!r}.")
    return {str(key): _range(f"{where}.{key}", node) for key, node in search.items() if node is not None}


def _range(where: str, node: Any) -> Range | Choice:
    if isinstance(node, list | tuple):
        if not node:
            raise TransferError(f"{where} is an empty list; null leaves the key out of the search.")
        return Choice(tuple(node))
    if not isinstance(node, Mapping):
        raise TransferError(f"{where} must be a list of choices or {{low: .., high: ..}}, not {node!r}.")
    known = ("low", "high", "log", "integer")
    for key in node:
        if key not in known:
            raise TransferError(
                f"{where} has no key '{key}'.{suggest(str(key), known)} Known keys: {', '.join(known)}."
            )
    low: Any = node.get("low")
    high: Any = node.get("high")
    log, integer = bool(node.get("log", False)), bool(node.get("integer", False))
    if not _is_number(low) or not _is_number(high) or low > high:
        raise TransferError(f"{where} needs numbers low <= high, not low={low}, high={high}.")
    if integer and not (float(low).is_integer() and float(high).is_integer()):
        raise TransferError(f"{where} is of whole numbers, and low={low}, high={high} are not.")
    if log and low <= 0:
        raise TransferError(f"{where} has a log scale, which needs low above 0, not {low}.")
    return Range(low, high, log, integer)


def uniform(seed: int, method: str, point: int, key: str) -> float:
    """In [0, 1), a function of its arguments."""
    digest = hashlib.sha256(f"{seed}/{method}/{point}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def draw(ranges: Mapping[str, Range | Choice], seed: int, method: str, point: int) -> dict[str, Any]:
    """The point's values, by key."""
    return {key: range_.at(uniform(seed, method, point, key)) for key, range_ in ranges.items()}


def word(key: str, value: Any) -> str:
    """The override `key=value`, as it would be typed."""
    return f"{key}={_written(value)}"


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(_written(v) for v in value)}]"
    if isinstance(value, str) and (not value.replace("_", "a").isalnum() or _reads_otherwise(value)):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    return str(value)


def _reads_otherwise(text: str) -> bool:
    """Whether the bare text would be read as a number, a truth value or null."""
    if text.lower() in ("null", "true", "false", "nan", "inf"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
