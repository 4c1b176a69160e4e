"""MRU: evict the block released most recently, and keep what was there first.

For prompts that repeat in a cycle longer than the cache: the least recently used order evicts each
one shortly before its turn, this order keeps as many as fit. Blocks of one request are released
together; of those, the last block of the text goes first, so that the rest is a usable prefix.
"""

from collections.abc import Sequence
from itertools import islice

from pydantic import Field

from kvplug import hookimpl
from kvplug.contract import EngineView, PolicyOptions, PrefixCachePolicy, Released
from kvplug.registry import PolicyRegistry


class Mru(PrefixCachePolicy):
    """Most recently used first, by release. O(1) per block; victims cost O(n + protect)."""

    name = "mru"
    paper = "most recently used"

    class Options(PolicyOptions):
        """Options of `Mru`."""

        protect: int = Field(
            0, ge=0, description="newest blocks that are evicted only when no others are left"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._order: dict[int, None] = {}  # oldest first; the last block of a text is its newest

    def on_release(self, released: Released) -> None:
        self.on_remove(released.ids)
        self._order.update(dict.fromkeys(reversed(released.ids)))

    def on_hit(self, ids: Sequence[int]) -> None:
        self.on_remove(ids)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._order.pop(block, None)

    def victims(self, n: int) -> list[int]:
        newest = islice(reversed(self._order), self.options.protect, self.options.protect + n)
        found = list(newest)
        return found + list(islice(self._order, len(found), n))


@hookimpl
def kvplug_register_policies(registry: PolicyRegistry) -> None:
    registry.add(Mru)
