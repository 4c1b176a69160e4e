"""Assumptions about vLLM beyond its documented extension points, in one place.

Checked on vLLM 0.32.0. The attributes set here, and nowhere else:

* ``BlockPool.free_block_queue`` and ``BlockPool.metrics_collector``: instances replaced once,
  before the first allocation, by objects with the same interface (`install_queue`,
  `install_collector`).
* ``Request.cache_salt`` and ``Request.block_hashes``: a new request's block hashes are computed
  again with a longer salt, before it is looked up (`salt_request`).
* ``SamplingParams.extra_args``: one more key for a new request (`mark_request`), or two
  (`mark_shadow`), and none of those names from a client (`unmark_request`).
* ``Worker.model_runner``: vLLM's worker assigns it, and a property of the class that vLLM itself
  adds for ``--worker-extension-cls`` sees the assignment (`extension.WorkerExtension`). A release
  that announces its worker to the extension needs no property (`announces_worker`).
* ``SchedulerOutput.has_sync_kv_loads``: set on a step that loads stored KV, and on one of the
  second model runner whose directives must reach workers before its forward
  (`load_before_forward`).
* ``Attention.attn_backend``: set per layer so that ``customize_spec`` knows which layer it is
  asked about (`set_layer_backend`).

What a metadata builder returned gets attributes of kvplug's own, whose names begin with
``kvplug_``, where the layers' steps find them.

`EXTENSION_POINTS` and `ATTRIBUTES` list what everything rests on. `missing_extension_points`
compares them with the installed vLLM; ``kvplug doctor`` prints the result, and a test fails when
something moves. `kvplug_lab.vllm_signatures` compares all uses of vLLM in the code with each
release of `RELEASES`, by its source.

Where releases differ, the code follows what the installed one has (`announces_worker`,
`reports_before_end`), never its number.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import inspect
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

logger = logging.getLogger("vllm.kvplug")

GUARD_MARK = "kvplug_guard"
"""Key of ``SamplingParams.extra_args`` whose value, signed bytes, names a watched request."""

SHADOW_MARK = "kvplug_shadow"
"""Key of ``SamplingParams.extra_args`` whose value, signed bytes, says that the likeliest tokens of
a watched request are compared, and which tokens it is to answer."""

_MARKS = frozenset({GUARD_MARK, SHADOW_MARK})
_SIGNATURE = 16


@dataclass(frozen=True)
class Release:
    """A release series of vLLM that kvplug knows.

    Attributes:
        series: Major and minor version.
        ran: Whether engines of it ran with kvplug; the signatures alone were compared otherwise.
        differs: What kvplug does otherwise on it than on the first series, a sentence each.
    """

    series: str
    ran: bool
    differs: tuple[str, ...] = ()


RELEASES = (
    Release("0.32", ran=True),
    Release(
        "0.33",
        ran=False,
        differs=(
            "The worker extension takes the model runner from `init_worker_extension`, not from a "
            "property.",
            "Sleep mode announces itself to the connector.",
            "Speculative decoding on the second model runner is refused beside a policy of layers: "
            "a worker reports before the drafts of its step are made.",
        ),
    ),
)
"""Release series, the oldest first."""

TESTED = tuple(release.series for release in RELEASES if release.ran)
"""Release series that kvplug ran on."""

NEWER = {
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.supports_sleep_mode": (
        "0.33"
    ),
    "vllm.v1.kv_offload.cpu.policies.base:CachePolicy.on_request_access": "0.33",
}
"""Methods that kvplug defines and vLLM calls from a release on only."""

ACCEPT = "KVPLUG_VLLM"
"""Environment variable that names a series, of those never run, to run on all the same."""

EXTENSION_POINTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vllm.v1.attention.backends.registry:register_backend", ("backend", "class_path")),
    ("vllm.v1.attention.backend:AttentionBackend.customize_spec", ("spec",)),
    ("vllm.v1.attention.backend:AttentionBackend.full_cls_name", ()),
    ("vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts", ()),
    ("vllm.v1.kv_cache_layout:KVCacheLayout", ()),
    ("vllm.utils.torch_utils:async_tensor_h2d", ("data", "device", "dtype")),
    ("vllm.tracing:init_tracer", ("instrumenting_module_name", "otlp_traces_endpoint")),
    ("vllm.tracing:extract_trace_context", ("headers",)),
    ("vllm.config.observability:ObservabilityConfig", ("otlp_traces_endpoint",)),
    ("vllm.v1.core.sched.output:SchedulerOutput", ("has_sync_kv_loads", "preempted_req_ids")),
    ("vllm.v1.core.sched.output:CachedRequestData", ("resumed_req_ids",)),
    (
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    (
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        (
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
            "is_prefilling",
            "seq_lens_cpu_upper_bound",
            "req_idx",
            "_num_computed_tokens_cache",
            "_token_to_req_indices_cache",
        ),
    ),
    ("vllm.v1.attention.backend:CommonAttentionMetadata.replace", ()),
    (
        "vllm.v1.attention.backend:AttentionMetadataBuilder.__init__",
        ("kv_cache_spec", "layer_names", "vllm_config", "device"),
    ),
    (
        "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support",
        ("vllm_config", "kv_cache_spec"),
    ),
    (
        "vllm.v1.attention.backend:AttentionImpl.forward",
        ("layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    (
        "vllm.v1.attention.backend:AttentionImpl.process_weights_after_loading",
        ("act_dtype",),
    ),
    (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
        ("layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    ("vllm.model_executor.models.utils:extract_layer_index", ("layer_name",)),
    (
        "vllm.v1.worker.utils:select_common_block_size",
        ("kv_manager_block_size", "backends"),
    ),
    ("vllm.config:get_current_vllm_config_or_none", ()),
    ("vllm.distributed.kv_transfer:has_kv_transfer_group", ()),
    ("vllm.distributed.kv_transfer:get_kv_transfer_group", ()),
    ("vllm.forward_context:get_forward_context", ()),
    ("vllm.model_executor.model_loader:get_model_loader", ("load_config",)),
    (
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.download_model",
        ("model_config",),
    ),
    (
        "vllm.v1.kv_cache_spec_registry:register_kv_cache_spec",
        ("manager_class", "uniform_type_base_spec"),
    ),
    ("vllm.v1.kv_cache_interface:replace_as", ("spec", "target_cls")),
    ("vllm.v1.kv_cache_interface:FullAttentionSpec.merge", ("specs",)),
    ("vllm.v1.kv_cache_interface:KVCacheSpec.is_uniform_with_collection", ("kv_cache_specs",)),
    ("vllm.v1.kv_cache_interface:KVCacheSpec.max_memory_usage_bytes", ("vllm_config",)),
    (
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.find_longest_cache_hit",
        ("block_hashes", "max_length", "kv_cache_spec"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks",
        ("request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:"
        "SingleTypeKVCacheManager.get_num_blocks_to_allocate",
        ("request_id", "apply_admission_cap"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.pop_blocks_for_free",
        ("request_id",),
    ),
    ("vllm.v1.request:Request", ("cache_salt", "block_hasher", "resumable")),
    ("vllm.v1.request:Request.update_block_hashes", ()),
    ("vllm.sampling_params:SamplingParams", ("extra_args", "output_kind")),
    ("vllm.utils.argparse_utils:FlexibleArgumentParser.parse_args", ("args",)),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorPromMetrics.observe",
        ("transfer_stats_data", "engine_idx"),
    ),
    ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.popleft_n", ("n",)),
    ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.append_n", ("blocks",)),
    ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.prepend_n", ("blocks",)),
    ("vllm.v1.core.kv_cache_utils:FreeKVCacheBlockQueue.remove", ("block",)),
    ("vllm.v1.core.kv_cache_metrics:KVCacheMetricsCollector.on_block_accessed", ("block",)),
    ("vllm.v1.core.kv_cache_metrics:KVCacheMetricsCollector.on_block_evicted", ("block",)),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:"
        "KVConnectorBase_V1.bind_kv_cache_manager",
        ("kv_cache_manager",),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:"
        "KVConnectorBase_V1.get_num_new_matched_tokens",
        ("request", "num_computed_tokens"),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:"
        "KVConnectorBase_V1.update_state_after_alloc",
        ("request", "blocks", "num_external_tokens"),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.start_load_kv",
        ("forward_context",),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.register_kv_caches",
        ("kv_caches",),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:"
        "KVConnectorBase_V1.get_block_ids_with_load_errors",
        (),
    ),
    ("vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks", ("block_ids",)),
    ("vllm.v1.core.block_pool:BlockPool.evict_blocks", ("block_ids",)),
    ("vllm.v1.core.kv_cache_metrics:KVCacheMetricsCollector.on_block_allocated", ("block",)),
    ("vllm.v1.core.kv_cache_utils:get_block_hash", ("key",)),
    ("vllm.v1.core.kv_cache_utils:make_block_hash_with_group_id", ("block_hash", "group_id")),
    (
        "vllm.v1.core.kv_cache_utils:resolve_block_hashes",
        ("block_hashes", "hash_block_size", "block_size"),
    ),
    ("vllm.v1.core.block_pool:BlockHashToBlockMap.get_one_block", ("key",)),
    ("vllm.distributed:get_pp_group", ()),
    (
        "vllm.distributed.kv_events:BlockStored",
        ("block_hashes", "parent_block_hash", "token_ids", "block_size", "medium", "locality"),
    ),
    ("vllm.distributed.kv_events:BlockRemoved", ("block_hashes", "medium", "group_idx")),
    ("vllm.v1.core.kv_cache_utils:maybe_convert_block_hash", ("hash_bytes",)),
    ("vllm.distributed:get_tensor_model_parallel_rank", ()),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorTransferResults",
        ("finished_recving", "failed_recving"),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.get_transfer_results",
        ("finished_req_ids",),
    ),
    (
        "vllm.forward_context:set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    ),
    ("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", ()),
    ("vllm.v1.worker.worker_base:WorkerWrapperBase.init_device", ()),
    (
        "vllm.v1.worker.gpu.kv_connector:ActiveKVConnector.post_forward",
        ("finished_req_ids",),
    ),
    (
        "vllm.v1.attention.backend:AttentionImpl.fused_output_quant_supported",
        ("quant_key",),
    ),
    ("vllm.v1.attention.backend:AttentionImpl.fused_qk_norm_rope_kvcache_supported", ()),
    ("vllm.v1.attention.backend:AttentionImpl.fused_qk_norm_mrope_kvcache_supported", ()),
    ("vllm.v1.attention.backend:AttentionImpl.fused_rope_kvcache_supported", ()),
    (
        "vllm.v1.sample.logits_processor:AdapterLogitsProcessor.new_req_logits_processor",
        ("params",),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1.handle_preemptions",
        ("kv_connector_metadata",),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA.request_finished_all_groups",
        ("request", "block_ids"),
    ),
    (
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        ("prompt", "sampling_params", "request_id", "priority", "data_parallel_rank"),
    ),
    ("vllm.inputs.engine:tokens_input", ("prompt_token_ids", "cache_salt")),
)
"""``module:qualified.name`` and the parameters (or dataclass fields) that kvplug relies on."""

ATTRIBUTES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", ("attn_groups", "model", "device")),
    ("vllm.v1.worker.gpu_worker:Worker", ("model_runner", "vllm_config")),
    (
        "vllm.model_executor.layers.attention:Attention",
        (
            "attn_backend",
            "attn_type",
            "head_size",
            "head_size_v",
            "impl",
            "kv_cache",
            "kv_cache_dtype",
            "kv_cache_torch_dtype",
            "kv_sharing_target_layer_name",
            "layer_name",
            "num_heads",
            "num_kv_heads",
            "sliding_window",
        ),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1",
        ("_vllm_config",),
    ),
    (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        ("scale", "logits_soft_cap", "alibi_slopes", "sinks"),
    ),
    ("vllm.v1.worker.utils:AttentionGroup", ("layer_names",)),
    ("vllm.forward_context:ForwardContext", ("attn_metadata",)),
    ("vllm.config:CompilationConfig", ("static_forward_context", "max_cudagraph_capture_size")),
    ("vllm.config:ParallelConfig", ("_api_process_count", "use_ubatching")),
)
"""``module:Class`` and the attributes of its instances that kvplug reads."""


def missing_extension_points() -> list[str]:
    """List what kvplug relies on and the installed vLLM lacks, one sentence each."""
    found = []
    for target, names in ATTRIBUTES:
        module_name, _, name = target.partition(":")
        try:
            cls = getattr(importlib.import_module(module_name), name)
            known = _attributes(cls)
        except (ImportError, AttributeError) as error:
            found.append(f"{target} is gone ({error})")
            continue
        if lost := [n for n in names if n not in known]:
            found.append(f"{target} no longer has {', '.join(lost)}")
    for target, parameters in EXTENSION_POINTS:
        module_name, _, qualified = target.partition(":")
        try:
            thing: Any = importlib.import_module(module_name)
            for part in qualified.split("."):
                thing = getattr(thing, part)
            have = set(inspect.signature(thing).parameters)
        except (ImportError, AttributeError) as error:
            found.append(f"{target} is gone ({error})")
            continue
        if lost := [p for p in parameters if p not in have]:
            found.append(f"{target} no longer takes {', '.join(lost)}")
    return found


def _attributes(cls: type[Any]) -> set[str]:
    """Attributes that a class and its bases declare, or assign to ``self``."""
    found: set[str] = set()
    for base in cls.__mro__[:-1]:
        found |= set(vars(base)) | set(vars(base).get("__annotations__", ()))
        try:
            source = inspect.getsource(base)
        except (OSError, TypeError):
            continue
        found |= set(re.findall(r"\bself\.(\w+)(?::[^=\n]+)?\s*=[^=]", source))
    return found


def version() -> str:
    """Version of the installed vLLM."""
    import vllm

    return str(vllm.__version__)


def is_tested(installed: str) -> bool:
    """True if a vLLM version belongs to a series that kvplug was tested on."""
    return any(_of_series(installed, series) for series in TESTED)


def is_admitted(installed: str) -> bool:
    """True if kvplug runs on a vLLM version.

    That is one of a series that it was tested on, or whose signatures were compared and which the
    environment variable `ACCEPT` names.
    """
    return is_tested(installed) or any(
        _of_series(installed, release.series) and os.environ.get(ACCEPT) == release.series
        for release in RELEASES
    )


def untested(installed: str) -> tuple[str, str]:
    """What is wrong with a version that `is_admitted` does not let in, and what to do."""
    install = f"install vLLM {' or '.join(TESTED)}"
    for release in RELEASES:
        if _of_series(installed, release.series):
            return (
                f"no engine of version {installed} has run with kvplug yet; only its signatures "
                "were compared.",
                f"{install}, or set {ACCEPT}={release.series} to run on it all the same.",
            )
    return f"version {installed} was never tested with kvplug.", f"{install}; see `kvplug doctor`."


def _of_series(installed: str, series: str) -> bool:
    return installed == series or installed.startswith(f"{series}.")


def announces_worker() -> bool:
    """True if vLLM tells a worker extension when its worker has a model runner."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    function = inspect.unwrap(WorkerWrapperBase.init_device)
    return "init_worker_extension" in function.__code__.co_consts


def reports_before_end() -> bool:
    """True if the second model runner may take a worker's report before the step has ended.

    It does where drafts of a step are made after its report is due.
    """
    from vllm.v1.worker.gpu.kv_connector import ActiveKVConnector

    return "defer_finalize" in inspect.signature(ActiveKVConnector.post_forward).parameters


def install_queue(pool: Any, queue: Any, collector: Any) -> None:
    """Replace a block pool's free queue and metrics collector.

    Must run before the first allocation: `queue` takes over the pool's free blocks.
    """
    pool.free_block_queue = queue
    pool.metrics_collector = collector


def install_collector(pool: Any, collector: Any) -> None:
    """Replace a block pool's metrics collector; must run before the first allocation."""
    pool.metrics_collector = collector


def salt_request(request: Any, salt: str) -> None:
    """Make a request's block hashes depend on one more string.

    Must run when the request is added, before it is scheduled: the salt goes into the hash of its
    first block and so into all that follow.
    """
    # With its length, so that no salt of a client's makes another pair the same text.
    own = f"{len(salt)}:{salt}"
    request.cache_salt = own if request.cache_salt is None else f"{own}|{request.cache_salt}"
    request.block_hashes.clear()
    request.update_block_hashes()


def download_weights(vllm_config: Any) -> None:
    """Download a model's weights, where its loader downloads any; a failure is left to the engine.

    What vLLM does when it loads the model, before that.
    """
    from vllm.model_executor.model_loader import get_model_loader

    try:
        get_model_loader(vllm_config.load_config).download_model(vllm_config.model_config)
    except Exception as error:
        logger.debug("the weights could not be downloaded: %s", error)


def mark_request(request: Any, engine_id: str) -> None:
    """Put its id into a request's sampling parameters, where a logits processor finds it.

    Must run when the request is added: workers receive the parameters once.

    Args:
        request: The request.
        engine_id: The engine's, of its KV-transfer config; signs the mark.
    """
    sampling = request.sampling_params
    name = str(request.request_id).encode("utf-8", "surrogatepass")
    mark = _signature(name, engine_id) + name
    sampling.extra_args = (sampling.extra_args or {}) | {GUARD_MARK: mark}


def mark_shadow(request: Any, engine_id: str, answers: Sequence[int] = ()) -> None:
    """Mark a request as `mark_request` does, and ask for its likeliest tokens.

    Args:
        request: The request.
        engine_id: The engine's.
        answers: Tokens that it answers, whatever its distributions; none to leave them its own.
    """
    mark_request(request, engine_id)
    sampling = request.sampling_params
    tokens = np.array(answers, dtype=np.int32).tobytes()
    name = str(request.request_id).encode("utf-8", "surrogatepass")
    mark = _signature(name + b"\0" + tokens, engine_id) + tokens
    sampling.extra_args = sampling.extra_args | {SHADOW_MARK: mark}


def shadow_answers(sampling: Any, engine_id: str) -> tuple[int, ...] | None:
    """Return the tokens that `mark_shadow` put into sampling parameters; None without its mark."""
    mark = (getattr(sampling, "extra_args", None) or {}).get(SHADOW_MARK)
    name = marked_as(sampling, engine_id)
    if not isinstance(mark, bytes) or name is None:
        return None
    signature, tokens = mark[:_SIGNATURE], mark[_SIGNATURE:]
    signed = name.encode("utf-8", "surrogatepass") + b"\0" + tokens
    if not hmac.compare_digest(signature, _signature(signed, engine_id)):
        return None
    return tuple(np.frombuffer(tokens, dtype=np.int32).tolist())


def load_before_forward(output: Any) -> None:
    """Make the second model runner start a step's loads before its forward, not after it.

    With them it tells the requests of its rows.
    """
    output.has_sync_kv_loads = True


def unmark_request(request: Any) -> None:
    """Take marks out of a new request's sampling parameters, where only a client can have put
    them."""
    sampling = request.sampling_params
    given = getattr(sampling, "extra_args", None)
    if given and not _MARKS.isdisjoint(given):
        sampling.extra_args = {key: value for key, value in given.items() if key not in _MARKS}


def marked_as(sampling: Any, engine_id: str) -> str | None:
    """Return the id that `mark_request` put into sampling parameters; None for any other mark.

    Args:
        sampling: vLLM's ``SamplingParams``.
        engine_id: The engine's.
    """
    mark = (getattr(sampling, "extra_args", None) or {}).get(GUARD_MARK)
    # No client that speaks JSON can send bytes.
    if not isinstance(mark, bytes):
        return None
    signature, name = mark[:_SIGNATURE], mark[_SIGNATURE:]
    if not hmac.compare_digest(signature, _signature(name, engine_id)):
        return None
    return name.decode("utf-8", "surrogatepass")


def _signature(name: bytes, engine_id: str) -> bytes:
    key = hashlib.blake2b(engine_id.encode("utf-8", "surrogatepass")).digest()
    return hashlib.blake2b(name, key=key, digest_size=_SIGNATURE).digest()


def set_layer_backend(layer: Any, backend: type) -> None:
    """Give one attention layer its own backend class.

    The classes of all layers must have one ``get_name()`` and ``full_cls_name()``, so that layers
    with equal specs still share one metadata builder.
    """
    layer.attn_backend = backend
