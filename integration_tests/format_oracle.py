"""What a model must answer when its KV is stored in a format, computed without a cache or kvplug.

Plain transformers over the whole text for every token. What a query reads of a key depends on
whether the key was computed in the query's own step, so the oracle takes where steps began.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

Stored = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""K and V ``[kv_heads, n, head_size]`` to what is read back of them."""
Starts = Callable[[int], int]
"""Position of a query to the first position whose K and V it sees as they were computed."""


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """Uniform levels between the smallest and largest element along a dimension, both float16."""
    low = x.amin(dim, keepdim=True).half().float()
    step = ((x.amax(dim, keepdim=True) - low).clamp_min(0) / (2**bits - 1)).half().float()
    code = torch.where(step > 0, (x - low) / step, 0.0).add(0.5).floor().clamp(0, 2**bits - 1)
    return code * step + low


def per_token(bits: int) -> Stored:
    """K and V of each token and head rounded on their own."""
    return lambda k, v: (rounded(k, bits, -1), rounded(v, bits, -1))


def per_channel(bits: int, group: int) -> Stored:
    """Keys rounded per channel over whole groups of tokens, values per token. The keys of a group
    that is not whole are never read back."""

    def stored(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        whole = k.shape[1] // group * group
        keys = k.clone()
        groups = k[:, :whole].reshape(k.shape[0], -1, group, k.shape[2])
        keys[:, :whole] = rounded(groups, bits, 2).reshape(k.shape[0], whole, k.shape[2])
        return keys, rounded(v, bits, -1)

    return stored


def never(position: int) -> int:
    """Everything is read back, a query's own token too."""
    return position + 1


def in_chunks(prompt: int, chunk: int, group: int = 1) -> Starts:
    """Prompts are computed a chunk at a time and answers a token at a time; tokens of a group that
    was not whole when the step began are seen as computed."""

    def start(position: int) -> int:
        begun = position // chunk * chunk if position < prompt else position
        return begun // group * group

    return start


class FormatOracle:
    """Greedy decoding of a small model that reads rounded K and V.

    Args:
        model: Directory of the model; run in float32.
    """

    def __init__(self, model: Path):
        name = f"kvplug_oracle_{id(self)}"
        AttentionInterface.register(name, self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=name
        ).eval()
        self._stored: list[Stored] = []
        self._starts: Starts = never
        self._visible: Callable[[int], Tensor] | None = None

    @torch.inference_mode()
    def greedy(
        self,
        prompt: list[int],
        max_tokens: int,
        stored: Stored | list[Stored],
        starts: Starts = never,
        visible: Callable[[int], Tensor] | None = None,
    ) -> list[int]:
        """Generated token ids; one way of storing for every layer, or one per layer. ``visible``
        gives ``[n, n]`` bool, query row sees key column, where that is not everything before."""
        layers = self.model.config.num_hidden_layers
        self._stored = stored if isinstance(stored, list) else [stored] * layers
        self._starts, self._visible = starts, visible
        tokens = list(prompt)
        for _ in range(max_tokens):
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    def _attend(self, module, query, key, value, attention_mask, scaling, **_):
        q, k, v = query[0], key[0], value[0]
        heads, n, _size = q.shape
        group = heads // k.shape[0]
        k2, v2 = self._stored[module.layer_idx](k, v)
        position = torch.arange(n)
        starts = torch.tensor([self._starts(i) for i in range(n)])
        computed = position >= starts[:, None]
        sees = position <= position[:, None]
        if self._visible is not None:
            sees &= self._visible(n)

        def logits(keys: Tensor) -> Tensor:
            return q @ keys.repeat_interleave(group, 0).transpose(1, 2) * scaling

        both = torch.where(computed, logits(k), logits(k2)).masked_fill(~sees, float("-inf"))
        weights = both.softmax(-1)
        out = (weights * computed) @ v.repeat_interleave(group, 0)
        out += (weights * ~computed) @ v2.repeat_interleave(group, 0)
        return out.transpose(0, 1)[None], None
