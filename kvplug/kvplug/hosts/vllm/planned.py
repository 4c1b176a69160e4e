"""Compares the KV-cache groups that an engine has planned with what its deployment asks for."""

from __future__ import annotations

from typing import Any

import torch

from kvplug.contract import FormatPolicy, Kind, ScoringPolicy
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.engine import (
    at_start,
    format_policy,
    layer_rules,
    rule_of,
    sequence_policy,
)
from kvplug.hosts.vllm.spec import (
    ApproximateSpec,
    PrunedSpec,
    ShorteningSpec,
    WindowedSpec,
    manager_of,
)

APART = "start each engine in a process of its own."
"""The fix where engines of one process would share what vLLM keeps once per process."""


def require_planned(deployment: Deployment, vllm_config: Any, kv_cache_config: Any) -> None:
    """Check that the engine's KV-cache groups are what the deployment asks for.

    Raises:
        DeploymentError: No group can do what a policy needs, or some are those of another
            deployment.
    """
    groups = [(g.kv_cache_spec, g.layer_names) for g in kv_cache_config.kv_cache_groups]
    problem = (
        _sequence_problem(deployment, vllm_config, groups)
        or _kept_apart_problem(deployment, groups)
        or _format_problem(deployment, vllm_config, groups)
    )
    if problem is not None:
        raise DeploymentError(deployment.source, [problem])


def require_managers(deployment: Deployment, managers: list[Any]) -> None:
    """Check that vLLM manages the blocks of kvplug's specs by kvplug's managers.

    Raises:
        DeploymentError: Another plugin's manager has one of them.
    """
    for manager in managers:
        wanted = manager_of(manager.kv_cache_spec)
        if wanted is not None and not isinstance(manager, wanted):
            raise DeploymentError(
                deployment.source,
                [
                    Refusal(
                        "kvplug",
                        f"blocks of a {type(manager.kv_cache_spec).__name__} are managed by "
                        f"{type(manager).__name__} instead of {wanted.__name__}.",
                        "remove the plugin that replaced it.",
                    )
                ],
            )


def _key(deployment: Deployment, kind: Kind) -> str:
    choice = deployment.choice(kind)
    return choice.key if choice is not None else f"kvplug.{kind}"


def _sequence_problem(
    deployment: Deployment, vllm_config: Any, groups: list[tuple[Any, list[str]]]
) -> Refusal | None:
    choice, policy = deployment.choice(Kind.SEQUENCE), sequence_policy(deployment, vllm_config)
    own = [spec for spec, _ in groups if isinstance(spec, ShorteningSpec)]
    wanted = PrunedSpec if isinstance(policy, ScoringPolicy) else WindowedSpec
    rules = set() if choice is None else at_start(deployment, choice, layer_rules, policy)
    if any(type(s) is not wanted or rule_of(s) not in rules for s in own):
        return Refusal(
            _key(deployment, Kind.SEQUENCE),
            "KV-cache groups have the budgets of another sequence section.",
            APART,
        )
    if choice is None or own:
        return None
    names = ", ".join(sorted({type(s).__name__ for s, _ in groups})) or "none"
    return Refusal(
        choice.key,
        f"{choice.policy.name} cannot run on this model: its KV-cache groups are {names}, and "
        "only full-attention layers on CPU_ATTN, FLASH_ATTN or TRITON_ATTN, in groups of their "
        "own, can give blocks back.",
        "remove the sequence section, or set --attention-backend and leave "
        "--disable-hybrid-kv-cache-manager out.",
    )


def _kept_apart_problem(
    deployment: Deployment, groups: list[tuple[Any, list[str]]]
) -> Refusal | None:
    """Reuse, attention policies and codecs that change KV need groups that keep approximate KV out
    of the prefix cache."""
    asking = [kind for kind in (Kind.REUSE, Kind.ATTENTION) if deployment.choice(kind) is not None]
    if any(not one.codec.policy.exact for one in deployment.tiers):
        asking.append(Kind.TIERS)
    own = [spec for spec, _ in groups if isinstance(spec, ApproximateSpec)]
    if bool(own) == bool(asking):
        return None
    if own:
        return Refusal("kvplug", "KV-cache groups are those of another section.", APART)
    kind = asking[0]
    names = ", ".join(sorted({type(s).__name__ for s, _ in groups})) or "none"
    return Refusal(
        _key(deployment, kind),
        f"the {kind!s} section cannot run on this model: its KV-cache groups are {names}, and none "
        "keeps KV that is not exact out of the prefix cache.",
        f"remove the {kind!s} section, or set --attention-backend FLASH_ATTN or TRITON_ATTN.",
    )


def _format_problem(
    deployment: Deployment, vllm_config: Any, groups: list[tuple[Any, list[str]]]
) -> Refusal | None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    choice, policy = deployment.choice(Kind.FORMAT), format_policy(deployment, vllm_config)
    full = [
        (spec, names)
        for spec, names in groups
        if isinstance(spec, FullAttentionSpec) and spec.sliding_window is None
    ]
    if policy is None or choice is None:
        stock = vllm_config.cache_config.cache_dtype in ("auto", "bfloat16", "float16")
        if stock and any(spec.state_content_bytes is not None for spec, _ in full):
            return Refusal("kvplug.format", "pages are in the bytes of a format.", APART)
        return None
    key = _key(deployment, Kind.FORMAT)
    if not full:
        return Refusal(
            key,
            f"{policy.name} cannot run on this model: it has no full-attention layer with a KV "
            "cache.",
            "remove the format section for this model.",
        )
    for spec, names in full:
        stored = at_start(deployment, choice, _layouts, policy, names)
        if spec.dtype is not torch.uint8 or _stored(spec) not in stored:
            return Refusal(
                key,
                f"pages have {spec.state_content_size_bytes} bytes a token and head, and "
                f"{policy.name} needs others.",
                APART,
            )
    return None


def _stored(spec: Any) -> tuple[int | None, int | None]:
    """Bytes of a token and head, and stored heads."""
    return spec.state_content_bytes, spec.num_head_slots


def _layouts(policy: FormatPolicy, names: list[str]) -> set[tuple[int | None, int | None]]:
    """`_stored` of some layers, as a format lays them out."""
    from vllm.model_executor.models.utils import extract_layer_index

    layouts = [policy.layout(policy.engine.layers[extract_layer_index(name)]) for name in names]
    return {(layout.bytes_per_token_head, layout.heads) for layout in layouts}
