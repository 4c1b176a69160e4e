"""What a model must answer under several kinds of policy at once, without a cache or kvplug.

The oracles of the single kinds put one behind the other: K and V are rounded as a format stores
them, foreign KV takes the place of what was computed, and what is left is forgotten by score or
hidden by a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from format_oracle import Stored
from pruned_oracle import PrunedOracle, Rule, Score, newest
from reuse_oracle import Layers, ReuseOracle, without
from torch import Tensor

Visible = Callable[[int], Tensor]
"""Length of a text to ``[n, n]`` bool: query row sees key column."""


class ComposedOracle(PrunedOracle):
    """Greedy decoding of a small model whose KV is stored, foreign and forgotten.

    Args:
        model: Directory of the model; run in float32.
    """

    def __init__(self, model: Path):
        super().__init__(model)
        self._turning = ReuseOracle(model)
        self._stored: Stored | None = None
        self._visible: Visible | None = None
        self._loaded: Sequence[tuple[int, Layers]] = ()
        self._seen: Layers = []

    @torch.inference_mode()
    def answer(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        stored: Stored | None = None,
        visible: Visible | None = None,
        score: Score | None = None,
        rules: Sequence[Rule] = (),
        loaded: Sequence[tuple[int, Layers]] = (),
        fresh: Sequence[tuple[int, int]] = (),
    ) -> list[int]:
        """Generated token ids.

        Args:
            prompt: The prompt.
            max_tokens: Tokens to generate.
            stored: How a format reads K and V back, a query's own token too; None as they are.
            visible: What a query sees; None for everything before it.
            score: What a scoring policy goes by, with ``rules``.
            rules: One rule for every layer.
            loaded: Where foreign KV stands, and what it is.
            fresh: Spans of it that are computed nevertheless.
        """
        self._take(len(prompt), stored, visible, score, rules, loaded, fresh)
        tokens = list(prompt)
        for _ in range(max_tokens):
            self._seen = []
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    @torch.inference_mode()
    def behind(self, prompt: Sequence[int], answer: Sequence[int], **how: Any) -> float:
        """How far the tokens of an answer are behind those that are likeliest after the same text,
        at most, in logits. Options are those of `answer`."""
        options = dict.fromkeys(("stored", "visible", "score"))
        sequences = dict.fromkeys(("rules", "loaded", "fresh"), ())
        self._take(len(prompt), **options | sequences | how)
        self._seen = []
        text = torch.tensor([[*prompt, *answer]])
        logits = self.model(text, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        return float((logits.max(1).values - chosen).max())

    def _take(
        self,
        num_prompt_tokens: int,
        stored: Stored | None,
        visible: Visible | None,
        score: Score | None,
        rules: Sequence[Rule],
        loaded: Sequence[tuple[int, Layers]],
        fresh: Sequence[tuple[int, int]],
    ) -> None:
        self._stored, self._visible = stored, visible
        self._score, self._prompt = score or newest, num_prompt_tokens
        self._rules = [*rules] * self.model.config.num_hidden_layers
        self._loaded = [piece for one in loaded for piece in without(one, fresh)]

    def segment(
        self, context: Sequence[int], tokens: Sequence[int], by: int, stored: Stored | None = None
    ) -> Layers:
        """KV of tokens after a context as a store holds it, re-rotated to ``by`` positions later
        and stored again."""
        self.answer([*context, *tokens], 1, stored=stored)
        kept = [(k[:, len(context) :].clone(), v[:, len(context) :].clone()) for k, v in self._seen]
        moved = self._turning.rerotated(kept, by)
        return [stored(k, v) for k, v in moved] if stored is not None else moved

    def _attend(self, module, query, key, value, attention_mask, scaling, **rest):
        k, v = key[0], value[0]
        if self._stored is not None:
            k, v = self._stored(k, v)
        if self._loaded:
            k, v = k.clone(), v.clone()
            for start, layers in self._loaded:
                foreign_k, foreign_v = layers[module.layer_idx]
                k[:, start : start + foreign_k.shape[1]] = foreign_k
                v[:, start : start + foreign_v.shape[1]] = foreign_v
        self._seen.append((k, v))
        if self._rules:
            return super()._attend(module, query, k[None], v[None], None, scaling, **rest)
        n, group = query.shape[2], query.shape[1] // k.shape[0]
        sees = self._visible(n) if self._visible is not None else torch.ones(n, n).tril().bool()
        weights = query[0] @ k.repeat_interleave(group, 0).transpose(1, 2) * scaling
        weights = weights.masked_fill(~sees, float("-inf")).softmax(-1)
        out = weights @ v.repeat_interleave(group, 0)
        return out.transpose(0, 1)[None], None
