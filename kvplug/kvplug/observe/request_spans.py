"""Spans of what was done for a request: collected as numbers, handed on once it has ended.

The scheduler's thread notes facts here; nothing is built, formatted or sent. A request that ended
is handed to ``done``, which may keep it for another thread to export.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

Value = str | int | float | bool

MOST_SPANS = 64
"""Spans kept of one request; further ones are counted."""

MOST_CHECKS = 256
"""Checks kept of one lookup; further ones are counted."""

LINGER = 5.0
"""Seconds that a request which ended waits for what was ordered for it: stores, mostly."""


@dataclass(slots=True)
class Span:
    """One thing that was done.

    Attributes:
        name: What it is called.
        begin: Nanoseconds of `time.perf_counter_ns`.
        end: The same; 0 while it goes on.
        attributes: What is known of it.
        children: What was done in it.
        failed: Why it failed; empty where it did not.
    """

    name: str
    begin: int
    end: int = 0
    attributes: dict[str, Value] = field(default_factory=dict)
    children: list[Span] = field(default_factory=list)
    failed: str = ""


@dataclass(slots=True)
class RequestTrace:
    """What was done for one request.

    Attributes:
        request_id: The engine's id.
        headers: W3C trace headers that came with it, or None.
        root: The span of the whole request in the scheduler.
        epoch: Nanoseconds to add to those of its spans for nanoseconds since 1970.
        left_out: Spans and checks that were not kept.
    """

    request_id: str
    headers: Mapping[str, str] | None
    root: Span
    epoch: int
    left_out: int = 0
    _lookup: Span | None = None
    _checks: list[Span] = field(default_factory=list)
    _freed: Span | None = None
    _open: set[Hashable] = field(default_factory=set)


class RequestSpans:
    """Collects the spans of requests under way. The scheduler's thread uses it alone.

    Memory is bounded by the requests in the engine, `MOST_SPANS` and `MOST_CHECKS`.

    Args:
        done: Takes a request that ended, in the scheduler's thread or in that of `sweep`.
        clock: Nanoseconds; only differences matter.
        wall: Nanoseconds since 1970.
    """

    def __init__(
        self,
        done: Callable[[RequestTrace], None],
        clock: Callable[[], int] = time.perf_counter_ns,
        wall: Callable[[], int] = time.time_ns,
    ):
        self._done = done
        self._clock = clock
        self._wall = wall
        self._running: dict[str, RequestTrace] = {}
        self._lingering: dict[str, RequestTrace] = {}
        self._open: dict[Hashable, tuple[RequestTrace, Span]] = {}

    # -- a request -----------------------------------------------------------------------------

    def began(self, request_id: str, headers: Mapping[str, str] | None, tokens: int) -> None:
        """Take in a request with a prompt of so many tokens."""
        now = self._clock()
        root = Span("kvplug.request", now, attributes={"kvplug.prompt_tokens": tokens})
        self._running[request_id] = RequestTrace(request_id, headers, root, self._wall() - now)

    def looking(self, request_id: str) -> int:
        """A lookup begins, or is made again; returns when. Earlier checks of it are forgotten."""
        trace = self._running.get(request_id)
        if trace is not None:
            trace._checks = []
        return self._clock()

    def checked(
        self,
        request_id: str,
        segment: str,
        tokens: int,
        checks: Sequence[tuple[str, int, int, str, str]],
    ) -> None:
        """Take in the checks of one candidate, in the lookup under way.

        Args:
            request_id: The request.
            segment: Id of the candidate.
            tokens: Tokens of it that stand in the text.
            checks: Name, begin, end, verdict and reason of each, in order.
        """
        trace = self._running.get(request_id)
        if trace is None:
            return
        for stage, begin, end, verdict, reason in checks:
            if len(trace._checks) >= MOST_CHECKS:
                trace.left_out += 1
                continue
            attributes: dict[str, Value] = {
                "kvplug.check.stage": stage,
                "kvplug.check.verdict": verdict,
                "kvplug.check.seconds": (end - begin) / 1e9,
                "kvplug.segment": segment,
                "kvplug.tokens": tokens,
            }
            if reason:
                attributes["kvplug.check.reason"] = reason
            trace._checks.append(Span("kvplug.check", begin, end, attributes))

    def looked_up(
        self, request_id: str, begin: int, prefix: int, found: int | None, where: str
    ) -> None:
        """A lookup was answered.

        Args:
            request_id: The request.
            begin: What `looking` returned.
            prefix: Tokens of the engine's own prefix cache.
            found: Tokens found behind them, or None to be asked again.
            where: What holds those, as in ``kvplug.<where>_tokens``.
        """
        trace = self._running.get(request_id)
        if trace is None:
            return
        # A request that finds no room is looked up every step: one span, of all of it.
        span = trace._lookup
        if span is None:
            span = trace._lookup = Span("kvplug.lookup", begin)
        span.end = self._clock()
        asked = int(span.attributes.get("kvplug.lookup.asked", 0))
        waited = int(span.attributes.get("kvplug.lookup.waited", 0))
        span.attributes = {
            "kvplug.prefix_tokens": prefix,
            "kvplug.segment_tokens": 0,
            "kvplug.tier_tokens": 0,
            "kvplug.lookup.asked": asked + 1,
            "kvplug.lookup.waited": waited + (found is None),
        }
        if found:
            span.attributes[f"kvplug.{where}_tokens"] = found
        span.children = trace._checks

    def allocated(self, request_id: str) -> None:
        """The request got blocks: its lookup is over."""
        trace = self._running.get(request_id)
        if trace is not None and trace._lookup is not None:
            self._add(trace, trace._lookup)
            trace._lookup, trace._checks = None, []

    def freed(self, request_id: str, blocks: int) -> None:
        """Blocks of the running request were given back: one span from the first to the last."""
        trace = self._running.get(request_id)
        if trace is None:
            return
        span, now = trace._freed, self._clock()
        if span is None:
            span = trace._freed = Span("kvplug.evict", now, attributes={"kvplug.blocks": 0})
            self._add(trace, span)
        span.end = now
        span.attributes["kvplug.blocks"] = int(span.attributes["kvplug.blocks"]) + blocks

    # -- what goes on for a while ----------------------------------------------------------------

    def open(
        self, request_id: str, key: Hashable, name: str, attributes: Mapping[str, Value]
    ) -> None:
        """Something was ordered for a request; `close` it by its key."""
        trace = self._running.get(request_id)
        if trace is None:
            return
        span = Span(name, self._clock(), attributes=dict(attributes))
        if self._add(trace, span):
            trace._open.add(key)
            self._open[key] = trace, span

    def close(
        self,
        key: Hashable,
        attributes: Mapping[str, Value] | None = None,
        failed: str = "",
        child: tuple[str, float, Mapping[str, Value]] | None = None,
    ) -> None:
        """What was ordered is done.

        Args:
            key: As in `open`; unknown ones are ignored.
            attributes: More that is known of it.
            failed: Why it failed.
            child: Name, seconds and attributes of its last part.
        """
        found = self._open.pop(key, None)
        if found is None:
            return
        trace, span = found
        trace._open.discard(key)
        span.end, span.failed = self._clock(), failed
        if attributes:
            span.attributes.update(attributes)
        if child is not None:
            name, seconds, more = child
            begin = max(span.begin, span.end - round(seconds * 1e9))
            span.children.append(Span(name, begin, span.end, dict(more)))
        if not trace._open and self._lingering.pop(trace.request_id, None) is not None:
            self._done(trace)

    # -- the end ---------------------------------------------------------------------------------

    def ended(self, request_id: str, attributes: Mapping[str, Value]) -> None:
        """The request ended; it is handed on once what was ordered for it is done too."""
        trace = self._running.pop(request_id, None)
        if trace is None:
            return
        if trace._lookup is not None:
            self._add(trace, trace._lookup)
        trace.root.end = self._clock()
        trace.root.attributes.update(attributes)
        if trace._open:
            self._lingering[request_id] = trace
        else:
            self._done(trace)

    def sweep(self, everything: bool = False) -> None:
        """Hand on requests that ended `LINGER` seconds ago, whatever is not done for them.

        Any thread may call this one; with ``everything``, those under way as well, at the end.
        """
        if everything:
            for request_id in list(self._running):
                self.ended(request_id, {})
        limit = self._clock() - round(LINGER * 1e9)
        for request_id, trace in list(self._lingering.items()):
            overdue = everything or trace.root.end < limit
            if overdue and self._lingering.pop(request_id, None) is not None:
                for key in list(trace._open):
                    self._open.pop(key, None)
                self._done(trace)

    def _add(self, trace: RequestTrace, span: Span) -> bool:
        if len(trace.root.children) >= MOST_SPANS:
            trace.left_out += 1
            return False
        trace.root.children.append(span)
        return True
