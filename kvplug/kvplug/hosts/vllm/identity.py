"""What the KV of an engine depends on, asked of the engine: its identity."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from kvplug.contract import EngineView, FormatPolicy
from kvplug.digests import file_digests
from kvplug.fingerprint import ONCE, once
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.hub import model_folder
from kvplug.hosts.vllm.view import kv_dtype, position_scheme
from kvplug.hosts.vllm.weights import plain
from kvplug.tiers.keys import engine_identity

_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
_ROOM = frozenset({"max_cpu_loras", "max_lora_rank", "max_loras", "specialize_active_lora"})
"""Settings of adapters that say how many fit, and not what they compute."""


def identity(vllm_config: Any, view: EngineView, stored: FormatPolicy | None) -> dict[str, Any]:
    """Fields of `Fingerprint` that all segments computed on an engine have in common.

    The model's is a digest of all that its KV depends on beside the request: weights, the config as
    it runs, quantization, types, adapters' type, and vLLM's version. An engine whose model has no
    fingerprint gets one that nothing else equals.
    """
    model = vllm_config.model_config
    position = position_scheme(model.hf_text_config)
    return {
        "model": _computation(vllm_config, view, position) if view.model else once(),
        "tokenizer": _tokenizer(vllm_config),
        "dtype": kv_dtype(vllm_config),
        "format": stored.fingerprint() if stored is not None else "",
        "position": position,
        "geometry": (
            len(view.layers),
            int(model.get_total_num_kv_heads()),
            int(model.get_head_size()),
        ),
    }


def chunk_identity(vllm_config: Any, view: EngineView, stored: FormatPolicy | None) -> str:
    """Identity of all chunks of KV that an engine stores, the same in all of its processes.

    Chunks are found by token ids, so the tokenizer has no part in it; the ranks that share a
    chunk's layers and heads have. An engine whose model has no fingerprint has an identity of its
    own.
    """
    parallel = vllm_config.parallel_config
    facts = {k: v for k, v in identity(vllm_config, view, stored).items() if k != "tokenizer"}
    if not view.model:
        facts["model"] = ONCE + str(vllm_config.kv_transfer_config.engine_id)
    return engine_identity(
        facts
        | {
            "layers": [
                (one.num_kv_heads, one.head_size, one.dtype)
                + ((stored.layout(one).bytes_per_token_head,) if stored is not None else ())
                for one in view.layers
            ],
            "ranks": (
                int(parallel.tensor_parallel_size),
                int(parallel.pipeline_parallel_size),
            ),
        }
    )


def _computation(vllm_config: Any, view: EngineView, position: str) -> str:
    model, lora = vllm_config.model_config, vllm_config.lora_config
    facts = {
        "weights": view.model,
        "load": vllm_config.load_config.model_loader_extra_config,
        "text": _without_path(model.hf_text_config.to_dict()),
        "config": _without_path(model.hf_config.to_dict()),
        "dtype": str(model.dtype),
        "cache_dtype": str(vllm_config.cache_config.cache_dtype),
        "quantization": model.quantization,
        "quantization_config": model.quantization_config,
        "model_impl": str(model.model_impl),
        "model_class": model.model_class_overrides,
        "disable_sliding_window": model.disable_sliding_window,
        "lora": {k: v for k, v in _fields(lora).items() if k not in _ROOM},
        "inputs": _inputs(vllm_config),
        # The table of rotations then depends on the longest text there may be.
        "length": view.max_model_len if position == "rope-by-length" else 0,
        "vllm": compat.version(),
    }
    text = json.dumps(plain(facts), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _fields(config: Any) -> dict[str, Any]:
    """A config of vLLM's as data; empty for none."""
    if config is None:
        return {}
    return {one.name: getattr(config, one.name) for one in dataclasses.fields(config)}


def _inputs(vllm_config: Any) -> dict[str, Any]:
    """What the embeddings of images, sound and video depend on beside their content.

    vLLM names an input by its content and the options of its processor that a request or a flag
    set, not by the processor's own files.
    """
    model = vllm_config.model_config
    settings = model.multimodal_config if model.is_multimodal_model else None
    if settings is None:
        return {}
    try:
        folder = model_folder(
            str(model.model), model.revision, vllm_config.load_config.download_dir
        )
        files = [p for n in _PROCESSOR_FILES if (p := folder / n).is_file()]
        if model.trust_remote_code:
            files += sorted(folder.glob("*.py"))
        processor: Any = [[p.name, one] for p, one in zip(files, file_digests(files), strict=True)]
    except OSError:
        processor = f"{model.model}@{model.revision or ''}"
    return {"processor": processor} | {
        name: getattr(settings, name, None)
        for name in (
            "media_io_kwargs",
            "mm_device_do_normalize",
            "mm_encoder_attn_dtype",
            "mm_processor_kwargs",
            "video_pruning_method",
            "video_pruning_rate",
        )
    }


def _tokenizer(vllm_config: Any) -> str:
    """Digest of the tokenizer's files; its name and revision where they are not here.

    Segments are found by token ids, so a tokenizer that is not known by content is known by name.
    """
    model = vllm_config.model_config
    name, revision = str(model.tokenizer), model.tokenizer_revision
    try:
        folder = model_folder(name, revision, vllm_config.load_config.download_dir)
        files = [p for n in _TOKENIZER_FILES if (p := folder / n).is_file()]
        digests = file_digests(files)
    except OSError:
        files = []
    if not files:
        return f"{name}@{revision or ''}"[:1024]
    text = json.dumps([[file.name, one] for file, one in zip(files, digests, strict=True)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
