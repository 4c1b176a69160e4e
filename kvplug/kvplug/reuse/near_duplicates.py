"""Stored segments with nearly the text of a request, found by SimHash (Charikar, STOC 2002).

Needs the package `usearch`: ``pip install 'kvplug[prefetch]'``.
"""

from __future__ import annotations

import math

from usearch.compiled import MetricKind, ScalarKind
from usearch.index import Index

from kvplug.reuse.hashing import SimHash, Tokens

__all__ = ["NearDuplicates"]

_REMOVED = 64


class NearDuplicates:
    """Segments of one tenant by the SimHash of their text.

    Every search compares all hashes: a near duplicate is alone among texts that are all about
    equally far, and there a graph of neighbours (HNSW) misses up to half of them, while adding to
    it takes several times as long (`kvplug_lab.reuse.index --graph`).

    Args:
        simhash: Hash of a text.
    """

    def __init__(self, simhash: SimHash) -> None:
        self._simhash = simhash
        # The library's graph is not used: keep it small.
        self._index = Index(
            ndim=simhash.bits,
            metric=MetricKind.Hamming,
            dtype=ScalarKind.B1,
            connectivity=2,
            expansion_add=1,
        )
        self._ids: dict[int, str] = {}
        self._keys: dict[str, int] = {}
        self._next = 0
        self._gone: list[int] = []

    def add(self, segment: str, tokens: Tokens) -> None:
        """Add a segment with at least one token, ``[n]``."""
        key, self._next = self._next, self._next + 1
        self._index.add(key, self._simhash(tokens), threads=1)
        self._ids[key], self._keys[segment] = segment, key

    def remove(self, segment: str) -> None:
        """Remove a segment."""
        key = self._keys.pop(segment)
        del self._ids[key]
        # The first addition after a removal takes milliseconds, however many were removed.
        self._gone.append(key)
        if len(self._gone) >= _REMOVED:
            self._index.remove(self._gone, threads=1)
            self._gone.clear()

    def find(self, tokens: Tokens, k: int) -> list[tuple[str, float]]:
        """Find the segments nearest to a text.

        Args:
            tokens: Token ids, ``[n]``, at least one.
            k: Most segments to return.

        Returns:
            Ids and estimated cosines of the sets of n-grams, most similar first.
        """
        count = min(k + len(self._gone), len(self._ids) + len(self._gone))
        found = self._index.search(self._simhash(tokens), count, exact=True, threads=1)
        nearest = [
            (self._ids[key], math.cos(math.pi * distance / self._simhash.bits))
            for key, distance in zip(found.keys.tolist(), found.distances.tolist(), strict=True)
            if key in self._ids
        ]
        return nearest[:k]
