"""What a request asks of kvplug: what is understood, and what is refused and how."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvplug.request_options import MAX_SEGMENTS, Cause, ParsedOptions, RefusedOption, RequestOptions


def parse(options: Any, tokens: int | None = 100, session_id: str | None = None) -> ParsedOptions:
    return RequestOptions.parse(
        {"kvplug": options}, num_prompt_tokens=tokens, session_id=session_id
    )


@pytest.mark.parametrize(
    "params", [None, {}, {"kvplug": None}, {"kvplug": {}}, {"other": {"a": 1}}]
)
def test_a_request_that_asks_nothing_has_the_defaults(params: Any) -> None:
    parsed = RequestOptions.parse(params, num_prompt_tokens=5)
    assert parsed.options == RequestOptions()
    assert parsed.options.sequence == "on"
    assert parsed.options.reuse == parsed.options.attention == "exact"
    assert parsed.options.segments is None and parsed.options.session_id is None
    assert parsed.refused == {}


@pytest.mark.parametrize(
    ("key", "given", "meant"),
    [
        ("sequence", "off", "off"),
        ("sequence", "on", "on"),
        ("sequence", False, "off"),
        ("sequence", True, "on"),
        ("reuse", "approximate", "approximate"),
        ("reuse", "exact", "exact"),
        ("reuse", "off", "off"),
        ("reuse", False, "off"),
        ("attention", "approximate", "approximate"),
        ("segments", [10, 90], (10, 90)),
        ("segments", (10, 90), (10, 90)),
        ("segments", [], ()),
        ("session_id", "anna", "anna"),
        ("session_id", "", ""),
        ("session_id", "é" * 256, "é" * 256),
    ],
)
def test_what_is_valid_is_kept(key: str, given: Any, meant: Any) -> None:
    parsed = parse({key: given})
    assert parsed.refused == {}
    assert parsed.options == RequestOptions(**{key: meant})
    assert getattr(parsed.options, key) == meant


@pytest.mark.parametrize(
    ("params", "sentence"),
    [
        (
            {"sequence": "off"},
            "sequence stands beside 'kvplug', where it is not read; write it below",
        ),
        (
            {"kvplug": {"reuse": "off"}, "session": "a"},
            "session stands beside 'kvplug', where it is not read; write it below",
        ),
        ({"KVPlug": {"sequence": "off"}}, "unknown key 'KVPlug'; did you mean 'kvplug'?"),
        ({"kvplg": None}, "unknown key 'kvplg'; did you mean 'kvplug'?"),
    ],
)
def test_what_stands_beside_the_options_by_mistake_is_refused(
    params: dict[str, Any], sentence: str
) -> None:
    (name,) = params.keys() - {"kvplug"}
    for session_id in (None, "engine's own"):
        parsed = RequestOptions.parse(params, session_id=session_id)
        assert parsed.refused == {name: RefusedOption(Cause.UNKNOWN_OPTION, sentence)}
        assert parsed.options.sequence == "on" and parsed.options.session_id == session_id
    assert parsed.options.reuse == params.get("kvplug", {}).get("reuse", "exact")


@pytest.mark.parametrize(
    ("key", "given", "sentence"),
    [
        ("sequence", "of", "sequence must be 'on' or 'off', got 'of'"),
        ("sequence", 0, "sequence must be 'on' or 'off', got 0"),
        ("reuse", True, "reuse must be 'exact', 'approximate' or 'off', got True"),
        ("reuse", ["off"], "reuse must be 'exact', 'approximate' or 'off', got ['off']"),
        ("attention", False, "attention must be 'exact' or 'approximate', got False"),
        (
            "segments",
            [1, 0],
            "segments must be a list of at most 16384 positive integers, got [1, 0]",
        ),
        (
            "segments",
            [True],
            "segments must be a list of at most 16384 positive integers, got [True]",
        ),
        (
            "segments",
            [1.0],
            "segments must be a list of at most 16384 positive integers, got [1.0]",
        ),
        ("segments", "12", "segments must be a list of at most 16384 positive integers, got '12'"),
        (
            "segments",
            {"a": 1},
            "segments must be a list of at most 16384 positive integers, got {'a': 1}",
        ),
        ("segments", [60, 41], "segments add up to 101 tokens, but the prompt has 100"),
        ("session_id", 7, "session_id must be a string of at most 256 characters, got 7"),
        ("session_id", b"a", "session_id must be a string of at most 256 characters, got b'a'"),
    ],
)
def test_an_invalid_value_is_refused_and_the_others_are_kept(
    key: str, given: Any, sentence: str
) -> None:
    other = {"sequence": "off"} if key != "sequence" else {"reuse": "off"}
    parsed = parse({key: given, **other})
    assert parsed.refused == {key: RefusedOption(Cause.INVALID_VALUE, sentence)}
    assert parsed.sentences == {key: sentence}
    assert parsed.options == RequestOptions(**other)


def test_a_session_id_that_is_too_long_is_not_repeated_in_full() -> None:
    parsed = parse({"session_id": "x" * 257})
    assert parsed.options.session_id is None
    assert len(parsed.refused["session_id"].sentence) < 150


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("sequnce", "unknown option 'sequnce'; did you mean 'sequence'?"),
        ("session", "unknown option 'session'; use 'session_id'"),
        (
            "zzz",
            "unknown option 'zzz'; known options: sequence, reuse, attention, store, missed, "
            "segments, session_id",
        ),
    ],
)
def test_an_unknown_option_is_refused_with_what_was_meant(key: str, sentence: str) -> None:
    parsed = parse({key: "off", "reuse": "off"})
    assert parsed.refused == {key: RefusedOption(Cause.UNKNOWN_OPTION, sentence)}
    assert parsed.options == RequestOptions(reuse="off")


def test_thousands_of_unknown_options_are_refused_in_few_words() -> None:
    parsed = parse({f"{i}{'x' * 1000}": 1 for i in range(5000)} | {"reuse": "off"})
    assert len(parsed.refused) == 9
    assert parsed.refused["..."].sentence == "further unknown options: 4992"
    assert all(len(key) <= 64 for key in parsed.refused)
    assert parsed.options.reuse == "off"


@pytest.mark.parametrize("options", ["off", ["sequence"], 1, False])
def test_options_that_are_no_mapping_are_refused(options: Any) -> None:
    parsed = parse(options)
    kind = type(options).__name__
    assert parsed.options == RequestOptions()
    assert parsed.refused == {
        "kvplug": RefusedOption(Cause.NOT_A_MAPPING, f"kvplug must be a mapping, got {kind}")
    }


@pytest.mark.parametrize("params", ["x", ["kvplug"], 7, "", [], 0, False])
def test_parameters_that_are_no_mapping_are_as_if_absent(params: Any) -> None:
    assert RequestOptions.parse(params) == ParsedOptions(RequestOptions(), {})


def test_null_is_no_value() -> None:
    parsed = parse(dict.fromkeys(RequestOptions.model_fields), session_id="engine")
    assert parsed.options == RequestOptions(session_id="engine")
    assert parsed.refused.keys() == RequestOptions.model_fields.keys()
    assert parsed.sentences["sequence"] == "sequence must be 'on' or 'off', got None"


def test_too_many_segments_are_refused_in_few_words() -> None:
    parsed = parse({"segments": [1] * (MAX_SEGMENTS + 1)}, tokens=1 << 30)
    assert parsed.options.segments is None and len(parsed.sentences["segments"]) < 300
    assert parse({"segments": [1] * MAX_SEGMENTS}, tokens=1 << 30).refused == {}


def test_the_engines_session_serves_where_the_options_name_none() -> None:
    assert parse({}, session_id="engine").options.session_id == "engine"
    assert parse({"session_id": "own"}, session_id="engine").options.session_id == "own"
    assert RequestOptions.parse(None, session_id="engine").options.session_id == "engine"
    assert "session_id" in parse({}, session_id="x" * 257).refused


def test_without_a_known_prompt_any_lengths_fit() -> None:
    assert parse({"segments": [1 << 40]}, tokens=None).refused == {}


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*RequestOptions.model_fields, "session"]) | st.text(), json)
)
def test_every_key_is_applied_or_refused(options: dict[str, Any]) -> None:
    parsed = parse(options)
    for key in options:
        if key not in RequestOptions.model_fields:
            assert key[:64] in parsed.refused or "..." in parsed.refused
        else:
            kept = (
                key in parsed.options.model_fields_set and getattr(parsed.options, key) is not None
            )
            assert kept != (key in parsed.refused)
