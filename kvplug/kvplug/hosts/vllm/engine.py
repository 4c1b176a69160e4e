"""What a vLLM config says, as the views policies receive, and the deployment it carries."""

from __future__ import annotations

from typing import Any

from kvplug.contract import EngineView, Feature, Kind, LayerView, SequencePolicy
from kvplug.deployment import Deployment, load_deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.flags import CONNECTOR, MODULE, RUNS

SECTION = "kv_transfer_config.kv_connector_extra_config.kvplug"


def is_kvplug(vllm_config: Any) -> bool:
    """Whether a vLLM config turns kvplug on."""
    transfer = getattr(vllm_config, "kv_transfer_config", None)
    return transfer is not None and (
        transfer.kv_connector == CONNECTOR and transfer.kv_connector_module_path == MODULE
    )


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
    layers = tuple(
        LayerView(
            index=i,
            num_layers=total,
            num_kv_heads=model.get_num_kv_heads(parallel),
            num_heads=model.get_num_attention_heads(parallel),
            head_size=model.get_head_size(),
            dtype=str(model.dtype).removeprefix("torch."),
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
    )


def sequence_policy(deployment: Deployment, vllm_config: Any) -> SequencePolicy | None:
    """The deployment's sequence policy, built for the engine, or None."""
    choice = deployment.choice(Kind.SEQUENCE)
    if choice is None:
        return None
    policy = choice.build(engine_view(vllm_config))
    assert isinstance(policy, SequencePolicy)
    return policy


def _layer_refusals(deployment: Deployment, vllm_config: Any) -> list[Refusal]:
    choice = deployment.choice(Kind.SEQUENCE)
    if choice is None:
        return []
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
                    "remove the sequence section for this model.",
                )
            )
    if found:
        return found
    policy = sequence_policy(deployment, vllm_config)
    assert policy is not None
    key = choice.key.removesuffix(".use")
    for layer in policy.engine.layers:
        try:
            window = policy.window(layer)
        except Exception as error:
            return [Refusal(key, f"{policy.name}: {error}.", "change the option named.")]
        if window is None:
            return [
                Refusal(
                    choice.key,
                    f"{policy.name} decides by score, which this host does not run yet.",
                    "use a positional policy such as sink_window.",
                )
            ]
    return []
