"""Engine features, each read from a vLLM config and from the flags of a ``--config`` file.

A flag file is read before an engine exists and without importing vllm; the config is what the
engine then runs with. Both readings of a feature stand in one row, so that they agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from kvplug.contract import Feature

Flags = Mapping[str, Any]
"""vLLM's flags by name, with dashes."""


@dataclass(frozen=True)
class Reading:
    """Two readings of one feature.

    Attributes:
        feature: The feature.
        of_config: True if a vLLM config enables it.
        of_flags: True if a flag file enables it, with vLLM's defaults for flags left out; None
            where only the model or the connector tells.
    """

    feature: Feature
    of_config: Callable[[Any], bool]
    of_flags: Callable[[Flags], bool] | None


def number(flags: Flags, name: str, default: int) -> int:
    """A flag's whole number; the default where it is left out or is no number."""
    value = flags.get(name, default)
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def enabled(flags: Flags, name: str, default: bool) -> bool:
    """True if a flag is on, written as ``name`` or ``no-name``."""
    if flags.get(f"no-{name}") is True:
        return False
    value = flags.get(name, default)
    return value if isinstance(value, bool) else default


def features_of(vllm_config: Any) -> frozenset[Feature]:
    """Features that a vLLM config enables."""
    return frozenset(row.feature for row in READINGS if row.of_config(vllm_config))


def features_from_flags(flags: Flags) -> frozenset[Feature]:
    """Features that a flag file enables, as far as it tells."""
    return frozenset(
        row.feature for row in READINGS if row.of_flags is not None and row.of_flags(flags)
    )


def speculation(flags: Flags) -> Mapping[str, Any] | None:
    """What flags say of speculative decoding, in one mapping or in flags of its parts; None where
    there is none."""
    config = flags.get("speculative-config")
    found = dict(config) if isinstance(config, Mapping) else {}
    for part, name in _SPECULATION.items():
        if flags.get(part) is not None:
            found[name] = flags[part]
    return found or None


_SPECULATION = {
    "spec-method": "method",
    "spec-model": "model",
    "spec-tokens": "num_speculative_tokens",
}
"""Flags that set one entry of ``--speculative-config`` each."""


def _draft_model(flags: Flags) -> bool:
    config = speculation(flags)
    # Without a method, vLLM takes the model's name for one.
    return config is not None and (config.get("method") or config.get("model")) not in _NGRAM


_NGRAM = ("ngram", "[ngram]")


def _async_scheduling(flags: Flags) -> bool:
    ngram = speculation(flags) is not None and not _draft_model(flags)
    pipeline = number(flags, "pipeline-parallel-size", 1) > 1
    return enabled(flags, "async-scheduling", not ngram and not pipeline)


def _several(*names: str) -> Callable[[Flags], bool]:
    return lambda flags: any(number(flags, name, 1) > 1 for name in names)


def _sliding_window(config: Any) -> bool:
    model = config.model_config
    layers = getattr(model.hf_text_config, "layer_types", None) or ()
    return model.get_sliding_window() is not None or any("sliding" in t for t in layers)


def _text_configs(config: Any) -> Iterator[Any]:
    """A Hugging Face config and those nested in it, each once."""
    seen: set[int] = set()
    found = [config]
    while found:
        one = found.pop()
        if one is None or isinstance(one, (str, int, float)) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Mapping):
            one = SimpleNamespace(**{str(k): v for k, v in one.items()})
        yield one
        own = getattr(one, "__dict__", {})
        found += [v for k, v in own.items() if k.endswith(("config", "_cfg"))]


def _shares_kv(config: Any) -> bool:
    """True where layers attend over the KV of others, as far as the model's config says; the layers
    are asked again once they are built."""
    model = config.model_config
    return bool(config.cache_config.kv_sharing_fast_prefill) or any(
        (getattr(one, "num_kv_shared_layers", 0) or 0) > 0
        or (getattr(one, "use_cla", False) and (getattr(one, "cla_share_factor", 1) or 1) > 1)
        for root in (model.hf_text_config, getattr(model, "hf_config", None))
        for one in _text_configs(root)
    )


FULL_PRECISION = frozenset({"auto", "bfloat16", "float16"})
"""Values of ``--kv-cache-dtype`` that do not quantize."""

READINGS: tuple[Reading, ...] = (
    Reading(Feature.PREEMPTION, lambda c: True, lambda f: True),
    Reading(
        Feature.PREFIX_CACHING,
        lambda c: bool(c.cache_config.enable_prefix_caching),
        lambda f: enabled(f, "enable-prefix-caching", True),
    ),
    Reading(
        Feature.CHUNKED_PREFILL,
        lambda c: bool(c.scheduler_config.enable_chunked_prefill),
        lambda f: enabled(f, "enable-chunked-prefill", True),
    ),
    Reading(
        Feature.ASYNC_SCHEDULING,
        lambda c: bool(c.scheduler_config.async_scheduling),
        _async_scheduling,
    ),
    Reading(
        Feature.SPECULATIVE_DECODING,
        lambda c: c.speculative_config is not None,
        lambda f: speculation(f) is not None,
    ),
    Reading(
        Feature.DRAFT_MODEL,
        lambda c: c.speculative_config is not None and c.speculative_config.method != "ngram",
        _draft_model,
    ),
    Reading(
        Feature.CUDA_GRAPHS,
        lambda c: bool(getattr(c.compilation_config.cudagraph_mode, "value", False)),
        lambda f: not enabled(f, "enforce-eager", False),
    ),
    Reading(
        Feature.TENSOR_PARALLEL,
        lambda c: c.parallel_config.tensor_parallel_size > 1,
        _several("tensor-parallel-size"),
    ),
    Reading(
        Feature.PIPELINE_PARALLEL,
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        _several("pipeline-parallel-size"),
    ),
    Reading(
        Feature.DATA_PARALLEL,
        lambda c: c.parallel_config.data_parallel_size > 1,
        _several("data-parallel-size"),
    ),
    Reading(
        Feature.CONTEXT_PARALLEL,
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1
            or c.parallel_config.prefill_context_parallel_size > 1
        ),
        _several("decode-context-parallel-size", "prefill-context-parallel-size"),
    ),
    Reading(
        Feature.LORA,
        lambda c: c.lora_config is not None,
        lambda f: enabled(f, "enable-lora", False),
    ),
    Reading(
        Feature.QUANTIZED_KV_CACHE,
        lambda c: c.cache_config.cache_dtype not in FULL_PRECISION,
        lambda f: str(f.get("kv-cache-dtype", "auto")) not in FULL_PRECISION,
    ),
    Reading(Feature.SLIDING_WINDOW_LAYERS, _sliding_window, None),
    Reading(Feature.MULTIMODAL, lambda c: bool(c.model_config.is_multimodal_model), None),
    Reading(
        Feature.KV_SHARING,
        _shares_kv,
        # Beside it, only the model tells.
        lambda f: enabled(f, "kv-sharing-fast-prefill", False),
    ),
    Reading(
        Feature.DISAGGREGATED_PREFILL,
        lambda c: c.kv_transfer_config.kv_role != "kv_both",
        None,
    ),
)
