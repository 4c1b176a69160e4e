"""The orders of the prefix cache that can be tried unasked."""

from __future__ import annotations

from kvplug.contract import Kind
from kvplug.registry import plugins


def ready_orders() -> list[str]:
    """Names of installed policies that order blocks themselves and need no options, sorted."""
    registry, found = plugins().registry, []
    for name in registry.ready(Kind.PREFIX_CACHE):
        policy = registry.get(Kind.PREFIX_CACHE, name)
        # What wraps another policy orders nothing itself.
        if policy is not None and "of" not in policy.Options.model_fields:
            found.append(name)
    return found
