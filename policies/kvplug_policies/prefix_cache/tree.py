"""Leaf first: no block is evicted before the blocks whose prefix it is part of.

Cached blocks form a forest: the parent of a block is the one before it in the text. Once a block
is gone, everything behind it is of no use, so only leaves are evicted, the one released longest ago
first; evicting a leaf may make its parent one. This is the order of a radix-tree prefix cache.

L. Zheng et al., SGLang: efficient execution of structured language model programs, arXiv
2312.07104, section 3.

Deviations: the unit is a block, not an edge of a compressed tree. A candidate whose child is still
cached but used by a request is evicted only if no leaf is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import Ranking


class Tree(PrefixCachePolicy):
    """Least recent leaf first. O(log n) per block; about 500 bytes per cached block."""

    name = "tree"
    needs = frozenset({BlockFact.PARENT})
    paper = "Zheng et al., SGLang, arXiv 2312.07104: eviction of RadixAttention"

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._clock = 0
        self._parent: dict[int, tuple[int, int]] = {}
        self._children: dict[int, int] = {}
        self._life: dict[int, int] = {}
        self._candidates: dict[int, int] = {}
        self._leaves = Ranking()

    def on_release(self, released: Released) -> None:
        parents = released.parents or [-1] * len(released.ids)
        for block in released.ids:
            if block not in self._life:
                self._clock += 1
                self._life[block] = self._clock
            self._clock += 1
            self._candidates[block] = self._clock
        for block, parent in zip(released.ids, parents, strict=True):
            self._link(block, parent)
        for block in released.ids:
            if not self._children.get(block):
                self._leaves.put((self._candidates[block], block))

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._candidates.pop(block, None)
            self._leaves.discard(block)

    def on_remove(self, ids: Sequence[int]) -> None:
        for block in ids:
            if self._life.pop(block, None) is None:
                continue
            self._candidates.pop(block, None)
            self._leaves.discard(block)
            self._children.pop(block, None)
            self._unlink(block)

    def victims(self, n: int) -> list[int]:
        found: list[int] = []
        gone: dict[int, int] = {}
        exposed: list[tuple[int, int]] = []
        rest: list[tuple[int, int]] | None = None
        taken: set[int] = set()
        walk = self._leaves.walk()
        leaf = next(walk, None)
        while len(found) < n:
            if leaf is not None and leaf[1] in taken:
                leaf = next(walk, None)
                continue
            if exposed and (leaf is None or exposed[0] < leaf):
                block = heappop(exposed)[1]
            elif leaf is not None:
                block = leaf[1]
                leaf = next(walk, None)
            else:
                if rest is None:
                    rest = [(at, b) for b, at in self._candidates.items()]
                    heapify(rest)
                block = heappop(rest)[1]
            if block in taken:
                continue
            taken.add(block)
            found.append(block)
            parent = self._parent_of(block)
            if parent is not None:
                gone[parent] = gone.get(parent, 0) + 1
                at = self._candidates.get(parent)
                if at is not None and gone[parent] == self._children[parent]:
                    heappush(exposed, (at, parent))
        walk.close()
        return found

    def _parent_of(self, block: int) -> int | None:
        """The block's parent, if its content is still the same."""
        link = self._parent.get(block)
        if link is None or self._life.get(link[0]) != link[1]:
            return None
        return link[0]

    def _link(self, block: int, parent: int) -> None:
        life = self._life.get(parent)
        if self._parent.get(block) == (parent, life):
            return
        self._unlink(block)
        if life is not None and parent != block:
            self._parent[block] = (parent, life)
            self._children[parent] = self._children.get(parent, 0) + 1
            self._leaves.discard(parent)

    def _unlink(self, block: int) -> None:
        parent = self._parent_of(block)
        self._parent.pop(block, None)
        if parent is None:
            return
        self._children[parent] -= 1
        if not self._children[parent]:
            del self._children[parent]
            at = self._candidates.get(parent)
            if at is not None:
                self._leaves.put((at, parent))
