"""Attention function of a model under calibration: a probe sees its inputs."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from kvplug.errors import KVPlugError
from kvplug.hosts.transformers.hook import check_call, hooked, softmax_scale

NAME = "kvplug_calibrate"


class Probe(Protocol):
    """Sees the inputs of each layer's attention and may replace its keys and values."""

    def see(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to.

        Args:
            layer: Index of the layer.
            query: ``[num_heads, n, head_size]``, after RoPE.
            key: ``[kv_heads, n, head_size]``, after RoPE.
            value: The same shape.
            how: The layer's attention.
        """
        ...


class How:
    """Causal attention of one layer.

    Args:
        scale: Softmax scale.
        softcap: Soft cap of logits; 0 for none.
        window: Latest tokens a query sees; 0 for all.
    """

    def __init__(self, scale: float, softcap: float = 0.0, window: int = 0):
        self.scale, self.softcap, self.window = scale, softcap, window

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention of a text to itself.

        Args:
            query: ``[num_heads, n, head_size]``.
            key: ``[kv_heads, n, head_size]``.
            value: The same shape.

        Returns:
            ``[num_heads, n, head_size]``.
        """
        n, mask = query.shape[1], None
        if self.window and self.window < n:
            at = torch.arange(n, device=query.device)
            mask = (at <= at[:, None]) & (at > at[:, None] - self.window)
        if not self.softcap:
            return functional.scaled_dot_product_attention(
                query[None],
                key[None],
                value[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=query.shape[0] != key.shape[0],
            )[0]
        if mask is None:
            mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril_()
        group = query.shape[0] // key.shape[0]
        parts = []
        for head in range(query.shape[0]):
            logits = query[head].float() @ key[head // group].float().mT * self.scale
            logits = self.softcap * torch.tanh(logits / self.softcap)
            weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
            parts.append((weights @ value[head // group].float()).to(query.dtype))
        return torch.stack(parts)


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
    kvplug_probe: Probe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one text, read whole, over the keys and values that the probe returns.

    Args:
        module: The attention module; its ``layer_idx`` says which layer.
        query: ``[1, num_heads, n, head_size]``, after RoPE.
        key: ``[1, kv_heads, n, head_size]``, after RoPE.
        value: The same shape.
        attention_mask: Not used: a text read whole is causal.
        scaling: Softmax scale.
        dropout: Not used.
        softcap: Soft cap of logits.
        sliding_window: The layer's window.
        kvplug_probe: The probe.
        kwargs: What else the model passes.

    Returns:
        ``[1, n, num_heads, head_size]``, and None.

    Raises:
        KVPlugError: The model's attention is not supported.
    """
    check_call(module, kvplug_probe, kwargs)
    assert kvplug_probe is not None
    if value.shape != key.shape:
        raise KVPlugError(
            f"{type(module).__name__}: values of another size than keys (MLA) are not supported"
        )
    scale = softmax_scale(scaling, query)
    how = How(scale, softcap or 0.0, sliding_window or 0)
    index = int(module.layer_idx)  # type: ignore[arg-type]
    keys, values = kvplug_probe.see(index, query[0], key[0], value[0], how)
    return how.attend(query[0], keys, values).transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(NAME, attend)


attached = partial(hooked, name=NAME)
"""Makes a model's attention `attend` within the block."""
