"""Runs a chain of reuse checks on one candidate: all must agree, and each is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np

from kvplug.containment import ContainedPolicy, PolicyFailure
from kvplug.contract.reuse import Candidate, ReuseCheck, ReuseRequest, Verdict
from kvplug.plain_text import label

MAX_SHIFT = 1 << 31
"""Positions that a check may shift keys by; no text is as long."""

FAILED = "check failed"
"""Cause of a refusal by a check that raised or returned something else than a verdict."""
NOT_ALLOWED = "approximate not allowed"
"""Cause of a refusal of approximate reuse that the deployment or the request does not allow."""

_logged: WeakSet[ContainedPolicy] = WeakSet()


class CheckRun(NamedTuple):
    """One check of one candidate.

    Attributes:
        stage: Name of the check.
        begin: Nanoseconds of `time.perf_counter_ns` as it was called.
        end: The same as it returned.
        verdict: ``exact``, ``approximate`` or ``refused``.
        reason: Why it refused; empty where it did not.
    """

    stage: str
    begin: int
    end: int
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The result of a chain.

    Attributes:
        verdict: Of the whole chain: exact if every check found it exact; the sum of their shifts;
            the lowest confidence; and the microseconds of all.
        costs_us: Microseconds of each check that ran, by its name, in order.
        refused_by: Name of the check that refused; empty where none did.
        error: Exception of the check that failed, ``Type: message``; empty where none failed.
        runs: Each check that ran, in order.
    """

    verdict: Verdict
    costs_us: dict[str, float]
    refused_by: str = ""
    error: str = ""
    runs: tuple[CheckRun, ...] = ()


def run_chain(
    checks: Sequence[ContainedPolicy | ReuseCheck], candidate: Candidate, request: ReuseRequest
) -> ChainResult:
    """Run the checks in order until one refuses; never raises.

    A check that raises or does not return a verdict refuses as `FAILED`; its first failure is
    logged. A check that finds reuse approximate where the request does not allow that refuses as
    `NOT_ALLOWED`.

    Args:
        checks: The chain, contained by the caller or here; an empty one refuses.
        candidate: The stored segment.
        request: Where it would be used.
    """
    costs: dict[str, float] = {}
    runs: list[CheckRun] = []
    exact, shift, confidence = True, 0, None
    reason, refused_by, error = "", "", ""
    if candidate.fingerprint.measures:
        # The one thing in it that a check could change.
        own = dict(candidate.fingerprint.measures)
        candidate = replace(candidate, fingerprint=replace(candidate.fingerprint, measures=own))
    for one in checks:
        check = one if isinstance(one, ContainedPolicy) else ContainedPolicy(one)
        name = check.policy_name
        started = perf_counter_ns()
        try:
            verdict: Verdict = check.run(_ask, check.target, candidate, request)
        except PolicyFailure as failure:
            error = failure.cause
            verdict = Verdict(False, FAILED, exact=False)
            if check not in _logged:
                _logged.add(check)
                check.log("failed and refuses candidates until it succeeds", failure)
        ended = perf_counter_ns()
        costs[name] = costs.get(name, 0.0) + (ended - started) / 1000
        exact &= verdict.exact
        shift += verdict.shift
        if verdict.confidence is not None:
            given = verdict.confidence
            confidence = given if confidence is None else min(confidence, given)
        if not verdict.ok:
            reason, refused_by = verdict.reason or "refused", name
        elif not verdict.exact and not request.approximate_allowed:
            reason, refused_by = NOT_ALLOWED, name
        said = "refused" if refused_by else "exact" if verdict.exact else "approximate"
        runs.append(CheckRun(name, started, ended, said, reason))
        if refused_by:
            break
    if not checks:
        reason, refused_by = "nothing checked", "chain"
    ok = not refused_by
    whole = Verdict(ok, reason, exact and ok, shift, confidence, sum(costs.values()))
    return ChainResult(whole, costs, refused_by, error, tuple(runs))


def _ask(check: ReuseCheck, candidate: Candidate, request: ReuseRequest) -> Verdict:
    """The check's verdict, of plain values."""
    given: Any = check.check(candidate, request)
    if not isinstance(given, Verdict):
        raise TypeError(f"returned {type(given).__name__}, expected a Verdict")
    reason, shift, confidence = given.reason, given.shift, given.confidence
    if not isinstance(reason, str):
        raise TypeError(f"reason must be text, got {type(reason).__name__}")
    if isinstance(shift, bool) or not isinstance(shift, int | np.integer):
        raise TypeError(f"shift must be an integer, got {type(shift).__name__}")
    if not -MAX_SHIFT <= int(shift) <= MAX_SHIFT:
        raise ValueError("shift must be a number of positions of a text")
    if confidence is not None:
        confidence = float(confidence)
        if not 0 <= confidence <= 1:
            raise ValueError(f"confidence must be from 0 to 1, got {confidence}")
    ok, exact = _flag("ok", given.ok), _flag("exact", given.exact)
    return Verdict(ok, label(reason), exact, int(shift), confidence)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be true or false, got {type(value).__name__}")
    return bool(value)
