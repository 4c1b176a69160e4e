from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reuse_cases import STORED, TEXT, build, candidate, digest, refusal, request

from kvplug_policies.reuse.structure import SAME, Structure

CHECK = build(Structure)


def test_the_same_text_after_the_same_text_is_exact() -> None:
    verdict = CHECK.check(candidate(), request(approximate=False))
    assert verdict.ok and verdict.exact and not verdict.shift and verdict.confidence is None


@pytest.mark.parametrize(
    ("field", "value", "cause"),
    [
        ("tenant", "b", "other tenant"),
        ("model", "m2", "other model"),
        ("tokenizer", "t2", "other tokenizer"),
        ("lora", "poet", "other LoRA adapter"),
        ("dtype", "float16", "other dtype"),
        ("format", "int8:..", "other format"),
        ("geometry", (4, 1, 16), "other geometry"),
        ("position", "rope/neox/0b", "other positions"),
        ("position", "rope/gptj/0a", "other positions"),
        ("tokens", digest(TEXT + 1), "other text"),
    ],
)
def test_a_field_that_differs_refuses_by_its_cause(field: str, value: Any, cause: str) -> None:
    assert refusal(CHECK.check(candidate(), request(**{field: value}))) == cause
    assert refusal(CHECK.check(candidate(**{field: value}), request())) == cause


def test_two_tenants_with_equal_text_never_share_and_learn_nothing_else() -> None:
    damaged = candidate(tenant="a", model="other", whole=False, valid=False)
    assert refusal(CHECK.check(damaged, request(tenant="b"))) == "other tenant"
    assert refusal(CHECK.check(candidate(tenant="a"), request(tenant=""))) == "other tenant"


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({"whole": False}, "not whole"),
        ({"whole": False, "cause": "bad checksum"}, "bad checksum"),
        ({"valid": False}, "invalidated"),
        ({"valid": False, "whole": False}, "invalidated"),
    ],
)
def test_a_segment_that_is_not_all_there_is_refused(state: dict[str, Any], cause: str) -> None:
    assert refusal(CHECK.check(candidate(**state), request())) == cause


@pytest.mark.parametrize(
    ("where", "num_tokens", "fits"),
    [
        ({}, 160, True),
        ({}, 159, False),
        ({"length": 0}, 512, False),
        ({"length": 97}, 512, False),
        ({"start": -1}, 512, False),
        ({"start": 416}, 512, True),
        ({"start": 417}, 512, False),
        ({"start": 480, "length": 32}, 512, True),
    ],
)
def test_a_run_must_lie_in_the_request_and_the_segment(
    where: dict[str, int], num_tokens: int, fits: bool
) -> None:
    verdict = CHECK.check(candidate(), request(num_tokens=num_tokens, **where))
    assert verdict.ok == fits and (fits or verdict.reason == "does not fit")


def test_other_text_before_is_approximate() -> None:
    verdict = CHECK.check(candidate(), request(context=digest([1])))
    assert verdict.ok and not verdict.exact


def test_a_shorter_run_is_not_compared_by_the_digest_of_the_whole() -> None:
    shorter = request(length=32, tokens=digest(TEXT[:32]))
    verdict = CHECK.check(candidate(), shorter)
    assert verdict.ok and verdict.exact


@pytest.mark.parametrize(
    ("ancestry", "most", "approximate", "ok"),
    [(0, 0, False, True), (1, 0, True, False), (1, 1, True, True), (1, 1, False, False)],
)
def test_ancestry_is_bounded_and_never_exact(
    ancestry: int, most: int, approximate: bool, ok: bool
) -> None:
    check = build(Structure, max_ancestry=most)
    verdict = check.check(candidate(ancestry=ancestry), request(approximate=approximate))
    assert verdict.ok == ok and verdict.exact == (ok and not ancestry)
    assert ok or verdict.reason == "approximate ancestry not allowed"


@pytest.mark.parametrize(("age", "ok"), [(0.0, True), (59.0, False), (60.0, True)])
def test_a_segment_older_than_max_age_is_refused(age: float, ok: bool) -> None:
    verdict = build(Structure, max_age=age).check(candidate(), request())
    assert verdict.ok == ok and (ok or verdict.reason == "too old")


@given(
    changed=st.sets(st.sampled_from([field for field, _ in SAME])),
    context=st.booleans(),
    ancestry=st.integers(0, 2),
    valid=st.booleans(),
    whole=st.booleans(),
    start=st.integers(-4, 600),
    length=st.integers(-2, 100),
)
def test_it_is_ok_only_if_all_agrees_and_exact_only_with_the_same_past(
    changed: set[str],
    context: bool,
    ancestry: int,
    valid: bool,
    whole: bool,
    start: int,
    length: int,
) -> None:
    other: dict[str, Any] = {
        f: (9, 9, 9) if f == "geometry" else getattr(STORED, f) + "?" for f in changed
    }
    stored = candidate(ancestry=ancestry, valid=valid, whole=whole)
    wanted = request(
        start=start, length=length, context=STORED.context if context else b"?" * 16, **other
    )
    verdict = build(Structure, max_ancestry=1).check(stored, wanted)
    fits = 1 <= length <= 96 and start >= 0 and start + length <= 512
    assert verdict.ok == (not changed and valid and whole and fits and ancestry <= 1)
    assert verdict.exact == (verdict.ok and context and not ancestry)
    if changed:
        assert verdict.reason == next(cause for field, cause in SAME if field in changed)


def test_what_a_segment_says_of_itself_does_not_refuse_it() -> None:
    other = replace(STORED, created=1.0, request_id="elsewhere", measures={"k_drift": 9.0})
    assert CHECK.check(candidate(), replace(request(), fingerprint=other)).exact


def test_a_model_that_is_not_known_equals_not_even_itself() -> None:
    unknown = CHECK.check(candidate(model=""), request(model=""))
    assert refusal(unknown) == "unknown model" and not unknown.exact
    assert refusal(CHECK.check(candidate(model=""), request())) == "other model"
