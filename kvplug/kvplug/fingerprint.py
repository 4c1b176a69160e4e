"""Tells one model from another, by its config and every byte of its weights."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kvplug.digests import Signature, file_digests, signature

__all__ = [
    "ONCE",
    "model_fingerprint",
    "once",
    "reads_files",
    "weight_files",
    "weights_signature",
]

ONCE = "once/"
"""Beginning of an identity that no other engine has, nor the same one after its end."""

_IGNORED = frozenset(
    {
        "_commit_hash",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Entries of config.json that say nothing about what a model computes. The type of its activations
is the engine's to choose."""

_SAFETENSORS_INDEX = "model.safetensors.index.json"
_MISTRAL, _MISTRAL_INDEX = "consolidated*.safetensors", "consolidated.safetensors.index.json"
_TRAINING = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
"""Files that are no weights, whatever their names end with."""

_QUANTIZATION = ("*quant_config.json", "*quantize_config.json")
"""Files in which vLLM finds how weights are quantized, where config.json does not say."""

_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "auto": ("*.safetensors", "*.bin", "*.pt"),
    "hf": ("*.safetensors", "*.bin", "*.pt"),
    "safetensors": ("*.safetensors",),
    "fastsafetensors": ("*.safetensors",),
    "instanttensor": ("*.safetensors",),
    "mistral": (_MISTRAL,),
    "pt": ("*.pt",),
    "npcache": ("*.bin", "*.pt"),
    "sharded_state": ("*.safetensors",),
    "runai_streamer": ("*.safetensors",),
    "runai_streamer_sharded": ("*.safetensors",),
}
"""Names of weight files by vLLM's ``--load-format``; the first pattern that finds any counts."""

_FILELESS = frozenset({"dummy", "ipc_cache", "modelexpress", "tensorizer"})
"""Formats of vLLM that read none of these."""

_INDEXED = frozenset({"auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral"})
"""Formats for which an index says which of the files are read."""


def once() -> str:
    """Return an identity that nothing else has, for what cannot be identified."""
    return ONCE + secrets.token_hex(16)


def reads_files(load_format: str) -> bool | None:
    """Tell whether vLLM's ``--load-format`` reads files that can be hashed; None if unknown."""
    load_format = load_format.lower()
    if load_format in _PATTERNS:
        return True
    return False if load_format in _FILELESS else None


def weight_files(model: Path, load_format: str = "auto") -> list[Path]:
    """List the files that a model's weights are read from.

    Args:
        model: Its directory, or the one file that holds all of it.
        load_format: vLLM's ``--load-format``.

    Returns:
        The files, sorted; none if there are none, or if the format reads no files.
    """
    if load_format in _FILELESS:
        return []
    if model.is_file():
        return [model]
    names = sorted(p.name for p in model.iterdir() if not p.name.startswith("."))
    index = _SAFETENSORS_INDEX
    if load_format == "auto" and any(fnmatch(name, _MISTRAL) for name in names):
        load_format = "mistral"
    if load_format == "mistral":
        index = _MISTRAL_INDEX
    for pattern in _PATTERNS.get(load_format, ()):
        found = [name for name in names if fnmatch(name, pattern)]
        if found and pattern.endswith(".safetensors") and load_format in _INDEXED:
            found = _indexed(model / index, found)
        elif found and load_format in ("auto", "hf", "pt", "npcache"):
            found = [name for name in found if name not in _TRAINING]
        if found:
            return [model / name for name in found]
    return []


def _indexed(index: Path, names: list[str]) -> list[str]:
    """Those of the files that an index lists; all without an index."""
    try:
        listed = json.loads(index.read_text("utf-8"))["weight_map"].values()
    except FileNotFoundError:
        return names
    wanted = {Path(str(name)).name for name in listed}
    if absent := wanted.difference(names):
        raise FileNotFoundError(f"{index} lists {min(absent)}, which is not there")
    return [name for name in names if name in wanted]


def weights_signature(model: Path, load_format: str = "auto") -> tuple[Signature, ...]:
    """What the file system says about a model's weights, to see whether they changed.

    Raises:
        OSError: They cannot be seen.
        ValueError: The index of the files is damaged.
    """
    return tuple(signature(file) for file in weight_files(model, load_format))


def model_fingerprint(
    path: str | Path,
    load_format: str = "auto",
    *,
    config: Path | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> str:
    """Fingerprint a model, distinct from any other whose config or weights differ in one byte.

    A hash over `config.json`, the names and all bytes of the weight files, and, if any, of the code
    that the config names and of the files that say how the weights are quantized. The directory and
    the files' times do not matter. Bytes are read once: digests are remembered in
    ``$XDG_CACHE_HOME/kvplug``, by each file's device, inode, size and times.

    Args:
        path: The model's directory or file.
        load_format: vLLM's ``--load-format``, which chooses among the files.
        config: Directory of `config.json` where it is another one.
        change: What the engine makes of the config.

    Returns:
        32 hexadecimal digits; empty for what is not here, has no config or no weights that can be
        read, and for a format that reads no files. What is empty equals nothing.
    """
    try:
        model = Path(path)
        files = weight_files(model, load_format)
        if not files:
            return ""
        facts: dict[str, Any] = {}
        folder = config or model
        if folder.is_dir():
            facts = json.loads((folder / "config.json").read_text("utf-8"))
        if change is not None:
            facts = change(facts)
        stated = {
            name: value
            for name, value in facts.items()
            if name not in _IGNORED and not name.endswith("_token_id")
        }
        beside = sorted(folder.glob("*.py")) if "auto_map" in facts else []
        beside += sorted(file for name in _QUANTIZATION for file in model.glob(name))
        if load_format == "npcache":
            # From the second start on, vLLM reads these instead, whatever the others are by then.
            beside += sorted(file for file in (model / "np").glob("*") if file.is_file())
        digests = file_digests([*files, *beside])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""
    found = hashlib.blake2b(digest_size=16)
    found.update(json.dumps(stated, sort_keys=True).encode())
    for file, digest in zip([*files, *beside], digests, strict=True):
        # The one file that is a model may have any name.
        found.update(f"\0{'' if file == model else file.name}\0{digest}".encode())
    return found.hexdigest()
