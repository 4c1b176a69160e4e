"""What a mistyped name may have meant, for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest"]

MOST = 64
"""Characters of a name that are compared."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the most similar name, or None where none is similar.

    Args:
        name: The unknown name.
        known: The names that there are.
        cutoff: Least similarity, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name[:MOST], list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``did you mean X? Otherwise `` with the `nearest` name, or the empty string."""
    near = nearest(name, known, cutoff)
    return f"did you mean {near}? Otherwise " if near else ""
