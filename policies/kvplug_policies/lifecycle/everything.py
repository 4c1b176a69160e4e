"""Everything: store all that leaves, as plain offloading does; the baseline of the other policies.

Each chunk goes to the fastest tier that can be asked, whatever is known of it; a full tier moves
what its order gives up to the next one, and the last one drops it.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvplug.contract import Leaving, LifecyclePolicy, Move, Pressure, TierView
from kvplug_policies.lifecycle_moves import given_up

ROOM = 1 / 32
"""Share of a tier that is kept free for what comes in."""


class Everything(LifecyclePolicy):
    """All that leaves is stored, and all that is found is loaded. O(1) per chunk."""

    name = "everything"
    changes = "what is stored on its way out of the pool: all of it; outputs stay"

    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        first = next((tier.name for tier in tiers if not tier.write.down), None)
        return [first] * len(leaving)

    def wants(self, tier: TierView) -> int:
        return max(0, tier.used - int((1 - ROOM) * tier.capacity)) if tier.capacity else 0

    def plan(self, pressure: Pressure) -> list[Move]:
        return given_up(pressure)
