"""Matches requests with stored segments: which run of its tokens a request may take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger

from kvplug.containment import ContainedPolicy
from kvplug.contract import ReuseCheck, ReuseRequest
from kvplug.counts import Causes
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.observe.catalogue import CHECK_SECONDS
from kvplug.observe.request_spans import RequestSpans
from kvplug.reuse.catalog import Catalog, CatalogEntry
from kvplug.reuse.chain import ChainResult, run_chain
from kvplug.reuse.guard import Guard
from kvplug.reuse.index import Match
from kvplug.reuse.plan import Planner, ReusePlan

logger = init_logger("vllm.kvplug")

MAX_WAIT = 5.0
"""Seconds a request waits for a segment to come back from the folder."""


class RunMatcher:
    """Finds the run of a request's tokens that is stored and passes every check.

    Args:
        catalog: Stored segments.
        planner: Joins segments to runs.
        checks: The chain of checks.
        guard: Stops approximate reuse of families whose answers drift, or None.
        identity: Fingerprint fields that all segments of the engine have in common.
        spans: Takes the checks' verdicts and times, or None.

    Attributes:
        checks: The checks, contained.
        asked: Candidates judged, by check.
        refusals: Candidates refused, by check.
        seconds: Times of each check.
    """

    def __init__(
        self,
        catalog: Catalog,
        planner: Planner,
        checks: Sequence[ReuseCheck],
        guard: Guard | None,
        identity: Mapping[str, Any],
        spans: RequestSpans | None = None,
    ):
        self.asked: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self._catalog = catalog
        self._planner = planner
        self.checks = [ContainedPolicy(check, log=logger) for check in checks]
        names = dict.fromkeys(check.policy_name for check in self.checks)
        self.seconds = {name: CHECK_SECONDS.distribution() for name in names}
        self._causes = Causes()
        self._guard = guard
        self._identity = identity
        self._spans = spans

    def plan(self, reusing: ReusingRequest, num_local: int) -> ReusePlan:
        """Plan the run that follows the engine's own hit of ``num_local`` tokens."""
        request, tokens = reusing.request, reusing.tokens
        allowed = reusing.approximate
        approximate = allowed and (
            self._guard is None or all(self._guard.allows(f) for f in reusing.families)
        )

        def judge(segment: CatalogEntry, match: Match) -> ChainResult:
            end = match.start + match.length
            would = reusing.fingerprint(self._identity, tokens, match.start, end)
            asked = ReuseRequest(
                would, request.request_id, num_local, request.num_tokens, approximate
            )
            result = run_chain(self.checks, segment.candidate, asked)
            self.asked.update(result.costs_us.keys())
            for run in result.runs:
                self.seconds[run.stage].add((run.end - run.begin) / 1e9)
            if self._spans is not None:
                self._spans.checked(request.request_id, segment.id, match.length, result.runs)
            if result.refused_by:
                self.refusals[result.refused_by] += 1
                cause = self._causes.add(result.verdict.reason)
                result = replace(result, verdict=replace(result.verdict, reason=cause))
            if not result.verdict.ok and allowed and not approximate:
                again = run_chain(
                    self.checks, segment.candidate, replace(asked, approximate_allowed=True)
                )
                if again.verdict.ok:
                    return replace(result, verdict=replace(result.verdict, reason="breaker open"))
            return result

        matches = self._catalog.match(tokens, reusing.tenant)
        return self._planner.plan(request.num_tokens, num_local, matches, judge)

    def waits(self, reusing: ReusingRequest, plan: ReusePlan) -> bool:
        """True while a segment that the request can take is on its way, for `MAX_WAIT`."""
        coming = [
            segment.in_flight or self._catalog.want(name)
            for name in plan.waiting
            if (segment := self._catalog.get(name)) is not None
        ]
        if not any(coming):
            return False
        now = time.monotonic()
        reusing.waiting_since = reusing.waiting_since or now
        return now - reusing.waiting_since < MAX_WAIT
