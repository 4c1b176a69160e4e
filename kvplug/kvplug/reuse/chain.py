"""Runs a chain of reuse checks on one candidate: all must agree, and each is timed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from weakref import WeakSet

from kvplug.contract.reuse import Candidate, ReuseCheck, ReuseRequest, Verdict

logger = logging.getLogger("kvplug")

FAILED = "check failed"
"""Cause of a refusal by a check that raised or returned something else than a verdict."""
NOT_ALLOWED = "approximate not allowed"
"""Cause of a refusal of approximate reuse that the deployment or the request does not allow."""

_logged: WeakSet[ReuseCheck] = WeakSet()


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The result of a chain.

    Attributes:
        verdict: Of the whole chain: exact if every check found it exact; the sum of their shifts;
            the lowest confidence; and the microseconds of all.
        costs_us: Microseconds of each check that ran, by its name, in order.
        refused_by: Name of the check that refused; empty where none did.
        error: Exception of the check that failed, ``Type: message``; empty where none failed.
    """

    verdict: Verdict
    costs_us: dict[str, float]
    refused_by: str = ""
    error: str = ""


def run_chain(
    checks: Sequence[ReuseCheck], candidate: Candidate, request: ReuseRequest
) -> ChainResult:
    """Run the checks in order until one refuses; never raises.

    A check that raises or does not return a verdict refuses as `FAILED`; its first failure is
    logged. A check that finds reuse approximate where the request does not allow that refuses as
    `NOT_ALLOWED`.

    Args:
        checks: The chain; an empty one refuses.
        candidate: The stored segment.
        request: Where it would be used.
    """
    costs: dict[str, float] = {}
    exact, shift, confidence = True, 0, None
    reason, refused_by, error = "", "", ""
    for check in checks:
        started = perf_counter_ns()
        try:
            verdict = check.check(candidate, request)
            _require_verdict(verdict)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
            verdict = Verdict(False, FAILED, exact=False)
            if check not in _logged:
                _logged.add(check)
                logger.error(
                    "reuse check %s failed and refuses candidates until it succeeds: %s",
                    check.name,
                    error,
                )
        cost = (perf_counter_ns() - started) / 1000
        costs[check.name] = costs.get(check.name, 0.0) + cost
        exact &= verdict.exact
        shift += verdict.shift
        if verdict.confidence is not None:
            given = verdict.confidence
            confidence = given if confidence is None else min(confidence, given)
        if not verdict.ok:
            reason, refused_by = verdict.reason or "refused", check.name
            break
        if not verdict.exact and not request.approximate_allowed:
            reason, refused_by = NOT_ALLOWED, check.name
            break
    if not checks:
        reason, refused_by = "nothing checked", "chain"
    ok = not refused_by
    whole = Verdict(ok, reason, exact and ok, shift, confidence, sum(costs.values()))
    return ChainResult(whole, costs, refused_by, error)


def _require_verdict(verdict: object) -> None:
    if not isinstance(verdict, Verdict):
        raise TypeError(f"returned {type(verdict).__name__}, expected a Verdict")
    if verdict.confidence is not None and not 0 <= verdict.confidence <= 1:
        raise ValueError(f"confidence must be from 0 to 1, got {verdict.confidence}")
