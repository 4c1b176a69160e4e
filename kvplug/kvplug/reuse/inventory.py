"""Stored segments with everything that is kept about them: text index, quota, sessions, variants,
and the commands that bring the workers to the same state."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kvplug.contract.reuse import Fingerprint
from kvplug.fingerprint import ONCE
from kvplug.reuse.entry import CatalogEntry, SegmentState, variant_key
from kvplug.reuse.index import SegmentIndex
from kvplug.reuse.quota import Quota
from kvplug.reuse.sessions import Sessions

__all__ = ["Inventory", "StoreCommands"]


@dataclass(slots=True)
class StoreCommands:
    """Commands for the workers. No id is both fetched and evicted, or saved in the same step and
    evicted, so a worker may carry them out in any order.

    Attributes:
        drop: Ids to take out of memory, after the step's own loads.
        fetch: Ids to bring from their files into memory, and how many approximate reuses are behind
            each.
        delete: Ids whose files to remove, and not to write any more.
    """

    drop: list[str] = field(default_factory=list)
    fetch: dict[str, int] = field(default_factory=dict)
    delete: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.drop or self.fetch or self.delete)


class Inventory:
    """Stored segments, and the changes of their state that keep all records about them in step.

    Args:
        index: Finds segments by their text.
        quota: Limits, and the order of eviction.
        sessions: Conversations that keep their segments.
        ttl: Seconds a segment is kept unused.
        max_variants: Copies of one text, computed after different texts, that are kept.
    """

    def __init__(
        self, index: SegmentIndex, quota: Quota, sessions: Sessions, ttl: float, max_variants: int
    ) -> None:
        self.index, self.quota, self.sessions = index, quota, sessions
        self._ttl = ttl
        self._max_variants = max_variants
        self._entries: dict[str, CatalogEntry] = {}
        self._variants: dict[tuple[object, ...], dict[str, CatalogEntry]] = {}
        # For each id to drop, whether its bytes are whole, so that it can be kept after all.
        self._drop: dict[str, bool] = {}
        self._fetch: dict[str, int] = {}
        self._delete: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def get(self, name: str) -> CatalogEntry | None:
        """Return the segment with an id, or None."""
        return self._entries.get(name)

    # -- Commands ----------------------------------------------------------------------------------

    def take_commands(self) -> StoreCommands:
        """Return the commands since the last call; each is given once."""
        commands = StoreCommands(list(self._drop), dict(self._fetch), list(self._delete))
        self._drop, self._fetch, self._delete = {}, {}, {}
        return commands

    def command_drop(self, name: str, *, whole: bool = False) -> None:
        """Have the workers drop a segment from memory.

        Args:
            name: Its id.
            whole: Its bytes are complete on every worker.
        """
        self._drop[name] = whole

    def command_delete(self, name: str) -> None:
        """Have the workers remove a segment's files."""
        self._delete[name] = None

    # -- Membership --------------------------------------------------------------------------------

    def add(self, entry: CatalogEntry) -> None:
        """Add a segment that is being saved, or that an earlier engine left on disk."""
        fingerprint = entry.fingerprint
        self._entries[entry.id] = entry
        if entry.state is SegmentState.SAVING:
            # What workers still have of an earlier one is overwritten.
            self._drop.pop(entry.id, None)
            self._delete.pop(entry.id, None)
        self.index.add(
            entry.id,
            entry.token_ids,
            fingerprint.tenant,
            fingerprint.created,
            fingerprint.request_id,
        )
        self._variants.setdefault(variant_key(fingerprint), {})[entry.id] = entry
        self._reorder(self.sessions.use(entry))
        self.quota.charge(entry, self.sessions.spares(entry))

    def restore(self, entries: Iterable[CatalogEntry], now: float) -> tuple[int, int]:
        """Add segments found on disk until the quota is reached; delete the others.

        Args:
            entries: The segments, most recently used first.
            now: Seconds since the epoch.

        Returns:
            How many had expired, and how many found no room or cannot equal anything any more.
        """
        expired = unwanted = 0
        for entry in entries:
            if entry.id in self:
                continue
            if entry.last_used < now - self._ttl:
                expired += 1
            elif entry.fingerprint.model.startswith(ONCE) or not self.quota.fits_on_disk(
                entry.fingerprint.tenant, entry.file_bytes
            ):
                unwanted += 1
            else:
                self.add(entry)
                continue
            self.command_delete(entry.id)
        return expired, unwanted

    def remove(self, entry: CatalogEntry) -> None:
        """Remove a segment and its bytes everywhere."""
        self._command_removal(entry)
        self.quota.remove(entry)
        self.index.remove(entry.id)
        key = variant_key(entry.fingerprint)
        del self._variants[key][entry.id]
        if not self._variants[key]:
            del self._variants[key]
        self.sessions.leave(entry)
        del self._entries[entry.id]

    def empty(self, entry: CatalogEntry) -> None:
        """Remove the bytes of an invalid segment; it stays known until it expires."""
        self._command_removal(entry)
        self.quota.release(entry)
        entry.bytes = entry.file_bytes = 0
        entry.state, entry.on_disk, entry.writing = SegmentState.DISK, False, False
        self.quota.charge(entry, self.sessions.spares(entry))

    def lose(self, entry: CatalogEntry) -> None:
        """Take in that a worker lacks a segment's bytes in memory."""
        if entry.on_disk:
            self.command_drop(entry.id)
            self.change(entry, SegmentState.DISK)
        else:
            self.remove(entry)

    def _command_removal(self, entry: CatalogEntry) -> None:
        self._fetch.pop(entry.id, None)
        if entry.in_memory:
            self.command_drop(entry.id)
        if self.quota.counts_on_disk(entry):
            self.command_delete(entry.id)

    # -- State and use -----------------------------------------------------------------------------

    def change(
        self,
        entry: CatalogEntry,
        state: SegmentState | None = None,
        *,
        on_disk: bool | None = None,
        writing: bool | None = None,
    ) -> None:
        """Change a segment's state; what is None stays."""
        self.quota.release(entry)
        entry.state = entry.state if state is None else state
        entry.on_disk = entry.on_disk if on_disk is None else on_disk
        entry.writing = entry.writing if writing is None else writing
        self.quota.charge(entry, self.sessions.spares(entry))

    def fetch(self, entry: CatalogEntry) -> None:
        """Bring a segment back into memory, where room was made for it."""
        if self._drop.get(entry.id):
            # The workers were not told to drop it yet.
            del self._drop[entry.id]
            self.change(entry, SegmentState.MEMORY)
            return
        # Where it is still in memory it is overwritten.
        self._drop.pop(entry.id, None)
        self._fetch[entry.id] = entry.fingerprint.ancestry
        self.change(entry, SegmentState.FETCHING)

    def touch(self, entry: CatalogEntry, now: float) -> None:
        """Count a segment and its session as used."""
        entry.last_used = now
        self._reorder(self.sessions.use(entry))
        self._reorder([entry])

    def end_session(self, session: str, tenant: str | None) -> int:
        """End a session; returns how many segments it had."""
        released = self.sessions.end(session, tenant)
        self._reorder(released)
        return len(released)

    def _reorder(self, entries: Iterable[CatalogEntry]) -> None:
        """Update the places of segments in the eviction orders."""
        for entry in entries:
            self.quota.place(entry, self.sessions.spares(entry))

    # -- Room --------------------------------------------------------------------------------------

    def room(
        self,
        tenant: str,
        memory: int,
        disk: int,
        now: float,
        leaving: CatalogEntry | None = None,
    ) -> tuple[list[CatalogEntry], list[CatalogEntry]] | None:
        """Choose what to evict for more bytes of a tenant, as `Quota.room`; idle sessions spare
        nothing."""
        self._reorder(self.sessions.end_idle(now))
        return self.quota.room(tenant, memory, disk, now, leaving)

    def evict(self, dropped: Iterable[CatalogEntry], deleted: Iterable[CatalogEntry]) -> None:
        """Drop segments from memory, and delete the files of others."""
        for entry in dropped:
            if entry.on_disk:
                self.command_drop(entry.id, whole=True)
                self.change(entry, SegmentState.DISK)
            else:
                self.remove(entry)
        for entry in deleted:
            if entry.state is SegmentState.DISK:
                self.remove(entry)
            else:
                self.command_delete(entry.id)
                self.change(entry, on_disk=False)

    def variants_full(self, fingerprint: Fingerprint) -> bool:
        """True if as many variants of a text are stored as may be."""
        return len(self._variants.get(variant_key(fingerprint), ())) >= self._max_variants

    def worst_variant(self, fingerprint: Fingerprint, now: float) -> CatalogEntry | None:
        """Return the variant that a new one may replace, or None: it is unusable, expired, or was
        computed after more approximate reuses than the new one."""
        family = self._variants.get(variant_key(fingerprint), {})
        oldest = now - self._ttl

        def badness(entry: CatalogEntry) -> tuple[bool, int, float]:
            useless = not entry.usable or entry.last_used < oldest
            return useless, entry.fingerprint.ancestry, -entry.last_used

        worst = heapq.nlargest(1, (e for e in family.values() if not e.in_flight), key=badness)
        if not worst:
            return None
        useless, ancestry, _ = badness(worst[0])
        return worst[0] if useless or ancestry > fingerprint.ancestry else None
