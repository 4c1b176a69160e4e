"""The plugin: registers the learned checks."""

from __future__ import annotations

from kvplug import hookimpl
from kvplug.registry import PolicyRegistry
from kvplug_reuse_learned.compensate import Compensate
from kvplug_reuse_learned.credibility import Credibility


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    """Register the learned checks."""
    for policy in (Credibility, Compensate):
        registry.add(policy)
