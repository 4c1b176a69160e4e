"""What a press is given in place of a model's attention module and its inputs.

A press is written for a forward pass of transformers: it is handed the attention module, all hidden
states, keys, values, attention weights and the pass's other arguments. A serving engine has keys
and values, and if asked for them the latest queries. Hidden states here carry those queries: the
module's ``q_proj`` returns them, and the rotary embedding beside them is that of angle 0, since
they are rotated already. Of earlier tokens they are NaN, so what reads them is found out by its
scores.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import LayerView


class Module:
    """An attention module: sizes, and queries that pass through it.

    Attributes:
        missed: Attributes that were asked for and are not there.
    """

    def __init__(self, layer: LayerView, scale: float):
        self.missed: list[str] = []
        self.config = SimpleNamespace(
            num_attention_heads=layer.num_heads,
            num_key_value_heads=layer.num_kv_heads,
            num_hidden_layers=layer.num_layers,
            hidden_size=layer.num_heads * layer.head_size,
            head_dim=layer.head_size,
        )
        self.head_dim = layer.head_size
        self.num_key_value_groups = layer.num_heads // layer.num_kv_heads
        self.layer_idx = layer.index
        self.scaling = scale
        self.is_causal, self.training = True, False

    def q_proj(self, hidden_states: Tensor) -> Tensor:
        """The queries that the hidden states are."""
        return hidden_states

    def __getattr__(self, name: str) -> Any:
        missed = self.__dict__.get("missed")
        if missed is not None and not name.startswith("__"):
            missed.append(f"module.{name}")
        raise AttributeError(f"a serving engine has no module.{name}")


class Arguments(dict[str, Any]):
    """The other arguments of the forward pass; knows which were asked for in vain."""

    def __init__(self, count: int, head_size: int, like: Tensor):
        one = like.new_ones((1, count, head_size))
        super().__init__(position_embeddings=(one, torch.zeros_like(one)))
        self.missed: list[str] = []

    def __missing__(self, key: str) -> Any:
        self.missed.append(f"kwargs[{key!r}]")
        raise KeyError(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The argument; one that is not there is noted."""
        if key not in self:
            self.missed.append(f"kwargs[{key!r}]")
        return super().get(key, default)


def hidden_states(count: int, queries: Tensor | None, layer: LayerView, like: Tensor) -> Tensor:
    """Hidden states of a text, of which the latest are known.

    Args:
        count: Tokens.
        queries: Queries of the latest, ``[n, num_heads, head_size]``, or None.
        layer: The layer.
        like: A tensor of the type and device to return.

    Returns:
        ``[1, count, num_heads * head_size]``; NaN before the latest ``n``.
    """
    found = like.new_full((1, count, layer.num_heads * layer.head_size), float("nan"))
    if queries is not None and len(queries):
        known = queries[-count:]
        found[0, count - len(known) :] = known.flatten(1).to(like.dtype)
    return found
