"""SIEVE: one queue in order of insertion, a mark for hits, and a hand that looks for the unmarked.

A hit marks a block and moves nothing. For a victim the hand goes from where it stopped towards the
newest block, taking marks away, to the first block without one, which is evicted; past the newest
it starts again at the oldest.

Y. Zhang, J. Yang, Y. Yue, Y. Vigfusson, K. V. Rashmi, SIEVE is simpler than LRU: an efficient
turn-key eviction algorithm for web caches, NSDI 2024.

Deviation: blocks that requests hold keep their place and are not seen by the hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from kvplug.contract import EngineView, PolicyOptions, PrefixCachePolicy, Released
from kvplug_policies.structures import Ranking, VictimPlan

WRAPPED = -1
"""Stands for a block in the hand's way: it passed the newest."""


class Sieve(PrefixCachePolicy):
    """SIEVE. O(log n) per block; about 330 bytes per cached block."""

    name = "sieve"
    paper = "Zhang et al., SIEVE is simpler than LRU, NSDI 2024"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._clock = 0
        self._place: dict[int, int] = {}
        self._marked: set[int] = set()
        self._hand = -1
        self._ahead = Ranking()
        self._behind = Ranking()
        self._plan: VictimPlan[int] = VictimPlan()

    def on_release(self, released: Released) -> None:
        for block in released.ids:
            place = self._place.get(block)
            if place is None:
                place = self._place[block] = self._clock
                self._clock += 1
            (self._ahead if place > self._hand else self._behind).put((place, block))

    def on_hit(self, ids: Sequence[int]) -> None:
        self._marked.update(ids)
        for block in ids:
            self._ahead.discard(block)
            self._behind.discard(block)

    def on_remove(self, ids: Sequence[int]) -> None:
        # The hand's way to the last victim, the victims themselves included.
        way = self._plan.moves_for(ids)
        for block in way:
            if block == WRAPPED:
                self._wrap()
                continue
            self._hand = self._place[block]
            self._marked.discard(block)
            self._ahead.discard(block)
            self._behind.put((self._hand, block))
        self._plan = VictimPlan()
        for block in ids:
            self._marked.discard(block)
            self._place.pop(block, None)
            self._ahead.discard(block)
            self._behind.discard(block)
        # From the newest block the hand falls back at once: what comes in is not next.
        if way and not len(self._ahead):
            self._wrap()

    def _wrap(self) -> None:
        self._hand = -1
        self._ahead, self._behind = self._behind, self._ahead

    def victims(self, n: int) -> list[int]:
        self._plan = plan = VictimPlan[int]()
        marked = self._marked
        walks = self._ahead.walk(), self._behind.walk()
        passed: list[int] = []
        cleared: set[int] = set()
        way: Iterator[int] = (block for _, block in walks[0])
        wrapped = False
        while len(plan.victims) < n:
            block = next(way, None)
            if block is None:
                plan.move(WRAPPED)
                # What the hand passed before it wrapped is younger than what lay behind it.
                rest = () if wrapped else (block for _, block in walks[1])
                way, passed, wrapped = chain(rest, passed), [], True
                continue
            plan.move(block)
            if block in marked and block not in cleared:
                cleared.add(block)
                passed.append(block)
            else:
                plan.evict(block)
        for walk in walks:
            walk.close()
        return list(plan.victims)
