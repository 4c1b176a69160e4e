"""Reads the deployment of a vLLM config and refuses what cannot run on that engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvplug.contract import Kind, ScoringPolicy
from kvplug.deployment import Choice, Deployment
from kvplug.errors import DeploymentError, Refusal, change_options
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.engine import (
    format_policy,
    layer_limits,
    layer_rules,
    plain_defaults,
    rule_of,
    sequence_policy,
)
from kvplug.hosts.vllm.flags import EXTENSION, GUARD, REQUEST_CHECK, REQUEST_CHECK_MIDDLEWARE, RUNS
from kvplug.hosts.vllm.spec import ShorteningSpec
from kvplug.hosts.vllm.view import engine_view
from kvplug.parser import load_deployment

SECTION = "kv_transfer_config.kv_connector_extra_config.kvplug"


@plain_defaults()
def deployment_of(vllm_config: Any) -> Deployment:
    """Read a vLLM config's deployment and check it against the engine.

    Raises:
        DeploymentError: The section is missing or wrong, or cannot run on this engine.
    """
    transfer = vllm_config.kv_transfer_config
    section = transfer.kv_connector_extra_config.get("kvplug")
    if section is None:
        raise DeploymentError(
            "inline",
            [Refusal(SECTION, "is missing.", "add `kvplug: {}` or a section with policies.")],
        )
    view = engine_view(vllm_config)
    deployment = load_deployment(section, key=SECTION, engine=view)
    installed = compat.version()
    if not compat.is_tested(installed):
        raise DeploymentError(
            deployment.source,
            [
                Refusal(
                    "vllm",
                    f"version {installed} was never tested with kvplug.",
                    f"install vLLM {' or '.join(compat.TESTED)}; see `kvplug doctor`.",
                )
            ],
        )
    deployment.require_compatible(view, runs=RUNS, host="vllm")
    if refusals := [
        *_request_refusals(deployment, vllm_config),
        *_layer_refusals(deployment, vllm_config),
    ]:
        raise DeploymentError(deployment.source, refusals)
    return deployment


def require_groups(deployment: Deployment, vllm_config: Any, kv_cache_config: Any) -> None:
    """Check that the engine's KV-cache groups are what the sequence policy needs.

    Raises:
        DeploymentError: No group can give blocks back, or some have rules of another deployment.
    """
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    choice = deployment.choice(Kind.SEQUENCE)
    specs = [
        layer
        for group in kv_cache_config.kv_cache_groups
        for layer in (
            group.kv_cache_spec.kv_cache_specs.values()
            if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
            else (group.kv_cache_spec,)
        )
    ]
    shortened = [spec for spec in specs if isinstance(spec, ShorteningSpec)]
    # vLLM caches the choice of attention backend per process, whatever the section says.
    rules = layer_rules(sequence_policy(deployment, vllm_config))
    if {rule_of(spec) for spec in shortened} - rules:
        refusal = Refusal(
            choice.key if choice is not None else "kvplug.sequence",
            "an engine with another sequence section ran in this process before, and vLLM still "
            "uses its budgets.",
            "start each engine in a process of its own.",
        )
        raise DeploymentError(deployment.source, [refusal])
    if choice is not None and not shortened:
        names = ", ".join(sorted({type(s).__name__ for s in specs})) or "none"
        refusal = Refusal(
            choice.key,
            f"{choice.policy.name} cannot run on this model: its KV-cache groups are {names}, and "
            "only full-attention layers on CPU_ATTN, FLASH_ATTN or TRITON_ATTN, in groups of their "
            "own, can give blocks back.",
            "remove the sequence section, or set --attention-backend and leave "
            "--disable-hybrid-kv-cache-manager out.",
        )
        raise DeploymentError(deployment.source, [refusal])


def _request_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    if deployment.on_bad_request != "refuse" or _has_processor(vllm_config, REQUEST_CHECK):
        return []
    return [
        Refusal(
            f"{SECTION}.on_bad_request" if deployment.source == "inline" else "on_bad_request",
            "nothing checks requests before they enter the engine.",
            f"set --logits-processors {REQUEST_CHECK} and, for HTTP 400 on streamed requests, "
            f"--middleware {REQUEST_CHECK_MIDDLEWARE}; kvplug serve does.",
        )
    ]


def _has_processor(vllm_config: Any, name: str) -> bool:
    """True where a logits processor is configured by ``module:class`` or as the class itself."""
    return any(
        name == (f"{p.__module__}:{p.__qualname__}" if isinstance(p, type) else p)
        for p in vllm_config.model_config.logits_processors or ()
    )


def _layer_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    chosen = [kind for kind in REFUSALS if deployment.choice(kind) is not None]
    found = []
    for kind in chosen:
        choice = deployment.choice(kind)
        assert choice is not None
        found += _model_refusals(choice, vllm_config) + _batch_refusals(choice, vllm_config)
    for kind in chosen:
        if not found:
            found = REFUSALS[kind](deployment, vllm_config)
    return found


def _reuse_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    key = deployment.choices[Kind.REUSE][0].key.split(".use")[0]
    found = []

    def refuse(below: str, problem: str, fix: str) -> None:
        found.append(Refusal(f"{key}{below}", problem, fix))

    if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
        refuse(
            "",
            "a segment that cannot be loaded would fail its request.",
            "set kv_load_failure_policy: recompute in kv-transfer-config.",
        )
    recompute = deployment.reuse.recompute
    if recompute.needed:
        parallel = vllm_config.parallel_config
        if parallel.worker_extension_cls != EXTENSION:
            refuse(
                ".recompute",
                "recomputing inside a run needs access to the model.",
                f"set --worker-extension-cls {EXTENSION}, or recompute: {{gaps: 0}}.",
            )
        for on, what in (
            (vllm_config.lora_config is not None, "LoRA"),
            (vllm_config.model_config.uses_mrope, "multi-axis rotary positions"),
        ):
            if on:
                refuse(
                    ".recompute",
                    f"does not support {what}.",
                    "remove the recompute section.",
                )
    if deployment.guard is not None and not _has_processor(vllm_config, GUARD):
        above = key.rsplit(".", 1)[0] if "." in key else ""
        found.append(
            Refusal(
                f"{above}.guard".lstrip("."),
                "needs a logits processor that is not enabled.",
                f"set --logits-processors {GUARD}.",
            )
        )
    policy = format_policy(deployment, vllm_config)
    if policy is not None:
        apart = any(policy.recent(layer) for layer in policy.engine.layers)
        if apart or len(policy.assignments()) > 1:
            refuse(
                "",
                f"format {policy.name} stores each request in its own way, so one request cannot "
                "read the bytes of another.",
                "choose another format or remove reuse.",
            )
    return found


def _model_refusals(choice: Choice, vllm_config: Any) -> list[Refusal]:
    model = vllm_config.model_config
    found = []
    for on, what in (
        (model.use_mla, "multi-head latent attention (MLA)"),
        (model.is_attention_free, "no attention layers (Mamba)"),
        (model.is_hybrid, "state-space layers beside attention (hybrid)"),
        (model.is_encoder_decoder, "an encoder and a decoder"),
    ):
        if on:
            found.append(
                Refusal(
                    choice.key,
                    f"{choice.policy.name} cannot run on a model with {what}.",
                    f"remove the {choice.policy.kind!s} section for this model.",
                )
            )
    return found


def _batch_refusals(choice: Choice, vllm_config: Any) -> list[Refusal]:
    if not vllm_config.parallel_config.use_ubatching:
        return []
    return [
        Refusal(
            choice.key,
            f"{choice.policy.name} needs a step's metadata in one piece, and microbatches build it "
            "in two.",
            "remove --enable-dbo and --ubatch-size.",
        )
    ]


def _format_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    choice = deployment.choice(Kind.FORMAT)
    policy = format_policy(deployment, vllm_config)
    assert choice is not None and policy is not None
    key, name = choice.key.removesuffix(".use"), policy.name
    size = policy.engine.block_size
    try:
        for layer in policy.engine.layers:
            layout, recent = policy.layout(layer), policy.recent(layer)
            if recent and size % recent:
                return [
                    Refusal(
                        choice.key,
                        f"{name} keeps {recent} recent tokens of layer {layer.index}, which does "
                        f"not divide the block size of {size} tokens.",
                        f"set --block-size {-(-size // recent) * recent}.",
                    )
                ]
            if layout.heads is not None and layout.heads > layer.num_kv_heads:
                raise ValueError(f"layer {layer.index} has more stored heads than KV heads")
    except Exception as error:
        fix = change_options(str(error), policy.Options.model_fields)
        return [Refusal(key, f"{name}: {error}.", fix)]
    other = deployment.choice(Kind.SEQUENCE)
    scoring = other is not None and issubclass(other.policy, ScoringPolicy)
    merged = any(policy.layout(layer).heads is not None for layer in policy.engine.layers)
    if scoring and (not policy.moves_tokens or merged):
        assert other is not None
        why = "its heads share one stored head" if merged else "its tokens share scales"
        return [
            Refusal(
                choice.key,
                f"{name} does not support sequence policy {other.policy.name}, which moves single "
                f"tokens of single heads: {why}.",
                "choose another format, or a positional sequence policy such as sink_window.",
            )
        ]
    return []


def _sequence_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    choice = deployment.choice(Kind.SEQUENCE)
    policy = sequence_policy(deployment, vllm_config)
    assert choice is not None and policy is not None
    key = choice.key.removesuffix(".use")
    try:
        rules = layer_rules(policy)
    except Exception as error:
        fix = change_options(str(error), policy.Options.model_fields)
        return [Refusal(key, f"{policy.name}: {error}.", fix)]
    if isinstance(policy, ScoringPolicy):
        return _scoring_refusals(policy, choice.key, vllm_config)
    if None in rules:
        return [
            Refusal(
                choice.key,
                f"{policy.name} gives no window, and is no ScoringPolicy.",
                "return a Window for every layer, or derive it from ScoringPolicy.",
            )
        ]
    return []


def _scoring_refusals(policy: ScoringPolicy, key: str, vllm_config: Any) -> list[Refusal]:
    if vllm_config.use_v2_model_runner and policy.options.on_demand:
        return [
            Refusal(
                f"{key.removesuffix('.use')}.on_demand",
                "evicted tokens are recalled from host memory inside a step, where vLLM's second "
                "model runner never waits for the device.",
                "remove it, or set VLLM_USE_V2_MODEL_RUNNER=0.",
            )
        ]
    least = min(layer_limits(policy, layer).kept(0) for layer in policy.engine.layers)
    if policy.observation > least * policy.engine.block_size:
        return [
            Refusal(
                key,
                f"{policy.name} observes {policy.observation} queries and may keep as few as "
                f"{least * policy.engine.block_size} tokens.",
                "raise budget or recent, or lower the number of observed queries.",
            )
        ]
    return []


def _attention_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    choice = deployment.choice(Kind.ATTENTION)
    assert choice is not None
    key, name = choice.key.removesuffix(".use"), choice.policy.name
    stored = format_policy(deployment, vllm_config)
    if stored is not None and any(stored.recent(layer) for layer in stored.engine.layers):
        return [
            Refusal(
                key,
                f"format {stored.name} keeps recent tokens outside the pages, where {name} does "
                "not read them.",
                "choose another format or remove the attention section.",
            )
        ]
    if stored is not None and len(stored.assignments()) > 1:
        return [
            Refusal(
                key,
                f"format {stored.name} stores each request in its own way, and {name} attends the "
                "rows of a step apart.",
                "choose another format or remove the attention section.",
            )
        ]
    return []


REFUSALS: dict[Kind, Callable[[Deployment, Any], list[Refusal]]] = {
    Kind.SEQUENCE: _sequence_refusals,
    Kind.FORMAT: _format_refusals,
    Kind.REUSE: _reuse_refusals,
    Kind.ATTENTION: _attention_refusals,
}
"""Refusals by kind, of kinds that touch attention layers; in this order, until one refuses."""
