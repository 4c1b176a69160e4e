"""The attention function that transformers' models call while this host runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvplug.errors import KVPlugError
from kvplug.hosts.transformers.coded import LayerCoded
from kvplug.hosts.transformers.hook import check_call, hooked, softmax_scale

if TYPE_CHECKING:
    from kvplug.hosts.transformers.cache import LayerCache

NAME = "kvplug"

LOGITS_BYTES = 32 << 20
"""Attention weights computed at a time where they are computed at all, on a CPU."""

DEVICE_LOGITS_BYTES = 1 << 30
"""The same on an accelerator, where many small steps cost more than memory does."""


@dataclass(frozen=True)
class Step:
    """One forward pass.

    Attributes:
        texts: The layers of each text, by layer index.
        positions: Positions of the new tokens, ``[texts, n]``.
    """

    texts: Sequence[Sequence[LayerCache]]
    positions: Tensor


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    kvplug: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Append the new tokens of each text and attend for their queries.

    Args:
        module: The attention module; its ``layer_idx`` is the layer.
        query: ``[texts, num_heads, n, head_size]``, after RoPE.
        key: ``[texts, kv_heads, n, head_size]``, after RoPE.
        value: The same shape.
        attention_mask: Not used: the mask follows from positions.
        scaling: Softmax scale.
        dropout: Not used: this host does not train.
        softcap: Soft cap of logits.
        sliding_window: The layer's window, as the model states it.
        kvplug: What is being run.
        kwargs: What else models pass on.

    Returns:
        ``[texts, n, num_heads, head_size]``, and None.

    Raises:
        KVPlugError: The model's attention is not supported by this host.
    """
    check_call(module, kvplug, kwargs)
    assert kvplug is not None
    rows = []
    for row, layers in enumerate(kvplug.texts):
        cache = layers[int(module.layer_idx)]  # type: ignore[arg-type]
        if bool(sliding_window) != bool(cache.sliding):
            raise KVPlugError(
                f"layer {cache.view.index} runs with sliding window {sliding_window}, its config "
                f"says {cache.sliding or None}"
            )
        positions = kvplug.positions[row]
        one = slice(row, row + 1)
        cache.softcap = softcap or 0.0
        cache.scale = softmax_scale(scaling, query)
        if isinstance(cache, LayerCoded):
            rows.append(cache.run(query[one], key[one], value[one], positions))
            continue
        cache.observe(query[one], positions)
        cache.append(key[one], value[one], positions)
        rows.append(_one(module, cache, query[one], positions))
    return torch.cat(rows), None


def _one(module: torch.nn.Module, cache: LayerCache, query: Tensor, positions: Tensor) -> Tensor:
    """Attend for one text, ``[1, n, num_heads, head_size]``."""
    new = query.shape[2]
    seen = None
    if cache.masked:
        seen = cache.visible(positions)
    elif 1 < new < cache.kept:
        # Whatever a head holds is older than the queries, except their own keys.
        seen = torch.ones(new, cache.kept, dtype=torch.bool, device=query.device)
        seen[:, cache.kept - new :].tril_()
    if cache.softcap:
        return _explicit(cache, query, seen, output=True)
    if cache.totals is not None:
        _explicit(cache, query, seen, output=False)
    mask = None if seen is None else seen[None, None]
    out: Tensor = sdpa_attention_forward(
        module, query, cache.keys, cache.values, mask, scaling=cache.scale
    )[0]
    return out


def _explicit(cache: LayerCache, query: Tensor, seen: Tensor | None, output: bool) -> Tensor:
    """Compute attention weights; add them to cumulative attention, apply them if asked to."""
    _, heads, new, size = query.shape
    kv_heads = cache.view.num_kv_heads
    group = heads // kv_heads
    keys, values = cache.keys[0].float(), cache.values[0].float()
    if seen is None and new > 1:
        seen = torch.ones(new, new, dtype=torch.bool, device=query.device).tril_()
    most = LOGITS_BYTES if query.device.type == "cpu" else DEVICE_LOGITS_BYTES
    at_once = max(1, most // (heads * cache.kept * 4))
    parts = []
    for start in range(0, new, at_once):
        part = query[0, :, start : start + at_once].float()
        part = part.view(kv_heads, group, -1, size)
        logits = torch.einsum("hgnd,htd->hgnt", part, keys) * cache.scale
        if cache.softcap:
            logits = cache.softcap * torch.tanh(logits / cache.softcap)
        if seen is not None:
            logits.masked_fill_(~seen[start : start + at_once], float("-inf"))
        weights = logits.softmax(-1)
        if cache.totals is not None:
            cache.receive(weights.sum(2).mean(1))
        if output:
            out = torch.einsum("hgnt,htd->hgnd", weights, values)
            parts.append(out.reshape(heads, -1, size).to(query.dtype))
    return torch.cat(parts, 1).transpose(0, 1)[None].contiguous() if output else query


AttentionInterface.register(NAME, attend)


attached = partial(hooked, name=NAME)
"""Makes a model's attention `attend` within the block."""
