"""What policies are told of a model's positions, held against transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import apply_rotary_pos_emb
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from kvplug.hosts.vllm.view import position_scheme, rope_of

SMALL = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 4}


def config(model_type: str, **stated: Any) -> Any:
    return AutoConfig.for_model(model_type, **SMALL | stated).get_text_config()


@pytest.mark.parametrize(
    ("model_type", "stated", "scheme"),
    [
        ("llama", {}, "rope/neox"),
        ("falcon", {}, "rope/neox"),
        ("falcon", {"alibi": True}, "alibi"),
        ("cohere", {}, "rope/gptj"),
        ("ernie4_5_moe", {}, "rope/gptj"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "rope/neox"),
        ("smollm3", {}, "unknown"),
        ("cohere2", {"sliding_window": 32}, "unknown"),
        ("exaone4", {"sliding_window": 32}, "unknown"),
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, "rope/neox"),
        ("granite", {"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "unknown"),
        ("granite", {"layer_rope_theta": [10000.0, 0, 10000.0, 0]}, "unknown"),
        ("granite", {"position_embedding_type": "nope"}, "unknown"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope-by-length",
        ),
    ],
)
def test_keys_are_rotated_anew_only_where_every_layer_rotates_them(
    model_type: str, stated: dict[str, Any], scheme: str
) -> None:
    found = config(model_type, **stated)
    assert position_scheme(found).startswith(scheme)
    assert (rope_of(found) is not None) is scheme.startswith("rope/")


def test_layers_that_rotate_nothing_are_those_of_the_model() -> None:
    found = config("smollm3", num_key_value_heads=1)
    assert [bool(SmolLM3Attention(found, i).use_rope) for i in range(4)] == [True] * 3 + [False]


def test_pairs_are_rotated_as_the_model_rotates_them() -> None:
    rope = rope_of(config("ernie4_5_moe"))
    assert rope is not None and rope.interleaved
    angles = 7 * torch.tensor(rope.frequencies)
    halves = torch.cat([angles, angles])[None, None]
    key = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    _, turned = apply_rotary_pos_emb(key, key, halves.cos(), halves.sin())
    even, odd = key[..., ::2], key[..., 1::2]
    expected = torch.stack(
        [even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()], -1
    ).flatten(-2)
    torch.testing.assert_close(turned, expected)
