"""Names and numbers that plugins count by, made fit for labels and bounded in number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

from kvplug.plain_text import label

__all__ = ["MAX_CAUSES", "MAX_NAMES", "OTHER", "Causes", "plain_counters"]

MAX_NAMES = 64
"""Counters of one policy."""

MAX_CAUSES = 64
"""Causes that are counted apart; a metric keeps a time series of each for good."""

OTHER = "other"
"""Cause under which all further ones are counted."""


def plain_counters(given: Any, names: set[str]) -> tuple[dict[str, float], str]:
    """Take a policy's counters that can be exported.

    Args:
        given: What the policy returned, a mapping of names to numbers; may raise anything.
        names: Names taken so far, at most `MAX_NAMES`; new ones are added.

    Returns:
        Finite numbers of at least 0 by name, and the names of a few that were left out: because
        of their number, because two names are one after they were made plain, or because there
        are too many.
    """
    found: dict[str, float] = {}
    left_out: list[str] = []
    for key, value in islice(given.items(), 4 * MAX_NAMES):
        name = _name(key)
        number = _number(value)
        known = name in names or len(names) < MAX_NAMES
        if not name or number is None or not known or name in found:
            left_out.append(repr(name))
            continue
        names.add(name)
        found[name] = number
    return found, ", ".join(left_out[:8])


def _name(key: Any) -> str:
    if isinstance(key, str):
        return label(key)
    return str(int(key)) if type(key) is int and abs(key) < 10**9 else ""


def _number(value: Any) -> float | None:
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) and number >= 0 else None


class Causes(Counter[str]):
    """Counts by cause: at most `MAX_CAUSES` of them, and `OTHER`."""

    def fold(self, cause: str) -> str:
        """Return the name that a cause is counted by."""
        cause = label(cause) or OTHER
        return cause if cause in self or len(self) < MAX_CAUSES else OTHER

    def add(self, cause: str, count: int = 1) -> str:
        """Count a cause; returns its name."""
        name = self.fold(cause)
        self[name] += count
        return name

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Count several causes."""
        for cause, count in counts.items():
            self.add(cause, count)
