"""What a model must answer when some of its KV is another text's, without an engine or kvplug.

Every forward runs over the whole text; where KV was loaded, the attention function puts the loaded
keys and values in place of those just computed. Keys are turned by multiplying complex numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, ``[kv_heads, n, head_size]``."""


class ReuseOracle:
    """Greedy decoding of a small model with foreign KV in its text.

    Args:
        model: Directory of the model; run in float32.
        dtype: The weights' dtype.
    """

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32):
        AttentionInterface.register("reuse_oracle", self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="reuse_oracle"
        ).eval()
        rope = self.model.config.rope_parameters
        size = self.model.config.head_dim
        self.turns = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        self._loaded: dict[int, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
        self._seen: Layers = []

    def _attend(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        key, value = key.clone(), value.clone()
        for start, k, v in self._loaded.get(module.layer_idx, ()):
            key[0, :, start : start + k.shape[1]] = k
            value[0, :, start : start + v.shape[1]] = v
        self._seen.append((key[0], value[0]))
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
        n = query.shape[2]
        future = torch.ones(n, n).triu(1).bool()
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        out = weights @ value.repeat_interleave(groups, 1)
        return out.transpose(1, 2).contiguous(), weights

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], loaded: Sequence[tuple[int, Layers]] = ()):
        """Logits of the last token, and K and V of every layer as attention saw them."""
        self._loaded, self._seen = {}, []
        for start, layers in loaded:
            for i, (k, v) in enumerate(layers):
                self._loaded.setdefault(i, []).append((start, k, v))
        logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0, -1]
        return logits, self._seen

    def stored(self, context: Sequence[int], tokens: Sequence[int]) -> Layers:
        """KV of some tokens after a context."""
        _, seen = self.forward([*context, *tokens])
        return [(k[:, len(context) :].clone(), v[:, len(context) :].clone()) for k, v in seen]

    def rerotated(self, layers: Layers, by: int) -> Layers:
        """The same tokens' KV with keys re-rotated to positions ``by`` later."""
        angle = self.turns * by
        turn = torch.polar(torch.ones_like(angle), angle)
        found = []
        for key, value in layers:
            half = key.shape[2] // 2
            turned = torch.complex(key[..., :half].double(), key[..., half:].double()) * turn
            found.append((torch.cat([turned.real, turned.imag], -1).to(key.dtype), value))
        return found

    def greedy(
        self,
        tokens: Sequence[int],
        loaded: Sequence[tuple[int, Layers]],
        fresh: Sequence[tuple[int, int]],
        n: int,
    ) -> list[int]:
        """Generated token ids.

        Args:
            tokens: The prompt.
            loaded: Where foreign KV stands.
            fresh: Spans of it that are computed nevertheless.
            n: Tokens to generate.
        """
        kept = [piece for one in loaded for piece in without(one, fresh)]
        text = list(tokens)
        for _ in range(n):
            logits, _ = self.forward(text, kept)
            text.append(int(logits.argmax()))
        return text[len(tokens) :]


def without(piece: tuple[int, Layers], fresh: Sequence[tuple[int, int]]) -> list:
    """A piece's runs that lie in no span."""
    start, layers = piece
    length = layers[0][0].shape[1]
    left = [i for i in range(length) if not any(a <= start + i < b for a, b in fresh)]
    found = []
    while left:
        run = 1
        while run < len(left) and left[run] == left[0] + run:
            run += 1
        at = left[0]
        found.append((start + at, [(k[:, at : at + run], v[:, at : at + run]) for k, v in layers]))
        left = left[run:]
    return found
