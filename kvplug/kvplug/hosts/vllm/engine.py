"""What a vLLM config says, as the views policies receive, and the deployment it carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvplug.contract import (
    EngineView,
    FormatPolicy,
    Kind,
    LayerView,
    ReuseCheck,
    ScoringPolicy,
    SequencePolicy,
    Window,
)
from kvplug.deployment import Deployment
from kvplug.hosts.pruning import Limits
from kvplug.hosts.vllm.flags import CONNECTOR, MODULE
from kvplug.hosts.vllm.view import engine_view

if TYPE_CHECKING:
    pass


@contextmanager
def plain_defaults() -> Iterator[None]:
    """torch's own default dtype within: vLLM loads models, and asks for backends, under the
    model's, in which a policy's tables would come out rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def is_kvplug(vllm_config: Any) -> bool:
    """Whether a vLLM config turns kvplug on."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and (
        transfer.kv_connector == CONNECTOR and transfer.kv_connector_module_path == MODULE
    )


@plain_defaults()
def reuse_checks(deployment: Deployment, view: EngineView) -> list[ReuseCheck]:
    """The deployment's chain of checks, built for an engine."""
    found = []
    for choice in deployment.choices.get(Kind.REUSE, ()):
        check = choice.build(view)
        assert isinstance(check, ReuseCheck)
        found.append(check)
    return found


@plain_defaults()
def sequence_policy(deployment: Deployment, vllm_config: Any) -> SequencePolicy | None:
    """The deployment's sequence policy, built for the engine, or None."""
    choice = deployment.choice(Kind.SEQUENCE)
    if choice is None:
        return None
    policy = choice.build(engine_view(vllm_config))
    assert isinstance(policy, SequencePolicy)
    return policy


@plain_defaults()
def format_policy(deployment: Deployment, vllm_config: Any) -> FormatPolicy | None:
    """The deployment's format policy, built for the engine, or None."""
    choice = deployment.choice(Kind.FORMAT)
    if choice is None:
        return None
    policy = choice.build(engine_view(vllm_config))
    assert isinstance(policy, FormatPolicy)
    return policy


def layer_limits(policy: ScoringPolicy, layer: LayerView) -> Limits:
    """What a scoring policy keeps of a layer. Raises ValueError where that cannot work."""
    return Limits.of(policy, layer, policy.engine.block_size)


def share_groups(policy: ScoringPolicy) -> list[float]:
    """The distinct shares of a policy's layers, ascending: one KV-cache group each."""
    return sorted({policy.share(layer) for layer in policy.engine.layers})


def layer_rules(policy: SequencePolicy | None) -> set[Window | Limits | None]:
    """The distinct rules of a policy's layers; empty without one.

    Raises:
        ValueError: A layer's rule cannot work.
    """
    if policy is None:
        return set()
    layers = policy.engine.layers
    if isinstance(policy, ScoringPolicy):
        return {layer_limits(policy, layer) for layer in layers}
    return {policy.window(layer) for layer in layers}


def rule_of(spec: Any) -> Window | Limits:
    """The rule a KV-cache spec of kvplug's carries."""
    found: Window | Limits = spec.limits if hasattr(spec, "limits") else spec.window
    return found
