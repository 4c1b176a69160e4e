"""What vLLM's attention layers are to a policy."""

from __future__ import annotations

from typing import Any

from kvplug.contract import LayerView, Policy


def layer_view(policy: Policy, name: str) -> LayerView:
    """Return a layer as its policy sees it.

    Args:
        policy: The policy.
        name: vLLM's name of the layer.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    return policy.engine.layers[extract_layer_index(name)]


def softcap_of(impl: Any) -> float:
    """Return the soft cap of an attention implementation's logits; 0 for none."""
    return float(getattr(impl, "logits_soft_cap", 0) or 0)
