"""Reads a model's config: what a token's KV takes in each of its layers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvplug.contract import Feature, LayerView
from kvplug.deployment import LATENT, Deployment
from kvplug.errors import DeploymentError, KVPlugError
from kvplug.regular_file import UnreadableFile, read_regular

MAX_CONFIG = 16 << 20
"""Most bytes of a config."""

ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of an element, by dtype."""
ALSO_SPELT = {"half": "float16", "float": "float32"}
"""Dtypes as vLLM's flag has them too."""

FULL, SLIDING = "full_attention", "sliding_attention"

UNPLANNED = (
    "ssm_cfg",
    "mamba_d_state",
    "linear_num_key_heads",
    "block_configs",
    "global_head_dim",
    "num_global_key_value_heads",
    "compress_ratios",
    "index_topk",
    "attention_chunk_size",
)
"""Keys of configs whose layers keep something else than the K and V that is counted here."""

_MAX_NUMBER = 1 << 30


class UnknownModel(KVPlugError):
    """A model that cannot be planned; the message says why and what to pass instead."""

    exit_code = 2


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer keeps of a token, over all ranks.

    Attributes:
        index: Number of the layer.
        kv_heads: KV heads; 1 for a latent.
        heads: Query heads.
        head_size: Elements of a key.
        value_size: Elements of a value; 0 for a latent, of which there is one.
        window: Latest tokens that it attends; None for all.
    """

    index: int
    kv_heads: int
    heads: int
    head_size: int
    value_size: int
    window: int | None = None

    def token_bytes(self, element: int) -> int:
        """Bytes of a token's KV.

        Args:
            element: Bytes of an element.
        """
        return self.kv_heads * (self.head_size + self.value_size) * element


@dataclass(frozen=True)
class Model:
    """A model as plans see it.

    Attributes:
        name: As it was named.
        folder: Directory of its files; None for a config alone.
        layers: The layers that keep KV of their own, in order.
        num_layers: All decoder layers; those not in `layers` attend over the KV of others.
        dtype: Name of the dtype that its KV is computed in.
        latent: True for multi-head latent attention.
        features: Engine features that the model brings.
        longest: Longest sequence that its config states; 0 for none.
        config: The text model's config, with the defaults of its type where they are known.
        raw: The whole config as it is written.
    """

    name: str
    folder: Path | None
    layers: tuple[AttentionLayer, ...]
    num_layers: int
    dtype: str
    latent: bool
    features: frozenset[Feature]
    longest: int
    config: Mapping[str, Any]
    raw: Mapping[str, Any]

    def served_in(self, dtype: str) -> Model:
        """The model as it is with another ``--dtype``; see `read_model`.

        Raises:
            UnknownModel: What its layers keep in that dtype is not known.
        """
        return replace(self, dtype=_dtype(self.raw, self.config, dtype, self.name))

    def require_runnable(self, deployment: Deployment) -> None:
        """Raise DeploymentError where policies cannot work on what the layers keep."""
        if self.latent and (refusals := deployment.beyond(LATENT)):
            raise DeploymentError(deployment.source, refusals)

    def token_bytes(self, element: int | None = None) -> int:
        """Bytes of a token's KV in all layers.

        Args:
            element: Bytes of an element; those of the model's dtype if None.
        """
        size = ELEMENT[self.dtype] if element is None else element
        return sum(layer.token_bytes(size) for layer in self.layers)

    def context_bytes(self, tokens: int) -> int:
        """Bytes of the KV of one text, where sliding layers keep their window alone."""
        size = ELEMENT[self.dtype]
        return sum(
            layer.token_bytes(size) * min(tokens, layer.window or tokens) for layer in self.layers
        )

    def views(self, ranks: int = 1) -> tuple[LayerView, ...]:
        """Views of the layers on one rank, as policies take them.

        Args:
            ranks: Tensor-parallel ranks.

        Raises:
            UnknownModel: The heads cannot be divided among them.
        """
        rope = _rope(self.config)
        return tuple(
            LayerView(
                index=layer.index,
                num_layers=self.num_layers,
                num_kv_heads=self.heads_of_rank(layer.kv_heads, ranks),
                num_heads=self.heads_of_rank(layer.heads, ranks),
                head_size=layer.head_size,
                dtype=self.dtype,
                rope=rope,
            )
            for layer in self.layers
        )

    def heads_of_rank(self, heads: int, ranks: int) -> int:
        """Heads on one rank; a head that there are fewer of than ranks is kept by several.

        Raises:
            UnknownModel: They cannot be divided.
        """
        if heads % ranks and ranks % heads:
            raise UnknownModel(
                f"{self.name}: {heads} heads cannot be divided among {ranks} GPUs. Fix: pass "
                "--tensor-parallel with a number that divides them."
            )
        return max(heads // ranks, 1)


def read_model(name: str, dtype: str = "auto") -> Model:
    """Read a model's config; the hub is asked only for that of a model that is not here.

    Args:
        name: Its config file, or the model as ``--model`` takes it.
        dtype: Dtype that it is served in; ``auto`` for the one its config states, bfloat16 in place
            of float32.

    Raises:
        ModelNotFound: It is not there.
        UnknownModel: It has no config that can be read, or what its layers keep is not known.
    """
    file, folder = _find(name)
    try:
        raw = json.loads(read_regular(file, MAX_CONFIG))
    except UnreadableFile as error:
        raise UnknownModel(f"{error}. Fix: pass a model's config.json.") from error
    except (ValueError, RecursionError) as error:
        raise UnknownModel(
            f"{file} is not JSON: {error}. Fix: pass a model's config.json."
        ) from error
    if not isinstance(raw, Mapping):
        raise UnknownModel(f"{file} is not a model's config. Fix: pass a model's config.json.")
    return model_of(raw, name, folder, dtype)


def _find(name: str) -> tuple[Path, Path | None]:
    from kvplug.model_source import Need, resolve

    if os.path.isfile(name) and not name.endswith(".gguf"):  # noqa: PTH113 -- False for no path
        return Path(name), None
    folder = resolve(name, need=Need.CONFIG).folder
    return folder / "config.json", folder


def model_of(
    raw: Mapping[str, Any], name: str, folder: Path | None = None, dtype: str = "auto"
) -> Model:
    """Read a config that is data already; see `read_model`."""
    text = raw.get("text_config")
    stated = _filled({**text} if isinstance(text, Mapping) else {**raw}, raw)
    read = _Reader(name, stated)
    for key in UNPLANNED:
        if stated.get(key) not in (None, 0, [], {}):
            raise UnknownModel(
                f"{name}: its layers keep more than K and V ({key}), which is not planned. "
                "Fix: start the engine; vLLM prints what its pool holds."
            )
    total = read.number("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = read.number("num_attention_heads", "n_head", "n_heads")
    latent = isinstance(stated.get("kv_lora_rank"), int)
    shared = read.number("num_kv_shared_layers", default=0)
    own = total - shared
    if own < 1:
        raise UnknownModel(f"{name}: num_kv_shared_layers is {shared} of {total} layers.")
    if latent:
        size, value_size, kv_heads = (
            read.number("kv_lora_rank") + read.number("qk_rope_head_dim"),
            0,
            1,
        )
    else:
        kv_heads = read.kv_heads(heads)
        hidden = read.number("hidden_size", "n_embd", "d_model")
        size = value_size = read.number("head_dim", default=hidden // heads)
    windows = read.windows(total)
    share = 1
    if stated.get("use_cla"):
        share = max(read.number("cla_share_factor", default=1), 1)
    layers = tuple(
        AttentionLayer(i, kv_heads, heads, size, value_size, windows[i])
        for i in range(own)
        if i % share == 0
    )
    features = {
        Feature.SLIDING_WINDOW_LAYERS: any(layer.window is not None for layer in layers),
        Feature.KV_SHARING: len(layers) < total,
        Feature.MULTIMODAL: any(k in raw for k in ("vision_config", "audio_config")),
    }
    return Model(
        name=name,
        folder=folder,
        layers=layers,
        num_layers=total,
        dtype=_dtype(raw, stated, dtype, name),
        latent=latent,
        features=frozenset(feature for feature, has in features.items() if has),
        longest=read.number("max_position_embeddings", "n_positions", default=0),
        config=stated,
        raw=raw,
    )


def _filled(text: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """A text config with its type's defaults, as transformers has them; as it is where that is not
    installed, or does not know the type."""
    kind = text.get("model_type") or raw.get("model_type")
    try:
        from transformers import CONFIG_MAPPING

        own: dict[str, Any] = CONFIG_MAPPING[kind](**text).to_dict()
    except Exception:
        # A config that it cannot read is read as far as it states things itself.
        return text
    return own | {key: value for key, value in text.items() if value is not None}


def _dtype(raw: Mapping[str, Any], stated: Mapping[str, Any], asked: str, name: str) -> str:
    found = ALSO_SPELT.get(asked, asked)
    if asked == "auto":
        keys = ("dtype", "torch_dtype")
        said = [of[key] for of in (raw, stated) for key in keys if isinstance(of.get(key), str)]
        found = said[0] if said else "bfloat16"
        found = "bfloat16" if found == "float32" else found
    if found not in ELEMENT:
        raise UnknownModel(
            f"{name}: KV in {found} is not planned. Fix: set the dtype to one of "
            f"{', '.join(ELEMENT)}."
        )
    return found


def _rope(config: Mapping[str, Any]) -> Any:
    """The rotary embedding that policies are shown, or None where it cannot be told."""
    from kvplug.hosts.vllm.view import rope_of

    try:
        from transformers import CONFIG_MAPPING

        return rope_of(CONFIG_MAPPING[config["model_type"]](**config))
    except Exception:
        return None


class _Reader:
    """Numbers of a config that somebody else wrote."""

    def __init__(self, name: str, config: Mapping[str, Any]):
        self.name, self.config = name, config

    def number(self, *keys: str, default: int | None = None) -> int:
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
                raise UnknownModel(f"{self.name}: {key} must be a number, got {value!r:.40}.")
            if value or default is not None:
                return value
        if default is None:
            raise UnknownModel(
                f"{self.name}: its config states no {keys[0]}. Fix: pass the config.json of a "
                "decoder model."
            )
        return default

    def kv_heads(self, heads: int) -> int:
        if self.config.get("multi_query") and not self.config.get("new_decoder_architecture"):
            return 1
        keys = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
        return self.number(*keys, default=heads) or heads

    def windows(self, total: int) -> list[int | None]:
        """Window of each layer; None for one that attends all."""
        window = self.number("sliding_window", "sliding_window_size", default=0) or None
        kinds = self.config.get("layer_types")
        if isinstance(kinds, list) and len(kinds) >= total:
            if unknown := sorted({str(k) for k in kinds[:total]} - {FULL, SLIDING}):
                raise UnknownModel(
                    f"{self.name}: layers of type {', '.join(unknown)[:80]} are not planned. "
                    "Fix: start the engine; vLLM prints what its pool holds."
                )
            return [window if k == SLIDING else None for k in kinds[:total]]
        pattern = self.number("sliding_window_pattern", "_sliding_window_pattern", default=0)
        if window and pattern > 1:
            return [None if (i + 1) % pattern == 0 else window for i in range(total)]
        if self.config.get("use_sliding_window") is False:
            window = None
        return [window] * total
