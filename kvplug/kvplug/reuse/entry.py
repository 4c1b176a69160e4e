"""One stored segment as the scheduler knows it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from kvplug.contract.reuse import Candidate, Fingerprint

__all__ = ["CatalogEntry", "SegmentState", "Tokens", "text_bytes", "variant_key"]

Tokens = NDArray[np.int32]


class SegmentState(StrEnum):
    """Location of a segment's bytes."""

    SAVING = "saving"
    """On their way from the engine's pages into the workers' memory."""
    MEMORY = "memory"
    """In the memory of every worker."""
    DISK = "disk"
    """In files only."""
    FETCHING = "fetching"
    """On their way from the files into memory."""


@dataclass(slots=True, eq=False)
class CatalogEntry:
    """A stored segment.

    Attributes:
        id: 32 hexadecimal digits.
        fingerprint: What its KV depends on.
        token_ids: Its tokens, ``[length]`` int32.
        context_ids: All tokens before it, ``[start]`` int32.
        bytes: In memory, on all ranks together: its K and V, and its text wherever that is kept.
        state: Where the bytes are.
        on_disk: Its files are written.
        last_used: Seconds since the epoch.
        session: Session that keeps it, or the empty string.
        valid: Nobody has invalidated it.
        cause: Why its bytes cannot be used; empty where they can.
        writing: Its files are being written.
        file_bytes: Of its files, on all ranks together.
    """

    id: str
    fingerprint: Fingerprint
    token_ids: Tokens
    context_ids: Tokens
    bytes: int
    state: SegmentState
    on_disk: bool = False
    last_used: float = 0.0
    session: str = ""
    valid: bool = True
    cause: str = ""
    writing: bool = False
    file_bytes: int = 0

    @property
    def usable(self) -> bool:
        """True if its bytes are what they should be, as far as is known."""
        return self.valid and not self.cause

    @property
    def ready(self) -> bool:
        """True if its bytes can be put into pages now."""
        return self.state is SegmentState.MEMORY and self.usable

    @property
    def candidate(self) -> Candidate:
        """The segment as checks see it."""
        return Candidate(self.fingerprint, not self.cause, self.cause, self.valid)

    @property
    def in_flight(self) -> bool:
        """True while a worker saves or fetches it, so that nothing else can be done with it."""
        return self.state in (SegmentState.SAVING, SegmentState.FETCHING)

    @property
    def in_memory(self) -> bool:
        """True if its bytes take memory."""
        return self.state is not SegmentState.DISK

    @property
    def session_key(self) -> tuple[str, str]:
        """Tenant and session: sessions of two tenants may have one name."""
        return self.fingerprint.tenant, self.session


def text_bytes(num_tokens: int, world: int) -> int:
    """Bytes that token ids take in memory: of the scheduler, and of each worker.

    Args:
        num_tokens: Tokens of a segment and of all the text before it.
        world: Number of workers.
    """
    return 4 * num_tokens * (world + 1)


def variant_key(fingerprint: Fingerprint) -> tuple[object, ...]:
    """Equal for fingerprints of one text computed after different texts."""
    return (
        fingerprint.tenant,
        fingerprint.tokens,
        fingerprint.model,
        fingerprint.tokenizer,
        fingerprint.lora,
        fingerprint.dtype,
        fingerprint.format,
        fingerprint.position,
        fingerprint.geometry,
        fingerprint.mask,
    )
