"""The plugin: registers the adapter of presses."""

from __future__ import annotations

from kvplug import hookimpl
from kvplug.registry import PolicyRegistry
from kvplug_kvpress.policy import KvPress


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    """Register the adapter."""
    registry.add(KvPress)
