"""What an attention layer shows once it is built, and a policy does not support."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvplug.contract import EngineView, LayerView
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm.worker import layer_check
from kvplug.hosts.vllm.worker.layer_check import LayerCheck
from kvplug.parser import load_deployment

NAME = "model.layers.{}.self_attn.attn"
SECTIONS: dict[str, dict[str, Any]] = {
    "format": {"format": "int8"},
    "scoring": {"sequence": {"use": "snapkv", "budget": 128}},
    "window": {"sequence": {"use": "sink_window", "sink": 32, "window": 64}},
    "reuse": {"reuse": {"use": ["structure", "position"]}},
}


def layer(**changes: Any) -> SimpleNamespace:
    """A full-attention layer of the model below."""
    found: dict[str, Any] = {
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_size": 64,
        "head_size_v": 64,
        "kv_cache_dtype": "auto",
        "kv_cache_torch_dtype": torch.bfloat16,
        "kv_sharing_target_layer_name": None,
        "sliding_window": None,
        "attn_type": "decoder",
    }
    return SimpleNamespace(**found | changes)


@pytest.fixture(params=SECTIONS)
def check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> LayerCheck:
    views = tuple(LayerView(i, 2, 2, 4, 64, "bfloat16") for i in range(2))
    view = EngineView(block_size=32, layers=views)
    monkeypatch.setattr(layer_check, "engine_view", lambda config: view)
    return LayerCheck(load_deployment(SECTIONS[request.param], key="kvplug"), None)


def refusal(check: LayerCheck, name: str, own: SimpleNamespace) -> str:
    try:
        check(name, own)
    except DeploymentError as error:
        return str(error)
    return ""


def test_the_models_own_layers_are_taken(check: LayerCheck) -> None:
    for _ in range(2):  # weights may be loaded again
        assert [refusal(check, NAME.format(i), layer()) for i in range(2)] == ["", ""]


def test_layers_that_share_kv_are_refused(check: LayerCheck) -> None:
    own = layer(kv_sharing_target_layer_name=NAME.format(0))
    found = refusal(check, NAME.format(1), own)
    assert "cannot run on this model: attention layer model.layers.1.self_attn.attn" in found
    assert "shares the KV of model.layers.0.self_attn.attn" in found


def test_a_quantized_kv_cache_that_the_checkpoint_asks_for_is_refused(check: LayerCheck) -> None:
    """vLLM sets it while it builds layers, where ``--kv-cache-dtype`` says nothing."""
    own = layer(kv_cache_dtype="fp8", kv_cache_torch_dtype=torch.float8_e4m3fn)
    found = refusal(check, NAME.format(0), own)
    windowed = check._choices[0].policy.name == "sink_window"
    assert ("has a quantized KV cache (fp8)" in found) is not windowed


def test_layers_of_other_models_are_refused(check: LayerCheck) -> None:
    """A draft model's layers follow the model's, or have their numbers."""
    assert "is not one of its 2 decoder layers" in refusal(check, NAME.format(2), layer())
    assert "is not one of its 2 decoder layers" in refusal(check, "vision.3.layers.0.attn", layer())
    assert refusal(check, NAME.format(0), layer()) == ""
    found = refusal(check, f"draft_model.{NAME.format(0)}", layer())
    assert "has the number of model.layers.0.self_attn.attn" in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_kv_heads": 1}, "1 KV heads instead of 2"),
        ({"num_heads": 8}, "8 heads instead of 4"),
        ({"head_size": 96, "head_size_v": 96}, "96 elements per head instead of 64"),
        ({"head_size_v": 32}, "32 elements per head of its values instead of 64"),
        ({"kv_cache_torch_dtype": torch.float16}, "KV stored as float16 instead of bfloat16"),
    ],
)
def test_layers_of_another_shape_are_refused(
    check: LayerCheck, changes: dict[str, Any], said: str
) -> None:
    found = refusal(check, NAME.format(0), layer(**changes))
    windowed = check._choices[0].policy.name == "sink_window"
    assert (said in found) is not windowed, "positions alone do not depend on it"


def test_a_window_of_the_layers_own(check: LayerCheck) -> None:
    found = refusal(check, NAME.format(0), layer(sliding_window=48))
    supported = check._choices[0].policy.name in ("sink_window", "snapkv")
    assert ("has a sliding window of 48" in found) is not supported


def test_an_encoders_layers_keep_nothing_to_shape(check: LayerCheck) -> None:
    assert refusal(check, "encoder.7.attn", layer(attn_type="encoder_only", head_size=80)) == ""
