"""Events observers receive."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvplug.contract import Kind


class EventType(StrEnum):
    """What can happen."""

    EVICTED = "evicted"
    FREED = "freed"
    REFUSED = "refused"
    FALLEN_BACK = "fallen back"
    ADJUSTED = "adjusted"
    REUSED = "reused"
    DRIFTED = "drifted"


@dataclass(frozen=True, slots=True)
class Event:
    """Something a policy did or had done to it.

    Attributes:
        type: What happened.
        kind: The kind of the policy.
        policy: Its name.
        step: Scheduler step.
        count: Blocks, tokens or requests concerned.
        detail: Cause, for refusals and fallbacks; what was decided, for adjustments.
    """

    type: EventType
    kind: Kind
    policy: str
    step: int
    count: int = 1
    detail: str = ""
