"""Where an engine's weights come from, and which model they are."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.digests import Signature
from kvplug.fingerprint import model_fingerprint, weights_signature
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.hub import model_folder

_SHARDS = re.compile(r"[^./][^/]*\.safetensors")


@dataclass(frozen=True)
class Weights:
    """Where an engine's weights come from.

    Attributes:
        name: Directory, file, URL or name on the hub.
        load_format: vLLM's ``--load-format``; one that no files are known of where shards are named
            by a pattern that leads elsewhere.
        revision: Commit on the hub, or None.
        cache: Folder of the hub's downloads; the usual one if None.
    """

    name: str
    load_format: str
    revision: str | None
    cache: str | None

    @classmethod
    def of(cls, vllm_config: Any) -> Weights:
        """The weights that an engine's config names."""
        model, load = vllm_config.model_config, vllm_config.load_config
        name, load_format = str(model.model_weights or model.model), str(load.load_format)
        extra = load.model_loader_extra_config
        pattern = str(extra.get("pattern") or "") if isinstance(extra, Mapping) else ""
        if load_format == "sharded_state" and pattern and not _SHARDS.fullmatch(pattern):
            load_format = f"sharded_state of {pattern}"
        return cls(name, load_format, model.revision, load.download_dir)

    @property
    def on_hub(self) -> bool:
        """True if their name is one on a hub, and not a path or a URL."""
        return "://" not in self.name and not Path(self.name).exists()

    def here(self) -> bool:
        """True if files of them are on this machine."""
        try:
            return bool(weights_signature(self.folder(), self.load_format))
        except (OSError, ValueError, KeyError, AttributeError):
            return False

    def signature(self) -> tuple[Signature, ...]:
        """What the file system says about their files; empty where there are none."""
        try:
            return weights_signature(self.folder(), self.load_format)
        except (OSError, ValueError, KeyError, AttributeError):
            return ()

    def folder(self) -> Path:
        """Where they are. Raises OSError if they are not on this machine."""
        return model_folder(self.name, self.revision, self.cache)


def model_of(vllm_config: Any) -> str:
    """Fingerprint of the engine's model, as calibrations and records name it; empty for none.

    Config overrides count: the model is then the one whose config says the same. A name on the hub
    is downloaded as vLLM does, if it was not yet.
    """
    model, weights = vllm_config.model_config, Weights.of(vllm_config)
    if weights.on_hub and not weights.here():
        compat.download_weights(vllm_config)
    elsewhere = model.hf_config_path
    config = None
    if elsewhere and elsewhere != model.model:
        try:
            config = model_folder(str(elsewhere), None, weights.cache)
        except OSError:
            return ""
    overrides = model.hf_overrides
    change = None
    if callable(overrides):
        change = functools.partial(_as_it_runs, vllm_config)
    elif overrides:
        change = functools.partial(_overridden, overrides)
    try:
        folder = weights.folder()
    except OSError:
        return ""
    return model_fingerprint(folder, weights.load_format, config=config, change=change)


def no_model(vllm_config: Any) -> str:
    """Why an engine's model has no fingerprint, as the end of a sentence."""
    weights = Weights.of(vllm_config)
    if weights.load_format == "dummy":
        return "load_format dummy draws its weights at random"
    if "://" in weights.name:
        return f"its weights come from {weights.name}, not from files of this machine"
    if weights.here():
        return f"its config or weights at {weights.name} cannot be read"
    return f"load_format {weights.load_format} finds no weight files of {weights.name}"


def _as_it_runs(vllm_config: Any, config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "as_it_runs": plain(vllm_config.model_config.hf_config.to_dict())}


def _overridden(overrides: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A config with overrides, those of nested configs too."""
    found = dict(config)
    for name, value in overrides.items():
        inner = found.get(name)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            found[name] = _overridden(value, inner)
        else:
            found[name] = plain(value)
    return found


def plain(value: Any) -> Any:
    """A value as JSON has it. What has no lasting text differs at every start."""
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(str(plain(inner)) for inner in value)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
