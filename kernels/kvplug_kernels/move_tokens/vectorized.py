"""Moving tokens in vectorized torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import checked
from ..compact_kv.vectorized import move_words
from .layers import LayerCaches
from .naive import check_arguments


@checked(check_arguments)
def move_tokens_vectorized(caches: LayerCaches, block_table: Tensor, source: Tensor) -> None:
    """Same contract as :func:`kvplug_kernels.move_tokens.move_tokens`."""
    slot = torch.arange(source.shape[3], dtype=torch.int32, device=source.device)
    for i in range(source.shape[0]):
        row, head, target = (source[i] != slot).nonzero(as_tuple=True)
        origin = source[i, row, head, target].long()
        for pages in caches.pages[i :: source.shape[0]]:
            move_words(pages, block_table, row, head, target, origin)
