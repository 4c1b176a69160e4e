"""What is kept beside each token of a page, in the page's own tail.

Beside the KV of a token, a scoring policy needs its position and perhaps a number more, for as
long as the token stays. vLLM allocates a page as large as its spec says, so what the spec adds
behind the content is planned, and freed, with the page.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

ELEMENT = 4
"""Bytes of an int32 or float32."""

ALIGNMENT = 16
"""Bytes that accelerators load at once; pages still start at multiples of it."""


def with_tail(spec: Any, fields: int) -> Any:
    """Return a KV-cache spec whose pages have a tail.

    Args:
        spec: The spec.
        fields: Numbers of 4 bytes beside each token of each head.
    """
    content = spec.unpadded_page_size_bytes
    unit = math.lcm(spec.state_content_size_bytes, ALIGNMENT)
    tail = fields * spec.num_heads * spec.block_size * ELEMENT
    # Whole cells, so that strides between blocks stay multiples of a token's content.
    return replace(spec, page_size_padded=content + -(-tail // unit) * unit)


def tail_of(cache: Tensor, field: int, dtype: torch.dtype) -> Tensor:
    """One of the numbers beside the tokens, ``[num_blocks, kv_heads, block_size]``.

    Args:
        cache: A layer's cache, ``[num_blocks, kv_heads, block_size, content]``, of pages with a
            tail; pages of several layers may be numbered as one cache.
        field: Which of the numbers.
        dtype: int32 or float32.
    """
    blocks, heads, size, content = cache.shape
    item = cache.element_size()
    start = cache.storage_offset() * item + heads * size * (content * item + field * ELEMENT)
    step = cache.stride(0) * item
    assert start % ELEMENT == 0 and step % ELEMENT == 0, "pages are aligned"
    bytes_of_all = cache.untyped_storage().nbytes() // ELEMENT * ELEMENT
    whole = cache.view(torch.int8).as_strided((bytes_of_all,), (1,), 0).view(dtype)
    return whole.as_strided((blocks, heads, size), (step // ELEMENT, size, 1), start // ELEMENT)
