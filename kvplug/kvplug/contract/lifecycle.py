"""Lifecycle policies: when a block changes tier or precision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from kvplug.contract.policy import Kind, Policy


class Action(StrEnum):
    """Actions on a block."""

    DEMOTE = "demote"
    PROMOTE = "promote"
    COMPRESS = "compress"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class TierView:
    """One tier: ``used`` and ``capacity`` in blocks; ``latency_us`` to fetch one block."""

    name: str
    used: int
    capacity: int
    latency_us: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """State from which moves are planned.

    Attributes:
        step: Scheduler step.
        tiers: The tiers, fastest first; the engine's own pool is the first.
        idle: Block ids that no request holds, per tier, in the prefix-cache policy's order.
        idle_seconds: Seconds each of them has been idle, aligned with ``idle``.
        waiting: Requests that could not be admitted.
    """

    step: int
    tiers: tuple[TierView, ...]
    idle: tuple[Sequence[int], ...]
    idle_seconds: tuple[Sequence[float], ...]
    waiting: int


@dataclass(frozen=True, slots=True)
class Move:
    """Do ``action`` to ``blocks`` of tier ``source``, towards tier ``target``."""

    action: Action
    blocks: Sequence[int]
    source: str
    target: str | None = None


class LifecyclePolicy(Policy):
    """Plans moves from pressure. Runs in the scheduler, once per step at most."""

    kind: ClassVar[Kind] = Kind.LIFECYCLE
    exact: ClassVar[bool] = True

    @abstractmethod
    def plan(self, pressure: Pressure) -> Sequence[Move]:
        """Return the moves to make now, possibly none. Changes nothing itself."""
