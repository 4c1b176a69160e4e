"""Makes vLLM's CPU platform choose a backend, and resolve its class, as the CUDA platform does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch


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
