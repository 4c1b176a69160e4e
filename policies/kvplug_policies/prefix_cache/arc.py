"""ARC: two LRU lists, once seen and seen again, whose sizes follow what was missed of each.

T1 holds content seen once, T2 content seen again; B1 and B2 remember the keys of what each evicted.
Content that returns while B1 knows it says T1 was too small, while B2 knows it, that T2 was: the
target size p of T1 follows. A victim comes from T1 when T1 is larger than p, else from T2.

N. Megiddo, D. S. Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003.

Deviations: a victim is chosen before it is known what takes its place, so p moves when content
returns and not just before the eviction, and the paper's tie (T1 exactly p large and the newcomer
in B2) goes to T2 always. Blocks that requests hold count for the sizes and are no victims; where a
list has no other, the victim comes from the other list.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import Ghosts


class Arc(PrefixCachePolicy):
    """Adaptive replacement cache. O(1) per block; about 500 bytes per cached block."""

    name = "arc"
    needs = frozenset({BlockFact.KEY})
    paper = "Megiddo and Modha, ARC: a self-tuning, low overhead replacement cache, FAST 2003"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._size = max(1, engine.num_blocks)
        self._target = 0.0
        self._once: OrderedDict[int, None] = OrderedDict()
        self._again: OrderedDict[int, None] = OrderedDict()
        self._seen_again: dict[int, bool] = {}
        self._key: dict[int, bytes] = {}
        self._held = [0, 0]
        self._ghosts: tuple[Ghosts[bool], Ghosts[bool]] = (
            Ghosts(2 * self._size),
            Ghosts(2 * self._size),
        )

    def on_release(self, released: Released) -> None:
        keys = released.keys or [b""] * len(released.ids)
        for block, key in zip(released.ids, keys, strict=True):
            again = self._seen_again.get(block)
            if again is None:
                again = self._returned(key)
                self._seen_again[block] = again
                self._held[again] += 1
                if key:
                    self._key[block] = key
                self._forget()
            order = self._again if again else self._once
            order[block] = None
            order.move_to_end(block)

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            again = self._seen_again.get(block)
            if again is None:
                continue
            (self._again if again else self._once).pop(block, None)
            if not again:
                self._seen_again[block] = True
                self._held[False] -= 1
                self._held[True] += 1

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            again = self._seen_again.pop(block, None)
            if again is None:
                continue
            (self._again if again else self._once).pop(block, None)
            self._held[again] -= 1
            key = self._key.pop(block, None)
            if key is not None:
                self._ghosts[again].add(key, again)
        self._forget()

    def victims(self, n: int) -> list[int]:
        found: list[int] = []
        once, again = iter(self._once), iter(self._again)
        left = [len(self._once), len(self._again)]
        held = self._held[False]
        while len(found) < n:
            if left[False] and (held > self._target or not left[True]):
                found.append(next(once))
                left[False] -= 1
                held -= 1
            else:
                found.append(next(again))
                left[True] -= 1
        return found

    def counters(self) -> dict[str, float]:
        return {"target_once": self._target}

    def _returned(self, key: bytes) -> bool:
        """Look content up in the ghosts and adapt the target; True if it was known."""
        once, again = self._ghosts
        sizes = len(once), len(again)
        if once.pop(key) is not None:
            self._target = min(self._size, self._target + max(1.0, sizes[1] / sizes[0]))
            again.pop(key)
            return True
        if again.pop(key) is not None:
            self._target = max(0.0, self._target - max(1.0, sizes[0] / sizes[1]))
            return True
        return False

    def _forget(self) -> None:
        """The paper's bounds: T1 and B1 within the cache's size, all four within twice that."""
        once, again = self._ghosts
        once.trim(max(0, self._size - self._held[False]))
        again.trim(max(0, 2 * self._size - sum(self._held) - len(once)))
