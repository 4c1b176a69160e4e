"""S3-FIFO: a small queue that most content passes through once, a main queue, and a ghost queue.

New content enters the small queue (a tenth of the cache), or the main one if the ghost queue knows
it. A hit counts, up to 3, and moves nothing. Victims come from the small queue while it is over
its size: its oldest block goes to the main queue if it was hit more than once, else it is evicted
and the ghost queue remembers it. In the main queue the oldest block is put back with one count
less, or evicted once it has none.

J. Yang, Y. Zhang, Z. Qiu, Y. Yue, R. Vinayak, FIFO queues are all you need for cache eviction,
SOSP 2023.

Deviations: blocks that requests hold keep their place in their queue and are passed over; whether
the ghost queue knows new content is looked up when the block is first released, not when its room
is made; where promoting from the small queue makes the main queue evict, that block is the victim
and the next one is decided on afresh.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import Ghosts, Ranking, VictimPlan

SMALL, MAIN = 0, 1
MOST_COUNTED = 3
PROMOTED_ABOVE = 1


class S3Fifo(PrefixCachePolicy):
    """S3-FIFO. O(log n) per block; about 750 bytes per cached block, keys of ghosts included."""

    name = "s3fifo"
    needs = frozenset({BlockFact.KEY})
    paper = "Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023"

    class Options(PolicyOptions):
        """Options of `S3Fifo`."""

        small: float = Field(
            0.1, gt=0, lt=1, description="fraction of the cache for the small queue"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        size = max(1, engine.num_blocks)
        self._small_size = self.options.small * size
        self._main_size = size - self._small_size
        self._clock = 0
        self._queues = (Ranking(), Ranking())
        self._held = [0, 0]
        self._place: dict[int, tuple[int, int]] = {}
        self._hits: dict[int, int] = {}
        self._key: dict[int, bytes] = {}
        self._ghosts: Ghosts[bool] = Ghosts(max(1, int(self._main_size)))
        self._plan: VictimPlan[tuple[int, int]] = VictimPlan()

    def on_release(self, released: Released) -> None:
        keys = released.keys or [b""] * len(released.ids)
        for block, key in zip(released.ids, keys, strict=True):
            place = self._place.get(block)
            if place is None:
                queue = SMALL if self._ghosts.pop(key) is None else MAIN
                place = self._enter(block, queue)
                if key:
                    self._key[block] = key
            queue, at = place
            self._queues[queue].put((at, block))

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._hits[block] = min(MOST_COUNTED, self._hits.get(block, 0) + 1)
            place = self._place.get(block)
            if place is not None:
                self._queues[place[0]].discard(block)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block, hits in self._plan.moves_for(ids):
            queue, _ = self._place[block]
            self._queues[queue].discard(block)
            self._held[queue] -= 1
            self._queues[MAIN].put((self._enter(block, MAIN)[1], block))
            self._hits[block] = hits
        self._plan = VictimPlan()
        for block in ids:
            self._hits.pop(block, None)
            place = self._place.pop(block, None)
            key = self._key.pop(block, None)
            if place is None:
                continue
            queue, _ = place
            self._queues[queue].discard(block)
            self._held[queue] -= 1
            if queue == SMALL and key is not None:
                self._ghosts.add(key, True)

    def victims(self, n: int) -> list[int]:
        self._plan = plan = VictimPlan[tuple[int, int]]()
        small, main = (queue.walk() for queue in self._queues)
        moved: deque[int] = deque()
        hits: dict[int, int] = {}
        left = [len(queue) for queue in self._queues]
        held = list(self._held)

        def counted(block: int) -> int:
            return hits[block] if block in hits else self._hits.get(block, 0)

        def put_in_main(block: int, count: int) -> None:
            hits[block] = count
            moved.append(block)
            plan.move((block, count))

        def evict_from_main() -> None:
            while True:
                entry = next(main, None)
                block = entry[1] if entry is not None else moved.popleft()
                if count := counted(block):
                    put_in_main(block, count - 1)
                else:
                    plan.evict(block)
                    left[MAIN] -= 1
                    held[MAIN] -= 1
                    return

        def evict_from_small() -> None:
            while left[SMALL]:
                _, block = next(small)
                left[SMALL] -= 1
                held[SMALL] -= 1
                if counted(block) <= PROMOTED_ABOVE:
                    plan.evict(block)
                    return
                full = held[MAIN] >= self._main_size
                put_in_main(block, 0)
                left[MAIN] += 1
                held[MAIN] += 1
                if full:
                    break
            evict_from_main()

        while len(plan.victims) < n:
            if left[SMALL] and (held[SMALL] >= self._small_size or not left[MAIN]):
                evict_from_small()
            else:
                evict_from_main()
        small.close()
        main.close()
        return list(plan.victims)

    def _enter(self, block: int, queue: int) -> tuple[int, int]:
        self._clock += 1
        self._place[block] = place = (queue, self._clock)
        self._held[queue] += 1
        return place
