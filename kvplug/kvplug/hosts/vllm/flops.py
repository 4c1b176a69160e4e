"""Floating-point operations of a prompt's tokens, from a model's config."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

TWO_MATRICES = frozenset(
    {"bloom", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi", "starcoder2"}
)
"""Model types whose MLP has two matrices; that of the others has a gate, so three."""


@dataclass(frozen=True)
class PromptFlops:
    """What tokens of a prompt take.

    Attributes:
        weights: Weights of all layers that a token is multiplied with.
        attended: Sum over layers of query heads times head size.
    """

    weights: int
    attended: int

    @classmethod
    def of(cls, vllm_config: Any) -> PromptFlops:
        """Read a vLLM config; zeros for a model whose config does not name its sizes."""
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            return cls._of(vllm_config.model_config)
        return cls(0, 0)

    @classmethod
    def _of(cls, model: Any) -> PromptFlops:
        text = model.hf_text_config
        hidden = _number(text, "hidden_size", "n_embd")
        inner = _inner(text, hidden)
        heads = _number(text, "num_attention_heads", "n_head")
        if not hidden or not inner or not heads or getattr(model, "use_mla", False):
            return cls(0, 0)
        layers = int(model.get_total_num_hidden_layers())
        head_size = int(model.get_head_size())
        kv_heads = min(heads, int(model.get_total_num_kv_heads()))
        attention = hidden * head_size * (2 * heads + 2 * kv_heads)
        matrices = 2 if getattr(text, "model_type", "") in TWO_MATRICES else 3
        weights = layers * (attention + matrices * hidden * inner)
        return cls(weights, layers * heads * head_size)

    def flops(self, start: int, tokens: int) -> int:
        """Operations of the tokens from a position on, each attending all before it and itself."""
        pairs = start * tokens + tokens * (tokens + 1) // 2
        return 2 * self.weights * tokens + 4 * self.attended * pairs


def _number(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0


def _inner(text: Any, hidden: int) -> int:
    """Inner elements of a layer's MLP that a token passes: of the experts chosen, if there are
    any."""
    inner = _number(text, "intermediate_size", "ffn_dim", "n_inner")
    experts = _number(text, "num_experts_per_tok")
    if experts:
        each = _number(text, "moe_intermediate_size") or inner
        shared = _number(text, "shared_expert_intermediate_size")
        return experts * each + shared
    return inner or (4 * hidden if getattr(text, "model_type", "") in TWO_MATRICES else 0)
