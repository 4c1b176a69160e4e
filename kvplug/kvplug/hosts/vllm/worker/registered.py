"""Compares the KV caches that a worker was given with what its kinds ask for.

Whatever keeps a policy from the layers (another plugin, another engine of the process, a backend
vLLM chose by itself, a plugin that was not loaded) shows here, before the first request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from kvplug.hosts.vllm.planned import APART
from kvplug.hosts.vllm.worker.backend import STOCK
from kvplug.hosts.vllm.worker.composition import is_door, takes_steps
from kvplug.hosts.vllm.worker.kind import KindWorker
from kvplug.hosts.vllm.worker.layer_check import keeps_no_kv

FREE_FIELDS = frozenset({"block_stride_alignment", "dcp_sharded", "max_tp_shards"})
"""Fields of a KV-cache spec that are vLLM's alone."""


def require_own(layers: Mapping[str, Any], caches: Mapping[str, Tensor]) -> str | None:
    """Return what is wrong where the caches are those of another engine, or None.

    Args:
        layers: The engine's layers, by name.
        caches: The caches a worker was given, by layer name.
    """
    for name, cache in caches.items():
        layer = layers.get(name)
        bound = getattr(layer, "kv_cache", None)
        if layer is None or (isinstance(bound, Tensor) and bound.data_ptr() != cache.data_ptr()):
            return (
                f"the KV cache of {name} belongs to another engine of this process, and vLLM keeps "
                "one connector per process."
            )
    return None


def require_registered(
    kinds: Sequence[KindWorker],
    layers: Mapping[str, Any],
    caches: Mapping[str, Tensor],
    kv_cache_config: Any,
    vllm_config: Any,
    built: set[str],
) -> None:
    """Check that layers, metadata builders and pages are what the kinds made them.

    Args:
        kinds: The kinds.
        layers: The engine's layers, by name.
        caches: Their KV caches, by layer name.
        kv_cache_config: vLLM's plan of them.
        vllm_config: The engine's config.
        built: Layers that one of the engine's metadata builders was made for.

    Raises:
        DeploymentError: One is not.
    """
    planned = planned_specs(kv_cache_config)
    for name, cache in caches.items():
        layer = layers[name]
        if not hasattr(layer, "attn_backend") or keeps_no_kv(layer):
            continue
        problem = _backend_problem(kinds, name, layer)
        windowed = getattr(layer, "sliding_window", None) is not None
        if problem is None and not windowed:
            problem = _cache_problem(
                name, layer, cache, planned.get(name), kv_cache_config.num_blocks, vllm_config
            )
            if problem is None and name not in built:
                problem = (f"vLLM builds the metadata of {name} by a builder of its own.", APART)
        for kind in kinds:
            if problem is not None:
                what, fix = problem
                kind.refuse(
                    f"the engine is not what the {kind.kind!s} section asks for: {what}", fix
                )


def planned_specs(kv_cache_config: Any) -> dict[str, Any]:
    """KV-cache spec of each layer that vLLM has planned a cache for, by layer name."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    found: dict[str, Any] = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        many = spec.kv_cache_specs if isinstance(spec, UniformTypeKVCacheSpecs) else {}
        found |= {name: many.get(name, spec) for name in group.layer_names}
    return found


def _backend_problem(kinds: Sequence[KindWorker], name: str, layer: Any) -> tuple[str, str] | None:
    backend = layer.attn_backend
    if is_door(backend):
        return f"{name} was loaded past vLLM's weight processing.", "set --load-format auto."
    if takes_steps(backend):
        own = getattr(layer.impl, "kvplug_kinds", None)
        return None if own is kinds else (f"{name} belongs to another engine.", APART)
    if getattr(layer, "sliding_window", None) is not None:  # vLLM's, whatever the kinds
        return None
    if any(is_door(base) or "kvplug_rules" in vars(base) for base in backend.__mro__):
        return (
            f"attention layer {name} attends in a way of its own ({backend.__name__}).",
            "remove the section for this model.",
        )
    if not STOCK:
        return (
            f"kvplug's plugin is not loaded in the process of attention layer {name}.",
            "add kvplug to VLLM_PLUGINS, or unset it.",
        )
    if backend.get_name() in STOCK:
        return (
            f"attention layer {name} was built by vLLM's own {backend.__name__}, which an engine "
            "with another connector chose in this process before.",
            APART,
        )
    return (
        f"attention layer {name} runs on {backend.get_name()}.",
        "set --attention-backend FLASH_ATTN or TRITON_ATTN.",
    )


def _cache_problem(
    name: str, layer: Any, cache: Tensor, planned: Any, num_blocks: int, vllm_config: Any
) -> tuple[str, str] | None:
    asked = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(vllm_config))
    if planned is None:
        return f"vLLM planned no KV cache for {name}.", APART
    if differing := spec_differences(asked, planned):
        return f"the KV cache that vLLM planned for {name} has {differing}.", APART
    shape = (num_blocks, asked.num_heads, asked.block_size, asked.state_content_size_bytes)
    has = (*cache.shape[:-1], cache.shape[-1] * cache.element_size())
    if has != shape or cache.dtype != asked.dtype:
        return (
            f"the pages of {name} are {cache.dtype} of {list(has)} bytes instead of {asked.dtype} "
            f"of {list(shape)}.",
            APART,
        )
    return None


def spec_differences(asked: Any, planned: Any) -> str:
    """In what a planned KV-cache spec differs from the one asked for; empty for nothing."""
    if type(planned) is not type(asked):
        return f"a {type(planned).__name__} instead of a {type(asked).__name__}"
    found = []
    for name in (f.name for f in fields(asked) if f.name not in FREE_FIELDS):
        has, want = getattr(planned, name), getattr(asked, name)
        # vLLM makes pages longer to be those of other layers, and never shorter.
        longer = name == "page_size_padded" and (want is None or (has or 0) >= want)
        if has != want and not longer:
            found.append(f"{name} {has} instead of {want}")
    return ", ".join(found)
