"""LoRA adapters by content, as stored KV tells them apart."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvplug.digests import Signature, file_digests, signature

_FILES = (
    "adapter_config.json",
    "adapter_model.bin",
    "adapter_model.pt",
    "adapter_model.safetensors",
    "new_embeddings.bin",
    "new_embeddings.pt",
    "new_embeddings.safetensors",
)
"""Files of which vLLM loads an adapter, where they are there."""


@dataclass(frozen=True)
class _Loaded:
    """An adapter as it was when a request first named it.

    Attributes:
        path: Its folder.
        files: What the file system said about its files.
        digest: Of its files; empty if they could not be read.
    """

    path: str
    files: tuple[tuple[str, Signature], ...]
    digest: str


class Adapters:
    """Content of the adapters that an engine has loaded.

    vLLM loads an adapter when somebody names its number for the first time, and keeps it, or loads
    it again from the same path, as long as it likes; nobody tells when. So a number whose files are
    younger than the engine, have changed since a request named it, or that comes with another path,
    may mean either content: it has no identity. The same bytes under another number are the same
    adapter.

    Args:
        started: When the engine started, in seconds since the epoch.
    """

    def __init__(self, started: float) -> None:
        self._started = started
        self._loaded: dict[int, _Loaded] = {}

    def identity(self, lora_request: Any) -> str | None:
        """Identity of a request's adapter.

        Args:
            lora_request: vLLM's ``LoRARequest``, or None.

        Returns:
            32 hexadecimal digits; the empty string without an adapter; None for one whose content
            is not known: it is not a local folder, cannot be read, or has changed.
        """
        if lora_request is None:
            return ""
        number, path = int(lora_request.lora_int_id), str(lora_request.lora_path)
        known = self._loaded.get(number)
        if known is None:
            known = self._loaded[number] = self._load(path)
        elif known.digest and (path != known.path or _signatures(path) != known.files):
            known = self._loaded[number] = _Loaded(known.path, (), "")
        return known.digest or None

    def _load(self, path: str) -> _Loaded:
        unknown = _Loaded(path, (), "")
        files = _signatures(path)
        if not any(name.startswith("adapter_model") for name, _ in files):
            return unknown
        if max(facts[-1] for _, facts in files) / 1e9 > self._started:
            return unknown
        try:
            digests = file_digests(Path(path).expanduser() / name for name, _ in files)
        except OSError:
            return unknown
        found = hashlib.blake2b(digest_size=16)
        for (name, _), digest in zip(files, digests, strict=True):
            found.update(f"{name}\0{digest}\0".encode())
        return _Loaded(path, files, found.hexdigest()) if _signatures(path) == files else unknown


def _signatures(path: str) -> tuple[tuple[str, Signature], ...]:
    """What the file system says about the files that are there."""
    found = []
    for name in _FILES:
        try:
            found.append((name, signature(Path(path).expanduser() / name)))
        except OSError:
            continue
    return tuple(found)
