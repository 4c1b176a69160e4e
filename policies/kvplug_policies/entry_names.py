"""Names under which tiers store chunks: one entry for each chunk and rank, apart by identity."""

from __future__ import annotations

import hashlib
import re

_NAME = re.compile(r"([0-9a-f]{64})\.(0|[1-9][0-9]{0,4})-([1-9][0-9]{0,4})")
_FOLDER = re.compile(r"[0-9a-f]{8,128}")


def entry_name(key: bytes, rank: int, world: int) -> str:
    """Name of a rank's part of a chunk."""
    return f"{key.hex()}.{rank}-{world}"


def parse_entry(name: str) -> tuple[bytes, int, int] | None:
    """Key, rank and world of an entry's name; None for any other name."""
    found = _NAME.fullmatch(name)
    if found is None or int(found[2]) >= int(found[3]):
        return None
    return bytes.fromhex(found[1]), int(found[2]), int(found[3])


def identity_name(identity: str) -> str:
    """Name of what holds the entries of one identity; safe in paths, URLs and keys."""
    if _FOLDER.fullmatch(identity):
        return identity
    return hashlib.blake2b(identity.encode(), digest_size=32).hexdigest()
