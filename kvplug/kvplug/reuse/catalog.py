"""The scheduler's catalog of stored segments: finds them, and decides what the workers keep."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvplug.contract.reuse import Fingerprint
from kvplug.reuse.entry import CatalogEntry, SegmentState, Tokens, text_bytes
from kvplug.reuse.file import digest, file_bytes, segment_id
from kvplug.reuse.hashing import Hasher
from kvplug.reuse.index import Match, SegmentIndex
from kvplug.reuse.inventory import Inventory, StoreCommands
from kvplug.reuse.quota import Quota
from kvplug.reuse.scan import scan_folder
from kvplug.reuse.sessions import Sessions
from kvplug.reuse.settings import MIB, Store

__all__ = ["Catalog", "CatalogEntry", "SegmentState", "StoreCommands", "segment_id"]

PREFETCHED_SEGMENTS = 16
"""Parts of a request's text that are searched for near duplicates."""

EVENTS = (
    "saved",
    "known",
    "replaced",
    "full_variants",
    "no_room",
    "written",
    "fetched",
    "prefetched",
    "dropped",
    "deleted",
    "expired",
    "invalidated",
    "reset",
    "stale",
)
"""Counters of what happened to segments since the start."""


class Catalog:
    """Every stored segment: what it is, where its bytes are, and how long it stays.

    The quotas hold at every moment, for what is on its way as for what is there. Segments of one
    tenant are never found for another.

    Args:
        settings: Quotas, time to live, variants.
        token_bytes: Bytes of one token's KV, on all ranks together.
        prefetch: Also keep an index of near-duplicate text, for `prefetch`.
        min_tokens: Tokens of a segment that a text must contain for it to be found.
        world: Ranks that each segment must have files of; any number if None.
        clock: Seconds since the epoch.
        hasher: Hash of token windows, another one in tests.

    Raises:
        ValueError: `token_bytes` is not positive.
        KVPlugError: `prefetch` needs a package that is not installed.
    """

    def __init__(
        self,
        settings: Store,
        token_bytes: int,
        *,
        prefetch: bool = False,
        min_tokens: int = 32,
        world: int | None = None,
        clock: Callable[[], float] = time.time,
        hasher: Hasher | None = None,
    ) -> None:
        if token_bytes < 1:
            raise ValueError(f"token_bytes must be positive, got {token_bytes}")
        self.settings = settings
        self._token_bytes = token_bytes
        self._min_tokens = min_tokens
        self._writes = bool(settings.directory)
        self._world = world
        self._clock = clock
        self._inventory = Inventory(
            SegmentIndex(min_tokens, near_duplicates=prefetch, hasher=hasher),
            Quota(
                settings.memory * MIB,
                settings.disk * MIB,
                settings.ttl,
                writes=self._writes,
                tenant_share=settings.tenant_share,
            ),
            Sessions(settings.session_ttl),
            settings.ttl,
            settings.variants,
        )
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._inventory)

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(self._inventory)

    @property
    def index(self) -> SegmentIndex:
        """Segments by text, time and request."""
        return self._inventory.index

    def get(self, segment: str) -> CatalogEntry | None:
        """Return the segment with an id, or None."""
        return self._inventory.get(segment)

    # -- Finding -----------------------------------------------------------------------------------

    def match(self, tokens: Tokens, tenant: str) -> list[tuple[CatalogEntry, Match]]:
        """Find a tenant's segments in a text, whatever their state; expired ones left out.

        Invalidated segments and those whose bytes turned out bad are included until they expire,
        so that a check can say why they are not used.

        Args:
            tokens: Token ids, ``[n]``.
            tenant: Cache salt, or the empty string.

        Returns:
            By position in the text, then longest first.
        """
        oldest = self._clock() - self.settings.ttl
        found = [(self._entry(match.segment), match) for match in self.index.match(tokens, tenant)]
        return [(entry, match) for entry, match in found if entry.last_used >= oldest]

    def prefetch(
        self,
        tokens: Tokens,
        tenant: str,
        runs: Sequence[tuple[int, int]] | None = None,
        *,
        k: int = 4,
        min_cosine: float = 0.5,
    ) -> list[str]:
        """Fetch from disk what has nearly the text of a request, before it is asked for.

        Args:
            tokens: Token ids, ``[n]``.
            tenant: Whose segments.
            runs: ``(begin, end)`` of each part to search for, as the text would be split into
                segments; the whole text if None. The first 16 that are long enough are searched.
            k: Most segments considered for a part.
            min_cosine: Least estimated cosine of the sets of n-grams.

        Returns:
            Ids of those that are being fetched.
        """
        ordered: list[str] = []
        if not self._inventory.quota.on_disk_only:
            return ordered
        parts = [(a, b) for a, b in runs or [(0, len(tokens))] if b - a >= self._min_tokens]
        for begin, end in parts[:PREFETCHED_SEGMENTS]:
            for name, cosine in self.index.nearest(tokens[begin:end], tenant, k):
                on_disk = self._entry(name).state is SegmentState.DISK
                if on_disk and cosine >= min_cosine and self.want(name):
                    ordered.append(name)
        self._counts["prefetched"] += len(ordered)
        return ordered

    # -- Saving ------------------------------------------------------------------------------------

    def plan_save(
        self, fingerprint: Fingerprint, token_ids: Tokens, context_ids: Tokens, session: str = ""
    ) -> CatalogEntry | None:
        """Make room for a segment that is being computed.

        Args:
            fingerprint: What its KV depends on.
            token_ids: Its tokens, ``[length]``.
            context_ids: All tokens before it, ``[start]``.
            session: Session that keeps it.

        Returns:
            The segment, ``SAVING``. None if it is stored already after no more approximate reuses
            (it then counts as used), if `variants` copies of its text after other texts are stored
            and none is worse, or if no room can be made for it.

        Raises:
            ValueError: The fingerprint is not that of these tokens.
        """
        token_ids = np.ascontiguousarray(token_ids, np.int32)
        context_ids = np.ascontiguousarray(context_ids, np.int32)
        _require_fingerprint_of(fingerprint, token_ids, context_ids)
        name, now = segment_id(fingerprint), self._clock()
        inventory = self._inventory
        known = inventory.get(name)
        replaced: CatalogEntry | None = None
        if known is not None:
            better = known.usable and known.fingerprint.ancestry <= fingerprint.ancestry
            if better or known.in_flight:
                inventory.sessions.adopt(known, session)
                inventory.touch(known, now)
                self._counts["known"] += 1
                return None
            replaced = known
        elif inventory.variants_full(fingerprint):
            replaced = inventory.worst_variant(fingerprint, now)
            if replaced is None:
                self._counts["full_variants"] += 1
                return None
        ranks = self._world or 1
        planes = fingerprint.length * self._token_bytes
        size = planes + text_bytes(fingerprint.start + fingerprint.length, ranks)
        files = file_bytes(fingerprint, session, planes, ranks) if self._writes else 0
        victims = inventory.room(fingerprint.tenant, size, files, now, replaced)
        if victims is None:
            self._counts["no_room"] += 1
            return None
        if replaced is not None:
            self._counts["replaced"] += 1
            inventory.remove(replaced)
        self._evict(*victims)
        entry = CatalogEntry(
            name,
            fingerprint,
            token_ids,
            context_ids,
            size,
            SegmentState.SAVING,
            last_used=now,
            session=session,
            file_bytes=files,
        )
        inventory.add(entry)
        return entry

    def saved(self, segment: str, measures: Mapping[str, float] | None = None) -> None:
        """Take in that all workers have a segment's bytes in memory.

        Args:
            segment: Its id.
            measures: Stability measures, for its fingerprint.
        """
        entry = self.get(segment)
        if entry is None or entry.state is not SegmentState.SAVING:
            self._counts["stale"] += 1
            return
        if measures:
            entry.fingerprint = replace(entry.fingerprint, measures=dict(measures))
        self._counts["saved"] += 1
        self._inventory.change(entry, SegmentState.MEMORY, writing=self._writes)
        if not entry.valid:
            self._inventory.empty(entry)

    def written(self, segment: str) -> None:
        """Take in that all workers have written a segment's files."""
        entry = self.get(segment)
        if entry is None:
            # Evicted while it was being written.
            self._inventory.command_delete(segment)
        elif entry.writing:
            self._counts["written"] += 1
            self._inventory.change(entry, on_disk=True, writing=False)
        else:
            self._counts["stale"] += 1

    def fetched(self, segment: str) -> None:
        """Take in that all workers have a segment's bytes in memory again."""
        entry = self.get(segment)
        if entry is None or entry.state is not SegmentState.FETCHING:
            self._counts["stale"] += 1
            return
        self._counts["fetched"] += 1
        self._inventory.change(entry, SegmentState.MEMORY)
        if not entry.valid:
            self._inventory.empty(entry)

    def failed(self, segment: str, cause: str) -> None:
        """Take in that a worker could not save, write or fetch a segment, or lacked its bytes.

        A segment whose files are bad is kept, with the cause, until it expires or is saved again.
        """
        self._failures[cause] += 1
        entry, inventory = self.get(segment), self._inventory
        if entry is None:
            return
        if entry.state is SegmentState.SAVING:
            inventory.remove(entry)
        elif entry.state is SegmentState.FETCHING:
            entry.cause = cause
            # Another rank may have fetched its part.
            inventory.command_drop(segment)
            inventory.change(entry, SegmentState.DISK)
            if not entry.valid:
                inventory.empty(entry)
        elif entry.writing:
            inventory.command_delete(segment)
            inventory.change(entry, writing=False)
        elif entry.state is SegmentState.MEMORY:
            inventory.lose(entry)

    # -- Using -------------------------------------------------------------------------------------

    def want(self, segment: str) -> bool:
        """Order a segment's fetch from disk.

        Returns:
            True if it is on its way or in memory; False if no room can be made for it, or its
            bytes cannot be used.
        """
        entry = self.get(segment)
        if entry is None or not entry.usable:
            return False
        if entry.state is not SegmentState.DISK:
            return entry.state is not SegmentState.SAVING
        now = self._clock()
        victims = self._inventory.room(entry.fingerprint.tenant, entry.bytes, 0, now)
        if victims is None:
            self._counts["no_room"] += 1
            return False
        self._evict(*victims)
        entry.last_used = now
        self._inventory.fetch(entry)
        return True

    def touch(self, segments: Iterable[str]) -> None:
        """Count segments as used now, and their sessions."""
        now = self._clock()
        for segment in segments:
            entry = self.get(segment)
            if entry is not None:
                self._inventory.touch(entry, now)

    def end_session(self, session: str, tenant: str | None = None) -> int:
        """End a session: its segments stay under the quota as any others.

        Args:
            session: The session.
            tenant: Of this tenant only; of all tenants if None.

        Returns:
            How many segments it had.
        """
        return self._inventory.end_session(session, tenant)

    def invalidate(
        self,
        tenant: str | None = None,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> int:
        """Never use segments again; their bytes go at once, in memory and on disk.

        All that is given must hold of a segment; with nothing given, every segment is chosen.

        Returns:
            How many segments were valid until now.
        """
        named = self if ids is None else filter(None, map(self.get, dict.fromkeys(ids)))
        chosen = [
            entry
            for entry in named
            if entry.valid
            and tenant in (None, entry.fingerprint.tenant)
            and model in (None, entry.fingerprint.model)
        ]
        for entry in chosen:
            entry.valid = False
            if not entry.in_flight:
                self._inventory.empty(entry)
        self._counts["invalidated"] += len(chosen)
        return len(chosen)

    def clear(self) -> list[str]:
        """Remove every segment and its bytes everywhere, those on their way too.

        Returns:
            Ids of those that have files, or will have.
        """
        filed = [entry.id for entry in self if self._inventory.quota.counts_on_disk(entry)]
        gone = list(self)
        for entry in gone:
            self._inventory.remove(entry)
        self._counts["reset"] += len(gone)
        return filed

    def expire(self) -> int:
        """Remove what nobody has used for its time to live; returns how many segments."""
        expired = self._inventory.quota.expired(self._clock())
        gone = [entry for entry in expired if not entry.in_flight]
        for entry in gone:
            self._inventory.remove(entry)
        self._counts["expired"] += len(gone)
        return len(gone)

    def take_commands(self) -> StoreCommands:
        """Return the commands for the workers since the last call; each is given once."""
        return self._inventory.take_commands()

    def counters(self) -> dict[str, float]:
        """Return segments and bytes by place, events since the start, and causes of failures."""
        states = Counter(entry.state for entry in self)
        quota = self._inventory.quota
        return {
            "segments": len(self),
            **{f"segments_{state}": states[state] for state in SegmentState},
            "memory_bytes": quota.memory_bytes,
            "disk_bytes": quota.disk_bytes,
            "sessions": len(self._inventory.sessions),
            **{name: self._counts[name] for name in EVENTS},
            **{f"failed {cause}": n for cause, n in sorted(self._failures.items())},
            **{f"refused {cause}": n for cause, n in sorted(self._refused.items())},
        }

    def failures(self) -> dict[str, int]:
        """Return how often segments could not be written or read, by cause."""
        return dict(self._failures)

    # -- Starting ----------------------------------------------------------------------------------

    def scan(self, directory: str | Path) -> dict[str, int]:
        """Add the segments that an earlier engine left in a folder.

        The most recently used come first, until the disk quota is reached; the others, and those
        that have expired, are ordered to be deleted. See `scan_folder`.

        Args:
            directory: The folder; one that does not exist has no segments.

        Returns:
            Files that are not used, by cause.

        Raises:
            KVPlugError: It is not a folder, or not readable.
        """
        now = self._clock()
        found, refused = scan_folder(directory, now, self._world)
        expired, unwanted = self._inventory.restore((one.entry() for one in found), now)
        self._counts["expired"] += expired
        self._counts["deleted"] += unwanted
        self._refused.update(refused)
        return dict(refused)

    # -- Inside ------------------------------------------------------------------------------------

    def _entry(self, segment: str) -> CatalogEntry:
        entry = self.get(segment)
        assert entry is not None, "the index knows no other segments"
        return entry

    def _evict(self, dropped: list[CatalogEntry], deleted: list[CatalogEntry]) -> None:
        self._counts["dropped"] += len(dropped)
        self._counts["deleted"] += len(deleted)
        self._inventory.evict(dropped, deleted)


def _require_fingerprint_of(
    fingerprint: Fingerprint, token_ids: Tokens, context_ids: Tokens
) -> None:
    if (len(token_ids), len(context_ids)) != (fingerprint.length, fingerprint.start):
        raise ValueError(
            f"the fingerprint is of {fingerprint.length} tokens at {fingerprint.start}, got "
            f"{len(token_ids)} after {len(context_ids)}"
        )
    if not len(token_ids):
        raise ValueError("a segment must have at least one token")
    if digest(token_ids) != fingerprint.tokens:
        raise ValueError("the fingerprint's digest does not match the tokens")
