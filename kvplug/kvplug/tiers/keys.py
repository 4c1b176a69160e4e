"""Keys of chunks: equal in every process and on every machine where the KV is equal.

A key is a BLAKE2b digest over everything that a chunk's KV depends on: the engine's computation,
the tenant, the adapter, and all token ids up to the chunk's end, with the multimodal inputs among
them. Each key is made from the one before it, so a text's keys cost one pass over its tokens.
vLLM's own block hashes serve one process alone: their seed and their hash function are the
engine's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvplug.contract import TransferCodec
from kvplug.tiers import wire

__all__ = ["KEY_BYTES", "KeyChain", "engine_identity", "stored_identity"]

KEY_BYTES = 32
_VERSION = 1
"""Of the way keys are made: another one finds nothing of what this one stored."""


def engine_identity(facts: Mapping[str, Any]) -> str:
    """Return the digest of what all KV of an engine depends on, hexadecimal.

    Args:
        facts: By name; plain data, as JSON takes it.
    """
    text = json.dumps([_VERSION, dict(facts)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def stored_identity(identity: str, codec: TransferCodec) -> str:
    """Return the identity under which a tier stores what a codec writes, hexadecimal.

    Chunks of one engine have the same keys under every codec, and what one codec wrote no other
    reads: engines of different codecs that share a server or a folder must not meet there.

    Args:
        identity: From `engine_identity`.
        codec: The codec.
    """
    facts = [identity, wire.VERSION, codec.name, codec.version, codec.fingerprint()]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


class KeyChain:
    """Keys of one text's chunks, in text order; longer texts add keys, none ever changes.

    Args:
        identity: From `engine_identity`.
        chunk: Tokens of a chunk.
        tenant: Name of the tenant; empty for none.
        adapter: Digest of the adapter; empty for none.

    Attributes:
        keys: Keys so far, 32 bytes each.
    """

    def __init__(self, identity: str, chunk: int, tenant: str = "", adapter: str = "") -> None:
        if chunk < 1:
            raise ValueError(f"a chunk has at least 1 token, got {chunk}")
        self.keys: list[bytes] = []
        self._chunk = chunk
        self._last = _digest(
            b"text", *(part.encode() for part in (identity, str(chunk), tenant, adapter))
        )

    def extend(self, tokens: Sequence[int], inputs: Sequence[tuple[str, int, int]] = ()) -> None:
        """Add the keys of a text's full chunks that have none yet.

        Args:
            tokens: Token ids of the whole text so far; what was passed before is unchanged.
            inputs: Multimodal inputs in text order: identifier of the content, position of its
                first token, tokens. Each counts from the first chunk on that has a token of it.
        """
        size, done = self._chunk, len(self.keys)
        count = len(tokens) // size
        if count <= done:
            return
        ids = np.asarray(tokens[done * size : count * size], dtype="<i4").reshape(-1, size)
        for i, chunk in enumerate(ids, start=done):
            start, end = i * size, (i + 1) * size
            within = [
                f"{name}@{first - start}".encode()
                for name, first, length in inputs
                if first < end and first + length > start
            ]
            self._last = _digest(self._last, chunk.tobytes(), *within)
            self.keys.append(self._last)


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(len(part).to_bytes(4, "little"))
        digest.update(part)
    return digest.digest()
