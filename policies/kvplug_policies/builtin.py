"""The built-in plugin: registers every policy of this package."""

from __future__ import annotations

from kvplug import hookimpl
from kvplug.registry import PolicyRegistry
from kvplug_policies.prefix_cache.fifo import Fifo
from kvplug_policies.prefix_cache.lru import Lru
from kvplug_policies.sequence.sink_window import SinkWindow

BUILTIN = (Fifo, Lru, SinkWindow)


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    for policy in BUILTIN:
        registry.add(policy)
