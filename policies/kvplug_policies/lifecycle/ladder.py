"""Ladder: each chunk stands on the rung that it is worth, from the pool down to nowhere.

A chunk's worth on a rung is the time it is expected to save there for each byte it takes: the
probability that it returns, times what computing it costs beyond what loading it costs, over its
bytes; the longer it was not used, the less. The rungs are the tiers in their order: one whose codec
changes KV first, if the deployment puts it there (a coded copy on the accelerator), then host
memory, disk, a server. What leaves the pool goes to the highest rung whose price it pays. The price
of a rung is the worth of what it gave up lately; a rung with room is free. A rung that is filled
above ``high`` gives up, of what its order names first, what is worth least: to the next rung whose
price it pays, or for good.

Computing and loading are charged as they were measured, so a line that is slower than prefill takes
nothing. One that is down, or so far backed up that writing would not be done within ``patience``
while requests wait, loses its chunks to the next. Urgent requests' chunks count double for each
level of priority. What a session needs that is about to return is fetched to the first rung, as far
as there is room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from pydantic import Field

from kvplug.contract import (
    Action,
    EngineView,
    Leaving,
    LifecyclePolicy,
    Move,
    PolicyOptions,
    Pressure,
    TierView,
)
from kvplug_policies.lifecycle_moves import Marks, fetched_ahead

REMEMBERED = 1 << 17
"""Chunks whose worth is remembered; about 200 bytes each."""

UNKNOWN_COST = 1e-4
"""Seconds a token that computing costs before it was measured."""

UNKNOWN_RETURN = 0.25
"""Probability of a return before any chunk's fate is known."""

FADE = 0.05
"""Weight of the latest chunk given up in a rung's price, and in the time chunks stay there."""

LEFT_OVER = 0.25
"""What is left of a chunk's worth after the time that chunks stay on their rung."""

LOOKED_AT = 2
"""Bytes of candidates looked at for each byte that has to go."""

PRIORITIES = 8
"""Levels of priority beyond which no more is made of one."""


class Ladder(LifecyclePolicy):
    """Rungs by worth. O(log n) per chunk that moves; about 200 bytes per chunk remembered."""

    name = "ladder"
    changes = "what is stored on its way out of the pool and where it stands; outputs stay"

    class Options(Marks):
        """Options of `Ladder`."""

        patience: float = Field(
            2.0, gt=0, description="seconds that a line may be backed up before writes are left"
        )

    options: Options

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self.checkpoint = self.options.checkpoint
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._prices: dict[str, float] = {}
        self._stay: dict[str, float] = {}
        self._now = 0
        self._waiting = False

    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        chosen: list[str | None] = []
        for chunk in leaving:
            returns = UNKNOWN_RETURN if chunk.returns is None else chunk.returns
            if not chunk.pays or returns < self.options.least:
                chosen.append(None)
                continue
            urgency = 2.0 ** max(-PRIORITIES, min(PRIORITIES, -chunk.priority))
            seconds = chunk.seconds or UNKNOWN_COST * chunk.tokens
            known = _Known(returns * urgency, seconds, self._now)
            rung = next((t.name for t in tiers if self._pays(known, chunk.size, t)), None)
            chosen.append(rung)
            if rung is not None:
                self._now += 1
                self._know(chunk.key, known)
        return chosen

    def on_used(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if (known := self._known.get(key)) is not None:
                self._know(key, known)

    def wants(self, tier: TierView) -> int:
        return LOOKED_AT * self.options.excess(tier)

    def plan(self, pressure: Pressure) -> list[Move]:
        self._waiting = pressure.waiting > 0
        moves = []
        for i, tier in enumerate(pressure.tiers):
            downwards: dict[str | None, list[bytes]] = {}
            for key, size in self._given_up(tier, pressure):
                known = self._known.get(key)
                lower = pressure.tiers[i + 1 :] if known is not None else ()
                below = next(
                    (
                        t.name
                        for t in lower
                        if known and (tier.exact or not t.exact) and self._pays(known, size, t)
                    ),
                    None,
                )
                downwards.setdefault(below, []).append(key)
                self._learn(tier, known, size)
            for name, keys in downwards.items():
                action = Action.DROP if name is None else Action.DEMOTE
                moves.append(Move(action, keys, tier.name, name))
        return moves + fetched_ahead(pressure, self.options.ahead)

    def counters(self) -> dict[str, float]:
        return {f"price_{name}": price for name, price in self._prices.items()}

    def _given_up(self, tier: TierView, pressure: Pressure) -> list[tuple[bytes, int]]:
        """What is worth least of what the order names first, as much as has to go, with bytes."""
        keys, sizes = pressure.candidates[tier.name], pressure.sizes[tier.name]
        excess = tier.used - int(self.options.low * tier.capacity)
        worth = [
            self._worth(self._known.get(key), size, tier)
            for key, size in zip(keys, sizes, strict=True)
        ]
        found = []
        for at in sorted(range(len(keys)), key=worth.__getitem__):
            if excess <= 0:
                break
            found.append((keys[at], sizes[at]))
            excess -= sizes[at]
        return found

    def _know(self, key: bytes, known: _Known) -> None:
        self._known[key] = known._replace(at=self._now)
        self._known.move_to_end(key)
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def _worth(self, known: _Known | None, size: int, tier: TierView) -> float:
        """Seconds a byte that a chunk is expected to save on a rung still; 0 if not known."""
        if known is None:
            return 0.0
        stay = self._stay.get(tier.name)
        left = LEFT_OVER ** ((self._now - known.at) / stay) if stay else 1.0
        loading = size / tier.read.bandwidth if tier.read.bandwidth else 0.0
        return known.returns * left * max(0.0, known.seconds - loading) / max(1, size)

    def _learn(self, tier: TierView, known: _Known | None, size: int) -> None:
        """What a rung gave up tells its price, and how long chunks stay on it."""
        price = self._prices.get(tier.name, 0.0)
        self._prices[tier.name] = price + FADE * (self._worth(known, size, tier) - price)
        if known is not None:
            age = self._now - known.at
            stay = self._stay.get(tier.name, float(age))
            self._stay[tier.name] = max(1.0, stay + FADE * (age - stay))

    def _pays(self, known: _Known, size: int, tier: TierView) -> bool:
        """True if a chunk may go to a tier: it can be asked, keeps up, and its price is met."""
        write = tier.write
        if write.down or tier.read.down:
            return False
        late = bool(write.bandwidth) and write.queued / write.bandwidth > self.options.patience
        if self._waiting and late:
            return False
        worth = self._worth(known, size, tier)
        full = bool(tier.capacity) and tier.fill > self.options.low
        return worth > 0 and (not full or worth >= self._prices.get(tier.name, 0.0))


class _Known(NamedTuple):
    """What is known of a chunk that was stored.

    Attributes:
        returns: Probability of its return when it left the pool, times its urgency.
        seconds: To compute it.
        at: When it was stored or used last, counted in chunks stored.
    """

    returns: float
    seconds: float
    at: int
