"""The plugin: registers the attention memory."""

from __future__ import annotations

from kvplug import hookimpl
from kvplug.registry import PolicyRegistry
from kvplug_attention_memo.policy import Memo


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    """Register the attention memory."""
    registry.add(Memo)
