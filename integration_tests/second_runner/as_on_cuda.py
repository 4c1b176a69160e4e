"""Makes vLLM's CPU platform do what the CUDA platform does: how a backend is chosen and its class
resolved, and scheduling a step ahead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


def schedule_ahead() -> None:
    """Let vLLM's CPU platform schedule a step while the one before it runs, as others do."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    stock = platform.check_and_update_config.__func__

    def check_and_update_config(cls: type[Any], vllm_config: Any) -> None:
        stock(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = classmethod(check_and_update_config)


def choose(name: str) -> None:
    """Have every attention layer of this process take a backend by name.

    The class is resolved again from its module and qualified name, and asked about the device.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def path(*_: Any, **__: Any) -> str:
        return ".".join(AttentionBackendEnum[name].get_class().full_cls_name())

    type(current_platform).get_attn_backend_cls = classmethod(path)
    device = SimpleNamespace(
        multi_processor_count=132, major=9, minor=0, warp_size=32, total_memory=1 << 36, name="none"
    )
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
    torch.cuda.get_device_properties = lambda *_, **__: device
