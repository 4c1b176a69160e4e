"""Builds a deployment's policies for an engine, and reads the rules they give layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from kvplug.containment import STARTING, Contained, PolicyFailure
from kvplug.contract import (
    AttentionPolicy,
    EngineView,
    FormatPolicy,
    Kind,
    LayerView,
    ReuseCheck,
    ScoringPolicy,
    SequencePolicy,
    Window,
)
from kvplug.deployment import Choice, Deployment
from kvplug.errors import DeploymentError
from kvplug.hosts import torch_state
from kvplug.hosts.pruning import Limits
from kvplug.hosts.vllm.connector_flag import CONNECTOR, MODULE
from kvplug.hosts.vllm.view import engine_view

Answer = TypeVar("Answer")


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Restore torch's own default dtype within. vLLM loads models, and asks for backends, under
    the model's dtype, in which a policy's tables would be rounded."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def at_start(
    deployment: Deployment, choice: Choice, ask: Callable[..., Answer], *arguments: Any
) -> Answer:
    """Ask a policy something on which the engine's start depends.

    Args:
        deployment: The deployment.
        choice: The policy in it.
        ask: Calls the policy.
        arguments: What it is called with.

    Raises:
        DeploymentError: The policy failed, and the refusal names it; or ``ask`` raised it.
    """
    name = f"{choice.policy.kind!s} policy {choice.policy.name!r}"
    refused: list[DeploymentError] = []

    def asked() -> Answer:
        try:
            return ask(*arguments)
        except DeploymentError as error:
            refused.append(error)
            raise

    before = torch_state.state()
    try:
        answer: Answer = Contained(choice, STARTING, name).run(asked)
    except PolicyFailure as failure:
        if refused:
            raise refused[0] from None
        problem = deployment.refusal(choice, failure.problem)
        raise DeploymentError(deployment.source, [problem]) from failure
    finally:
        torch_state.restore(before)
    return answer


def is_kvplug(vllm_config: Any) -> bool:
    """True if a vLLM config enables kvplug."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and (
        transfer.kv_connector == CONNECTOR and transfer.kv_connector_module_path == MODULE
    )


@plain_defaults()
def reuse_checks(deployment: Deployment, view: EngineView) -> list[ReuseCheck]:
    """Build the deployment's chain of checks for an engine."""
    found = []
    for choice in deployment.choices.get(Kind.REUSE, ()):
        check = at_start(deployment, choice, choice.build, view)
        assert isinstance(check, ReuseCheck)
        found.append(check)
    return found


@plain_defaults()
def sequence_policy(deployment: Deployment, vllm_config: Any) -> SequencePolicy | None:
    """Build the deployment's sequence policy for the engine, or None."""
    choice = deployment.choice(Kind.SEQUENCE)
    if choice is None:
        return None
    policy = at_start(deployment, choice, choice.build, engine_view(vllm_config))
    assert isinstance(policy, SequencePolicy)
    return policy


@plain_defaults()
def attention_policy(deployment: Deployment, vllm_config: Any) -> AttentionPolicy | None:
    """Build the deployment's attention policy for the engine, or None."""
    choice = deployment.choice(Kind.ATTENTION)
    if choice is None:
        return None
    policy = at_start(deployment, choice, choice.build, engine_view(vllm_config))
    assert isinstance(policy, AttentionPolicy)
    return policy


@plain_defaults()
def format_policy(deployment: Deployment, vllm_config: Any) -> FormatPolicy | None:
    """Build the deployment's format policy for the engine, or None."""
    choice = deployment.choice(Kind.FORMAT)
    if choice is None:
        return None
    policy = at_start(deployment, choice, choice.build, engine_view(vllm_config))
    assert isinstance(policy, FormatPolicy)
    return policy


def layer_limits(policy: ScoringPolicy, layer: LayerView) -> Limits:
    """Limits that a scoring policy sets for a layer. Raises ValueError if they cannot work."""
    return Limits.of(policy, layer, policy.engine.block_size)


def share_groups(policy: ScoringPolicy) -> list[float]:
    """Distinct shares of a policy's layers, ascending: one KV-cache group each."""
    return sorted({policy.share(layer) for layer in policy.engine.layers})


def layer_rules(policy: SequencePolicy | None) -> set[Window | Limits | None]:
    """Distinct rules of a policy's layers; empty without a policy.

    Raises:
        ValueError: A layer's rule cannot work.
    """
    if policy is None:
        return set()
    layers = policy.engine.layers
    if isinstance(policy, ScoringPolicy):
        return {layer_limits(policy, layer) for layer in layers}
    rules: set[Window | Limits | None] = set()
    for layer in layers:
        window = policy.window(layer)
        if window is not None and type(window) is not Window:
            raise ValueError(f"window of layer {layer.index} must be a Window, got {window!r}")
        rules.add(window)
    return rules


def rule_of(spec: Any) -> Window | Limits:
    """The rule of one of kvplug's KV-cache specs."""
    found: Window | Limits = spec.limits if hasattr(spec, "limits") else spec.window
    return found
