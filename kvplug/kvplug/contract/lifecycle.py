"""Lifecycle policies: what is stored on its way out, when it moves, and when loading pays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from kvplug.contract.policy import Kind, Policy


class Action(StrEnum):
    """Actions on chunks of a tier.

    ``DEMOTE``: move to a tier below. ``COPY``: store in a tier below as well. ``PROMOTE``: bring to
    a tier above before it is asked for. ``DROP``: remove.
    """

    DEMOTE = "demote"
    COPY = "copy"
    PROMOTE = "promote"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class LinkView:
    """A tier's line to the accelerator, as measured so far.

    Attributes:
        latency: Seconds of a transfer beside its bytes.
        bandwidth: Bytes a second; 0 if nothing was transferred yet.
        queued: Bytes that wait to be transferred.
        down: True if the tier failed lately and is left alone for a while.
    """

    latency: float = 0.0
    bandwidth: float = 0.0
    queued: int = 0
    down: bool = False

    def seconds(self, size: int) -> float:
        """Estimate the time for ``size`` more bytes; infinite if the tier is down."""
        if self.down:
            return float("inf")
        if not self.bandwidth:
            return self.latency
        return self.latency + (self.queued + size) / self.bandwidth


@dataclass(frozen=True, slots=True)
class TierView:
    """View of a tier.

    Attributes:
        name: Its name in the deployment.
        used: Bytes in use; of the engine's pool, of blocks with content.
        capacity: Bytes it may hold; 0 for no limit here.
        exact: False if its codec changes KV.
        shared: True if other engines see it.
        durable: True if it outlives the process.
        read: Its line towards the accelerator.
        write: Its line away from it.
    """

    name: str
    used: int = 0
    capacity: int = 0
    exact: bool = True
    shared: bool = False
    durable: bool = False
    read: LinkView = field(default_factory=LinkView)
    write: LinkView = field(default_factory=LinkView)

    @property
    def fill(self) -> float:
        """Fraction in use; 0 for a tier without a limit."""
        return self.used / self.capacity if self.capacity else 0.0


@dataclass(frozen=True, slots=True)
class Leaving:
    """A chunk of the engine's pool that is about to be evicted.

    Attributes:
        key: Its key.
        start: Position of its first token in its text.
        tokens: Its tokens.
        uses: Requests that used it since it was computed, the first included.
        idle: Seconds since a request held it.
        misses: Requests that asked for it after it had gone everywhere; from the ghost list.
        returns: Probability that it is asked for again while a tier could hold it: as the pool's
            order estimates it, or as chunks like it came back; None before any did or did not.
        session: True if its request named a session.
        priority: The request's priority, lower is more urgent.
        parent: Key of the chunk before it in its text; empty for the first, or if unknown.
        text: Names what is loaded together: its session, else the request that used it last. Any
            bytes, the same for all chunks of one text; empty if unknown.
        pays: False if storing chunks like this one has not paid lately: what comes back is more
            than the tiers hold, and taking this one in costs another that is asked for as often.
        size: Bytes it would take in a tier, estimated.
        seconds: To compute its tokens again, as measured, with a usual context before them: what
            stands later in a text is worth nothing without what stands before it, so it is not
            said to cost more. 0 if not measured yet.
    """

    key: bytes
    start: int
    tokens: int
    uses: int = 1
    idle: float = 0.0
    misses: int = 0
    returns: float | None = None
    session: bool = False
    priority: int = 0
    parent: bytes = b""
    text: bytes = b""
    pays: bool = True
    size: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Due:
    """Chunks of a session that is about to return, by what sessions' pauses were like.

    Attributes:
        keys: Its chunks that stand below the fastest tier, in text order.
        source: Name of the fastest tier that holds them.
        probability: Share of sessions that returned once they were due.
    """

    keys: Sequence[bytes]
    source: str
    probability: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """State from which moves are planned.

    Attributes:
        step: Scheduler step.
        now: Seconds on the engine's clock.
        pool: The engine's pool.
        tiers: The tiers, fastest first.
        candidates: For each tier, chunks in the order in which they would leave it, as far as
            their room is above what `LifecyclePolicy.wants` asked to see.
        sizes: Bytes of each candidate, aligned with them.
        waiting: Requests that wait.
        running: Requests that run.
        thrash: Fraction of the chunks that the latest requests missed which a tier had held and
            given up, or which had been missed before.
        due: What sessions about to return need from below the fastest tier; each once a pause.
    """

    step: int
    now: float
    pool: TierView
    tiers: tuple[TierView, ...]
    candidates: Mapping[str, Sequence[bytes]]
    sizes: Mapping[str, Sequence[int]]
    waiting: int = 0
    running: int = 0
    thrash: float = 0.0
    due: tuple[Due, ...] = ()


@dataclass(frozen=True, slots=True)
class Move:
    """Do ``action`` to chunks of tier ``source``, towards tier ``target``."""

    action: Action
    keys: Sequence[bytes]
    source: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """Chunks of a request's text that tiers hold, right after what the pool holds.

    Attributes:
        tokens: Tokens of each chunk, in text order.
        sizes: Bytes of each.
        tiers: Name of the fastest tier that holds each.
        start: Tokens before the first.
        total: Tokens of the request.
        prefill: Tokens a second that prefill computes now, as measured; 0 if not known yet.
        ahead: Tokens that are computed before the request's own: those of waiting requests.
        loading: Estimated seconds to load the first n chunks, for n from 0 to all of them; empty
            if no tier of theirs was measured yet.
        computing: Estimated seconds to compute the rest of the request once the first n chunks are
            there, for the same n; empty if prefill was not measured yet.
        wait: Estimated seconds until the request's own tokens are computed anyhow.
    """

    tokens: Sequence[int]
    sizes: Sequence[int]
    tiers: Sequence[str]
    start: int
    total: int
    prefill: float = 0.0
    ahead: int = 0
    loading: Sequence[float] = ()
    computing: Sequence[float] = ()
    wait: float = 0.0

    def seconds(self, n: int) -> float | None:
        """Estimate the time to the first token if the first ``n`` chunks are loaded.

        Loading runs while others are computed, so only what it takes beyond `wait` counts.

        Returns:
            Seconds, or None if loading or prefill was not measured yet.
        """
        if not self.loading or not self.computing:
            return None
        return max(self.wait, self.loading[n]) + self.computing[n]


class LifecyclePolicy(Policy):
    """Decides about chunks, never about their bytes. Runs in the scheduler; changes nothing itself.

    Every method is called with a batch, at most once per step, except `load` and `on_used`, which
    are called once for each request that tiers hold something of.

    Attributes:
        checkpoint: Seconds between two copies of what the pool holds into a durable tier, for a
            restart after a crash; 0 for none.
    """

    kind: ClassVar[Kind] = Kind.LIFECYCLE
    exact: ClassVar[bool] = True
    checkpoint: float = 0.0

    @abstractmethod
    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> Sequence[str | None]:
        """Choose the tier that each chunk about to be evicted is stored in; None for no tier."""

    @abstractmethod
    def plan(self, pressure: Pressure) -> Sequence[Move]:
        """Return the moves to make now, possibly none."""

    def load(self, found: Found, tiers: Mapping[str, TierView]) -> int:
        """Return how many of the chunks found to load; the rest is computed.

        By default what gives the first token soonest by `Found.seconds`, and all of them before
        anything was measured. Later tokens cost more to compute and no more to load, so loading a
        part of what one tier holds never is best: the best number ends where a tier does.
        """
        best, least = len(found.tokens), found.seconds(len(found.tokens))
        if least is None:
            return best
        for n in range(len(found.tokens) - 1, -1, -1):
            seconds = found.seconds(n)
            if seconds is not None and seconds < least:
                best, least = n, seconds
        return best

    def on_used(self, keys: Sequence[bytes]) -> None:
        """Take note that a request loads chunks."""

    def wants(self, tier: TierView) -> int:
        """Bytes of candidates of a tier that `plan` wants to see now; 0 for none."""
        return 0
