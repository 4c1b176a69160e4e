"""Finds stored segments by their text, their time and their request.

Equal text is found by a rolling hash over the whole request and then compared token by token,
 so a collision costs time and never gives a wrong answer. Near-duplicate text, found by
`kvplug.reuse.near_duplicates`, only tells what may be worth fetching from disk.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from sortedcontainers import SortedSet

from kvplug.errors import KVPlugError
from kvplug.reuse.hashing import GOLDEN, Hasher, Hashes, RollingHash, SimHash, Tokens

if TYPE_CHECKING:
    from kvplug.reuse.near_duplicates import NearDuplicates

__all__ = ["Match", "SegmentIndex"]


@dataclass(frozen=True, slots=True)
class Match:
    """First tokens of a stored segment, found in a text.

    Attributes:
        segment: The segment's id.
        start: Position in the text.
        length: Number of its tokens that match, from its first.
    """

    segment: str
    start: int
    length: int


def _common(one: Tokens, other: Tokens) -> int:
    """Length of the common prefix of two texts."""
    size = min(len(one), len(other))
    if not size:
        return 0
    differ = one[:size] != other[:size]
    first = int(differ.argmax())
    return first if differ[first] else size


@dataclass(slots=True, eq=False)
class _Text:
    """One text and the segments of it; ordered by its tokens."""

    tokens: Tokens
    ids: list[str] = field(default_factory=list)

    def __lt__(self, other: _Text) -> bool:
        first = _common(self.tokens, other.tokens)
        if first == len(other.tokens):
            return False
        return first == len(self.tokens) or bool(self.tokens[first] < other.tokens[first])


class _Table:
    """Texts by the hash of their first `width` tokens.

    An array of counts first rules out most positions of a text at once: looking each up in the
    dictionary would miss thousands of times.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.buckets: dict[int, list[_Text]] = {}
        self._bits = 10
        self._counts = np.zeros(1 << self._bits, np.uint16)

    def _slots(self, hashes: Hashes) -> NDArray[np.intp]:
        slots = (hashes * np.uint64(GOLDEN)) >> np.uint64(64 - self._bits)
        return slots.astype(np.intp)

    def _count(self, key: int, change: int) -> None:
        slot = self._slots(np.array([key], np.uint64))[0]
        self._counts[slot] = int(self._counts[slot]) + change

    def text(self, key: int, tokens: Tokens) -> _Text:
        """Return the text of these tokens, added if it is new."""
        bucket = self.buckets.get(key)
        if bucket is None:
            bucket = self.buckets[key] = []
            self._count(key, 1)
            if len(self.buckets) << 4 > len(self._counts):
                self._grow()
        made = _Text(tokens)
        place = bisect_left(bucket, made)
        if place < len(bucket) and np.array_equal(bucket[place].tokens, tokens):
            return bucket[place]
        bucket.insert(place, made)
        return made

    def remove(self, key: int, text: _Text) -> None:
        bucket = self.buckets[key]
        del bucket[bisect_left(bucket, text)]
        if not bucket:
            del self.buckets[key]
            self._count(key, -1)

    def _grow(self) -> None:
        self._bits += 2
        slots = self._slots(np.fromiter(self.buckets, np.uint64, len(self.buckets)))
        self._counts = np.bincount(slots, minlength=1 << self._bits).astype(np.uint16)

    def places(self, hashes: Hashes) -> list[tuple[int, list[_Text]]]:
        """Positions in a text where stored texts may begin, and those texts."""
        found = []
        for place in np.flatnonzero(self._counts[self._slots(hashes)]).tolist():
            bucket = self.buckets.get(int(hashes[place]))
            if bucket is not None:
                found.append((place, bucket))
        return found


@dataclass(slots=True)
class _Tenant:
    """Everything of one tenant; never read for another."""

    tables: dict[int, _Table] = field(default_factory=dict)
    near: NearDuplicates | None = None
    segments: int = 0


@dataclass(slots=True)
class _Entry:
    tenant: str
    table: _Table
    key: int
    text: _Text
    created: float
    request_id: str


def _near_duplicates(seed: int | None) -> Callable[[], NearDuplicates]:
    """Return a function that makes an empty index of near duplicates, one for each tenant."""
    try:
        from kvplug.reuse.near_duplicates import NearDuplicates
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "usearch":
            raise
        raise KVPlugError(
            "reuse.prefetch: needs the package usearch, which is not installed. "
            "Fix: pip install 'kvplug[prefetch]', or set prefetch: false."
        ) from None
    simhash = SimHash(seed=seed)
    return lambda: NearDuplicates(simhash)


class SegmentIndex:
    """Finds stored segments; tenants are kept apart.

    Args:
        min_tokens: Tokens of a segment that a text must contain for it to be found; of a shorter
            segment, all of them.
        window: Tokens that are hashed of segments shorter than `min_tokens`.
        near_duplicates: Also keep what `nearest` needs.
        limit: Most different texts found at one position, longest match first: thousands of
            conversations may begin alike.
        hasher: Hash of windows, another one in tests.
        seed: Seed of the hashes; random if None.

    Raises:
        ValueError: `min_tokens`, `window` or `limit` is below one.
        KVPlugError: `near_duplicates` needs a package that is not installed.
    """

    def __init__(
        self,
        min_tokens: int = 32,
        *,
        window: int = 16,
        near_duplicates: bool = False,
        limit: int = 32,
        hasher: Hasher | None = None,
        seed: int | None = None,
    ) -> None:
        if min(min_tokens, window, limit) < 1:
            raise ValueError(
                f"min_tokens, window and limit must be positive: {min_tokens, window, limit}"
            )
        self._min_tokens = min_tokens
        self._window = min(window, min_tokens)
        self._limit = limit
        self._hasher: Hasher = hasher or RollingHash(seed)
        self._new_near = _near_duplicates(seed) if near_duplicates else None
        self._tenants: dict[str, _Tenant] = {}
        self._entries: dict[str, _Entry] = {}
        self._by_time: SortedSet = SortedSet()
        self._by_request: SortedSet = SortedSet()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, segment: object) -> bool:
        return segment in self._entries

    def _width(self, length: int) -> int:
        # A long segment counts only with `min_tokens` tokens, so that many are hashed.
        return self._min_tokens if length >= self._min_tokens else min(self._window, length)

    def add(
        self, segment: str, tokens: Tokens, tenant: str, created: float, request_id: str
    ) -> None:
        """Add a segment.

        Args:
            segment: Its id.
            tokens: Its token ids, ``[n]``; not copied if they are int32 already, so they must not
                change.
            tenant: The tenant that may find it.
            created: Seconds since the epoch.
            request_id: Request that computed it.

        Raises:
            ValueError: It has no tokens, or its id is known already.
        """
        tokens = np.ascontiguousarray(tokens, np.int32)
        if not len(tokens):
            raise ValueError(f"segment {segment} has no tokens")
        if segment in self._entries:
            raise ValueError(f"segment {segment} is in the index already")
        owner = self._tenants.setdefault(tenant, _Tenant())
        width = self._width(len(tokens))
        table = owner.tables.setdefault(width, _Table(width))
        key = int(self._hasher(tokens[:width], width)[0])
        text = table.text(key, tokens)
        text.ids.append(segment)
        if self._new_near is not None:
            owner.near = owner.near or self._new_near()
            owner.near.add(segment, tokens)
        owner.segments += 1
        self._entries[segment] = _Entry(tenant, table, key, text, created, request_id)
        self._by_time.add((created, segment))
        self._by_request.add((request_id, created, segment))

    def remove(self, segment: str) -> None:
        """Remove a segment.

        Raises:
            KeyError: The segment is not in the index.
        """
        entry = self._entries.pop(segment)
        owner = self._tenants[entry.tenant]
        entry.text.ids.remove(segment)
        if not entry.text.ids:
            entry.table.remove(entry.key, entry.text)
            if not entry.table.buckets:
                del owner.tables[entry.table.width]
        if owner.near is not None:
            owner.near.remove(segment)
        owner.segments -= 1
        if not owner.segments:
            del self._tenants[entry.tenant]
        self._by_time.remove((entry.created, segment))
        self._by_request.remove((entry.request_id, entry.created, segment))

    def match(self, tokens: Tokens, tenant: str) -> list[Match]:
        """Find stored segments anywhere in a text.

        Args:
            tokens: The text's token ids, ``[n]``.
            tenant: Whose segments.

        Returns:
            Every segment of the tenant whose first ``min(min_tokens, its length)`` tokens or more
            are in the text, once per position, as far as `limit` allows; by position, then longest
            first.
        """
        owner = self._tenants.get(tenant)
        if owner is None:
            return []
        text = np.ascontiguousarray(tokens, np.int32)
        found: list[Match] = []
        for width, table in owner.tables.items():
            if len(text) < width:
                continue
            for place, bucket in table.places(self._hasher(text, width)):
                self._verify(text, place, bucket, width, found)
        found.sort(key=lambda match: (match.start, -match.length, match.segment))
        return found

    def _verify(
        self, text: Tokens, place: int, bucket: list[_Text], width: int, found: list[Match]
    ) -> None:
        """Append the texts of a bucket that match at a position.

        The bucket is sorted by tokens, so the texts with most in common with this one are where it
        would be inserted, and the match gets shorter with the distance from there.
        """
        rest = text[place:]
        right = bisect_left(bucket, _Text(rest)) if len(bucket) > 1 else 0
        left = right - 1
        before = _common(rest, bucket[left].tokens) if left >= 0 else -1
        after = _common(rest, bucket[right].tokens) if right < len(bucket) else -1
        texts = 0
        while max(before, after) >= width and texts < self._limit:
            if after >= before:
                stored, length = bucket[right], after
                right += 1
                after = _common(rest, bucket[right].tokens) if right < len(bucket) else -1
            else:
                stored, length = bucket[left], before
                left -= 1
                before = _common(rest, bucket[left].tokens) if left >= 0 else -1
            if length >= min(self._min_tokens, len(stored.tokens)):
                found.extend(Match(segment, place, length) for segment in stored.ids)
                texts += 1

    def since(self, created: float) -> list[str]:
        """Return the ids of segments created at a time or later, oldest first."""
        return [segment for _, segment in self._by_time.irange((created, ""))]

    def of_request(self, request_id: str) -> list[str]:
        """Return the ids of segments that a request computed, oldest first."""
        first = (request_id, -math.inf, "")
        last = (request_id, math.inf, "")
        return [segment for *_, segment in self._by_request.irange(first, last)]

    def nearest(self, tokens: Tokens, tenant: str, k: int = 10) -> list[tuple[str, float]]:
        """Find segments with nearly a given text.

        Args:
            tokens: Token ids, ``[n]``, about as long as the segments looked for.
            tenant: Whose segments.
            k: Most segments to return.

        Returns:
            Ids and an estimate of the cosine of the two sets of n-grams, from 1 to -1, most
            similar first. Empty without ``near_duplicates=True``.
        """
        owner = self._tenants.get(tenant)
        text = np.ascontiguousarray(tokens, np.int32)
        if owner is None or owner.near is None or not len(text) or k < 1:
            return []
        return owner.near.find(text, k)
