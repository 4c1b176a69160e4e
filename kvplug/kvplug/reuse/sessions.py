"""Conversations that keep their segments from being evicted while they are in use."""

from __future__ import annotations

from sortedcontainers import SortedSet

from kvplug.reuse.entry import CatalogEntry

__all__ = ["Sessions"]

Key = tuple[str, str]


class Sessions:
    """Sessions by tenant and name, the segments of each, and when each was last used.

    A session is *live* until it is idle for its time. An idle session keeps its segments, which
    are spared again once it is used.

    Args:
        ttl: Seconds after which an unused session is idle.
    """

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._last_used: dict[Key, float] = {}
        self._by_time: SortedSet = SortedSet()
        self._members: dict[Key, dict[str, CatalogEntry]] = {}

    def __len__(self) -> int:
        return len(self._last_used)

    def spares(self, entry: CatalogEntry) -> bool:
        """True if a segment belongs to a live session."""
        return entry.session_key in self._last_used

    def use(self, entry: CatalogEntry) -> list[CatalogEntry]:
        """Count a segment, and with it its session, as used when the segment last was.

        Returns:
            Other segments that are spared from now on: their session was idle.
        """
        if not entry.session:
            return []
        key = entry.session_key
        members = self._members.setdefault(key, {})
        members[entry.id] = entry
        before = self._last_used.get(key)
        used = entry.last_used if before is None else max(before, entry.last_used)
        if before == used:
            return []
        if before is not None:
            self._by_time.remove((before, key))
        self._last_used[key] = used
        self._by_time.add((used, key))
        if before is not None:
            return []
        return [other for other in members.values() if other is not entry]

    def adopt(self, entry: CatalogEntry, session: str) -> None:
        """Give a segment to the session that computes its text now."""
        if session and session != entry.session:
            self.leave(entry)
            entry.session = session

    def leave(self, entry: CatalogEntry) -> None:
        """Take a segment out of its session; a session without segments ends."""
        key = entry.session_key
        members = self._members.get(key)
        if members is None or entry.id not in members:
            return
        del members[entry.id]
        if not members:
            del self._members[key]
            self._end(key)

    def end(self, session: str, tenant: str | None = None) -> list[CatalogEntry]:
        """End sessions of a name.

        Args:
            session: The name.
            tenant: Of this tenant only; of all tenants if None.

        Returns:
            Their segments, which belong to no session now.
        """
        released: list[CatalogEntry] = []
        for key in [k for k in self._members if k[1] == session and tenant in (None, k[0])]:
            self._end(key)
            released += self._members.pop(key).values()
        for entry in released:
            entry.session = ""
        return released

    def end_idle(self, now: float) -> list[CatalogEntry]:
        """Stop sparing the segments of sessions that were not used for their time.

        Returns:
            The segments that are not spared any more.
        """
        released: list[CatalogEntry] = []
        while self._by_time and self._by_time[0][0] < now - self._ttl:
            _, key = self._by_time[0]
            self._end(key)
            released += self._members[key].values()
        return released

    def _end(self, key: Key) -> None:
        used = self._last_used.pop(key, None)
        if used is not None:
            self._by_time.remove((used, key))
