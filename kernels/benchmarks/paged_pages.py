"""Pages for the benchmarks of the operations on a paged cache."""

from __future__ import annotations

import torch
from bandwidth_floor import device
from torch import Tensor

BLOCK_SIZE = 16


def packed_pages(
    rows: int, tokens: int, kv_heads: int, head_size: int, rng: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """bfloat16 keys and values side by side in each page, as vLLM packs them, and a block table
    of distinct blocks in random order."""
    width = -(-tokens // BLOCK_SIZE)
    shape = (rows * width, kv_heads, BLOCK_SIZE, 2 * head_size)
    pages = torch.randn(shape, generator=rng).to(device(), torch.bfloat16)
    table = torch.randperm(rows * width, generator=rng).view(rows, width)
    keys, values = pages.split(head_size, dim=-1)
    return keys, values, table.to(device(), torch.int32)
