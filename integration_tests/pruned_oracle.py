"""What a model must answer when requests are cut by score, computed without a cache or kvplug.

Plain transformers over the whole text for every token. The attention function of each layer walks
through the cuts, keeps a set of visible tokens per KV head, and scores with formulas written here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

Score = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""``score(probabilities, keys, totals, held, at)``: one value per KV head and text position.

``probabilities`` ``[heads, n, n]`` of every query so far, ``keys`` ``[kv_heads, n, head_size]``,
``totals`` ``[kv_heads, n]``, ``held`` ``[kv_heads, n]`` bool, ``at`` the number of tokens computed.
"""


@dataclass(frozen=True)
class Rule:
    """What is kept and when, in tokens of whole blocks."""

    kept: int
    interval: int
    sink: int
    recent: int
    block: int = 32
    hold: int | None = None

    def cuts(self, prompt: int, total: int) -> list[tuple[int, int, int]]:
        """``(tokens computed, tokens covered, tokens kept)`` of every cut of a text."""
        found = []
        covered, held = 0, 0
        if self.hold is not None:
            quarter = self.hold // self.block // 4 * self.block
            room = max(self.kept, self.hold - self.interval - max(self.interval, quarter))
            while covered - held + self.hold < prompt:
                covered += self.hold - held
                held = room
                found.append((covered, covered, held))
        whole = prompt // self.block * self.block
        if whole >= self.interval + self.kept and (whole > covered or held > self.kept):
            found.append((prompt, whole, self.kept))
            covered, held = whole, self.kept
        nxt = covered + self.interval if covered else self.interval + self.kept
        while nxt <= total:
            found.append((nxt, nxt, self.kept))
            nxt += self.interval
        return found


def keydiff(probabilities: Tensor, keys: Tensor, totals: Tensor, held: Tensor, at: int) -> Tensor:
    """Keys unlike the others matter. (Key norms would tie: in the first layer they depend on the
    token alone, and tokens repeat.)"""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = (unit * held[..., None]).sum(1, keepdim=True) / held.sum(1)[:, None, None]
    return -torch.cosine_similarity(keys, mean.expand_as(keys), dim=-1)


def tova(probabilities: Tensor, keys: Tensor, totals: Tensor, held: Tensor, at: int) -> Tensor:
    """What the latest query attends to, over all heads."""
    return probabilities[:, at - 1].mean(0, keepdim=True).expand(keys.shape[0], -1)


def heavy(probabilities: Tensor, keys: Tensor, totals: Tensor, held: Tensor, at: int) -> Tensor:
    """Everything received so far."""
    return totals


def newest(probabilities: Tensor, keys: Tensor, totals: Tensor, held: Tensor, at: int) -> Tensor:
    """The latest tokens matter."""
    return torch.arange(keys.shape[1]).float().expand(keys.shape[0], -1)


class PrunedOracle:
    """Greedy decoding of a small model whose heads forget.

    Args:
        model: Directory of the model; run in float32.
    """

    def __init__(self, model: Path):
        # Of its own: a name stands for the function registered under it last.
        name = f"kvplug_oracle_{id(self)}"
        AttentionInterface.register(name, self._attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=name
        ).eval()
        self._score: Score = newest
        self._rules: list[Rule] = []
        self._prompt = 0

    @torch.inference_mode()
    def greedy(
        self, prompt: list[int], max_tokens: int, score: Score, rules: Sequence[Rule]
    ) -> list[int]:
        """Generated token ids; one rule for every layer, or one per layer."""
        layers = self.model.config.num_hidden_layers
        self._rules = list(rules) if len(rules) > 1 else [*rules] * layers
        self._score, self._prompt = score, len(prompt)
        tokens = list(prompt)
        for _ in range(max_tokens):
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    def _attend(self, module, query, key, value, attention_mask, scaling, **_):
        q, k, v = query[0], key[0], value[0]
        heads, n, _size = q.shape
        group = heads // k.shape[0]
        rule = self._rules[module.layer_idx]
        alive = torch.ones(k.shape[0], n, dtype=torch.bool)
        totals = torch.zeros(k.shape[0], n)
        probabilities = torch.zeros(heads, n, n)
        logits = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scaling
        position = torch.arange(n)
        start = 0
        for at, covered, kept in [*rule.cuts(self._prompt, n), (n, 0, 0)]:
            part = slice(start, at)
            seen = alive.repeat_interleave(group, 0)[:, None] & (position <= position[part, None])
            p = logits[:, part].masked_fill(~seen, float("-inf")).softmax(-1)
            probabilities[:, part] = p
            totals += p.sum(1).view(k.shape[0], group, n).mean(1)
            start = at
            if not covered:
                break
            scores = self._score(probabilities, k, totals, alive & (position < at), at).clone()
            scores[:, (position < rule.sink) | (position >= at - rule.recent)] = float("inf")
            scores[~alive] = float("-inf")
            scores[:, covered:] = float("-inf")
            best = scores.topk(kept, dim=-1).indices
            survivors = torch.zeros_like(alive).scatter_(1, best, True)
            alive[:, :covered] = survivors[:, :covered]
        out = probabilities @ v.repeat_interleave(group, 0)
        return out.transpose(0, 1)[None], None
