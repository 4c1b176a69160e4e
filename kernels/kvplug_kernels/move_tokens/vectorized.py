"""Moving tokens in vectorized torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import checked
from ..compact_kv.vectorized import move_words
from .layers import LayerCaches
from .naive import check_arguments


@checked(check_arguments)
def move_tokens_vectorized(
    caches: LayerCaches,
    block_table: Tensor,
    source: Tensor,
    beside: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Same contract as :func:`kvplug_kernels.move_tokens.move_tokens`."""
    slot = torch.arange(source.shape[3], dtype=torch.int32, device=source.device)
    for i in range(source.shape[0]):
        row, head, target = (source[i] != slot).nonzero(as_tuple=True)
        origin = source[i, row, head, target].long()
        for pages in caches.pages[i :: source.shape[0]]:
            move_words(pages, block_table, row, head, target, origin)
    put_beside(block_table, source, beside)


def put_beside(
    block_table: Tensor, source: Tensor, beside: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Let what is kept beside tokens follow them; takes what `move_tokens` takes."""
    for pages, values in beside:
        heads, count = source.shape[2:]
        size = pages.shape[2]
        width = -(-count // size)
        table = block_table[:, :width].long().repeat_interleave(size, 1)[:, :count]
        slot = torch.arange(count, device=source.device) % size
        head = torch.arange(heads, device=source.device)[:, None]
        moved = values.gather(2, source[0].long())
        pages[table[:, None], head, slot] = moved
