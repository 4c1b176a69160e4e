"""What the scheduler knows of every stored segment, and what it lets the workers keep."""

from __future__ import annotations

import heapq
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedSet

from kvplug.contract.reuse import Candidate, Fingerprint
from kvplug.errors import KVPlugError
from kvplug.reuse.file import (
    SUFFIX,
    BadSegment,
    SegmentHeader,
    digest,
    parse_name,
    read_header,
    segment_id,
)
from kvplug.reuse.index import Hasher, Match, SegmentIndex
from kvplug.reuse.settings import MIB, Store

__all__ = ["Catalog", "CatalogEntry", "SegmentState", "StoreCommands", "segment_id"]

logger = logging.getLogger("kvplug.reuse")

Tokens = NDArray[np.int32]

_PREFETCHED = 16


class SegmentState(StrEnum):
    """Where a segment's bytes are."""

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
        bytes: On all ranks together.
        state: Where the bytes are.
        on_disk: Whether its files are written.
        last_used: Seconds since the epoch.
        session: Session that keeps it, or the empty string.
        valid: Whether nobody has invalidated it.
        cause: Why its bytes cannot be had; empty where they can.
        writing: Whether its files are on their way to the disk.
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

    @property
    def usable(self) -> bool:
        """Whether its bytes are what they should be, as far as is known."""
        return self.valid and not self.cause

    @property
    def ready(self) -> bool:
        """Whether its bytes can be put into pages now."""
        return self.state is SegmentState.MEMORY and self.usable

    @property
    def candidate(self) -> Candidate:
        """What the checks are shown."""
        return Candidate(self.fingerprint, not self.cause, self.cause, self.valid)

    @property
    def in_flight(self) -> bool:
        """Whether a worker is at it, so that nothing else can be done with it."""
        return self.state in (SegmentState.SAVING, SegmentState.FETCHING)

    @property
    def in_memory(self) -> bool:
        """Whether its bytes take memory."""
        return self.state is not SegmentState.DISK


@dataclass(slots=True)
class StoreCommands:
    """What the workers are to do. No id is both fetched and given up, or saved in the same step and
    given up, so the order in which a worker does them does not matter.

    Attributes:
        drop: Ids to take out of memory; what the step loads is loaded first.
        fetch: Ids to bring from their files into memory.
        delete: Ids whose files go, and which are not to be written any more.
    """

    drop: list[str] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.drop or self.fetch or self.delete)


class EvictionOrder:
    """Segments in the order in which they may go: ordinary ones before those of live sessions,
    and the least recently used first."""

    def __init__(self) -> None:
        self._sorted: SortedSet = SortedSet()
        self._keys: dict[str, tuple[bool, float, str]] = {}

    def put(self, segment: CatalogEntry, spared: bool) -> None:
        self.discard(segment.id)
        key = self._keys[segment.id] = (spared, segment.last_used, segment.id)
        self._sorted.add(key)

    def discard(self, segment: str) -> None:
        key = self._keys.pop(segment, None)
        if key is not None:
            self._sorted.remove(key)

    def __iter__(self) -> Iterator[str]:
        return (key[2] for key in self._sorted)

    def unused_since(self, moment: float) -> Iterator[str]:
        """Those last used before a moment."""
        for spared in (False, True):
            for key in self._sorted.irange((spared, -float("inf"), ""), (spared, moment, "")):
                yield key[2]


class Catalog:
    """Every stored segment: what it is, where it lies, and how long it stays.

    The quotas hold at every moment, for what is on its way as for what is there. Segments of one
    tenant are never found for another.

    Args:
        settings: Quotas, time to live, variants.
        token_bytes: Bytes of one token's KV, on all ranks together.
        prefetch: Also keep an index of near-duplicate text, for `prefetch`.
        min_tokens: Tokens of a segment that must stand in a text for it to be found.
        world: Ranks that each segment must have files of; any number if None.
        clock: Seconds since the epoch.
        hasher: Hash of token windows, another one in tests.

    Raises:
        ValueError: `token_bytes` is not positive.
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
            raise ValueError(f"token_bytes must be positive, not {token_bytes}")
        self.settings = settings
        self._token_bytes = token_bytes
        self._memory_quota = settings.memory * MIB
        self._disk_quota = settings.disk * MIB
        self._writes = bool(settings.directory)
        self._world = world
        self._clock = clock
        self._segments: dict[str, CatalogEntry] = {}
        self._index = SegmentIndex(min_tokens, near_duplicates=prefetch, hasher=hasher)
        self._min_tokens = min_tokens
        # Segments that could be dropped from memory, deleted from the disk, or expire.
        self._memory_order, self._disk_order, self._order = (
            EvictionOrder(),
            EvictionOrder(),
            EvictionOrder(),
        )
        self._memory_bytes = self._disk_bytes = self._asleep = 0
        self._families: dict[tuple[object, ...], dict[str, None]] = {}
        self._sessions: dict[tuple[str, str], float] = {}
        self._idle: SortedSet = SortedSet()
        self._members: dict[tuple[str, str], dict[str, None]] = {}
        # With each id to drop, whether the bytes are whole, so that it may as well stay.
        self._drop: dict[str, bool] = {}
        self._fetch: dict[str, None] = {}
        self._delete: dict[str, None] = {}
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(self._segments.values())

    @property
    def index(self) -> SegmentIndex:
        """Segments by text, time and request."""
        return self._index

    def get(self, segment: str) -> CatalogEntry | None:
        """The segment of an id; None if there is none."""
        return self._segments.get(segment)

    # -- Finding -----------------------------------------------------------------------------------

    def match(self, tokens: Tokens, tenant: str) -> list[tuple[CatalogEntry, Match]]:
        """Find a tenant's segments in a text, whatever their state; expired ones left out.

        Invalidated segments and those whose bytes turned out bad are among them until they
        expire, so that a check can say why they are not used.

        Args:
            tokens: Token ids, ``[n]``.
            tenant: Cache salt, or the empty string.

        Returns:
            By place in the text, then the longest first.
        """
        oldest = self._clock() - self.settings.ttl
        return [
            (self._segments[match.segment], match)
            for match in self._index.match(tokens, tenant)
            if self._segments[match.segment].last_used >= oldest
        ]

    def prefetch(
        self,
        tokens: Tokens,
        tenant: str,
        runs: Sequence[tuple[int, int]] | None = None,
        *,
        k: int = 4,
        min_cosine: float = 0.5,
    ) -> list[str]:
        """Bring back from the disk what has nearly the text of a request, before it is asked for.

        Args:
            tokens: Token ids, ``[n]``.
            tenant: Whose segments.
            runs: ``(begin, end)`` of each run to look for, as the text would be cut into segments;
                one run is all of it if None. The first 16 that are long enough are looked at.
            k: Most segments looked at for a run.
            min_cosine: Estimated cosine of the sets of n-grams from which on it is worth it.

        Returns:
            Ids of those on their way.
        """
        ordered: list[str] = []
        if not self._asleep:
            return ordered
        pieces = [(a, b) for a, b in runs or [(0, len(tokens))] if b - a >= self._min_tokens]
        for begin, end in pieces[:_PREFETCHED]:
            for segment, cosine in self._index.near(tokens[begin:end], tenant, k):
                asleep = self._segments[segment].state is SegmentState.DISK
                if asleep and cosine >= min_cosine and self.want(segment):
                    ordered.append(segment)
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
            The segment, ``SAVING``. None if it is there already after no more approximate
            reuses (it counts as used then), if there are `variants` of its text after other
            texts and none is worse, or if there is no room that may be made for it.

        Raises:
            ValueError: The fingerprint is not of these tokens.
        """
        token_ids = np.ascontiguousarray(token_ids, np.int32)
        context_ids = np.ascontiguousarray(context_ids, np.int32)
        if (len(token_ids), len(context_ids)) != (fingerprint.length, fingerprint.start):
            raise ValueError(
                f"fingerprint of {fingerprint.length} tokens at {fingerprint.start}, given "
                f"{len(token_ids)} after {len(context_ids)}"
            )
        if not len(token_ids):
            raise ValueError("a segment has at least one token")
        if digest(token_ids) != fingerprint.tokens:
            raise ValueError("the fingerprint's hash is not that of the tokens")
        name, now = segment_id(fingerprint), self._clock()
        known = self._segments.get(name)
        worse: CatalogEntry | None = None
        if known is not None:
            better = known.usable and known.fingerprint.ancestry <= fingerprint.ancestry
            if better or known.in_flight:
                self._adopt(known, session)
                self.touch([name])
                self._counts["known"] += 1
                return None
            worse = known
        else:
            family = self._families.get(_family(fingerprint), ())
            if len(family) >= self.settings.variants:
                worse = self._worst(family, fingerprint.ancestry, now)
                if worse is None:
                    self._counts["full_variants"] += 1
                    return None
        size = fingerprint.length * self._token_bytes
        victims = self._room(size, size if self._writes else 0, now, worse)
        if victims is None:
            self._counts["no_room"] += 1
            return None
        if worse is not None:
            self._counts["replaced"] += 1
            self._forget(worse)
        self._give_up(*victims)
        segment = CatalogEntry(
            name, fingerprint, token_ids, context_ids, size, SegmentState.SAVING, session=session
        )
        segment.last_used = now
        self._enter(segment)
        return segment

    def saved(self, segment: str, measures: Mapping[str, float] | None = None) -> None:
        """All workers have a segment's bytes in memory.

        Args:
            segment: Its id.
            measures: Stability measures, for its fingerprint.
        """
        known = self._segments.get(segment)
        if known is None or known.state is not SegmentState.SAVING:
            self._counts["stale"] += 1
            return
        if measures:
            known.fingerprint = replace(known.fingerprint, measures=dict(measures))
        self._counts["saved"] += 1
        self._change(known, SegmentState.MEMORY, writing=self._writes)
        if not known.valid:
            self._bury(known)

    def written(self, segment: str) -> None:
        """All workers have written a segment's files."""
        known = self._segments.get(segment)
        if known is None:
            # Given up while the thread was at it.
            self._delete[segment] = None
        elif known.writing:
            self._counts["written"] += 1
            self._change(known, on_disk=True, writing=False)
        else:
            self._counts["stale"] += 1

    def fetched(self, segment: str) -> None:
        """All workers have a segment's bytes in memory again."""
        known = self._segments.get(segment)
        if known is None or known.state is not SegmentState.FETCHING:
            self._counts["stale"] += 1
            return
        self._counts["fetched"] += 1
        self._change(known, SegmentState.MEMORY)
        if not known.valid:
            self._bury(known)

    def failed(self, segment: str, cause: str) -> None:
        """A worker could not save, write or bring back a segment, or had not got its bytes.

        One whose files are bad is kept, with the cause, until it expires or is saved anew.
        """
        self._failures[cause] += 1
        known = self._segments.get(segment)
        if known is None:
            return
        if known.state is SegmentState.SAVING:
            self._forget(known)
        elif known.state is SegmentState.FETCHING:
            known.cause = cause
            # Another rank may have fetched its part.
            self._drop[segment] = False
            self._change(known, SegmentState.DISK)
            if not known.valid:
                self._bury(known)
        elif known.writing:
            self._delete[segment] = None
            self._change(known, writing=False)
        elif known.state is SegmentState.MEMORY:
            self._lose(known)

    # -- Using -------------------------------------------------------------------------------------

    def want(self, segment: str) -> bool:
        """Order a segment back from the disk.

        Returns:
            Whether it is on its way or in memory. False if there is no room that may be made, or
            its bytes cannot be had.
        """
        known = self._segments.get(segment)
        if known is None or not known.usable:
            return False
        if known.state is not SegmentState.DISK:
            return known.state is not SegmentState.SAVING
        now = self._clock()
        victims = self._room(known.bytes, 0, now, None)
        if victims is None:
            self._counts["no_room"] += 1
            return False
        self._give_up(*victims)
        known.last_used = now
        if self._drop.get(segment):
            # Nobody has been told to drop it yet.
            del self._drop[segment]
            self._change(known, SegmentState.MEMORY)
            return True
        # Where it is in memory still it is overwritten.
        self._drop.pop(segment, None)
        self._fetch[segment] = None
        self._change(known, SegmentState.FETCHING)
        return True

    def touch(self, segments: Iterable[str]) -> None:
        """Count segments as used now, and their sessions."""
        now = self._clock()
        for segment in segments:
            known = self._segments.get(segment)
            if known is not None:
                known.last_used = now
                self._see_session(known)
                self._file(known)

    def end_session(self, session: str, tenant: str | None = None) -> int:
        """Let go of what a session kept: it stays under the quota as everything else does.

        Args:
            session: The session.
            tenant: Of this tenant only; of all that have one of the name if None.

        Returns:
            Segments it had.
        """
        ended = [key for key in self._members if key[1] == session and tenant in (None, key[0])]
        return sum(self._end(key) for key in ended)

    def invalidate(
        self,
        tenant: str | None = None,
        model: str | None = None,
        ids: Sequence[str] | None = None,
    ) -> int:
        """Never use segments again; their bytes go at once, in memory and on the disk.

        What is given must all hold of a segment; with nothing given it is all of them.

        Returns:
            Segments that were valid until now.
        """
        chosen = (
            list(self._segments.values())
            if ids is None
            else [self._segments[i] for i in dict.fromkeys(ids) if i in self._segments]
        )
        count = 0
        for segment in chosen:
            fingerprint = segment.fingerprint
            if (
                segment.valid
                and tenant in (None, fingerprint.tenant)
                and model in (None, fingerprint.model)
            ):
                segment.valid = False
                count += 1
                if not segment.in_flight:
                    self._bury(segment)
        self._counts["invalidated"] += count
        return count

    def expire(self) -> int:
        """Give up what nobody has used for its time to live; returns how many."""
        now = self._clock()
        gone = [
            self._segments[segment]
            for segment in self._order.unused_since(now - self.settings.ttl)
            if not self._segments[segment].in_flight
        ]
        for segment in gone:
            self._forget(segment)
        self._counts["expired"] += len(gone)
        return len(gone)

    def take_commands(self) -> StoreCommands:
        """What the workers are to do since the last call; each order is given once."""
        orders = StoreCommands(list(self._drop), list(self._fetch), list(self._delete))
        self._drop, self._fetch, self._delete = {}, {}, {}
        return orders

    def counters(self) -> dict[str, float]:
        """Segments and bytes by place, what has happened since the start, and causes."""
        states = Counter(segment.state for segment in self._segments.values())
        events = (
            "saved known replaced full_variants no_room written fetched prefetched dropped "
            "deleted expired invalidated stale"
        )
        return {
            "segments": len(self._segments),
            **{f"segments_{state}": states[state] for state in SegmentState},
            "memory_bytes": self._memory_bytes,
            "disk_bytes": self._disk_bytes,
            "sessions": len(self._sessions),
            **{name: self._counts[name] for name in events.split()},
            **{f"failed {cause}": n for cause, n in sorted(self._failures.items())},
            **{f"refused {cause}": n for cause, n in sorted(self._refused.items())},
        }

    # -- Starting ----------------------------------------------------------------------------------

    def scan(self, directory: str | Path) -> dict[str, int]:
        """Learn of the segments that an earlier engine left in a folder.

        Headers are read, and the files' lengths compared; the planes' checksums when they are
        fetched. The latest used come first, until the disk's quota is reached; what is left over,
        and what has expired, is ordered to be deleted. Files that cannot be used stay where they
        are and are named in the log.

        Args:
            directory: The folder; one that is not there has no segments.

        Returns:
            Files that are not used, by cause; segments that lack the file of a rank count as
            ``incomplete``.

        Raises:
            KVPlugError: The folder is none, or must not be read.
        """
        refused: Counter[str] = Counter()
        parts: dict[tuple[str, int], dict[int, tuple[SegmentHeader, float]]] = {}
        for path in _files(Path(directory)):
            try:
                header, used = self._head(path)
            except BadSegment as error:
                refused[error.cause] += 1
                logger.warning("a stored segment is not used: %s", error)
                continue
            parts.setdefault((header.id, header.world), {})[header.rank] = (header, used)
        now = self._clock()
        whole: list[tuple[float, str, int, SegmentHeader]] = []
        for (name, world), ranks in parts.items():
            headers = [header for header, _ in ranks.values()]
            first = headers[0]
            ancestries = {header.fingerprint.ancestry for header in headers}
            if len(ranks) != world or len(ancestries) > 1:
                refused["incomplete"] += len(ranks)
                logger.warning("a stored segment is not used: %s has not all its files", name)
                continue
            used = max(max(first.fingerprint.created, used) for _, used in ranks.values())
            size = sum(header.size for header in headers)
            whole.append((min(used, now), name, size, first))
        whole.sort(key=lambda found: (found[0], found[1]), reverse=True)
        for used, name, size, header in whole:
            if name in self._segments:
                continue
            expired = used < now - self.settings.ttl
            if expired or self._disk_bytes + size > self._disk_quota:
                self._counts["expired" if expired else "deleted"] += 1
                self._delete[name] = None
                continue
            segment = CatalogEntry(
                name,
                header.fingerprint,
                header.token_ids,
                header.context_ids,
                size,
                SegmentState.DISK,
                on_disk=True,
                last_used=used,
                session=header.session,
            )
            self._enter(segment)
        self._refused.update(refused)
        return dict(refused)

    def _head(self, path: Path) -> tuple[SegmentHeader, float]:
        named = parse_name(path.name)
        if named is None:
            raise BadSegment(path, "not a segment file", "its name is not that of one")
        header = read_header(path)
        if header.id != named[0] or header.id != segment_id(header.fingerprint):
            raise BadSegment(path, "bad header", f"it is segment {header.id}")
        if (header.rank, header.world) != named[1:]:
            raise BadSegment(path, "other rank", f"{header.rank} of {header.world}")
        if self._world not in (None, header.world):
            raise BadSegment(path, "other rank", f"of {header.world}, not {self._world}")
        try:
            return header, path.stat().st_mtime
        except OSError as error:
            raise BadSegment(path, "unreadable", error.strerror or str(error)) from None

    # -- Room --------------------------------------------------------------------------------------

    def _room(
        self, memory: int, disk: int, now: float, leaving: CatalogEntry | None
    ) -> tuple[list[CatalogEntry], list[CatalogEntry]] | None:
        """Who must leave memory and who the disk; None if that is not enough.

        `leaving` goes anyway. Nothing is changed here.
        """
        if memory > self._memory_quota or disk > self._disk_quota:
            return None
        self._end_idle_sessions(now)
        memory_used, disk_used = self._memory_bytes + memory, self._disk_bytes + disk
        if leaving is not None:
            memory_used -= leaving.bytes * leaving.in_memory
            disk_used -= leaving.bytes * self._charged(leaving)
        dropped: list[CatalogEntry] = []
        deleted: list[CatalogEntry] = []
        if memory_used > self._memory_quota:
            for segment in self._leaving(self._memory_order, now, leaving):
                dropped.append(segment)
                memory_used -= segment.bytes
                # What has no file goes altogether.
                disk_used -= segment.bytes * (self._charged(segment) and not segment.on_disk)
                if memory_used <= self._memory_quota:
                    break
            else:
                return None
        if disk and disk_used > self._disk_quota:
            for segment in self._leaving(self._disk_order, now, leaving):
                deleted.append(segment)
                disk_used -= segment.bytes
                if disk_used <= self._disk_quota:
                    break
            else:
                return None
        return dropped, deleted

    def _leaving(
        self, order: EvictionOrder, now: float, leaving: CatalogEntry | None
    ) -> Iterator[CatalogEntry]:
        """Segments in the order in which they go: expired ones, then that of `order`."""
        oldest = now - self.settings.ttl
        seen = set()
        for segment in order.unused_since(oldest):
            seen.add(segment)
            if leaving is None or segment != leaving.id:
                yield self._segments[segment]
        for segment in order:
            if segment not in seen and (leaving is None or segment != leaving.id):
                yield self._segments[segment]

    def _give_up(self, dropped: Iterable[CatalogEntry], deleted: Iterable[CatalogEntry]) -> None:
        for segment in dropped:
            self._counts["dropped"] += 1
            if segment.on_disk:
                self._drop[segment.id] = True
                self._change(segment, SegmentState.DISK)
            else:
                self._forget(segment)
        for segment in deleted:
            self._counts["deleted"] += 1
            if segment.state is SegmentState.DISK:
                self._forget(segment)
            else:
                self._delete[segment.id] = None
                self._change(segment, on_disk=False)

    def _worst(self, family: Iterable[str], ancestry: int, now: float) -> CatalogEntry | None:
        """The variant that a new one of an ancestry may replace."""
        oldest = now - self.settings.ttl

        def badness(segment: CatalogEntry) -> tuple[bool, int, float]:
            useless = not segment.usable or segment.last_used < oldest
            return useless, segment.fingerprint.ancestry, -segment.last_used

        worst = heapq.nlargest(
            1, (s for i in family if not (s := self._segments[i]).in_flight), key=badness
        )
        if worst and (badness(worst[0])[0] or worst[0].fingerprint.ancestry > ancestry):
            return worst[0]
        return None

    # -- Books -------------------------------------------------------------------------------------

    def _charged(self, segment: CatalogEntry) -> bool:
        """Whether it counts on the disk: its files are there or will be."""
        return (
            segment.on_disk
            or segment.writing
            or (segment.state is SegmentState.SAVING and self._writes)
        )

    def _charge(self, segment: CatalogEntry, sign: int) -> None:
        if segment.in_memory:
            self._memory_bytes += sign * segment.bytes
        if self._charged(segment):
            self._disk_bytes += sign * segment.bytes
        if segment.state is SegmentState.DISK and segment.on_disk and not segment.cause:
            self._asleep += sign

    def _change(
        self,
        segment: CatalogEntry,
        state: SegmentState | None = None,
        *,
        on_disk: bool | None = None,
        writing: bool | None = None,
    ) -> None:
        self._charge(segment, -1)
        segment.state = segment.state if state is None else state
        segment.on_disk = segment.on_disk if on_disk is None else on_disk
        segment.writing = segment.writing if writing is None else writing
        self._charge(segment, 1)
        self._file(segment)

    def _file(self, segment: CatalogEntry) -> None:
        """Put a segment where its state and use say in the orders of leaving."""
        spared = (segment.fingerprint.tenant, segment.session) in self._sessions
        self._order.put(segment, spared)
        if segment.state is SegmentState.MEMORY and segment.bytes:
            self._memory_order.put(segment, spared)
        else:
            self._memory_order.discard(segment.id)
        if segment.on_disk and not segment.in_flight:
            self._disk_order.put(segment, spared)
        else:
            self._disk_order.discard(segment.id)

    def _enter(self, segment: CatalogEntry) -> None:
        fingerprint = segment.fingerprint
        self._segments[segment.id] = segment
        if segment.state is SegmentState.SAVING:
            # What is there of an earlier one is overwritten.
            self._drop.pop(segment.id, None)
            self._delete.pop(segment.id, None)
        self._charge(segment, 1)
        self._index.add(
            segment.id,
            segment.token_ids,
            fingerprint.tenant,
            fingerprint.created,
            fingerprint.request_id,
        )
        self._families.setdefault(_family(fingerprint), {})[segment.id] = None
        self._see_session(segment)
        self._file(segment)

    def _forget(self, segment: CatalogEntry) -> None:
        """Take a segment out, its bytes everywhere."""
        if segment.in_memory:
            self._drop[segment.id] = False
        if self._charged(segment):
            self._delete[segment.id] = None
        self._charge(segment, -1)
        for order in (self._memory_order, self._disk_order, self._order):
            order.discard(segment.id)
        self._index.remove(segment.id)
        family = _family(segment.fingerprint)
        del self._families[family][segment.id]
        if not self._families[family]:
            del self._families[family]
        self._leave_session(segment)
        del self._segments[segment.id]

    def _bury(self, segment: CatalogEntry) -> None:
        """Give up the bytes of a segment that is invalid; what is known of it stays a while."""
        if segment.in_memory:
            self._drop[segment.id] = False
        if self._charged(segment):
            self._delete[segment.id] = None
        self._charge(segment, -1)
        segment.bytes = 0
        segment.state, segment.on_disk, segment.writing = SegmentState.DISK, False, False
        self._file(segment)

    def _lose(self, segment: CatalogEntry) -> None:
        """A worker has not the bytes that it should have in memory."""
        if segment.on_disk:
            self._drop[segment.id] = False
            self._change(segment, SegmentState.DISK)
        else:
            self._forget(segment)

    # -- Sessions ----------------------------------------------------------------------------------

    def _adopt(self, segment: CatalogEntry, session: str) -> None:
        """A session that computes what is there keeps it from now on."""
        if session and session != segment.session:
            self._leave_session(segment)
            segment.session = session

    def _see_session(self, segment: CatalogEntry) -> None:
        if not segment.session:
            return
        key = (segment.fingerprint.tenant, segment.session)
        members = self._members.setdefault(key, {})
        members[segment.id] = None
        before = self._sessions.get(key)
        used = segment.last_used if before is None else max(before, segment.last_used)
        if before == used:
            return
        if before is not None:
            self._idle.remove((before, key))
        self._sessions[key] = used
        self._idle.add((used, key))
        if before is None:
            # It was idle: what it had counts as its own again.
            for other in list(members):
                if other != segment.id:
                    self._file(self._segments[other])

    def _leave_session(self, segment: CatalogEntry) -> None:
        key = (segment.fingerprint.tenant, segment.session)
        members = self._members.get(key)
        if members is None or segment.id not in members:
            return
        del members[segment.id]
        if not members:
            del self._members[key]
            if (used := self._sessions.pop(key, None)) is not None:
                self._idle.remove((used, key))

    def _end(self, key: tuple[str, str]) -> int:
        if (used := self._sessions.pop(key, None)) is not None:
            self._idle.remove((used, key))
        members = self._members.pop(key)
        for segment in members:
            self._segments[segment].session = ""
            self._file(self._segments[segment])
        return len(members)

    def _end_idle_sessions(self, now: float) -> None:
        """Sessions not used for their time spare nothing any more, until they are used again."""
        oldest = now - self.settings.session_ttl
        while self._idle and self._idle[0][0] < oldest:
            used, key = self._idle[0]
            self._idle.remove((used, key))
            del self._sessions[key]
            for segment in self._members[key]:
                self._file(self._segments[segment])


def _family(fingerprint: Fingerprint) -> tuple[object, ...]:
    """What copies of one text computed after different texts have in common."""
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


def _files(folder: Path) -> Iterator[Path]:
    try:
        paths = sorted(folder.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise KVPlugError(
            f"reuse.store.directory: {folder} cannot be read ({error.strerror}). Fix: name a "
            "folder that the engine's user may read and write."
        ) from None
    yield from (p for p in paths if p.suffix == SUFFIX and not p.name.startswith("."))
