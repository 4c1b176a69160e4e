"""What is measured of reuse."""

from __future__ import annotations

from collections.abc import Iterator

from kvplug.hosts.vllm.scheduler.reuse_counters import ReuseCounters
from kvplug.hosts.vllm.scheduler.reuse_matching import RunMatcher
from kvplug.observe import catalogue
from kvplug.observe.causes import OF_REUSE, OF_SEGMENTS, counted, word
from kvplug.observe.metric import Sample
from kvplug.reuse.catalog import EVENTS, Catalog
from kvplug.reuse.entry import SegmentState
from kvplug.reuse.guard import BreakerState, Guard


def of_requests(counters: ReuseCounters) -> Iterator[Sample]:
    """What requests took."""
    approximate = counters.approximate_requests
    yield catalogue.REUSE_REQUESTS.of(counters.requests - approximate, "true")
    yield catalogue.REUSE_REQUESTS.of(approximate, "false")
    exact = min(counters.exact_tokens, counters.tokens)
    yield catalogue.REUSE_TOKENS.of(exact, "exact")
    yield catalogue.REUSE_TOKENS.of(counters.tokens - exact, "approximate")
    yield catalogue.REUSE_TOKENS.of(counters.shifted_tokens, "shifted")
    yield catalogue.REUSE_TOKENS.of(counters.loaded, "loaded")
    yield catalogue.REUSE_TOKENS.of(counters.corrected, "corrected")
    yield catalogue.REUSE_TOKENS.of(counters.computed, "recomputed")
    yield catalogue.SEGMENTS_STORED.of(counters.segments)


def of_checks(matcher: RunMatcher) -> Iterator[Sample]:
    """What each check judged."""
    for check in matcher.checks:
        name = check.policy_name
        refused = matcher.refusals[name]
        yield catalogue.REUSE_CHECKS.of(matcher.asked[name] - refused, name, "allowed")
        yield catalogue.REUSE_CHECKS.of(refused, name, "refused")


def of_causes(refused: dict[str, int], failures: dict[str, int]) -> Iterator[Sample]:
    """What was not served, and what failed."""
    for cause, count in counted(refused, OF_REUSE).items():
        yield catalogue.REUSE_REFUSED.of(count, cause)
    for cause, count in counted(failures, OF_SEGMENTS).items():
        yield catalogue.SEGMENT_ERRORS.of(count, cause)


def of_store(catalog: Catalog) -> Iterator[Sample]:
    """What is stored."""
    counts = catalog.counters()
    for state in SegmentState:
        yield catalogue.SEGMENTS.of(counts[f"segments_{state}"], word(state))
    for medium in ("memory", "disk"):
        yield catalogue.SEGMENT_BYTES.of(counts[f"{medium}_bytes"], medium)
    for event in EVENTS:
        yield catalogue.SEGMENT_EVENTS.of(counts[event], event)


def of_guard(guard: Guard) -> Iterator[Sample]:
    """What the guard saw, and its breakers."""
    counts = guard.counters()
    for result in ("exact", "compared", "uncompared", "drifted", "unwatched"):
        yield catalogue.GUARD_ANSWERS.of(counts[f"guard_{result}"], result)
    for change, name in (("opened", "opened"), ("closed", "closed"), ("trial", "trials")):
        yield catalogue.BREAKER_CHANGES.of(counts[f"guard_{name}"], change)
    states = guard.states()
    for state in BreakerState:
        yield catalogue.BREAKERS.of(states.count(state), word(state))
