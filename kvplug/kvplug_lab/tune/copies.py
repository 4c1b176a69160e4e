"""How long a block of KV takes from host memory."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

REPEATED = 9


def copy_seconds(model: Path, block_size: int, dtype: str) -> float:
    """Seconds to copy a block of all layers from host memory to where the engine computes.

    The median of some copies of what stock vLLM would store, from pinned memory on a GPU. A tier
    also checks and decodes; what it takes in all is in the rounds of its own engine.

    Args:
        model: Model directory.
        block_size: Tokens of a block.
        dtype: Of the KV.
    """
    import torch

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or config["hidden_size"] // heads)
    element = 4 if dtype in ("float32", "float") else 2
    size = block_size * 2 * int(config["num_hidden_layers"]) * kv_heads * head * element
    cuda = torch.cuda.is_available()
    source = torch.ones(size, dtype=torch.uint8, pin_memory=cuda)
    target = torch.empty(size, dtype=torch.uint8, device="cuda" if cuda else "cpu")
    times = []
    for _ in range(REPEATED):
        began = time.perf_counter()
        target.copy_(source)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
