"""Watermarks: store what leaves, and keep every tier between a high and a low mark.

What is about to be evicted goes to the fastest tier that is not down. A tier that is filled above
``high`` gives chunks up in its order until it is down to ``low``: to the tier below, or, at the
bottom, for good. Nothing waits for a full tier: the room between the marks takes what comes in
meanwhile. What a session needs that is about to return is fetched to the fastest tier, as far as
there is room.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvplug.contract import (
    EngineView,
    Leaving,
    LifecyclePolicy,
    Move,
    PolicyOptions,
    Pressure,
    TierView,
)
from kvplug_policies.lifecycle_moves import Marks, fetched_ahead, given_up


class Watermarks(LifecyclePolicy):
    """High and low water per tier. O(1) per chunk; keeps nothing."""

    name = "watermarks"
    changes = "what is stored on its way out of the pool, and how full tiers are; outputs stay"

    class Options(Marks):
        """Options of `Watermarks`."""

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.checkpoint = self.options.checkpoint

    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        first = next((tier.name for tier in tiers if not tier.write.down), None)
        least = self.options.least
        return [
            first if chunk.pays and (chunk.returns is None or chunk.returns >= least) else None
            for chunk in leaving
        ]

    def wants(self, tier: TierView) -> int:
        return self.options.excess(tier)

    def plan(self, pressure: Pressure) -> list[Move]:
        return given_up(pressure) + fetched_ahead(pressure, self.options.ahead)
