"""What a vLLM config says, as the views policies receive, and the deployment it carries."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvplug.contract import (
    EngineView,
    Feature,
    FormatPolicy,
    Kind,
    LayerView,
    ReuseCheck,
    Rope,
    ScoringPolicy,
    SequencePolicy,
    Window,
)
from kvplug.deployment import Choice, Deployment, load_deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.pruning import Limits
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.flags import CONNECTOR, EXTENSION, GUARD, MODULE, RUNS
from kvplug.models import model_fingerprint

if TYPE_CHECKING:
    from kvplug.hosts.vllm.segments import ReuseWorker

SECTION = "kv_transfer_config.kv_connector_extra_config.kvplug"


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
def deployment_of(vllm_config: Any) -> Deployment:
    """The deployment a vLLM config carries, checked against the engine it configures.

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
    if refusals := _layer_refusals(deployment, vllm_config):
        raise DeploymentError(deployment.source, refusals)
    return deployment


def features_of(vllm_config: Any) -> frozenset[Feature]:
    """The engine features a vLLM config has on."""
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    scheduler = vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    model = vllm_config.model_config
    tests = {
        Feature.PREEMPTION: True,
        Feature.PREFIX_CACHING: bool(cache.enable_prefix_caching),
        Feature.CHUNKED_PREFILL: bool(scheduler.enable_chunked_prefill),
        Feature.ASYNC_SCHEDULING: bool(scheduler.async_scheduling),
        Feature.SPECULATIVE_DECODING: speculative is not None,
        Feature.DRAFT_MODEL: speculative is not None and speculative.method != "ngram",
        Feature.CUDA_GRAPHS: graphs is not None and bool(graphs.value),
        Feature.TENSOR_PARALLEL: parallel.tensor_parallel_size > 1,
        Feature.PIPELINE_PARALLEL: parallel.pipeline_parallel_size > 1,
        Feature.DATA_PARALLEL: parallel.data_parallel_size > 1,
        Feature.CONTEXT_PARALLEL: parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        Feature.LORA: vllm_config.lora_config is not None,
        Feature.QUANTIZED_KV_CACHE: cache.cache_dtype not in {"auto", "bfloat16", "float16"},
        Feature.SLIDING_WINDOW_LAYERS: model.get_sliding_window() is not None
        or any("sliding" in t for t in getattr(model.hf_text_config, "layer_types", None) or ()),
        Feature.MULTIMODAL: bool(model.is_multimodal_model),
        Feature.KV_SHARING: bool(cache.kv_sharing_fast_prefill),
        Feature.DISAGGREGATED_PREFILL: vllm_config.kv_transfer_config.kv_role != "kv_both",
    }
    return frozenset(feature for feature, on in tests.items() if on)


def engine_view(vllm_config: Any, num_blocks: int = 0) -> EngineView:
    """The engine as policies see it; ``num_blocks`` once the pool is known."""
    model = vllm_config.model_config
    parallel = vllm_config.parallel_config
    total = int(model.get_total_num_hidden_layers())
    rope = rope_of(model.hf_text_config)
    layers = tuple(
        LayerView(
            index=i,
            num_layers=total,
            num_kv_heads=model.get_num_kv_heads(parallel),
            num_heads=model.get_num_attention_heads(parallel),
            head_size=model.get_head_size(),
            dtype=str(model.dtype).removeprefix("torch."),
            rope=rope,
        )
        for i in range(total)
    )
    return EngineView(
        block_size=int(vllm_config.cache_config.block_size),
        num_blocks=num_blocks,
        max_model_len=int(model.max_model_len),
        max_in_flight_tokens=int(vllm_config.max_in_flight_tokens),
        features=features_of(vllm_config),
        layers=layers,
        host="vllm",
        host_version=compat.version(),
        model=_fingerprint(str(model.model)),
    )


_fingerprint = functools.cache(model_fingerprint)

INTERLEAVED = frozenset({"cohere", "cohere2", "glm", "glm4", "gptj", "ernie4_5", "helium"})
"""Model types whose rotary pairs are neighbours, not halves."""


def rope_of(config: Any) -> Rope | None:
    """The rotary embedding a Hugging Face text config states, or None where it states none that
    is the same at every length and in every layer."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = getattr(config, "rope_parameters", None)
    if not isinstance(stated, dict) or "rope_theta" not in stated:
        return None
    kind = stated.get("rope_type", "default")
    if kind == "default":
        head_size = getattr(config, "head_dim", None)
        head_size = head_size or config.hidden_size // config.num_attention_heads
        turned = int(head_size * stated.get("partial_rotary_factor", 1.0))
        theta = float(stated["rope_theta"])
        frequencies = tuple(theta ** (-2 * i / turned) for i in range(turned // 2))
    elif kind in ("linear", "llama3", "yarn"):
        found, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        frequencies = tuple(float(f) for f in found)
    else:
        return None
    return Rope(frequencies, getattr(config, "model_type", "") in INTERLEAVED)


ALIBI = frozenset({"bloom", "mpt"})
LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"})


def position_scheme(config: Any) -> str:
    """How a Hugging Face text config's model knows positions, as `Fingerprint.position` says it."""
    rope = rope_of(config)
    if rope is not None:
        table = np.array(rope.frequencies, dtype="<f8").tobytes()
        digest = hashlib.blake2b(table, digest_size=8).hexdigest()
        return f"rope/{'gptj' if rope.interleaved else 'neox'}/{digest}"
    kind = getattr(config, "model_type", "")
    if isinstance(getattr(config, "rope_parameters", None), dict):
        return "rope-by-length"
    if kind in ALIBI or getattr(config, "alibi", False):
        return "alibi"
    return "learned" if kind in LEARNED else "unknown"


def identity(vllm_config: Any, view: EngineView, stored: FormatPolicy | None) -> dict[str, Any]:
    """What every segment computed on an engine has in common: fields of `Fingerprint`."""
    model = vllm_config.model_config
    return {
        "model": view.model,
        "tokenizer": f"{model.tokenizer}@{model.tokenizer_revision or ''}",
        "dtype": view.layers[0].dtype,
        "format": stored.fingerprint() if stored is not None else "",
        "position": position_scheme(model.hf_text_config),
        "geometry": (
            len(view.layers),
            int(model.get_total_num_kv_heads()),
            int(model.get_head_size()),
        ),
    }


def token_bytes(view: EngineView, stored: FormatPolicy | None) -> int:
    """Bytes of one token's KV in all layers, on one rank."""
    if stored is not None:
        return sum(stored.layout(layer).token_bytes(layer) for layer in view.layers)
    element = getattr(torch, view.layers[0].dtype).itemsize
    return sum(2 * layer.num_kv_heads * layer.head_size * element for layer in view.layers)


def tokenizer(vllm_config: Any) -> Any:
    """The engine's tokenizer, or None for one that starts without."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if vllm_config.model_config.skip_tokenizer_init:
        return None
    return cached_tokenizer_from_config(vllm_config.model_config)


@plain_defaults()
def reuse_checks(deployment: Deployment, view: EngineView) -> list[ReuseCheck]:
    """The deployment's chain of checks, built for an engine."""
    found = []
    for choice in deployment.choices.get(Kind.REUSE, ()):
        check = choice.build(view)
        assert isinstance(check, ReuseCheck)
        found.append(check)
    return found


def reuse_worker(deployment: Deployment, vllm_config: Any) -> ReuseWorker:
    """The worker half of reuse, on this rank."""
    from vllm.distributed import get_tensor_model_parallel_rank

    from kvplug.hosts.vllm.segments import ReuseWorker

    return ReuseWorker(
        deployment,
        vllm_config,
        reuse_checks(deployment, engine_view(vllm_config)),
        format_policy(deployment, vllm_config),
        get_tensor_model_parallel_rank(),
        int(vllm_config.parallel_config.tensor_parallel_size),
    )


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


def _layer_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    found = []
    for kind in (Kind.SEQUENCE, Kind.FORMAT, Kind.REUSE):
        choice = deployment.choice(kind)
        if choice is not None:
            found += _model_refusals(choice, vllm_config)
    if not found and deployment.choice(Kind.SEQUENCE) is not None:
        found = _sequence_refusals(deployment, vllm_config)
    if not found and deployment.choice(Kind.FORMAT) is not None:
        found = _format_refusals(deployment, vllm_config)
    if not found and deployment.choice(Kind.REUSE) is not None:
        found = _reuse_refusals(deployment, vllm_config)
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
                "computing inside a run needs the model, and nothing gives it to kvplug.",
                f"set --worker-extension-cls {EXTENSION}, or recompute: {{gaps: 0}}.",
            )
        for on, what in (
            (vllm_config.lora_config is not None, "LoRA"),
            (vllm_config.use_v2_model_runner, "vLLM's second model runner"),
            (vllm_config.model_config.uses_mrope, "multi-axis rotary positions"),
        ):
            if on:
                refuse(
                    ".recompute",
                    f"nothing can be computed inside a run with {what}.",
                    "remove the recompute section.",
                )
    if deployment.guard is not None and not any(
        GUARD in str(p) for p in vllm_config.model_config.logits_processors or ()
    ):
        above = key.rsplit(".", 1)[0] if "." in key else ""
        found.append(
            Refusal(
                f"{above}.guard".lstrip("."),
                "watches answers through a logits processor that is not on.",
                f"set --logits-processors {GUARD}.",
            )
        )
    policy = format_policy(deployment, vllm_config)
    if policy is not None:
        apart = any(policy.recent(layer) for layer in policy.engine.layers)
        if apart or len(policy.assignments()) > 1:
            refuse(
                "",
                f"format {policy.name} treats requests apart, so its bytes mean nothing in "
                "another.",
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
                        f"{name} keeps {recent} recent tokens of layer {layer.index}, and blocks "
                        f"of {size} tokens are no multiple of that.",
                        f"set --block-size {-(-size // recent) * recent}.",
                    )
                ]
            if recent and vllm_config.use_v2_model_runner:
                return [
                    Refusal(
                        choice.key,
                        f"{name} keeps recent tokens by request, which vLLM's second model runner "
                        "gives no way to.",
                        "set VLLM_USE_V2_MODEL_RUNNER=0.",
                    )
                ]
            if layout.heads is not None and layout.heads > layer.num_kv_heads:
                raise ValueError(f"layer {layer.index}: more stored heads than KV heads")
    except Exception as error:
        return [Refusal(key, f"{name}: {error}.", "change the option named.")]
    other = deployment.choice(Kind.SEQUENCE)
    scoring = other is not None and issubclass(other.policy, ScoringPolicy)
    merged = any(policy.layout(layer).heads is not None for layer in policy.engine.layers)
    if scoring and (not policy.moves_tokens or merged):
        assert other is not None
        why = "heads share one stored head" if merged else "tokens share scales"
        return [
            Refusal(
                choice.key,
                f"{name} cannot live with sequence policy {other.policy.name}, which moves single "
                f"tokens of single heads: {why} there.",
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
        return [Refusal(key, f"{policy.name}: {error}.", "change the option named.")]
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
    if vllm_config.use_v2_model_runner:
        return [
            Refusal(
                key,
                f"{policy.name} decides while a step runs, which vLLM's second model runner gives "
                "no way to.",
                "set VLLM_USE_V2_MODEL_RUNNER=0.",
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
