"""Checks each attention layer that vLLM has built against what a deployment's policies support.

A model's config does not say all of it: layers may share KV, have windows, heads or a KV dtype of
their own, and draft models bring layers of their own. The layers say it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from kvplug.contract import Feature, Kind, LayerView
from kvplug.deployment import Choice, Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.features import FULL_PRECISION
from kvplug.hosts.vllm.view import engine_view

SHAPING = (Kind.SEQUENCE, Kind.REUSE, Kind.ATTENTION, Kind.FORMAT)
"""Kinds that shape attention layers."""


class LayerCheck:
    """Refuses layers that a deployment cannot shape.

    Args:
        deployment: The deployment, checked against the engine.
        vllm_config: The engine's config.
    """

    def __init__(self, deployment: Deployment, vllm_config: Any):
        self._deployment = deployment
        self._choices = [c for kind in SHAPING for c in deployment.choices.get(kind, ())]
        self._config = vllm_config
        self._names: dict[int, str] = {}

    @cached_property
    def _layers(self) -> tuple[LayerView, ...]:
        return engine_view(self._config).layers

    def __call__(self, name: str, layer: Any) -> None:
        """Check a layer whose weights were loaded.

        Args:
            name: Its name.
            layer: vLLM's attention layer.

        Raises:
            DeploymentError: A policy does not support it.
        """
        for choice in self._choices:
            for what in self._unfit(choice, name, layer):
                kind = choice.policy.kind
                raise DeploymentError(
                    self._deployment.source,
                    [
                        Refusal(
                            choice.key,
                            f"{choice.policy.name} cannot run on this model: attention layer "
                            f"{name} {what}.",
                            f"remove the {kind!s} section for this model.",
                            self._deployment.lines.get(choice.key),
                        )
                    ],
                )

    def _unfit(self, choice: Choice, name: str, layer: Any) -> Iterator[str]:
        for feature, what in layer_features(layer):
            if feature not in choice.policy.supports:
                yield what
        if keeps_no_kv(layer):
            return
        index = _index(name)
        if index is None or index >= len(self._layers):
            yield f"is not one of its {len(self._layers)} decoder layers"
            return
        other = self._names.setdefault(index, name)
        if other != name:
            yield f"has the number of {other}"
        if choice.policy.kind is Kind.SEQUENCE and not choice.policy.mutates_blocks:
            return
        if different := _differences(layer, self._layers[index]):
            yield f"has {different}"


def layer_features(layer: Any) -> Iterator[tuple[Feature, str]]:
    """Yield the features that a layer of vLLM's shows, each with what the layer does."""
    target = getattr(layer, "kv_sharing_target_layer_name", None)
    if target is not None:
        yield Feature.KV_SHARING, f"shares the KV of {target}"
    if getattr(layer, "sliding_window", None) is not None:
        yield Feature.SLIDING_WINDOW_LAYERS, f"has a sliding window of {layer.sliding_window}"
    stored = getattr(layer, "kv_cache_dtype", "auto")
    if stored not in FULL_PRECISION:
        yield Feature.QUANTIZED_KV_CACHE, f"has a quantized KV cache ({stored})"


def keeps_no_kv(layer: Any) -> bool:
    """True for a layer of an encoder, which attends once and keeps nothing."""
    return getattr(layer, "attn_type", "decoder") in ("encoder", "encoder_only")


def _index(name: str) -> int | None:
    """Number of a layer, or None where its name has none or several."""
    from vllm.model_executor.models.utils import extract_layer_index

    try:
        return int(extract_layer_index(name))
    except (AssertionError, ValueError):
        return None


def _differences(layer: Any, view: LayerView) -> str:
    """In what a layer differs from what its policy was built for; empty for nothing."""
    size, kv_heads = view.head_size, view.num_kv_heads
    compared = (
        ("heads", getattr(layer, "num_heads", view.num_heads), view.num_heads),
        ("KV heads", getattr(layer, "num_kv_heads", kv_heads), kv_heads),
        ("elements per head", getattr(layer, "head_size", size), size),
        ("elements per head of its values", getattr(layer, "head_size_v", size), size),
    )
    found = [f"{has} {what} instead of {want}" for what, has, want in compared if has != want]
    dtype = getattr(layer, "kv_cache_torch_dtype", None)
    stored = str(dtype).removeprefix("torch.")
    if dtype is not None and stored != view.dtype:
        found.append(f"KV stored as {stored} instead of {view.dtype}")
    return ", ".join(found)
