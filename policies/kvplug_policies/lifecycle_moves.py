"""Options and moves that lifecycle policies have in common."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from kvplug.contract import Action, Move, PolicyOptions, Pressure, TierView


class Marks(PolicyOptions):
    """When a tier gives chunks up, what is stored at all, and what is done ahead of time."""

    high: float = Field(
        0.98, gt=0, le=1, description="filled fraction above which a tier gives chunks up"
    )
    low: float = Field(
        0.95, ge=0, lt=1, description="filled fraction that it gives them up down to"
    )
    least: float = Field(
        0.02, ge=0, le=1, description="probability of a return below which nothing is stored"
    )
    ahead: float = Field(
        0.3,
        ge=0,
        le=1,
        description="probability of a session's return from which its chunks are fetched "
        "to the fastest tier ahead of it",
    )
    checkpoint: float = Field(
        0,
        ge=0,
        description="seconds between copies of the pool into a durable tier; 0 for none",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Marks:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self

    def excess(self, tier: TierView) -> int:
        """Bytes of a tier over its low mark, once it is over the high one."""
        if not tier.capacity or tier.fill <= self.high:
            return 0
        return tier.used - int(self.low * tier.capacity)


def tier_below(tier: TierView, lower: Sequence[TierView]) -> TierView | None:
    """The fastest lower tier that may take what leaves a tier: what is not exact stays so."""
    return next((t for t in lower if not t.write.down and (tier.exact or not t.exact)), None)


def given_up(pressure: Pressure) -> list[Move]:
    """Move each tier's candidates to the tier below it; drop those that no tier takes."""
    moves = []
    for i, tier in enumerate(pressure.tiers):
        if not (keys := pressure.candidates[tier.name]):
            continue
        below = tier_below(tier, pressure.tiers[i + 1 :])
        if below is None:
            moves.append(Move(Action.DROP, keys, tier.name))
        else:
            moves.append(Move(Action.DEMOTE, keys, tier.name, below.name))
    return moves


def fetched_ahead(pressure: Pressure, least: float) -> list[Move]:
    """Bring what sessions need that return with a probability of at least ``least`` to the top."""
    first = pressure.tiers[0].name
    return [
        Move(Action.PROMOTE, due.keys, due.source, first)
        for due in pressure.due
        if due.probability >= least
    ]
