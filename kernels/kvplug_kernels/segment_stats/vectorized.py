"""A segment's measures in vectorized torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import checked
from .naive import KEY_COSINE, KEY_RMS, OUTGOING, SPARSITY, VALUE_RMS, check_arguments

TOKENS_BYTES = 256 << 10
"""float32 vectors at a time: their copies stay in a CPU's cache."""
LOGITS_BYTES = 4 << 20


@checked(check_arguments)
def segment_stats_vectorized(
    key: Tensor,
    value: Tensor,
    query: Tensor | None = None,
    before: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Same contract as :func:`kvplug_kernels.segment_stats.segment_stats`."""
    n, heads, head_size = key.shape
    out = torch.full((heads, 5), math.nan, device=key.device)
    if n == 0:
        return out
    key_square, similarity, value_norms = key.new_zeros((3, heads), dtype=torch.float32)
    value_square = torch.zeros_like(key_square)
    at_once = max(TOKENS_BYTES // (heads * head_size * 4), 2)
    for low in range(0, n, at_once):
        norms = torch.linalg.vector_norm(value[low : low + at_once], dim=-1, dtype=torch.float32)
        value_norms += norms.sum(0)
        value_square += norms.square().sum(0)
        # Its neighbour before belongs to each chunk but the first.
        first = max(low - 1, 0)
        keys = key[first : low + at_once].float()
        norms = torch.linalg.vector_norm(keys, dim=-1)
        key_square += norms[low - first :].square().sum(0)
        inverse = norms.reciprocal().masked_fill_(norms == 0, 0)
        similarity += ((keys[1:] * keys[:-1]).sum(-1) * inverse[1:] * inverse[:-1]).sum(0)
    out[:, KEY_RMS] = (key_square / (n * head_size)).sqrt()
    out[:, VALUE_RMS] = (value_square / (n * head_size)).sqrt()
    if n > 1:
        root = math.sqrt(n)
        share = (root - value_norms / value_square.sqrt()) / (root - 1)
        out[:, SPARSITY] = share.masked_fill_(value_square == 0, 0.0)
        out[:, KEY_COSINE] = similarity / (n - 1)
    if query is not None and query.shape[0] > 0:
        out[:, OUTGOING] = _outgoing(key, query, before, scale)
    return out


def _outgoing(key: Tensor, query: Tensor, before: Tensor | None, scale: float) -> Tensor:
    n, heads, head_size = key.shape
    m, num_heads, _ = query.shape
    if before is None or before.shape[0] == 0:
        return key.new_zeros(heads, dtype=torch.float32)
    # Query heads of one head one behind another, so that each head has one product.
    rows = query.float().mul(scale).view(m, heads, num_heads // heads, head_size)
    rows = rows.permute(1, 2, 0, 3).reshape(heads, -1, head_size)
    position = torch.arange(n - m, n, device=key.device).repeat(num_heads // heads)
    inside = _log_sum(rows, key, position)
    outside = _log_sum(rows, before, None)
    return torch.sigmoid(outside - inside).mean(-1)


def _log_sum(rows: Tensor, key: Tensor, position: Tensor | None) -> Tensor:
    """Log-sum-exp of the logits of queries ``[heads, rows, head_size]`` over keys at most as late
    as ``position``, or all."""
    found = rows.new_full(rows.shape[:2], -math.inf)
    at_once = max(LOGITS_BYTES // (4 * rows.shape[0] * rows.shape[1]), 1)
    for low in range(0, key.shape[0], at_once):
        keys = key[low : low + at_once].float()
        logits = rows @ keys.permute(1, 2, 0)
        if position is not None:
            late = torch.arange(low, low + keys.shape[0], device=key.device) > position[:, None]
            logits.masked_fill_(late, -math.inf)
        found = torch.logaddexp(found, logits.logsumexp(-1))
    return found
