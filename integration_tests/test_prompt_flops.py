"""Operations of a prompt's tokens, against the weights of the models themselves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2MoeConfig,
)

from kvplug.hosts.vllm.flops import PromptFlops

LAYERS, HIDDEN, HEADS = 3, 64, 8
SIZES: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "vocab_size": 100,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=96),
    "opt": OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=HIDDEN),
    "gpt2": GPT2Config(n_layer=LAYERS, n_embd=HIDDEN, n_head=HEADS, vocab_size=100),
    "moe": Qwen2MoeConfig(
        **SIZES,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=48,
        num_experts=2,
        num_experts_per_tok=2,
    ),
}


def config(text: Any, kv_heads: int) -> Any:
    model = SimpleNamespace(
        hf_text_config=text,
        use_mla=False,
        get_total_num_hidden_layers=lambda: LAYERS,
        get_total_num_kv_heads=lambda: kv_heads,
        get_head_size=lambda: HIDDEN // HEADS,
    )
    return SimpleNamespace(model_config=model)


@pytest.mark.parametrize(
    ("name", "kv_heads"), [("llama", 2), ("opt", HEADS), ("gpt2", HEADS), ("moe", 4)]
)
def test_the_weights_are_those_of_the_models_layers(name: str, kv_heads: int) -> None:
    text = CONFIGS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text)
    # Matrices of layers, every expert chosen; routers and the shared expert's gate are small.
    weights = sum(
        one.numel()
        for part, one in model.named_parameters()
        if one.dim() >= 2 and (".h." in part or ".layers." in part)
        if "mlp.gate.weight" not in part and "shared_expert_gate" not in part
    )
    flops = PromptFlops.of(config(text, kv_heads))
    assert flops.weights == weights
    assert flops.attended == LAYERS * HIDDEN


def test_tokens_attend_all_before_them_and_themselves() -> None:
    flops = PromptFlops(weights=10, attended=3)
    assert flops.flops(0, 1) == 2 * 10 + 4 * 3 * 1
    assert flops.flops(5, 3) == 2 * 10 * 3 + 4 * 3 * (6 + 7 + 8)
    assert flops.flops(0, 8) == flops.flops(0, 5) + flops.flops(5, 3)


@pytest.mark.parametrize("broken", [SimpleNamespace(), config(SimpleNamespace(), 1)])
def test_a_model_of_unknown_sizes_saves_nothing_that_is_counted(broken: Any) -> None:
    assert PromptFlops.of(broken) == PromptFlops(0, 0)
    assert PromptFlops(0, 0).flops(3, 4) == 0
