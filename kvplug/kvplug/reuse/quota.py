"""Limits of the bytes that stored segments take, and the order of eviction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from sortedcontainers import SortedSet

from kvplug.reuse.entry import CatalogEntry, SegmentState

__all__ = ["EvictionOrder", "Quota", "QuotaPart"]


class EvictionOrder:
    """Segments in the order in which they are evicted: ordinary ones before those of live
    sessions, then the least recently used."""

    def __init__(self) -> None:
        self._sorted: SortedSet = SortedSet()
        self._entries: dict[str, tuple[tuple[bool, float, str], CatalogEntry]] = {}

    def __len__(self) -> int:
        return len(self._entries)

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


class QuotaPart:
    """The bytes of one place, memory or disk, and the segments that may be evicted from it.

    Where room is needed, nobody loses what is within a fair share: the limit divided by the tenants
    that have anything there. So one tenant's segments never push out all of another's.

    Args:
        limit: Most bytes, of all tenants together.
        largest: Most bytes of one tenant.
        size: Bytes that a segment takes there.

    Attributes:
        limit: As given.
        used: Bytes counted now.
    """

    def __init__(self, limit: int, largest: float, size: Callable[[CatalogEntry], int]) -> None:
        self.limit = limit
        self.used = 0
        self._largest = largest
        self._size = size
        self._by_tenant: Counter[str] = Counter()
        self._ranked: SortedSet = SortedSet()
        self._evictable: dict[str, EvictionOrder] = {}
        self._all = EvictionOrder()

    def count(self, entry: CatalogEntry, sign: int) -> None:
        """Add a segment's bytes, or take them away."""
        size, tenant = sign * self._size(entry), entry.fingerprint.tenant
        self.used += size
        before = self._by_tenant[tenant]
        self._ranked.discard((before, tenant))
        if before + size:
            self._by_tenant[tenant] = before + size
            self._ranked.add((before + size, tenant))
        else:
            del self._by_tenant[tenant]

    def put(self, entry: CatalogEntry, spared: bool) -> None:
        """Let a segment be evicted, in its order."""
        self._all.put(entry, spared)
        self._evictable.setdefault(entry.fingerprint.tenant, EvictionOrder()).put(entry, spared)

    def discard(self, entry: CatalogEntry) -> None:
        """Let a segment be evicted no more."""
        self._all.discard(entry)
        own = self._evictable.get(entry.fingerprint.tenant)
        if own is not None:
            own.discard(entry)
            if not len(own):
                del self._evictable[entry.fingerprint.tenant]

    def victims(
        self, tenant: str, size: int, oldest: float, gone: Sequence[CatalogEntry] = ()
    ) -> list[CatalogEntry] | None:
        """Choose what to evict for more bytes of a tenant. Changes nothing.

        Args:
            tenant: Whose bytes they are.
            size: How many.
            oldest: Time before which a segment's last use has expired it.
            gone: Segments counted here that leave anyway.

        Returns:
            The segments; None if evicting all that may be evicted is not enough.
        """
        if size > min(self.limit, self._largest):
            return None
        used, of_tenant = self.used + size, Counter({tenant: size})
        chosen: list[CatalogEntry] = []
        seen: set[str] = set()

        def usage(one: str) -> int:
            return self._by_tenant.get(one, 0) + of_tenant[one]

        def leave(entry: CatalogEntry) -> None:
            nonlocal used
            seen.add(entry.id)
            used -= self._size(entry)
            of_tenant[entry.fingerprint.tenant] -= self._size(entry)

        def take(entries: Iterable[CatalogEntry], enough: Callable[[], bool]) -> None:
            for entry in entries:
                if enough():
                    return
                if entry.id not in seen:
                    chosen.append(entry)
                    leave(entry)

        def fits() -> bool:
            return used <= self.limit

        def allowed() -> bool:
            return usage(tenant) <= self._largest

        for entry in gone:
            leave(entry)
        if fits() and allowed():
            return chosen
        own = self._evictable.get(tenant, ())
        take(self._all.unused_since(oldest), lambda: fits() and allowed())
        take(own, allowed)
        share = self.limit / len(self._by_tenant.keys() | {tenant})
        take(own, lambda: fits() or usage(tenant) <= share)
        for _, other in reversed(self._ranked):
            if fits():
                break
            if other != tenant and usage(other) > share:
                have = self._evictable.get(other, ())
                take(have, lambda other=other: fits() or usage(other) <= share)  # type: ignore[misc]
        take(own, fits)
        return chosen if fits() and allowed() else None


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
        tenant_share: Largest fraction of either that one tenant takes.
    """

    def __init__(
        self, memory: int, disk: int, ttl: float, *, writes: bool, tenant_share: float = 1.0
    ) -> None:
        self._memory = QuotaPart(memory, memory * tenant_share, lambda entry: entry.bytes)
        self._disk = QuotaPart(disk, disk * tenant_share, lambda entry: entry.file_bytes)
        self.on_disk_only = 0
        """Segments that could be fetched from disk."""
        self._ttl = ttl
        self._writes = writes
        self._all = EvictionOrder()

    @property
    def memory_bytes(self) -> int:
        """Bytes that are counted against memory."""
        return self._memory.used

    @property
    def disk_bytes(self) -> int:
        """Bytes that are counted against the disk."""
        return self._disk.used

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
        for order in (self._memory, self._disk, self._all):
            order.discard(entry)

    def place(self, entry: CatalogEntry, spared: bool) -> None:
        """Place a segment in the eviction orders by its state and last use.

        Args:
            entry: The segment.
            spared: It belongs to a live session, so it leaves after all that do not.
        """
        self._all.put(entry, spared)
        if entry.state is SegmentState.MEMORY and entry.bytes:
            self._memory.put(entry, spared)
        else:
            self._memory.discard(entry)
        if entry.on_disk and not entry.in_flight:
            self._disk.put(entry, spared)
        else:
            self._disk.discard(entry)

    def expired(self, now: float) -> Iterator[CatalogEntry]:
        """Segments that nobody used for their time to live."""
        return self._all.unused_since(now - self._ttl)

    def fits_on_disk(self, tenant: str, size: int) -> bool:
        """True if there is room for that many more bytes of a tenant's files."""
        return self._disk.victims(tenant, size, -float("inf")) == []

    def room(
        self,
        tenant: str,
        memory: int,
        disk: int,
        now: float,
        leaving: CatalogEntry | None = None,
    ) -> tuple[list[CatalogEntry], list[CatalogEntry]] | None:
        """Choose the segments to evict so that more bytes fit. Changes nothing.

        Args:
            tenant: Whose bytes they are.
            memory: Bytes needed in memory.
            disk: Bytes needed on disk.
            now: Seconds since the epoch.
            leaving: A segment of the tenant that leaves anyway.

        Returns:
            Segments to drop from memory and segments to delete from disk; None if evicting all
            that may be evicted is not enough.
        """
        oldest = now - self._ttl
        going = [leaving] if leaving is not None else []
        gone = [entry for entry in going if entry.in_memory]
        dropped = self._memory.victims(tenant, memory, oldest, gone)
        if dropped is None or not disk:
            return None if dropped is None else (dropped, [])
        # Without a file, what is dropped leaves altogether.
        going += [entry for entry in dropped if not entry.on_disk]
        gone = [entry for entry in going if self.counts_on_disk(entry)]
        deleted = self._disk.victims(tenant, disk, oldest, gone)
        return None if deleted is None else (dropped, deleted)

    def _count(self, entry: CatalogEntry, sign: int) -> None:
        if entry.in_memory:
            self._memory.count(entry, sign)
        if self.counts_on_disk(entry):
            self._disk.count(entry, sign)
        if entry.state is SegmentState.DISK and entry.on_disk and not entry.cause:
            self.on_disk_only += sign
