"""How often chunks of each class come back after they left the pool, learned as they do."""

from __future__ import annotations

from collections import OrderedDict

from kvplug.contract import Leaving

WATCHED = 1 << 16
"""Chunks that left lately and are watched, at most."""

FADE = 0.5
"""What is left of a class's counts once they reach `ENOUGH`: the latest count most."""

ENOUGH = 4096.0

PRIOR = 4.0
"""Chunks' worth of the mean of all classes that a class starts from."""


class Returns:
    """Share of chunks that are asked for again, by class, while a tier could still hold them.

    A class is what is known as a chunk leaves: how many requests used it, how often it was missed
    after it had gone, whether it belongs to a session, and where in its text it stands. A chunk
    that left is watched until it is asked for, which counts for its class, or until ``watched``
    others left after it, which counts against it: a return after the tiers' own lifetime is none.

    Args:
        watched: Chunks watched; about what the tiers hold, twice.
    """

    def __init__(self, watched: int = WATCHED):
        self.watched = max(64, min(watched, WATCHED))
        self._watch: OrderedDict[int, int] = OrderedDict()
        self._back: dict[int, float] = {}
        self._all: dict[int, float] = {}
        self._total_back = self._total = 0.0

    def left(self, chunk: Leaving, misses: int = 0) -> float | None:
        """Watch a chunk, and estimate the probability that it returns in time.

        Args:
            chunk: The chunk.
            misses: Requests that asked for it after it had gone everywhere.

        Returns:
            The probability; None before any chunk's fate is known.
        """
        kind = class_of(chunk, misses)
        name = int.from_bytes(chunk.key[:8], "little")
        if self._watch.pop(name, None) is None and len(self._watch) >= self.watched:
            _, old = self._watch.popitem(last=False)
            self._count(old, 0.0)
        self._watch[name] = kind
        return self.of_class(kind)

    def asked(self, key: bytes) -> None:
        """Take note that a request asked for a chunk."""
        kind = self._watch.pop(int.from_bytes(key[:8], "little"), None)
        if kind is not None:
            self._count(kind, 1.0)

    def of_class(self, kind: int) -> float | None:
        """The probability of a class."""
        if not self._total:
            return None
        mean = self._total_back / self._total
        seen = self._all.get(kind, 0.0)
        return (self._back.get(kind, 0.0) + PRIOR * mean) / (seen + PRIOR)

    def _count(self, kind: int, back: float) -> None:
        seen = self._all.get(kind, 0.0) + 1.0
        came = self._back.get(kind, 0.0) + back
        if seen >= ENOUGH:
            seen, came = seen * FADE, came * FADE
        self._all[kind], self._back[kind] = seen, came
        self._total += 1.0
        self._total_back += back
        if self._total >= 16 * ENOUGH:
            self._total *= FADE
            self._total_back *= FADE


def class_of(chunk: Leaving, misses: int) -> int:
    """The class of a chunk: four small numbers in one."""
    uses = min(chunk.uses, 4)
    position = min(7, (chunk.start // max(1, 4 * chunk.tokens)).bit_length())
    return ((uses * 4 + min(misses, 3)) * 2 + chunk.session) * 8 + position
