"""W-TinyLFU: new content stays only if it is requested more often than what it displaces.

New content enters a small LRU window. What leaves the window, least recent first, is compared with
the victim of the main cache (a segmented LRU): the one whose content was requested less often
lately is evicted, the other stays in the main cache. How often is estimated by a count-min sketch
of 4-bit counters, behind a doorkeeper (a Bloom filter that absorbs content requested once); after
every ``sample`` references all counters are halved and the doorkeeper is emptied.

G. Einziger, R. Friedman, B. Manes, TinyLFU: a highly efficient cache admission policy, ACM
Transactions on Storage 13 (4), 2017, arXiv 1512.00727.

Deviations: blocks enter the window when they are released, so the window may be larger than its
share until room is needed; then it is brought back to it, block by block. Blocks in use are in no
list.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from zlib import crc32

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import VictimPlan

ROWS = 4
COUNTERS = 4
"""Counters of a row for each block of the cache, at least."""

MOST = 15
HALVES = bytes(i >> 1 for i in range(256))
WORD = (1 << 64) - 1
MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)
WINDOW, PROBATION, PROTECTED = 0, 1, 2


class Sketch:
    """Recent request frequency of keys: a count-min sketch behind a doorkeeper.

    Args:
        size: Number of keys to distinguish: the blocks of the cache.
        sample: References after which all counts are halved.
    """

    def __init__(self, size: int, sample: int):
        bits = max(6, (COUNTERS * size - 1).bit_length())
        self._shift = 64 - bits
        self._rows = [bytearray(1 << bits) for _ in range(ROWS)]
        # Eight bits of the doorkeeper for each reference of a sample keep false positives rare.
        door = max(9, (8 * sample - 1).bit_length())
        self._door_shift = 64 - door
        self._door = bytearray(1 << (door - 3))
        self._sample = sample
        self._seen = 0

    def add(self, code: int) -> None:
        """Count one reference to the key of this code (32 bits)."""
        a, b = code * MULTIPLIERS[0] & WORD, code * MULTIPLIERS[1] & WORD
        door, shift = self._door, self._door_shift
        one, two = a >> shift, b >> shift
        if door[one >> 3] >> (one & 7) & 1 and door[two >> 3] >> (two & 7) & 1:
            shift = self._shift
            for row in self._rows:
                at = a >> shift
                if row[at] < MOST:
                    row[at] += 1
                a = a + b & WORD
        else:
            door[one >> 3] |= 1 << (one & 7)
            door[two >> 3] |= 1 << (two & 7)
        self._seen += 1
        if self._seen >= self._sample:
            self._halve()

    def count(self, code: int) -> int:
        """References to the key, estimated: seldom too few, at times too many."""
        a, b = code * MULTIPLIERS[0] & WORD, code * MULTIPLIERS[1] & WORD
        door, shift = self._door, self._door_shift
        one, two = a >> shift, b >> shift
        known = door[one >> 3] >> (one & 7) & door[two >> 3] >> (two & 7) & 1
        shift = self._shift
        first, second, third, fourth = self._rows
        return known + min(
            first[a >> shift],
            second[(a + b & WORD) >> shift],
            third[(a + 2 * b & WORD) >> shift],
            fourth[(a + 3 * b & WORD) >> shift],
        )

    def _halve(self) -> None:
        self._rows = [row.translate(HALVES) for row in self._rows]
        self._door = bytearray(len(self._door))
        self._seen //= 2


class TinyLfu(PrefixCachePolicy):
    """W-TinyLFU. O(1) per block; about 400 bytes per cached block, sketch included."""

    name = "tinylfu"
    needs = frozenset({BlockFact.KEY})
    paper = "Einziger et al., TinyLFU: a highly efficient cache admission policy, arXiv 1512.00727"

    class Options(PolicyOptions):
        """Options of `TinyLfu`."""

        window: float = Field(0.01, gt=0, lt=1, description="fraction of the cache for the window")
        protected: float = Field(
            0.8, ge=0, le=1, description="fraction of the main cache that blocks hit there may fill"
        )
        sample: int = Field(
            10,
            ge=1,
            le=1000,
            description="references between halvings of the counts, as a multiple of the cache",
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        size = max(1, engine.num_blocks)
        self._window_size = max(1, round(self.options.window * size))
        self._size = size
        self._main_size = size - self._window_size
        self._protected_size = int(self.options.protected * self._main_size)
        self._in_main = 0
        self._sketch = Sketch(size, self.options.sample * size)
        self._lists: tuple[OrderedDict[int, None], ...] = (
            OrderedDict(),
            OrderedDict(),
            OrderedDict(),
        )
        self._place: dict[int, int] = {}
        self._code: dict[int, int] = {}
        self._early: dict[int, int] = {}
        self._plan: VictimPlan[int] = VictimPlan()

    def on_release(self, released: Released) -> None:
        keys = released.keys or [b.to_bytes(8, "little") for b in released.ids]
        for block, key in zip(released.ids, keys, strict=True):
            place = self._place.get(block)
            if place is None:
                place = self._place[block] = WINDOW
                code = self._code[block] = crc32(key)
                for _ in range(1 + self._early.pop(block, 0)):
                    self._sketch.add(code)
            order = self._lists[place]
            order[block] = None
            order.move_to_end(block)
        window, probation, protected = self._lists
        # While the cache is not full there is no victim to be compared with.
        while len(window) > self._window_size and len(self._place) < self._size:
            self._admit(window.popitem(last=False)[0])
        while len(protected) > self._protected_size:
            block, _ = protected.popitem(last=False)
            self._place[block] = PROBATION
            probation[block] = None

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            place = self._place.get(block)
            if place is None:
                self._early[block] = self._early.get(block, 0) + 1
                continue
            self._lists[place].pop(block, None)
            self._sketch.add(self._code[block])
            if place == PROBATION:
                self._place[block] = PROTECTED

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in self._plan.moves_for(ids):
            del self._lists[WINDOW][block]
            self._admit(block)
        self._plan = VictimPlan()
        for block in ids:
            self._early.pop(block, None)
            self._code.pop(block, None)
            place = self._place.pop(block, None)
            if place is not None:
                self._lists[place].pop(block, None)
                self._in_main -= place != WINDOW

    def _admit(self, block: int) -> None:
        self._place[block] = PROBATION
        self._lists[PROBATION][block] = None
        self._in_main += 1

    def victims(self, n: int) -> list[int]:
        self._plan = plan = VictimPlan[int]()
        window, probation, protected = (iter(order) for order in self._lists)
        admitted: deque[int] = deque()
        in_window = len(self._lists[WINDOW])
        in_main = self._in_main
        code, count = self._code, self._sketch.count
        main: int | None = None
        frequency = 0
        while len(plan.victims) < n:
            if main is None:
                main = next(probation, None)
                if main is None:
                    main = admitted.popleft() if admitted else next(protected, None)
                frequency = count(code[main]) if main is not None else 0
            if in_window and (in_window > self._window_size or main is None):
                newcomer = next(window)
                in_window -= 1
                if main is None or count(code[newcomer]) <= frequency:
                    plan.evict(newcomer)
                    continue
                plan.move(newcomer)
                admitted.append(newcomer)
                in_main += 1
                if in_main <= self._main_size:
                    continue
            assert main is not None
            plan.evict(main)
            in_main -= 1
            main = None
        return list(plan.victims)
