"""Finds what kvplug's objects still know of requests that have ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def leftovers(roots: Mapping[str, Any], request_ids: Iterable[str]) -> list[str]:
    """Containers that mention a request, by their path from a root.

    Followed are attributes of kvplug's own objects and what containers hold; a request's id
    counts where it is a key or an element, not where an object's attribute names it (a stored
    segment names the request that left it).

    Args:
        roots: Objects to begin at, by name.
        request_ids: Ids of requests that have ended.

    Returns:
        ``path (n)`` for every container with ``n`` of the ids.
    """
    ids = frozenset(request_ids)
    found: list[str] = []
    seen: set[int] = set()
    left = list(roots.items())
    while left:
        path, one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            inner = [(f"{path}[]", value) for value in one.values()]
            names = set(one)
        elif isinstance(one, (list, tuple, set, frozenset)):
            inner = [(f"{path}[]", value) for value in one]
            names = {value for value in one if isinstance(value, str)}
        elif type(one).__module__.split(".")[0].startswith("kvplug"):
            inner = [(f"{path}.{name}", value) for name, value in _attributes(one)]
            names = set()
        else:
            continue
        if count := len(ids & names):
            found.append(f"{path} ({count})")
        left += inner
    return sorted(found)


def _attributes(one: object) -> list[tuple[str, Any]]:
    slots = [name for of in type(one).__mro__ for name in getattr(of, "__slots__", ())]
    named = getattr(one, "__dict__", {}) | {n: getattr(one, n) for n in slots if hasattr(one, n)}
    return list(named.items())
