"""Events observers receive."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvplug.contract import Kind


class EventType(StrEnum):
    """Types of events."""

    EVICTED = "evicted"
    FREED = "freed"
    REFUSED = "refused"
    FALLEN_BACK = "fallen back"
    ADJUSTED = "adjusted"
    REUSED = "reused"
    DRIFTED = "drifted"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a policy or a request.

    Attributes:
        type: What happened.
        kind: The kind of the policy; None where no kind is concerned.
        policy: Its name, or the empty string.
        step: Scheduler step.
        count: Blocks, tokens or requests concerned.
        detail: Cause, for refusals and fallbacks; what was decided, for adjustments.
    """

    type: EventType
    kind: Kind | None
    policy: str
    step: int
    count: int = 1
    detail: str = ""
