"""Everything kvplug assumes about vLLM that is not a documented extension point, in one place.

Checked on vLLM 0.32.0. The attributes touched here, and nowhere else:

* ``BlockPool.free_block_queue`` and ``BlockPool.metrics_collector``: instances replaced once,
  before the first allocation, by objects with the same interface (`install_queue`).
* ``Request.cache_salt`` and ``Request.block_hashes``: a new request's block hashes are made anew
  with a longer salt, before it is looked up (`salt_request`).
* ``SamplingParams.extra_args``: a new request's gets one key more (`mark_request`).
* ``Worker.model_runner``: vLLM's worker assigns it, and a property of the class that vLLM itself
  mixes in for ``--worker-extension-cls`` hears of that (`extension.WorkerExtension`).
* ``Attention.attn_backend``: set per layer so that ``customize_spec`` knows which layer it is
  asked about (`set_layer_backend`).

`missing_extension_points` compares what is installed with what was tested; ``kvplug doctor``
prints it and a test fails when something moves.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

GUARD_MARK = "kvplug_guard"
"""Key of ``SamplingParams.extra_args`` under which a watched request is named."""

TESTED = ("0.32",)
"""Release series kvplug was tested on."""

EXTENSION_POINTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vllm.v1.attention.backends.registry:register_backend", ("backend", "class_path")),
    ("vllm.v1.attention.backend:AttentionBackend.customize_spec", ("spec",)),
    ("vllm.v1.attention.backend:AttentionBackend.full_cls_name", ()),
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
            "seq_lens_cpu_upper_bound",
        ),
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
    ("vllm.v1.request:Request", ("cache_salt", "block_hasher")),
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
"""``module:qualified.name`` and the parameters (or dataclass fields) kvplug relies on."""


def missing_extension_points() -> list[str]:
    """What the installed vLLM lacks of what kvplug relies on, one sentence each."""
    found = []
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


def version() -> str:
    """The installed vLLM's version."""
    import vllm

    return str(vllm.__version__)


def is_tested(installed: str) -> bool:
    """Whether a vLLM version belongs to a series kvplug was tested on."""
    return any(installed == t or installed.startswith(f"{t}.") for t in TESTED)


def install_queue(pool: Any, queue: Any, collector: Any) -> None:
    """Replace a block pool's free queue and metrics collector.

    Must run before the first allocation: `queue` takes over the pool's free blocks.
    """
    pool.free_block_queue = queue
    pool.metrics_collector = collector


def salt_request(request: Any, salt: str) -> None:
    """Make what a request's blocks are known by depend on one thing more.

    Must run when the request is added, before it is scheduled: the salt goes into the hash of its
    first block and so into all that follow.
    """
    request.cache_salt = salt if request.cache_salt is None else f"{request.cache_salt}|{salt}"
    request.block_hashes.clear()
    request.update_block_hashes()


def mark_request(request: Any, mark: str) -> None:
    """Put a mark into a request's sampling parameters, which is all that a logits processor sees
    of it. Must run when the request is added: workers are sent the parameters once."""
    sampling = request.sampling_params
    sampling.extra_args = (sampling.extra_args or {}) | {GUARD_MARK: mark}


def set_layer_backend(layer: Any, backend: type) -> None:
    """Give one attention layer its own backend class.

    The class must keep its parent's ``get_name()`` and ``full_cls_name()``, so that layers with
    equal specs still share one metadata builder.
    """
    layer.attn_backend = backend
