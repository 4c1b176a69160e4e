"""Assumptions about vLLM beyond its documented extension points, in one place.

Checked on vLLM 0.32.0. The attributes set here, and nowhere else:

* ``BlockPool.free_block_queue`` and ``BlockPool.metrics_collector``: instances replaced once,
  before the first allocation, by objects with the same interface (`install_queue`).
* ``Request.cache_salt`` and ``Request.block_hashes``: a new request's block hashes are computed
  again with a longer salt, before it is looked up (`salt_request`).
* ``SamplingParams.extra_args``: one more key for a new request (`mark_request`).
* ``Worker.model_runner``: vLLM's worker assigns it, and a property of the class that vLLM itself
  adds for ``--worker-extension-cls`` sees the assignment (`extension.WorkerExtension`).
* ``SchedulerOutput.has_sync_kv_loads``: set on a step of the second model runner whose directives
  must reach workers before its forward (`SchedulerHalf.step`).
* ``Attention.attn_backend``: set per layer so that ``customize_spec`` knows which layer it is
  asked about (`set_layer_backend`).

`EXTENSION_POINTS` and `ATTRIBUTES` list everything called or read. `missing_extension_points`
compares them with the installed vLLM; ``kvplug doctor`` prints the result, and a test fails when
something moves.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

GUARD_MARK = "kvplug_guard"
"""Key of ``SamplingParams.extra_args`` whose value, a string, names a watched request."""

TESTED = ("0.32",)
"""Release series that kvplug was tested on."""

EXTENSION_POINTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vllm.v1.attention.backends.registry:register_backend", ("backend", "class_path")),
    ("vllm.v1.attention.backend:AttentionBackend.customize_spec", ("spec",)),
    ("vllm.v1.attention.backend:AttentionBackend.full_cls_name", ()),
    ("vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts", ()),
    ("vllm.v1.kv_cache_layout:KVCacheLayout", ()),
    ("vllm.utils.torch_utils:async_tensor_h2d", ("data", "device", "dtype")),
    ("vllm.v1.core.sched.output:SchedulerOutput", ("has_sync_kv_loads",)),
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
    ("vllm.forward_context:get_forward_context", ()),
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
    ("vllm.sampling_params:SamplingParams", ("extra_args",)),
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
    (
        "vllm.forward_context:set_forward_context",
        ("attn_metadata", "vllm_config", "num_tokens", "slot_mapping"),
    ),
    ("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", ()),
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
)
"""``module:qualified.name`` and the parameters (or dataclass fields) that kvplug relies on."""

ATTRIBUTES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", ("attn_groups", "model", "device")),
    ("vllm.v1.worker.gpu_worker:Worker", ("model_runner", "vllm_config")),
    ("vllm.model_executor.layers.attention:Attention", ("attn_backend", "impl", "layer_name")),
    (
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl",
        ("scale", "logits_soft_cap", "alibi_slopes", "sinks"),
    ),
    ("vllm.v1.worker.utils:AttentionGroup", ("layer_names",)),
    ("vllm.forward_context:ForwardContext", ("attn_metadata",)),
    ("vllm.config:CompilationConfig", ("static_forward_context", "max_cudagraph_capture_size")),
    ("vllm.config:ParallelConfig", ("use_ubatching",)),
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
    return any(installed == t or installed.startswith(f"{t}.") for t in TESTED)


def install_queue(pool: Any, queue: Any, collector: Any) -> None:
    """Replace a block pool's free queue and metrics collector.

    Must run before the first allocation: `queue` takes over the pool's free blocks.
    """
    pool.free_block_queue = queue
    pool.metrics_collector = collector


def salt_request(request: Any, salt: str) -> None:
    """Make a request's block hashes depend on one more string.

    Must run when the request is added, before it is scheduled: the salt goes into the hash of its
    first block and so into all that follow.
    """
    request.cache_salt = salt if request.cache_salt is None else f"{request.cache_salt}|{salt}"
    request.block_hashes.clear()
    request.update_block_hashes()


def mark_request(request: Any, mark: str) -> None:
    """Put a mark into a request's sampling parameters, where a logits processor finds it.

    Must run when the request is added: workers receive the parameters once.
    """
    sampling = request.sampling_params
    sampling.extra_args = (sampling.extra_args or {}) | {GUARD_MARK: mark}


def set_layer_backend(layer: Any, backend: type) -> None:
    """Give one attention layer its own backend class.

    The classes of all layers must have one ``get_name()`` and ``full_cls_name()``, so that layers
    with equal specs still share one metadata builder.
    """
    layer.attn_backend = backend
