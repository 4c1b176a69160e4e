"""Reads the deployment of a vLLM config and refuses what cannot run on that engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvplug.contract import (
    BlockFact,
    EngineView,
    Kind,
    PageLayout,
    PrefixCachePolicy,
    ScoringPolicy,
)
from kvplug.deployment import LATENT, LAYER_KINDS, Choice, Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.connector_flag import CONNECTOR, misplaced
from kvplug.hosts.vllm.engine import (
    at_start,
    format_policy,
    layer_limits,
    layer_rules,
    plain_defaults,
    sequence_policy,
)
from kvplug.hosts.vllm.flags import (
    GUARD,
    REQUEST_CHECK,
    REQUEST_CHECK_MIDDLEWARE,
    RUNS,
)
from kvplug.hosts.vllm.needs import SHADOW_WITH_DRAFTS, Stated, unmet
from kvplug.hosts.vllm.view import engine_view
from kvplug.parser import load_deployment

SECTION = "kv_transfer_config.kv_connector_extra_config.kvplug"


@plain_defaults()
def read_deployment(vllm_config: Any, view: EngineView | None = None) -> Deployment:
    """Read a vLLM config's deployment.

    Args:
        vllm_config: The config.
        view: The engine of the config; described here if None.

    Raises:
        DeploymentError: The section is missing or wrong.
    """
    transfer = vllm_config.kv_transfer_config
    extra = transfer.kv_connector_extra_config
    if "kvplug" not in extra:
        raise DeploymentError(
            "inline",
            [Refusal(SECTION, "is missing.", "add `kvplug: {}` or a section with policies.")],
        )
    if beside := misplaced(extra):
        above = SECTION.rpartition(".")[0]
        raise DeploymentError(
            "inline",
            [Refusal(f"{above}.{name}", problem, fix) for name, problem, fix in beside],
        )
    section = extra["kvplug"]
    return load_deployment(
        {} if section is None else section, key=SECTION, engine=view or engine_view(vllm_config)
    )


@plain_defaults()
def deployment_of(vllm_config: Any) -> Deployment:
    """Read a vLLM config's deployment and check it against the engine.

    Raises:
        DeploymentError: The section is missing or wrong, or cannot run on this engine.
    """
    view = engine_view(vllm_config)
    deployment = read_deployment(vllm_config, view)
    installed = compat.version()
    if not compat.is_admitted(installed):
        raise DeploymentError(deployment.source, [Refusal("vllm", *compat.untested(installed))])
    deployment.require_compatible(view, runs=RUNS, host="vllm")
    if refusals := [
        *unmet(deployment, Stated.of_config(vllm_config)),
        *_request_refusals(deployment, vllm_config),
        *_guard_refusals(deployment, vllm_config),
        *_layer_refusals(deployment, vllm_config),
    ]:
        raise DeploymentError(deployment.source, refusals)
    return deployment


def refuse_inside(vllm_config: Any) -> None:
    """Check that kvplug is not one of several connectors inside another one.

    Raises:
        DeploymentError: It is.
    """
    transfer: Any = getattr(vllm_config, "kv_transfer_config", None)
    extra = getattr(transfer, "kv_connector_extra_config", None)
    inner = extra.get("connectors") if isinstance(extra, Mapping) else None
    if inner is None or not any(_names_kvplug(one) for one in inner):
        return
    raise DeploymentError(
        "inline",
        [
            Refusal(
                "kv_transfer_config.kv_connector_extra_config.connectors",
                f"kvplug is one of several connectors inside {transfer.kv_connector}, where it "
                "sees no attention layers, and the others would store KV that is not exact.",
                f"set kv_connector: {CONNECTOR} for the engine itself, or remove kvplug.",
            )
        ],
    )


def _names_kvplug(connector: Any) -> bool:
    """True for the config of a connector that is kvplug, or has it among its own."""
    if not isinstance(connector, Mapping):
        return False
    extra = connector.get("kv_connector_extra_config")
    inner = extra.get("connectors") if isinstance(extra, Mapping) else None
    return connector.get("kv_connector") == CONNECTOR or any(_names_kvplug(c) for c in inner or ())


def _request_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    if deployment.on_bad_request != "refuse":
        return []
    key = f"{SECTION}.on_bad_request" if deployment.source == "inline" else "on_bad_request"
    if _no_processors(vllm_config):
        return [Refusal(key, NO_PROCESSORS, WITHOUT_PROCESSORS)]
    if _has_processor(vllm_config, REQUEST_CHECK):
        return []
    return [
        Refusal(
            key,
            "nothing checks requests before they enter the engine.",
            f"set --logits-processors {REQUEST_CHECK} and, for HTTP 400 on streamed requests, "
            f"--middleware {REQUEST_CHECK_MIDDLEWARE}; kvplug serve does.",
        )
    ]


def _guard_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    guard = deployment.guard
    if guard is None:
        return []
    key = f"{SECTION}.guard" if deployment.source == "inline" else "guard"
    found = []
    if not _has_processor(vllm_config, GUARD):
        found.append(
            Refusal(
                key,
                "needs a logits processor that is not enabled.",
                f"set --logits-processors {GUARD}.",
            )
        )
    if _no_processors(vllm_config):
        found.append(Refusal(key, NO_PROCESSORS, WITHOUT_PROCESSORS))
    elif guard.shadow is not None and vllm_config.speculative_config is not None:
        found.append(Refusal(f"{key}.shadow", *SHADOW_WITH_DRAFTS))
    return found


NO_PROCESSORS = (
    "needs a logits processor, and vLLM's first model runner takes none with speculative decoding."
)
WITHOUT_PROCESSORS = "remove it or --speculative-config, or set VLLM_USE_V2_MODEL_RUNNER=1."


def _no_processors(vllm_config: Any) -> bool:
    return vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner


def _has_processor(vllm_config: Any, name: str) -> bool:
    """True where a logits processor is configured by ``module:class`` or as the class itself."""
    return any(
        name == (f"{p.__module__}:{p.__qualname__}" if isinstance(p, type) else p)
        for p in vllm_config.model_config.logits_processors or ()
    )


def _layer_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    chosen = [choice for kind in LAYER_KINDS if (choice := deployment.choice(kind)) is not None]
    found = _model_refusals(deployment, vllm_config) if chosen else []
    for choice in chosen:
        found += _batch_refusals(choice, vllm_config)
    for choice in chosen:
        if not found:
            refusals = REFUSALS[choice.policy.kind]
            found = at_start(deployment, choice, refusals, deployment, vllm_config)
    return found


def _reuse_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    key = deployment.choices[Kind.REUSE][0].key.split(".use")[0]
    found = []

    def refuse(below: str, problem: str, fix: str) -> None:
        found.append(Refusal(f"{key}{below}", problem, fix))

    if deployment.reuse.recompute.needed and vllm_config.model_config.uses_mrope:
        refuse(
            ".recompute",
            "does not support multi-axis rotary positions.",
            "remove the recompute section.",
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


def _tiers_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    choice = deployment.choice(Kind.TIERS)
    assert choice is not None
    key = choice.key.split(".use")[0]
    policy = format_policy(deployment, vllm_config)
    if policy is None:
        return []
    apart = any(policy.recent(layer) for layer in policy.engine.layers)
    if not apart and len(policy.assignments()) <= 1:
        return []
    return [
        Refusal(
            key,
            f"format {policy.name} stores each request in its own way, so one request cannot read "
            "the bytes of another.",
            f"choose another format or remove {key}.",
            deployment.lines.get(key),
        )
    ]


def _model_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    model = vllm_config.model_config
    having = (
        (model.use_mla, LATENT),
        (model.is_attention_free, "no attention layers (Mamba)"),
        (model.is_hybrid, "state-space layers beside attention (hybrid)"),
        (model.is_encoder_decoder, "an encoder and a decoder"),
    )
    return [refusal for on, what in having if on for refusal in deployment.beyond(what)]


def _batch_refusals(choice: Choice, vllm_config: Any) -> list[Refusal]:
    drafts = vllm_config.speculative_config is not None and vllm_config.use_v2_model_runner
    if drafts and compat.reports_before_end():
        return [
            Refusal(
                choice.key,
                f"{choice.policy.name} needs a worker's report of a whole step, and this vLLM's "
                "second model runner takes it before the step's drafts are made.",
                "remove --speculative-config, or set VLLM_USE_V2_MODEL_RUNNER=0.",
            )
        ]
    return []


def _format_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    choice = deployment.choice(Kind.FORMAT)
    policy = format_policy(deployment, vllm_config)
    assert choice is not None and policy is not None
    name = choice.policy.name
    size = policy.engine.block_size
    for layer in policy.engine.layers:
        layout, recent = policy.layout(layer), policy.recent(layer)
        if type(layout) is not PageLayout or type(recent) is not int or recent < 0:
            raise ValueError(
                f"layer {layer.index} has layout {layout!r} and keeps {recent!r} recent tokens; "
                "they must be a PageLayout and an integer of at least 0"
            )
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
    known = [policy.fingerprint(), *policy.assignments()]
    if any(type(one) is not str for one in known):
        raise ValueError(f"fingerprint() and assignments() must be texts, got {known!r}")
    known = list(policy.assignments())
    if not known or len(set(known)) < len(known):
        raise ValueError(f"assignments() must return distinct texts, got {known!r}")
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
    rules = layer_rules(policy)
    if isinstance(policy, ScoringPolicy):
        return [
            *_unshared_refusals(policy, choice.key, deployment.choice(Kind.PREFIX_CACHE)),
            *_scoring_refusals(policy, choice.key, vllm_config),
        ]
    if None in rules:
        return [
            Refusal(
                choice.key,
                f"{choice.policy.name} gives no window, and is no ScoringPolicy.",
                "return a Window for every layer, or derive it from ScoringPolicy.",
            )
        ]
    return []


def _unshared_refusals(policy: ScoringPolicy, key: str, cache: Choice | None) -> list[Refusal]:
    """What has no effect where no request finds another one's blocks."""
    if not policy.wants_cumulative_attention:
        return []
    why = (
        f"has no effect beside {policy.name}, whose requests share no blocks: a prefix hit would "
        "bring tokens without the attention they received."
    )
    found = []
    if policy.options.shared:
        found.append(Refusal(f"{key.removesuffix('.use')}.shared", why, "remove it."))
    # One that follows requests acts whatever is found.
    acts = (
        cache is None
        or not issubclass(cache.policy, PrefixCachePolicy)
        or BlockFact.FINISHED in cache.policy.needs
    )
    if cache is not None and not acts:
        fix = "remove it, or choose a sequence policy without cumulative attention."
        found.append(Refusal(cache.key, f"{cache.policy.name} {why}", fix))
    return found


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
    if type(policy.observation) is not int or policy.observation < 0:
        raise ValueError(f"observation must be a number of queries, got {policy.observation!r}")
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
    Kind.TIERS: _tiers_refusals,
}
"""Refusals of each of `LAYER_KINDS`; in their order, until one refuses."""
