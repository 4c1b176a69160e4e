"""LoRA adapters by content, as stored KV tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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
        fused: True if it says that its experts' weights are in one tensor a layer.
        files: What the file system said about its files.
        digest: Of its files; empty if they could not be read.
    """

    path: str
    fused: bool
    files: tuple[tuple[str, Signature], ...]
    digest: str


class Adapters:
    """Content of the adapters that an engine has loaded.

    vLLM loads an adapter when somebody names its number for the first time, and keeps it, or loads
    it again from the same path, as long as it likes; nobody tells when. So a number whose files, or
    the links that lead to them, are younger than the engine, have changed since a request named it,
    or that comes with another path, may mean either content: it has no identity. The same bytes
    under another number are the same adapter.

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
        fused = bool(getattr(lora_request, "is_3d_lora_weight", False))
        known = self._loaded.get(number)
        if known is None:
            known = self._loaded[number] = self._load(path, fused)
        elif known.digest and (
            (path, fused) != (known.path, known.fused) or _signatures(path) != known.files
        ):
            known = self._loaded[number] = _Loaded(known.path, known.fused, (), "")
        return known.digest or None

    def _load(self, path: str, fused: bool) -> _Loaded:
        unknown = _Loaded(path, fused, (), "")
        files = _signatures(path)
        if not any(name.startswith("adapter_model") for name, _ in files):
            return unknown
        try:
            if _changed(path, files) / 1e9 > self._started:
                return unknown
            digests = file_digests(Path(path).expanduser() / name for name, _ in files)
        except OSError:
            return unknown
        found = hashlib.blake2b(b"fused" if fused else b"", digest_size=16)
        for (name, _), digest in zip(files, digests, strict=True):
            found.update(f"{name}\0{digest}\0".encode())
        return (
            _Loaded(path, fused, files, found.hexdigest())
            if _signatures(path) == files
            else unknown
        )


def _changed(path: str, files: tuple[tuple[str, Signature], ...]) -> int:
    """When an adapter last became what it is, in nanoseconds: by a change of its files, of the
    folder, which is renamed to take another's place, or of a link on the way to them."""
    folder = Path(path).expanduser().absolute()
    links = {link for name, _ in files for link in _links(folder / name)}
    return max(
        folder.stat().st_ctime_ns,
        *(facts[-1] for _, facts in files),
        *(link.lstat().st_ctime_ns for link in links),
    )


def _links(path: Path) -> Iterator[Path]:
    """Yield the links that a path, which leads to a file, goes through."""
    for one in (path, *path.parents):
        if one.is_symlink():
            yield one
            yield from _links(one.parent / one.readlink())


def _signatures(path: str) -> tuple[tuple[str, Signature], ...]:
    """What the file system says about the files that are there."""
    found = []
    for name in _FILES:
        try:
            found.append((name, signature(Path(path).expanduser() / name)))
        except OSError:
            continue
    return tuple(found)
