"""Plans agree with vLLM's own arithmetic, and with the pools that engines then have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.kv_cache_utils import _get_kv_cache_bytes_per_block, get_kv_cache_groups
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    replace_as,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvplug.hosts.sizes import tail_fields
from kvplug.hosts.vllm.spec import PrunedSpec, WindowedSpec
from kvplug.hosts.vllm.worker.page_tails import with_tail
from kvplug.parser import load_deployment
from kvplug.planning.candidates import Candidate, candidates
from kvplug.planning.model import Model, read_model
from kvplug.planning.plan import GIB, Planned, Planner, Question
from kvplug.planning.plan import plan as planned
from kvplug.planning.pool import Pruned
from kvplug.planning.weights import Weights
from kvplug_lab.engine.trial import TrialRequest, TrialResult

CONFIGS = Path(__file__).resolve().parents[1] / "kvplug" / "tests" / "model_configs"
CONTEXT, BATCHED = 8192, 2048
Run = Callable[..., TrialResult]


def question(**given: Any) -> Question:
    return Question(
        **{
            "memory": 40 * GIB,
            "context": CONTEXT,
            "weights": Weights(0, "none"),
            "batched": BATCHED,
            **given,
        }
    )


# -- vLLM's arithmetic -----------------------------------------------------------------------------


def vllm_config() -> Any:
    """What vLLM's functions read of a config."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: KVCacheLayout.LBHNC),
        model_config=SimpleNamespace(max_model_len=CONTEXT, hf_config=SimpleNamespace()),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        speculative_config=None,
        max_in_flight_tokens=2 * BATCHED,
    )


def specs_of(model: Model, candidate: Candidate) -> dict[str, KVCacheSpec]:
    """The specs that vLLM's layers would have, made as the workers of the kinds make them."""
    planner = Planner(model, question())
    flags = {"block-size": 16, "max-num-batched-tokens": BATCHED, "max-model-len": CONTEXT}
    deployment = load_deployment(dict(candidate.section))
    policies = planner._built(deployment, flags | dict(candidate.flags))
    block_size = int(candidate.flags.get("block-size", 16))
    found: dict[str, KVCacheSpec] = {}
    for layer, view in zip(model.layers, policies.engine.layers, strict=True):
        dtype = getattr(torch, model.dtype)
        if "kv-cache-dtype" in candidate.flags:
            dtype = torch.float8_e4m3fn
        common: dict[str, Any] = {
            "block_size": block_size,
            "num_kv_heads": view.num_kv_heads,
            "head_size": layer.head_size,
            "dtype": dtype,
        }
        name = f"model.layers.{layer.index}.self_attn.attn"
        if model.latent:
            found[name] = MLAAttentionSpec(**common)
            continue
        if layer.window is not None:
            found[name] = SlidingWindowSpec(**common, sliding_window=layer.window)
            continue
        spec: Any = FullAttentionSpec(**common)
        if policies.format is not None:
            rule = policies.format.layout(view)
            spec = replace(
                spec,
                dtype=torch.uint8,
                state_content_bytes=rule.bytes_per_token_head,
                num_head_slots=rule.heads,
            )
        found[name] = _shortened(spec, policies, view)
    return found


def _shortened(spec: Any, policies: Any, view: Any) -> Any:
    sequence = policies.sequence
    if sequence is None:
        return spec
    own = {"in_flight_tokens": 2 * BATCHED, "max_tokens": CONTEXT, "exact_tokens": 0}
    window = sequence.window(view)
    if window is not None:
        return replace_as(
            spec,
            WindowedSpec,
            sink_tokens=window.sink_blocks * spec.block_size,
            window_tokens=window.window_blocks * spec.block_size,
            **own,
        )
    from kvplug.hosts.vllm.engine import layer_limits

    spec = replace_as(spec, PrunedSpec, limits=layer_limits(sequence, view), **own)
    return with_tail(spec, tail_fields(sequence.wants_cumulative_attention))


NAMES = [c.name for c in candidates(1024)]
ALL = [("llama-3.1-8b", n) for n in NAMES] + [
    (model, name)
    for model in ("gemma-3-1b", "gemma-3-4b", "deepseek-v2-lite", "llama-2-70b", "qwen2.5-7b")
    for name in ("stock", "stock_fp8", "snapkv", "pyramidkv", "sink_window")
]


@pytest.mark.parametrize(("config", "name"), ALL)
def test_groups_and_bytes_of_a_block_are_vllms(config: str, name: str) -> None:
    model = read_model(str(CONFIGS / f"{config}.json"))
    (candidate,) = [c for c in candidates(1024) if c.name == name]
    (found,) = planned(model, question(), [candidate])
    if found.pool is None:
        assert model.latent or model.features or "calibration" in (found.refused or "")
        return
    specs, fake = specs_of(model, candidate), vllm_config()
    groups = get_kv_cache_groups(fake, specs)
    assert found.pool.block_bytes == _get_kv_cache_bytes_per_block(groups, KVCacheLayout.LBHNC)
    sizes = sorted((len(g.layer_names), g.kv_cache_spec.block_size) for g in groups)
    assert sizes == sorted((g.layers, g.block_size) for g in found.pool.groups)
    # What vLLM admits a request by knows no limit of the pool on a prompt before its eviction.
    unlimited = [
        Pruned(g.rule.limits.with_prefill_limit(0)) if isinstance(g.rule, Pruned) else g.rule
        for g in found.pool.groups
    ]
    texts = question().texts(2 * BATCHED)
    admitted = sum(
        rule.blocks(texts, g.block_size).admitted
        for rule, g in zip(unlimited, found.pool.groups, strict=True)
    )
    assert admitted == sum(
        -(-g.kv_cache_spec.max_memory_usage_bytes(fake) // g.kv_cache_spec.page_size_bytes)
        for g in groups
    )


# -- engines ---------------------------------------------------------------------------------------

ENGINES = {
    "int4": {"format": {"use": "int4", "layers": {"0-1": 8, "-1": 8}}},
    "stock": {},
    "snapkv": {"sequence": {"use": "snapkv", "budget": 256, "shared": 128}},
    "h2o+int8": {
        "sequence": {"use": "h2o", "budget": 256},
        "format": {"use": "int8"},
    },
}


def of_engine(section: dict[str, Any], model: Path) -> Planned:
    """Plan the engine that `run` starts: 1 GiB of KV, on a CPU."""
    flags = {"block-size": 32, "no-async-scheduling": True, "max-num-batched-tokens": 256}
    asked = question(
        memory=GIB, context=1024, output=64, batched=256, utilization=1.0, overhead=0, slots=8
    )
    candidate = Candidate("engine", section, flags)
    (first,) = planned(read_model(str(model)), asked, [candidate])
    # There what policies keep beside the pages is not taken from the pool's memory.
    (found,) = planned(
        read_model(str(model)), replace(asked, memory=GIB + first.beside), [candidate]
    )
    return found


@pytest.mark.parametrize(
    "name", ["int4", *(pytest.param(n, marks=pytest.mark.slow) for n in list(ENGINES)[1:])]
)
def test_the_engine_has_the_planned_pool(run: Run, smollm2: Path, name: str) -> None:
    section = ENGINES[name]
    found = of_engine(section, smollm2)
    assert found.pool is not None
    result = run(
        smollm2,
        [TrialRequest("To be, or not to be", 4)],
        section or None,
        env={"VLLM_CPU_KVCACHE_SPACE": "1"},
        max_model_len=1024,
        max_num_batched_tokens=256,
        max_num_seqs=8,
        block_size=32,
        dtype="bfloat16",
    )
    assert abs(result.num_blocks - found.pool.usable) <= 1
    assert result.block_bytes == found.pool.block_bytes
    if "sequence" in section:
        assert sum(result.cap_blocks) == found.admitted
