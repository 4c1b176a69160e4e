"""What goes together: the page's table against the code that refuses, and a sample of its cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import composition
import pytest
from composition import KINDS, Cell, Expected, Runner, combinations, covering, deployments, pairs

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "composition.json"
ALONE = frozenset[str]()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    found = Runner(tmp_path_factory.mktemp("composition"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def expected(runner: Runner) -> Expected:
    return runner.expected


@pytest.fixture(scope="module")
def refused(expected: Expected) -> dict[tuple[str, frozenset[str]], str | None]:
    """What the host says of every deployment under every combination, without an engine."""
    return composition.admitted_of(deployments(), expected)


def test_every_two_settings_stand_together() -> None:
    every = combinations()
    chosen = covering(every, "any")
    assert len(chosen) < 12 < len(every)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, every))


@pytest.mark.timeout(900)
def test_the_page_says_what_the_host_says(
    refused: dict[tuple[str, frozenset[str]], str | None],
) -> None:
    shown = json.loads(FIGURE.read_text(encoding="utf-8"))
    fresh = composition.summary([], refused)
    assert shown["switches"] == fresh["switches"]
    assert [row["deployment"] for row in shown["rows"]] == list(deployments())
    for row, own in zip(shown["rows"], fresh["rows"], strict=True):
        name = row["deployment"]
        assert row["section"] == own["section"], name
        assert row["alone"] == own["alone"], name
        for switch, one in row["switches"].items():
            assert one["refused"] == own["switches"][switch]["refused"], (name, switch)


def test_what_was_run_was_right() -> None:
    """And covers: two features that a deployment is admitted with ran together."""
    for row in json.loads(FIGURE.read_text(encoding="utf-8"))["rows"]:
        assert row["wrong"] == [], row["deployment"]
        ran = [frozenset(one) for one in row["ran"]]
        assert len(ran) == row["right"]
        assert (row["alone"] is None) is bool(ran), row["deployment"]


@pytest.mark.timeout(900)
def test_a_refusal_is_a_sentence_that_names_a_key_and_a_fix(
    refused: dict[tuple[str, frozenset[str]], str | None],
) -> None:
    said = {one for one in refused.values() if one is not None}
    assert said
    for one in said:
        for line in one.splitlines():
            assert line.startswith("inline: kv_transfer_config.") and " Fix: " in line, line


@pytest.mark.parametrize("name", ["sequence (window)", "sequence (keys)", "format"])
def test_the_oracle_of_a_kind_is_not_the_plain_one(expected: Expected, name: str) -> None:
    """Otherwise a policy that does nothing would be right."""
    asked = [one for one in composition.workload({}) if one.after is None]
    own, plain = (
        [expected.answer(section, ALONE, one, one.prompt) for one in asked]
        for section in (KINDS[name], {})
    )
    assert own != plain


def test_foreign_kv_is_not_the_same_as_none(expected: Expected) -> None:
    section = KINDS["reuse"]
    asked, answers = composition.workload(section), expected.answers(section, ALONE)
    foreign, exact = (
        next(i for i, a in enumerate(asked) if a.prompt == composition.WHOLE and a.foreign is one)
        for one in (True, False)
    )
    assert answers[foreign] != answers[exact]


UNHEARD = {
    "an order of what nobody finds": (
        {"prefix_cache": "lru", "sequence": {"use": "smart_window", "budget": 128}},
        ALONE,
        "kvplug.prefix_cache: lru has no effect beside smart_window",
    ),
    "a prefix that nobody finds": (
        {"sequence": {"use": "h2o", "budget": 128, "shared": 64}},
        ALONE,
        "kvplug.sequence.shared: has no effect beside h2o",
    ),
    "a guard that vLLM does not take": (
        KINDS["guard"],
        frozenset({"n-gram"}),
        "kvplug.guard: needs a logits processor, and vLLM's first model runner takes none",
    ),
    "a check of requests that vLLM does not take": (
        KINDS["prefix_cache"] | {"on_bad_request": "refuse"},
        frozenset({"n-gram"}),
        "kvplug.on_bad_request: needs a logits processor, and vLLM's first model runner takes none",
    ),
    "a recording": (
        {"prefix_cache": {"use": "record", "of": "lru"}, "sequence": {"use": "h2o", "budget": 128}},
        ALONE,
        None,
    ),
}


@pytest.mark.timeout(900)
def test_what_would_have_no_effect_is_refused(expected: Expected) -> None:
    asked = [(name, section, switches) for name, (section, switches, _) in UNHEARD.items()]
    models = {name: str(expected.tiny) for name in UNHEARD}
    said = composition.admission(asked, models)
    for name, (_, switches, begins) in UNHEARD.items():
        found = said[name, switches]
        assert (found is None) is (begins is None), (name, found)
        assert begins is None or begins in (found or ""), (name, found)


def result_of(expected: list[list[int]], **others: Any) -> Any:
    answers = [SimpleNamespace(token_ids=list(one), kvplug=None) for one in expected]
    return SimpleNamespace(answers=answers, reports=[], leftovers=[], preemptions=0, **others)


def test_a_wrong_token_is_seen(expected: Expected) -> None:
    result = result_of(expected.answers({}, ALONE))
    assert composition.judge({}, ALONE, result, expected) == []
    result.answers[2].token_ids[5] += 1
    result.leftovers = ["scheduler.scheduler.kinds[].requests (1)"]
    assert composition.judge({}, ALONE, result, expected) == [
        "request 2: differs from token 5 of 16 on",
        "still known of after their end: scheduler.scheduler.kinds[].requests (1)",
    ]


def test_a_wrong_token_under_a_format_is_seen(expected: Expected) -> None:
    section = KINDS["format"]
    result = result_of(expected.answers(section, ALONE))
    result.answers[1].token_ids[3] += 1
    assert any("request 1: differs" in why for why in judge_of(section, result, expected))


def judge_of(section: Any, result: Any, expected: Expected) -> list[str]:
    return composition.judge(section, ALONE, result, expected)


def test_a_policy_that_does_nothing_is_seen(expected: Expected) -> None:
    section = KINDS["prefix_cache"]
    result = result_of(expected.answers(section, ALONE))
    assert composition.judge(section, ALONE, result, expected) == ["nothing reported"]
    counters = {"hits": 0, "evicted": 0}
    result.reports = [
        {"name": "s3fifo", "kind": "prefix_cache", "acted": 0, "errors": 0, "counters": counters}
    ]
    (said,) = composition.judge(section, ALONE, result, expected)
    assert said.startswith("s3fifo did nothing")


SAMPLE = {
    "prefix_cache + sequence (window)": {"chunks", "n-gram", "pressure"},
    "sequence (keys) + format": {"chunks", "pressure", "second runner"},
    "reuse + attention": {"no prefix cache", "chunks", "ahead", "second runner"},
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_of_cells(runner: Runner, name: str) -> None:
    cell = runner.run(name, deployments()[name], frozenset(SAMPLE[name]))
    assert (cell.verdict, cell.why) == ("right", [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", deployments())
def test_a_cell_of_each_deployment(
    runner: Runner, refused: dict[tuple[str, frozenset[str]], str | None], name: str
) -> None:
    """Of those that were run for the page, the one with most features on in one process."""
    admitted = [s for s in combinations() if refused[name, s] is None and "processes" not in s]
    if not admitted:
        assert refused[name, ALONE] is not None
        return
    most = max(covering(admitted, name), key=len)
    cell: Cell = runner.run(name, deployments()[name], most)
    assert (cell.verdict, cell.why) == ("right", [])
