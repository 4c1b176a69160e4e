"""Functions that scoring policies share: text order, the latest tokens, value norms.

A request's resident tokens are in no particular order, and after a decision each KV head keeps
different ones. Neighbours and the latest tokens are therefore found here by position in the text.
Scores are ``[rows, kv_heads, resident]`` float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvplug.contract import ResidentView
from kvplug_kernels.key_scores import VALUE_NORM

CHUNK_BYTES = 64 << 20
"""Largest temporary a policy makes at a time."""

ALWAYS = 1e30
"""Score of a token that a method always keeps."""


class TextOrder:
    """The resident tokens of each KV head in the order of the text.

    Args:
        positions: Position in the text of each resident token, ``[rows, kv_heads, resident]``.
    """

    def __init__(self, positions: Tensor):
        self._order = positions.argsort(dim=-1, stable=True)
        self.positions = positions.gather(-1, self._order)

    def sort(self, values: Tensor) -> Tensor:
        """Reorder from slot order to text order, along the last dimension."""
        return values.gather(-1, self._order)

    def unsort(self, values: Tensor) -> Tensor:
        """Reorder from text order to slot order, along the last dimension."""
        return torch.empty_like(values).scatter_(-1, self._order, values)


def raised(scores: Tensor, mask: Tensor) -> Tensor:
    """Set the scores of masked tokens to `ALWAYS`; ``mask`` is broadcastable to ``scores``."""
    return scores.masked_fill(mask, ALWAYS)


def latest(resident: ResidentView, count: int | Tensor) -> Tensor:
    """Mask of the resident tokens among the latest ``count`` of the text.

    Args:
        resident: The resident tokens.
        count: Tokens, or one number per row, ``[rows]``.

    Returns:
        ``[rows, kv_heads, resident]`` bool.
    """
    since = resident.num_tokens - count
    return resident.positions >= since[:, None, None]


def value_norms(resident: ResidentView) -> Tensor:
    """L2 norm of each resident value, ``[rows, kv_heads, resident]``.

    Attention times value norm is the first-order proxy of how much the layer's output changes
    when a token goes; the gradient itself would need a backward pass, which inference has not.
    """
    return resident.key_score(VALUE_NORM)


def query_count(resident: ResidentView, window: int) -> Tensor:
    """Count observed queries among the latest ``window``, at least 1, ``[rows, 1, 1]`` float32."""
    assert resident.query_positions is not None
    seen = (resident.query_positions[:, -window:] >= 0).sum(-1)
    return seen.clamp(min=1).float()[:, None, None]


def chunked(resident: int, bytes_per_token: int, part: Callable[[slice], Tensor]) -> Tensor:
    """Concatenate ``part`` over slices of resident tokens that stay within `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_token))
    parts = [part(slice(s, min(s + step, resident))) for s in range(0, resident, step)]
    return torch.cat(parts, dim=-1)
