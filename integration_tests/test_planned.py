"""The KV-cache groups of an engine, compared with what its deployment asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as

from kvplug.contract import EngineView, LayerView
from kvplug.errors import DeploymentError
from kvplug.hosts.vllm import engine, planned
from kvplug.hosts.vllm.planned import require_managers, require_planned
from kvplug.hosts.vllm.spec import ApproximateSpec, PrunedSpec, WindowedManager, WindowedSpec
from kvplug.parser import load_deployment

NAMES = ["model.layers.0.attn", "model.layers.1.attn"]
VIEW = EngineView(
    block_size=32,
    max_model_len=2048,
    max_in_flight_tokens=256,
    layers=tuple(LayerView(i, 2, 2, 4, 64, "float32") for i in range(2)),
)
STOCK = FullAttentionSpec(block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32)
LOCAL = SlidingWindowSpec(
    block_size=32, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=48
)
INT8 = replace(STOCK, dtype=torch.uint8, state_content_bytes=136)
INT4 = replace(STOCK, dtype=torch.uint8, state_content_bytes=72)
APPROXIMATE = replace_as(STOCK, ApproximateSpec)
COMMON: dict[str, Any] = {"exact_tokens": 128, "in_flight_tokens": 256, "max_tokens": 2048}


def windowed(window: int) -> WindowedSpec:
    return replace_as(STOCK, WindowedSpec, sink_tokens=32, window_tokens=window, **COMMON)


def pruned(limits: Any) -> PrunedSpec:
    return replace_as(STOCK, PrunedSpec, limits=limits, **COMMON)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr(engine, "engine_view", lambda config: VIEW)

    def against(section: dict[str, Any], *specs: Any, cache_dtype: str = "auto") -> str:
        groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=NAMES) for spec in specs]
        config = SimpleNamespace(cache_config=SimpleNamespace(cache_dtype=cache_dtype))
        deployment = load_deployment(section, key="kvplug", engine=VIEW)
        try:
            require_planned(deployment, config, SimpleNamespace(kv_cache_groups=groups))
        except DeploymentError as error:
            return str(error)
        return ""

    return against


WINDOW = {"sequence": {"use": "sink_window", "sink": 32, "window": 65}}
REUSE = {"reuse": {"use": ["structure", "position"]}}


@pytest.mark.parametrize(
    ("section", "specs"),
    [
        ({}, [STOCK]),
        ({}, [STOCK, LOCAL]),
        ({"format": "int8"}, [INT8]),
        (WINDOW, [windowed(64)]),
        (WINDOW, [LOCAL, windowed(64)]),
        (REUSE, [APPROXIMATE]),
        ({"format": "int8"} | REUSE, [replace_as(INT8, ApproximateSpec)]),
        ({"prefix_cache": "lru"}, [LOCAL]),
    ],
)
def test_what_was_asked_for_is_taken(
    refused: Callable[..., str], section: dict[str, Any], specs: list[Any]
) -> None:
    assert refused(section, *specs) == ""


@pytest.mark.parametrize(
    ("section", "specs", "said"),
    [
        ({"format": "int8"}, [INT4], "pages have 72 bytes a token and head, and int8 needs"),
        ({"format": "int8"}, [STOCK], "pages have 512 bytes a token and head, and int8 needs"),
        ({"format": "int8"}, [LOCAL], "it has no full-attention layer"),
        ({"format": "int8"}, [], "it has no full-attention layer"),
        ({}, [INT8], "pages are in the bytes of a format."),
        (WINDOW, [windowed(96)], "have the budgets of another sequence section."),
        (WINDOW, [pruned(None)], "have the budgets of another sequence section."),
        ({}, [windowed(64)], "have the budgets of another sequence section."),
        (WINDOW, [STOCK], "its KV-cache groups are FullAttentionSpec, and only full-attention"),
        (WINDOW, [], "its KV-cache groups are none, and only full-attention"),
        (REUSE, [STOCK], "none keeps KV that is not exact out of the prefix cache."),
        (REUSE, [], "none keeps KV that is not exact out of the prefix cache."),
        ({}, [APPROXIMATE], "KV-cache groups are those of another section."),
    ],
)
def test_anything_else_is_refused(
    refused: Callable[..., str], section: dict[str, Any], specs: list[Any], said: str
) -> None:
    found = refused(section, *specs)
    assert said in found
    assert " Fix: " in found and found.startswith("inline: kvplug")


def test_vllms_own_quantized_pages_are_no_format_of_ours(refused: Callable[..., str]) -> None:
    assert refused({}, INT8, cache_dtype="turboquant_k8v4") == ""


def test_blocks_managed_by_another_plugin_are_refused() -> None:
    deployment = load_deployment(WINDOW, key="kvplug")
    own = object.__new__(WindowedManager)
    own.kv_cache_spec = windowed(64)
    stock = object.__new__(FullAttentionManager)
    stock.kv_cache_spec = STOCK
    require_managers(deployment, [own, stock])
    stock.kv_cache_spec = windowed(64)
    with pytest.raises(DeploymentError, match="FullAttentionManager instead of WindowedManager"):
        require_managers(deployment, [own, stock])
    assert planned.manager_of(STOCK) is None
