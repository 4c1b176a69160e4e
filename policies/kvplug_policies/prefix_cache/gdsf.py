"""GDSF: a block is worth how often it was used times what it costs to compute it again.

Priority is ``L + frequency * cost / size``. L is the priority of the last victim, so what is not
used again sinks below what comes in. Size is 1 for every block. Cost is the work to compute the
block again at its depth, in tokens: one for each of its tokens, and for each of those the share
of attention over all tokens before it, which makes the sum over a prompt quadratic::

    cost = B * (1 + (depth * B + B / 2) / quadratic_tokens)

with B tokens a block. L. Cherkasova, Improving WWW proxies performance with
Greedy-Dual-Size-Frequency caching policy, HP Labs HPL-98-69R1, 1998.

Deviation: a deep block costs more than a shallow one but is of no use once a block before it is
gone, which a cache of independent objects does not have. So of the blocks that one request lets
go, each is worth at least as much as those behind it (``chained``; off for the plain formula).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from kvplug.contract import (
    BlockFact,
    EngineView,
    PolicyOptions,
    PrefixCachePolicy,
    Released,
)
from kvplug_policies.structures import Ranking

COMMON_HIDDEN = 4096
"""Hidden size assumed where the host does not know the model's layers."""


class Gdsf(PrefixCachePolicy):
    """Greedy-Dual-Size-Frequency. O(log n) per block; about 400 bytes per cached block."""

    name = "gdsf"
    needs = frozenset({BlockFact.POSITION})
    paper = "Cherkasova, Greedy-Dual-Size-Frequency caching policy, HPL-98-69R1, 1998"

    class Options(PolicyOptions):
        """Options of `Gdsf`."""

        quadratic_tokens: int = Field(
            0,
            ge=0,
            le=1 << 30,
            description="tokens of context over which attention costs as much as the rest of the "
            "model; 0: six times the hidden size, as for a common transformer",
        )
        chained: bool = Field(
            True, description="value a block at least as highly as those behind it"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        hidden = max((x.num_heads * x.head_size for x in engine.layers), default=0)
        # Per token and layer 24 h^2 operations outside attention (4 h^2 weights of projections,
        # 8 h^2 of the MLP, two operations each), and 4 h per token attended to.
        self._quadratic = self.options.quadratic_tokens or 6 * (hidden or COMMON_HIDDEN)
        self._chained = self.options.chained
        self._age = 0.0
        self._clock = 0
        self._uses: dict[int, int] = {}
        self._ranking = Ranking()
        self._chosen: list[int] = []

    def on_release(self, released: Released) -> None:
        positions = released.positions or [-1] * len(released.ids)
        behind = 0.0
        for block, position in zip(released.ids, positions, strict=True):
            uses = self._uses.setdefault(block, 1)
            worth = self._age + uses * self.cost(position)
            if self._chained:
                worth = behind = max(worth, behind)
            self._clock += 1
            self._ranking.put((worth, self._clock, block))

    def on_hit(self, ids: Sequence[int]) -> None:
        for block in ids:
            self._uses[block] = self._uses.get(block, 1) + 1
            self._ranking.discard(block)

    def on_remove(self, ids: Sequence[int]) -> None:
        n = len(ids)
        if n and self._chosen[:n] == list(ids):
            self._age = max(self._age, self._ranking[ids[-1]][0])
        self._chosen = []
        for block in ids:
            self._uses.pop(block, None)
            self._ranking.discard(block)

    def victims(self, n: int) -> list[int]:
        self._chosen = self._ranking.first(n)
        return list(self._chosen)

    def cost(self, position: int) -> float:
        """Tokens of work to compute the block at this index of a text again; -1: unknown."""
        size = self.engine.block_size
        return size * (1 + (max(position, 0) * size + size / 2) / self._quadratic)

    def counters(self) -> dict[str, float]:
        return {"age": self._age}
