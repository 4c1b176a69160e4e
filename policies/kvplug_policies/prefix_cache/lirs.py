"""LIRS: what counts is how much else was used between the last two uses of a block.

Most of the cache holds LIR blocks, whose last two uses lay close together; a small remainder holds
HIR blocks, which are the ones evicted, oldest first. The stack S keeps all blocks, evicted ones
included, in order of their last use, down to the least recent LIR block: a HIR block that is used
while it is in S has shown a shorter distance than that block and changes places with it.

S. Jiang, X. Zhang, LIRS: an efficient low inter-reference recency set replacement policy to
improve buffer cache performance, SIGMETRICS 2002.

Deviations: the paper lets S hold any number of evicted blocks; ``history`` bounds them. Room for a
request is made before its own blocks are cached, so when more is needed than there are HIR blocks,
LIR blocks follow, least recent first. Blocks that requests hold are no victims; letting one go
renews its recency and is no second use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain, islice

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import Ghosts

GONE = -1
"""Stands in S for the block of evicted content."""


class Lirs(PrefixCachePolicy):
    """Low inter-reference recency set. O(1) amortized; about 1,400 bytes per cached block."""

    name = "lirs"
    needs = frozenset({BlockFact.KEY})
    paper = "Jiang and Zhang, LIRS, SIGMETRICS 2002"

    class Options(PolicyOptions):
        """Options of `Lirs`."""

        hir: float = Field(
            0.01,
            gt=0,
            lt=1,
            description="fraction of the cache for blocks with a long reuse distance",
        )
        history: float = Field(
            2.0, ge=0, le=64, description="evicted blocks remembered, as a multiple of the cache"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        size = max(2, engine.num_blocks)
        self._most_lir = size - max(1, round(self.options.hir * size))
        self._clock = 0
        self._stack: OrderedDict[int, int] = OrderedDict()
        """Stamp to block, in order of last use."""
        self._stamp: dict[int, int] = {}
        self._lir: set[int] = set()
        self._known: dict[int, bytes] = {}
        self._queue: OrderedDict[int, None] = OrderedDict()
        self._lir_free: OrderedDict[int, None] = OrderedDict()
        self._gone: Ghosts[int] = Ghosts(int(self.options.history * size))
        self._gone_key: dict[int, bytes] = {}

    def on_release(self, released: Released) -> None:
        keys = released.keys or [b""] * len(released.ids)
        for block, key in zip(released.ids, keys, strict=True):
            if block not in self._known:
                self._known[block] = key
                self._enter(block, key)
            elif block in self._stamp:
                self._to_top(block)
            self._let_go(block)

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._queue.pop(block, None)
            self._lir_free.pop(block, None)
            if block not in self._known:
                continue
            if block not in self._lir and block in self._stamp:
                self._make_lir(block)
            else:
                self._to_top(block)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            key = self._known.pop(block, None)
            if key is None:
                continue
            self._queue.pop(block, None)
            self._lir_free.pop(block, None)
            stamp = self._stamp.pop(block, None)
            if block in self._lir:
                self._lir.discard(block)
                if stamp is not None:
                    del self._stack[stamp]
            elif stamp is not None:
                self._remember(stamp, key)
            self._prune()

    def victims(self, n: int) -> list[int]:
        return list(islice(chain(self._queue, self._lir_free), n))

    def counters(self) -> dict[str, float]:
        return {"lir": len(self._lir), "remembered": len(self._gone)}

    def _enter(self, block: int, key: bytes) -> None:
        before = self._gone.pop(key)
        if before is not None:
            del self._stack[before]
            del self._gone_key[before]
            self._make_lir(block)
            return
        if len(self._lir) < self._most_lir:
            self._lir.add(block)
        self._to_top(block)

    def _remember(self, stamp: int, key: bytes) -> None:
        """A HIR block in S is gone: its place in S represents its content from now on."""
        if not key:
            del self._stack[stamp]
            return
        older = self._gone.pop(key)
        self._stack[stamp] = GONE
        self._gone_key[stamp] = key
        forgotten = self._gone.add(key, stamp)
        for one in forgotten if older is None else [older, *forgotten]:
            del self._stack[one]
            del self._gone_key[one]

    def _let_go(self, block: int) -> None:
        order = self._lir_free if block in self._lir else self._queue
        order[block] = None
        order.move_to_end(block)

    def _make_lir(self, block: int) -> None:
        self._lir.add(block)
        self._to_top(block)
        while len(self._lir) > self._most_lir:
            self._demote()

    def _demote(self) -> None:
        """The least recent LIR block, at the bottom of S, becomes the youngest HIR block."""
        stamp, block = next(iter(self._stack.items()))
        del self._stack[stamp]
        del self._stamp[block]
        self._lir.discard(block)
        if block in self._lir_free:
            del self._lir_free[block]
            self._queue[block] = None
        self._prune()

    def _to_top(self, block: int) -> None:
        stamp = self._stamp.get(block)
        if stamp is not None:
            del self._stack[stamp]
        self._clock += 1
        self._stack[self._clock] = block
        self._stamp[block] = self._clock
        if block in self._lir:
            self._prune()

    def _prune(self) -> None:
        """S ends at a LIR block: what lies below has a longer distance than all of those."""
        stack = self._stack
        while stack:
            stamp, block = next(iter(stack.items()))
            if block in self._lir:
                return
            del stack[stamp]
            if block == GONE:
                self._gone.pop(self._gone_key.pop(stamp))
            else:
                del self._stamp[block]
