"""Events that plugins receive through `kvplug_event`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvplug.contract import Kind


class EventType(StrEnum):
    """Types of events.

    Attributes:
        EVICTED: A prefix-cache policy evicted cached blocks; one event per step, ``count`` blocks.
        FREED: A sequence policy gave blocks of a running request back; ``count`` blocks.
        REFUSED: A request option was refused, or the reuse checks refused stored segments;
            ``count`` options or segments, ``detail`` is the cause.
        FALLEN_BACK: A policy failed and the host's default took over; ``detail`` is the error.
        ADJUSTED: A format policy changed its decision; ``detail`` says to what.
        REUSED: Stored KV was loaded into a request; ``count`` tokens, without recomputed ones.
        DRIFTED: The guard found an answer that differs from the exact one; ``detail`` says how
            much.
    """

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
        type: The type of the event.
        kind: The kind of the policy; None for an option of no kind.
        policy: Its name, or the empty string.
        step: Scheduler step.
        count: Number of blocks, tokens or requests, see `EventType`.
        detail: Cause or decision, see `EventType`; empty for the others.
    """

    type: EventType
    kind: Kind | None
    policy: str
    step: int
    count: int = 1
    detail: str = ""
