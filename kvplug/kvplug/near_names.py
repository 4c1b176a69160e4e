"""What a mistyped name may have meant, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "near", "nearest", "suggestion"]

MOST = 64
"""Characters of a name that are compared."""


def near(name: str, known: Iterable[str], most: int, cutoff: float = 0.6) -> list[str]:
    """List similar names, most similar first.

    Args:
        name: The unknown name.
        known: The names that there are.
        most: How many are listed at most.
        cutoff: Least similarity, from 0 to 1.
    """
    return difflib.get_close_matches(name[:MOST], list(known), n=most, cutoff=cutoff)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar name, or None where none is similar; see `near`."""
    return next(iter(near(name, known, 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the `suggestion` of the `nearest` name."""
    return suggestion(*near(name, known, 1, cutoff))


def suggestion(*names: str) -> str:
    """Return ``did you mean X? Otherwise ``, which begins a fix; of no names the empty string."""
    return f"did you mean {' or '.join(names)}? Otherwise " if names else ""
