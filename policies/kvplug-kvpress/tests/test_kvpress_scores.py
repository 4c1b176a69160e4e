"""kvpress's own presses keep the same tokens here as on a model in transformers.

kvpress pins a transformers older than vLLM's, so it is not in the lock: these tests run where it
was installed by hand, `pip install --no-deps kvpress`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kvplug.contract import EngineView, LayerView
from kvplug.testing import residents
from kvplug_kvpress.policy import KvPress

kvpress = pytest.importorskip("kvpress")

TOKENS, HEADS, KV_HEADS, SIZE = 700, 4, 2, 32
ENGINE = EngineView(block_size=16, num_blocks=64, host="test")
SERVED: list[tuple[str, dict[str, Any]]] = [
    ("KnormPress", {}),
    ("KeyDiffPress", {}),
    ("LagKVPress", {}),
    ("CURPress", {}),
    ("RandomPress", {"seed": 3}),
    ("SnapKVPress", {"window_size": 32}),
    ("TOVAPress", {}),
]


@pytest.fixture(scope="module")
def layer() -> dict[str, Any]:
    """What kvpress hands a press of the second layer of a small random model."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=HEADS * SIZE,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=SIZE,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    seen: dict[str, Any] = {}

    def look(module: Any, arguments: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, module=module)

    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(look, with_kwargs=True)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.randint(300, (1, TOKENS)), past_key_values=cache, use_cache=True)
        hidden = seen["hidden_states"]
        query = attention.q_proj(hidden).view(1, TOKENS, HEADS, SIZE).transpose(1, 2)
        query, _ = apply_rotary_pos_emb(query, query, *seen["position_embeddings"])
    found = cache.layers[1]
    return seen | {"keys": found.keys, "values": found.values, "query": query.transpose(1, 2)}


def kept(scores: Tensor, count: int = 200) -> list[list[int]]:
    return [sorted(row) for row in scores[0].topk(count).indices.tolist()]


@pytest.mark.parametrize(("name", "arguments"), SERVED, ids=[name for name, _ in SERVED])
def test_the_same_tokens_are_kept(
    name: str, arguments: dict[str, Any], layer: dict[str, Any]
) -> None:
    options = {"press": f"kvpress.{name}", "arguments": arguments, "recent": 64}
    policy = KvPress(KvPress.Options.model_validate(options), ENGINE)
    keys, values = layer["keys"], layer["values"]
    view = residents(
        keys,
        values,
        queries=layer["query"][:, -policy.observation :] if policy.observation else None,
        layer=LayerView(1, 2, KV_HEADS, HEADS, SIZE),
    )
    press = getattr(kvpress, name)(**arguments)
    with torch.no_grad():
        right = press.score(layer["module"], layer["hidden_states"], keys, values, None, layer)
    torch.testing.assert_close(policy.score(view), right.float(), rtol=1e-4, atol=1e-6)
    assert kept(policy.score(view)) == kept(right.float())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ExpectedAttentionPress", "cannot be served"),
        ("ObservedAttentionPress", "cannot be served"),
        ("LeverageScorePress", "cannot be served"),
        ("QFilterPress", "cannot be served"),
        ("PyramidKVPress", "overrides compress"),
        ("StreamingLLMPress", "gives every token one score"),
        ("RandomPress", "scores by chance"),
    ],
)
def test_a_press_that_needs_more_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        KvPress(KvPress.Options.model_validate({"press": f"kvpress.{name}"}), ENGINE)
    assert f"kvpress.{name}" in str(refused.value)
