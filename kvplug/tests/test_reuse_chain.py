from __future__ import annotations

import logging
from typing import Any

import pytest

from kvplug.containment import ContainedPolicy
from kvplug.contract import EngineView
from kvplug.contract.policy import PolicyOptions
from kvplug.contract.reuse import Candidate, Fingerprint, ReuseCheck, ReuseRequest, Verdict
from kvplug.reuse.chain import FAILED, NOT_ALLOWED, run_chain

PRINT = Fingerprint(
    *("m", "t", "", "bfloat16", "", "none"), (1, 1, 8), "", "causal", 0, 32, b"c", b"t", 0.0, "r"
)
CANDIDATE = Candidate(PRINT)


def asked(approximate: bool = True) -> ReuseRequest:
    return ReuseRequest(PRINT, "r", 0, 64, approximate)


def says(name: str, answer: Any) -> ReuseCheck:
    class Says(ReuseCheck):
        changes = ""
        calls = 0

        def check(self, candidate: Candidate, request: ReuseRequest) -> Verdict:
            Says.calls += 1
            assert candidate is CANDIDATE
            if isinstance(answer, Exception):
                raise answer
            found: Verdict = answer
            return found

    Says.name = name
    return Says(PolicyOptions(), EngineView(16))


def test_all_agree_and_all_are_timed() -> None:
    chain = [says("a", Verdict(True)), says("b", Verdict(True))]
    result = run_chain(chain, CANDIDATE, asked(False))
    verdict = result.verdict
    assert verdict.ok and verdict.exact and not verdict.shift and verdict.confidence is None
    assert list(result.costs_us) == ["a", "b"] and min(result.costs_us.values()) > 0
    assert verdict.cost_us == sum(result.costs_us.values())
    assert not result.refused_by and not result.error


@pytest.mark.parametrize(
    "second, approximate, said",
    [
        (Verdict(True), True, [("a", "exact", ""), ("b", "exact", ""), ("c", "exact", "")]),
        (Verdict(True, exact=False), True, [("a", "exact", ""), ("b", "approximate", "")]),
        (Verdict(True, exact=False), False, [("a", "exact", ""), ("b", "refused", NOT_ALLOWED)]),
        (Verdict(False, "too far"), True, [("a", "exact", ""), ("b", "refused", "too far")]),
        (Verdict(False), True, [("a", "exact", ""), ("b", "refused", "refused")]),
        (OSError("no"), True, [("a", "exact", ""), ("b", "refused", FAILED)]),
    ],
)
def test_what_each_check_said_is_told_in_order(
    second: Any, approximate: bool, said: list[tuple[str, str, str]]
) -> None:
    chain = [says("a", Verdict(True)), says("b", second), says("c", Verdict(True))]
    runs = run_chain(chain, CANDIDATE, asked(approximate)).runs
    found = [(run.stage, run.verdict, run.reason) for run in runs]
    assert found[: len(said)] == said
    # Whoever refuses is the last.
    assert len(found) == (3 if said[-1][1] != "refused" else 2)
    times = [at for run in runs for at in (run.begin, run.end)]
    assert times == sorted(times)


def test_what_each_said_is_put_together() -> None:
    chain = [
        says("a", Verdict(True, exact=False)),
        says("b", Verdict(True, exact=False, shift=-5)),
        says("c", Verdict(True, confidence=0.9)),
        says("d", Verdict(True, confidence=0.7)),
    ]
    verdict = run_chain(chain, CANDIDATE, asked()).verdict
    assert (verdict.ok, verdict.exact, verdict.shift, verdict.confidence) == (
        True,
        False,
        -5,
        0.7,
    )


def test_the_first_refusal_ends_it() -> None:
    last = says("c", Verdict(True))
    chain = [says("a", Verdict(True)), says("b", Verdict(False, "other text")), last]
    result = run_chain(chain, CANDIDATE, asked())
    assert (result.verdict.ok, result.verdict.exact) == (False, False)
    assert (result.verdict.reason, result.refused_by) == ("other text", "b")
    assert list(result.costs_us) == ["a", "b"] and type(last).calls == 0  # type: ignore[attr-defined]


def test_approximate_reuse_is_refused_where_it_is_not_wanted() -> None:
    last = says("c", Verdict(True))
    chain = [says("a", Verdict(True)), says("b", Verdict(True, exact=False, shift=3)), last]
    result = run_chain(chain, CANDIDATE, asked(False))
    assert (result.verdict.ok, result.verdict.reason, result.refused_by) == (
        False,
        NOT_ALLOWED,
        "b",
    )
    assert type(last).calls == 0  # type: ignore[attr-defined]
    assert run_chain(chain, CANDIDATE, asked(True)).verdict.ok


@pytest.mark.parametrize(
    "answer",
    [
        RuntimeError("no"),
        None,
        True,
        Verdict(True, confidence=float("nan")),
        Verdict(True, confidence=1.5),
    ],
)
def test_a_check_that_fails_refuses_and_is_logged_once(
    answer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chain = [ContainedPolicy(c) for c in (says("a", Verdict(True)), says("broken", answer))]
    with caplog.at_level(logging.ERROR, "kvplug"):
        for _ in range(3):
            result = run_chain(chain, CANDIDATE, asked())
            assert (result.verdict.ok, result.verdict.exact) == (False, False)
            assert (result.verdict.reason, result.refused_by) == (FAILED, "broken")
            assert result.error
    assert sum("reuse policy 'broken' failed" in r.message for r in caplog.records) == 1


def test_an_empty_chain_shows_nothing_and_allows_nothing() -> None:
    result = run_chain([], CANDIDATE, asked())
    assert not result.verdict.ok and not result.verdict.exact and result.refused_by


def test_a_refusal_without_words_is_still_counted() -> None:
    result = run_chain([says("a", Verdict(False))], CANDIDATE, asked())
    assert result.verdict.reason == "refused"
