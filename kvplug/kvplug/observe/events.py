"""Events that plugins receive through `kvplug_event`, and that the event log holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kvplug.contract import Kind


class EventType(StrEnum):
    """Types of events.

    Attributes:
        EVICTED: Cached blocks were evicted: ``count`` blocks, by a prefix-cache policy or, where
            ``policy`` is empty, in vLLM's own order; ``request`` is the one they made room for,
            where it was just admitted.
        FREED: A sequence policy gave blocks of a running request back; ``count`` blocks.
        REFUSED: A request option was refused, or the reuse checks refused stored segments;
            ``count`` options or segments, ``detail`` is the cause.
        FALLEN_BACK: A policy failed and the host's default took over; ``detail`` is the error.
        ADJUSTED: A format policy changed its decision; ``detail`` says to what.
        REUSED: Stored KV was loaded into a request; ``count`` tokens, without recomputed ones.
        DRIFTED: The guard found an answer that differs from the exact one; ``detail`` says how
            much.
        GUARDED: The guard's shadow changed how much may be approximated; ``detail`` says to what,
            and why.
        ADMITTED: A request was given its first blocks; ``count`` full blocks of its prompt,
            ``facts`` where they came from.
        MISSED: Full blocks of its prompt have to be computed: ``count`` blocks, ``detail`` is the
            first miss in words, ``facts`` the causes.
        PREEMPTED: A running request lost its blocks to others and starts over.
        AGAIN: It was given blocks again; ``count`` full blocks are computed again, ``detail`` says
            why.
        THRASHED: Blocks were evicted and are computed again within one pool of evictions;
            ``count`` blocks.
        ENDED: A request ended; ``count`` tokens of its answer.
        STORED: Tiers took KV in; ``count`` chunks, ``detail`` is the tier.
        LOADED: A tier's KV is in a request's blocks; ``count`` tokens.
        DEMOTED: KV moved to a lower tier; ``count`` chunks, ``detail`` is the tier.
        PROMOTED: KV moved to a higher tier; ``count`` chunks, ``detail`` is the tier.
        BREAKER: A breaker of the guard changed its state; ``detail`` says to what.
        RESET: The prefix cache was reset.
    """

    EVICTED = "evicted"
    FREED = "freed"
    REFUSED = "refused"
    FALLEN_BACK = "fallen back"
    ADJUSTED = "adjusted"
    REUSED = "reused"
    DRIFTED = "drifted"
    GUARDED = "guarded"
    ADMITTED = "admitted"
    MISSED = "missed"
    PREEMPTED = "preempted"
    AGAIN = "again"
    THRASHED = "thrashed"
    ENDED = "ended"
    STORED = "stored"
    LOADED = "loaded"
    DEMOTED = "demoted"
    PROMOTED = "promoted"
    BREAKER = "breaker"
    RESET = "reset"


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
        request: The request it happened to; empty where there is none.
        blocks: Short hashes of the blocks concerned, at most 64.
        facts: Further numbers and words, by name, see `EventType`.
    """

    type: EventType
    kind: Kind | None
    policy: str
    step: int
    count: int = 1
    detail: str = ""
    request: str = ""
    blocks: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
