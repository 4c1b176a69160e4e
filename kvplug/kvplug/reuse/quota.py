"""Limits of the bytes that stored segments take, and the order of eviction."""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedSet

from kvplug.reuse.entry import CatalogEntry, SegmentState

__all__ = ["EvictionOrder", "Quota"]


class EvictionOrder:
    """Segments in the order in which they are evicted: ordinary ones before those of live
    sessions, then the least recently used."""

    def __init__(self) -> None:
        self._sorted: SortedSet = SortedSet()
        self._entries: dict[str, tuple[tuple[bool, float, str], CatalogEntry]] = {}

    def put(self, entry: CatalogEntry, spared: bool) -> None:
        """Add a segment, or move it to where its last use now puts it."""
        self.discard(entry)
        key = (spared, entry.last_used, entry.id)
        self._entries[entry.id] = key, entry
        self._sorted.add(key)

    def discard(self, entry: CatalogEntry) -> None:
        """Remove a segment, if it is there."""
        found = self._entries.pop(entry.id, None)
        if found is not None:
            self._sorted.remove(found[0])

    def __iter__(self) -> Iterator[CatalogEntry]:
        return (self._entries[name][1] for *_, name in self._sorted)

    def unused_since(self, moment: float) -> Iterator[CatalogEntry]:
        """Segments last used before a moment."""
        for spared in (False, True):
            for *_, name in self._sorted.irange((spared, -float("inf"), ""), (spared, moment, "")):
                yield self._entries[name][1]


class Quota:
    """Bytes in memory and on disk, and the segments to evict when there is no room.

    Counts what is on its way as well as what is there, so neither limit is ever exceeded. Entries
    are charged and placed by their state: release one before a change of its state and charge it
    afterwards.

    Args:
        memory: Bytes of all ranks' memory together.
        disk: Bytes of all ranks' files together.
        ttl: Seconds a segment is kept unused.
        writes: Segments in memory are also written to disk.
    """

    def __init__(self, memory: int, disk: int, ttl: float, *, writes: bool) -> None:
        self.memory, self.disk = memory, disk
        self.memory_bytes = self.disk_bytes = 0
        self.on_disk_only = 0
        """Segments that could be fetched from disk."""
        self._ttl = ttl
        self._writes = writes
        self._in_memory, self._on_disk, self._all = (
            EvictionOrder(),
            EvictionOrder(),
            EvictionOrder(),
        )

    def counts_on_disk(self, entry: CatalogEntry) -> bool:
        """True if a segment's files exist or will."""
        saving = entry.state is SegmentState.SAVING and self._writes
        return entry.on_disk or entry.writing or saving

    def charge(self, entry: CatalogEntry, spared: bool) -> None:
        """Count a segment's bytes where its state says, and place it in the eviction orders."""
        self._count(entry, 1)
        self.place(entry, spared)

    def release(self, entry: CatalogEntry) -> None:
        """Stop counting a segment's bytes; it keeps its place."""
        self._count(entry, -1)

    def remove(self, entry: CatalogEntry) -> None:
        """Stop counting a segment's bytes, and take it out of the eviction orders."""
        self.release(entry)
        for order in (self._in_memory, self._on_disk, self._all):
            order.discard(entry)

    def place(self, entry: CatalogEntry, spared: bool) -> None:
        """Place a segment in the eviction orders by its state and last use.

        Args:
            entry: The segment.
            spared: It belongs to a live session, so it leaves after all that do not.
        """
        self._all.put(entry, spared)
        if entry.state is SegmentState.MEMORY and entry.bytes:
            self._in_memory.put(entry, spared)
        else:
            self._in_memory.discard(entry)
        if entry.on_disk and not entry.in_flight:
            self._on_disk.put(entry, spared)
        else:
            self._on_disk.discard(entry)

    def expired(self, now: float) -> Iterator[CatalogEntry]:
        """Segments that nobody used for their time to live."""
        return self._all.unused_since(now - self._ttl)

    def fits_on_disk(self, size: int) -> bool:
        """True if there is room for that many more bytes of files."""
        return self.disk_bytes + size <= self.disk

    def room(
        self, memory: int, disk: int, now: float, leaving: CatalogEntry | None = None
    ) -> tuple[list[CatalogEntry], list[CatalogEntry]] | None:
        """Choose the segments to evict so that more bytes fit. Changes nothing.

        Args:
            memory: Bytes needed in memory.
            disk: Bytes needed on disk.
            now: Seconds since the epoch.
            leaving: A segment that leaves anyway.

        Returns:
            Segments to drop from memory and segments to delete from disk; None if evicting all
            that may be evicted is not enough.
        """
        if memory > self.memory or disk > self.disk:
            return None
        memory_used, disk_used = self.memory_bytes + memory, self.disk_bytes + disk
        if leaving is not None:
            memory_used -= leaving.bytes * leaving.in_memory
            disk_used -= leaving.bytes * self.counts_on_disk(leaving)
        dropped: list[CatalogEntry] = []
        deleted: list[CatalogEntry] = []
        if memory_used > self.memory:
            for entry in self._evictable(self._in_memory, now, leaving):
                dropped.append(entry)
                memory_used -= entry.bytes
                # Without a file it leaves altogether.
                disk_used -= entry.bytes * (self.counts_on_disk(entry) and not entry.on_disk)
                if memory_used <= self.memory:
                    break
            else:
                return None
        if disk and disk_used > self.disk:
            for entry in self._evictable(self._on_disk, now, leaving):
                deleted.append(entry)
                disk_used -= entry.bytes
                if disk_used <= self.disk:
                    break
            else:
                return None
        return dropped, deleted

    def _evictable(
        self, order: EvictionOrder, now: float, leaving: CatalogEntry | None
    ) -> Iterator[CatalogEntry]:
        """Segments of an order: expired ones first."""
        seen = {leaving.id} if leaving is not None else set()
        for entry in order.unused_since(now - self._ttl):
            if entry.id not in seen:
                seen.add(entry.id)
                yield entry
        for entry in order:
            if entry.id not in seen:
                yield entry

    def _count(self, entry: CatalogEntry, sign: int) -> None:
        if entry.in_memory:
            self.memory_bytes += sign * entry.bytes
        if self.counts_on_disk(entry):
            self.disk_bytes += sign * entry.bytes
        if entry.state is SegmentState.DISK and entry.on_disk and not entry.cause:
            self.on_disk_only += sign
