"""The engine as policies see it: views made from a vLLM config."""

from __future__ import annotations

import copy
import functools
import hashlib
from typing import Any

import numpy as np
import torch

from kvplug.contract import (
    EngineView,
    FormatPolicy,
    LayerView,
    Rope,
)
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.features import features_of
from kvplug.hosts.vllm.weights import model_of


def engine_view(vllm_config: Any, num_blocks: int = 0) -> EngineView:
    """Describe an engine for policies; ``num_blocks`` once the pool is known."""
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
    found = _EngineOfConfig(
        block_size=int(vllm_config.cache_config.block_size),
        num_blocks=num_blocks,
        max_model_len=int(model.max_model_len),
        max_in_flight_tokens=int(vllm_config.max_in_flight_tokens),
        features=features_of(vllm_config),
        layers=layers,
        host="vllm",
        host_version=compat.version(),
    )
    return found.identified_by(vllm_config)


class _EngineOfConfig(EngineView):
    """An engine whose model is identified when somebody asks: that may read all of its weights."""

    def identified_by(self, vllm_config: Any) -> EngineView:
        """Return this view, with the model of a config."""
        found = vars(self)
        found.pop("model")
        found["_config"] = vllm_config
        return self

    @functools.cached_property
    def model(self) -> str:
        return model_of(vars(self)["_config"])

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineView:
        """Copy the view, and not vLLM's config: with it go the layers and their weights."""
        found = object.__new__(type(self))
        for name, value in vars(self).items():
            vars(found)[name] = value if name == "_config" else copy.deepcopy(value, memo)
        return found


INTERLEAVED = frozenset(
    {
        "cohere",
        "cohere2",
        "cohere2_moe",
        "ernie4_5",
        "ernie4_5_moe",
        "glm",
        "glm4",
        "gptj",
        "helium",
    }
)
"""Model types that rotate neighbouring channels as pairs, not halves."""


UNROTATED = frozenset({"afmoe", "cohere2", "cohere2_moe", "exaone4", "exaone_moe"})
"""Model types whose full-attention layers rotate nothing beside layers with a sliding window."""


NO_ROTATION = frozenset({"alibi", "nope"})
"""Values of ``position_embedding_type`` of models that rotate nothing."""


def rope_of(config: Any) -> Rope | None:
    """Rotary embedding of a Hugging Face text config; None unless it has one that is the same at
    every length and in every layer."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stated = getattr(config, "rope_parameters", None)
    if not isinstance(stated, dict) or "rope_theta" not in stated or not _rotates_alike(config):
        return None
    kind = stated.get("rope_type", "default")
    if kind == "default":
        head_size = getattr(config, "head_dim", None)
        head_size = head_size or config.hidden_size // config.num_attention_heads
        rotated = int(head_size * stated.get("partial_rotary_factor", 1.0))
        theta = float(stated["rope_theta"])
        frequencies = tuple(theta ** (-2 * i / rotated) for i in range(rotated // 2))
    elif kind in ("linear", "llama3", "yarn"):
        found, _ = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        frequencies = tuple(float(f) for f in found)
    else:
        return None
    return Rope(frequencies, getattr(config, "model_type", "") in INTERLEAVED)


def _rotates_alike(config: Any) -> bool:
    """False where some layers, or all, rotate nothing or otherwise, though the config has the
    parameters of a rotation."""
    theta = config.rope_parameters["rope_theta"]
    thetas = getattr(config, "layer_rope_theta", None) or ()
    rotated = getattr(config, "no_rope_layers", None) or ()  # 1 for a layer that rotates
    apart = getattr(config, "model_type", "") in UNROTATED and any(
        "sliding" in kind for kind in getattr(config, "layer_types", None) or ()
    )
    return bool(
        theta
        and all(one == theta for one in thetas)
        and all(rotated)
        and not apart
        and not getattr(config, "alibi", False)
        and getattr(config, "position_embedding_type", None) not in NO_ROTATION
    )


ALIBI = frozenset({"bloom", "mpt"})


LEARNED = frozenset({"gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"})


def position_scheme(config: Any) -> str:
    """Position scheme of a Hugging Face text config's model, as in `Fingerprint.position`."""
    rope = rope_of(config)
    if rope is not None:
        table = np.array(rope.frequencies, dtype="<f8").tobytes()
        digest = hashlib.blake2b(table, digest_size=8).hexdigest()
        return f"rope/{'gptj' if rope.interleaved else 'neox'}/{digest}"
    kind = getattr(config, "model_type", "")
    if kind in ALIBI or getattr(config, "alibi", False):
        return "alibi"
    stated = getattr(config, "rope_parameters", None)
    if isinstance(stated, dict):
        alike = "rope_theta" not in stated or _rotates_alike(config)
        return "rope-by-length" if alike else "unknown"
    return "learned" if kind in LEARNED else "unknown"


def kv_dtype(vllm_config: Any) -> str:
    """Type in which an engine's pages hold K and V."""
    asked = str(vllm_config.cache_config.cache_dtype)
    model = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return model if asked == "auto" else asked


def token_bytes(view: EngineView, stored: FormatPolicy | None, dtype: str = "") -> int:
    """Bytes of one token's KV in all layers, on one rank; in the model's type where no other is
    given."""
    if stored is not None:
        return sum(stored.layout(layer).token_bytes(layer) for layer in view.layers)
    element = getattr(torch, dtype or view.layers[0].dtype).itemsize
    return sum(2 * layer.num_kv_heads * layer.head_size * element for layer in view.layers)


def tokenizer(vllm_config: Any) -> Any:
    """The engine's tokenizer, or None for one that starts without."""
    from vllm.tokenizers import cached_tokenizer_from_config

    if vllm_config.model_config.skip_tokenizer_init:
        return None
    return cached_tokenizer_from_config(vllm_config.model_config)
