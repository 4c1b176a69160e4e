"""Functions that scoring policies share: text order, pooling over neighbours, value norms.

A request's resident tokens are in no particular order, and after a decision each KV head keeps
different ones. Neighbours and the latest tokens are therefore found here by position in the text.
Scores are ``[rows, kv_heads, resident]`` float32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

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


def pool(
    scores: Tensor, positions: Tensor, kernel: int, how: Literal["mean", "max"] = "mean"
) -> Tensor:
    """Pool scores over neighbours in the text, as SnapKV does to keep clusters together.

    Args:
        scores: At least 0, ``[rows, kv_heads, resident]``.
        positions: Position in the text of each resident token, the same shape.
        kernel: Tokens pooled, odd: the token and as many to either side.
        how: Mean or largest of them.

    Returns:
        The shape of ``scores``. A token of the text that is not resident counts as one of score 0,
        as does one beyond either end of the text.
    """
    if kernel == 1:
        return scores
    text = TextOrder(positions)
    reach, resident = kernel // 2, scores.shape[-1]
    padded = functional.pad(text.sort(scores), (reach, reach))
    places = functional.pad(text.positions, (reach, reach), value=-kernel)
    pooled = torch.zeros_like(scores)
    for shift in range(kernel):
        near = (places[..., shift : shift + resident] - text.positions).abs() <= reach
        taken = padded[..., shift : shift + resident].where(near, 0)
        pooled = torch.maximum(pooled, taken) if how == "max" else pooled + taken
    return text.unsort(pooled if how == "max" else pooled / kernel)


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
    return resident.key_scores[VALUE_NORM]


def query_count(resident: ResidentView, window: int) -> Tensor:
    """Count observed queries among the latest ``window``, at least 1, ``[rows, 1, 1]`` float32."""
    assert resident.query_positions is not None
    seen = (resident.query_positions[:, -window:] >= 0).sum(-1)
    return seen.clamp(min=1).float()[:, None, None]


def per_query_max(resident: ResidentView, window: int) -> Tensor:
    """Largest attention weight that each resident token receives from one of the latest queries.

    Returns:
        ``[rows, num_heads, resident]`` float32. Each query is a row of its own to the kernel; so
        many at a time that what it returns stays within `CHUNK_BYTES`.

    Raises:
        ValueError: The policy observes no queries.
    """
    if resident.queries is None or resident.query_positions is None:
        raise ValueError("per_query_max needs queries: set the policy's `observation`")
    queries = resident.queries[:, -window:]
    places = resident.query_positions[:, -window:]
    rows, window, heads, size = queries.shape
    most = resident.positions.new_zeros((rows, heads, resident.count), dtype=torch.float32)
    step = max(1, CHUNK_BYTES // (4 * max(1, rows * heads * resident.count)))
    for start in range(0, window, step):
        some = queries[:, start : start + step]
        count = some.shape[1]
        each = replace(
            resident,
            num_tokens=resident.num_tokens.repeat_interleave(count),
            num_prompt_tokens=resident.num_prompt_tokens.repeat_interleave(count),
            positions=resident.positions.repeat_interleave(count, 0),
            block_table=resident.block_table.repeat_interleave(count, 0),
            queries=some.reshape(rows * count, 1, heads, size),
            query_positions=places[:, start : start + step].reshape(rows * count, 1),
            cumulative_attention=None,
        )
        mass = each.attention_mass(1).reshape(rows, count, heads, resident.count)
        most = torch.maximum(most, mass.amax(1))
    return most


def chunked(resident: int, bytes_per_token: int, part: Callable[[slice], Tensor]) -> Tensor:
    """Concatenate ``part`` over slices of resident tokens that stay within `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // max(1, bytes_per_token))
    parts = [part(slice(s, min(s + step, resident))) for s in range(0, resident, step)]
    return torch.cat(parts, dim=-1)
