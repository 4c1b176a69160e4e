"""Entry point of ``vllm.general_plugins``: runs in every vLLM process, without a config.

It only registers names: attention backends that resolve to vLLM's own class unless kvplug's
connector is configured, and the KV-cache specs those backends use when it is. Without
``--kv-transfer-config`` nothing of it is used.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("kvplug")

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")


def register() -> None:
    """Register backends and KV-cache specs. Idempotent."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from kvplug.hosts.vllm import compat
    from kvplug.hosts.vllm.worker import backend

    installed = compat.version()
    if not compat.is_admitted(installed):
        logger.warning("kvplug stays off: %s Fix: %s", *compat.untested(installed))
        return
    for name in BACKENDS:
        member = AttentionBackendEnum[name]
        if member.get_path() != backend.path(name):
            backend.STOCK[name] = member.get_path()
            register_backend(member, backend.path(name))
    from kvplug.hosts.vllm import spec  # noqa: F401
