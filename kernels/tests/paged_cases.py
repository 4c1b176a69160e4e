"""Paged caches for the tests: every layout of pages, and NaN wherever no token is resident."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ["head-major", "token-major", "packed", "padded"]
# Where the layers, blocks, heads and tokens of vLLM's layouts lie, from the outside in.
LAYER_LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
# No block has this id: an implementation that reads an entry it should not cannot go unnoticed.
NO_BLOCK = 2**31 - 1


def lay_out(pages: Tensor, layout: str) -> Tensor:
    """The same pages with other strides, NaN or extreme integers in between."""
    blocks, heads, size, content = pages.shape
    hole = float("nan") if pages.is_floating_point() else 99
    if layout == "token-major":
        return pages.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        # Keys and values side by side in one page, as vLLM stores them.
        wide = pages.new_full((blocks, heads, size, 2 * content), hole)[..., content:]
        return wide.copy_(pages)
    if layout == "padded":
        wide = pages.new_full((blocks, 2, heads, size, content + 3), hole)
        return wide[:, 1, ..., 2 : content + 2].copy_(pages)
    return pages


def lay_out_layers(caches: Tensor, layout: str) -> list[Tensor]:
    """Views ``[blocks, heads, block_size, content]`` of one allocation in one of vLLM's layouts, of
    layers ``[layers, blocks, heads, block_size, content]``."""
    order = LAYER_LAYOUTS[layout]
    whole = caches.permute(order).contiguous()
    return list(whole.permute([order.index(axis) for axis in range(5)]))


def make_table(lens: list[int], width: int, block_size: int, seed: int = 0) -> tuple[Tensor, int]:
    """A block table of distinct blocks in random order, and the number of blocks."""
    rng = torch.Generator().manual_seed(seed)
    num_blocks = len(lens) * width + 1
    table = torch.randperm(num_blocks, generator=rng)[: len(lens) * width].view(len(lens), width)
    live = torch.arange(width) * block_size < torch.tensor(lens)[:, None]
    return table.masked_fill(~live, NO_BLOCK).int(), num_blocks


def make_pages(
    table: Tensor,
    lens: list[int],
    num_blocks: int,
    heads: int,
    block_size: int,
    head_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "head-major",
    device: torch.device,
    seed: int = 0,
) -> Tensor:
    """Random tokens in the slots of resident tokens, NaN in all others."""
    rng = torch.Generator().manual_seed(seed)
    pages = torch.full((num_blocks, heads, block_size, head_size), float("nan"))
    for r, n in enumerate(lens):
        for t in range(min(n, table.shape[1] * block_size)):
            token = torch.randn(heads, head_size, generator=rng)
            pages[table[r, t // block_size], :, t % block_size] = token
    return lay_out(pages.to(device, dtype), layout)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor with its strides, which ``Tensor.to`` does not always keep."""
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return moved.copy_(tensor)
