"""A plugin that fails costs a log line and its own effect, never the engine or an answer."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvplug.counts import MAX_CAUSES, MAX_NAMES
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

PLUGINS = Path(__file__).parent / "plugins"
BLOCK = 32
ENGINE = {
    "dtype": "float32",
    "block_size": BLOCK,
    "max_model_len": 512,
    "num_gpu_blocks_override": 25,
}
RETIRED = "failed and is retired; vLLM's own order takes over"
HOOK_FAILED = "kvplug plugin 'test_observers' failed in"
ANSWERS = 3
"""Calls of victims() that `fails_later` answers."""


def requests() -> list[TrialRequest]:
    """Seven prompts of nine blocks in three rounds, two at a time, in a pool that holds two."""
    choose = random.Random(1)
    prompts = [[choose.randrange(10, 300) for _ in range(9 * BLOCK + 5)] for _ in range(7)]
    turns = [0, 1, 2, 1, 3, 4, 0, 1, 5, 6, 2, 3, 4, 3, 5, 1]
    return [TrialRequest(prompts[p], 8, wave=i // 2) for i, p in enumerate(turns)]


def environment(observer: str = "") -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "KVPLUG_TEST_OBSERVER": observer}


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


def cached(result: TrialResult) -> list[int]:
    return [a.cached_tokens for a in result.answers]


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(log: str, policy: str) -> str:
    """What the closing summary says about a policy."""
    (line,) = [
        line for line in log.partition("kvplug summary after")[2].splitlines() if policy in line
    ]
    return line


@pytest.fixture(scope="module")
def stock(run: Run, tiny: Path) -> TrialResult:
    result = run(tiny, requests(), None, **ENGINE)
    assert 0 < sum(cached(result)) < len(requests()) * 9 * BLOCK // 2, "some prefixes are evicted"
    return result


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("observer") / "events.jsonl"


@pytest.fixture(scope="module")
def failing_later(run: Run, tiny: Path, events: Path) -> TrialResult:
    return run(
        tiny,
        requests(),
        {"prefix_cache": {"use": "fails_later", "answers": ANSWERS}},
        env=environment(f"record:{events}"),
        **ENGINE,
    )


def failed_once(result: TrialResult, stock: TrialResult, policy: str, cause: str) -> None:
    """The engine went on as stock, and logged once what happened."""
    log: str = result.log  # type: ignore[attr-defined]
    assert tokens(result) == tokens(stock)
    assert cached(result) == cached(stock), "these policies are LRU until they fail, as stock is"
    assert len(result.steps) == len(stock.steps)
    (line,) = [line for line in log.splitlines() if RETIRED in line]
    assert repr(policy) in line
    assert cause in line
    (report,) = result.reports
    assert report["name"] == policy
    assert report["errors"] == 1
    assert "FAILED 1 times, the host's default took over" in summary(log, policy)


def test_a_policy_that_stops_answering(failing_later: TrialResult, stock: TrialResult) -> None:
    failed_once(failing_later, stock, "fails_later", "RuntimeError: no more answers")
    (report,) = failing_later.reports
    assert report["counters"]["evicted"] >= ANSWERS
    assert report["counters"]["reordered"] == 0


@pytest.mark.parametrize(
    ("policy", "cause"),
    [
        ("fails_at_once", "RuntimeError: releases are not wanted"),
        ("names_strangers", "KeyError: 1000000"),
    ],
)
def test_a_policy_that_never_works(
    run: Run, tiny: Path, stock: TrialResult, policy: str, cause: str
) -> None:
    result = run(tiny, requests(), {"prefix_cache": policy}, env=environment(), **ENGINE)
    failed_once(result, stock, policy, cause)
    (report,) = result.reports
    assert report["counters"]["evicted"] == 0


def test_an_observer_hears_of_evictions_and_of_the_failure(
    failing_later: TrialResult, events: Path
) -> None:
    start, *happened, stop = recorded(events)
    assert start == {"hook": "started", "num_blocks": 24, "block_size": BLOCK}
    (report,) = stop["reports"]
    assert stop["hook"] == "stopping"
    assert report == failing_later.reports[0]

    assert {e["hook"] for e in happened} == {"event"}
    # The others are of prompts and their ends, which are no policy's.
    happened = [e for e in happened if e["kind"] is not None]
    assert {e["kind"] for e in happened} == {"prefix_cache"}
    (fallen,) = [e for e in happened if e["type"] == "fallen back"]
    assert fallen["detail"] == "RuntimeError: no more answers"
    of_the_pool = [e for e in happened if e["type"] == "evicted"]
    evicted = [e for e in of_the_pool if e["policy"] == "fails_later"]
    assert sum(e["count"] for e in evicted) == report["counters"]["evicted"] > 0
    assert {e["type"] for e in happened} == {"evicted", "fallen back"}
    later = of_the_pool[len(evicted) :]
    assert later and {e["policy"] for e in later} == {""}, "then they leave in vLLM's own order"
    steps = [e["step"] for e in evicted]
    assert steps == sorted(steps)
    assert abs(fallen["step"] - steps[-1]) <= 1, "it failed over the last eviction or right after"


def test_an_observer_that_fails_everywhere(run: Run, tiny: Path, stock: TrialResult) -> None:
    """So does the policy, where it is asked what it counted."""
    section = {"prefix_cache": "speechless"}
    result = run(tiny, requests(), section, env=environment("raise"), **ENGINE)
    log: str = result.log  # type: ignore[attr-defined]
    assert tokens(result) == tokens(stock)
    assert cached(result) == cached(stock)
    for hook, cause in (
        ("kvplug_engine_started", "a start is not wanted"),
        ("kvplug_event", "an event is not wanted"),
        ("kvplug_engine_stopping", "a stop is not wanted"),
    ):
        assert log.count(f"{HOOK_FAILED} {hook}; the engine goes on") == 1
        assert log.count(f"RuntimeError: {cause}") == 1
    assert log.count("receives no further events") == 1
    assert log.count("RuntimeError: nothing was counted") == 1

    (report,) = result.reports
    assert report["errors"] == 0, "the policy is not to blame"
    assert report["counters"]["evicted"] > 0
    assert report["counters"]["reordered"] == 0
    assert "FAILED" not in summary(log, "speechless")


def test_an_observer_hears_what_a_sequence_policy_frees_and_refuses(
    run: Run, tiny: Path, tmp_path: Path
) -> None:
    """Two windowed requests, and one that asks to keep more than the pool has."""
    path = tmp_path / "events.jsonl"
    long = requests()[0].prompt * 3
    result = run(
        tiny,
        [
            TrialRequest(long, 40),
            TrialRequest(long[3:], 40),
            TrialRequest(long, 40, wave=1, kvplug={"sequence": "off"}),
        ],
        {"sequence": {"use": "sink_window", "sink": 32, "window": 65}},
        env=environment(f"record:{path}"),
        max_num_batched_tokens=128,
        **ENGINE | {"max_model_len": 1024},
    )
    start, *happened, stop = recorded(path)
    assert (start["hook"], stop["hook"]) == ("started", "stopping")
    happened = [e for e in happened if e["kind"] is not None]
    assert {(e["kind"], e["policy"]) for e in happened} == {("sequence", "sink_window")}

    freed = [e for e in happened if e["type"] == "freed"]
    assert len(freed) > 10, "as it happens, not in the end"
    assert all(e["count"] > 0 and not e["detail"] for e in freed)
    freed_per_answer = [a.kvplug["blocks_freed"] for a in result.answers if a.kvplug]
    assert sum(e["count"] for e in freed) == sum(freed_per_answer) == stop["reports"][0]["acted"]

    (refused,) = [e for e in happened if e["type"] == "refused"]
    assert "the pool has 24" in refused["detail"]
    assert result.answers[2].kvplug is not None
    assert result.answers[2].kvplug["refused"] == {"sequence": refused["detail"]}
    assert len(freed) + 1 == len(happened)


def bounded(result: TrialResult) -> None:
    """Whatever the policies counted and said, reports and log stay small and plain."""
    log: str = result.log  # type: ignore[attr-defined]
    assert "Traceback" not in log
    assert not [line for line in log.splitlines() if line.startswith("ERROR 01-01")]
    assert max(map(len, log.splitlines())) < 5000
    for report in result.reports:
        names = list(report["counters"])
        assert len(names) < MAX_NAMES + MAX_CAUSES + 64
        assert all(len(n) < 80 and n.isprintable() and ":" not in n for n in names)


def test_hostile_policies_that_may_change_nothing_change_nothing(
    run: Run, tiny: Path, stock: TrialResult
) -> None:
    """An order of eviction, a reuse check and an attention policy at once."""
    section = {
        "prefix_cache": "hostile_cache",
        "reuse": {"use": ["structure", "position", "hostile_check"], "approximate": True},
        "attention": "hostile_attention",
    }
    asks = {"reuse": "approximate", "attention": "approximate", "session_id": "s" * 200}
    asking = [replace(r, kvplug=asks) for r in requests()]
    result = run(tiny, asking, section, env=environment(), **ENGINE)
    assert tokens(result) == tokens(stock)
    assert all(a.kvplug is not None and a.kvplug["exact"] is False for a in result.answers)
    bounded(result)
    cache, *_, check, attention = result.reports
    assert (cache["name"], cache["errors"]) == ("hostile_cache", 1)
    assert cache["counters"]["evicted"] >= 3
    assert check["name"] == "hostile_check"
    assert (attention["name"], attention["errors"]) == ("hostile_attention", 1)
    log: str = result.log  # type: ignore[attr-defined]
    assert log.count("prefix_cache policy 'hostile_cache' failed and is retired") == 1
    assert log.count("prefix_cache policy 'hostile_cache' failed in on_stop()") == 1
    assert log.count("reuse policy 'hostile_check' failed in counters()") == 1
    assert log.count("attention policy 'hostile_attention' failed in attend") == 1


def test_hostile_policies_that_change_what_is_kept_and_how_it_is_stored(
    run: Run, tiny: Path, stock: TrialResult
) -> None:
    section = {
        "prefix_cache": "hostile_cache",
        "sequence": {"use": "hostile_scores", "budget": 96, "recent": 32, "interval": 32},
        "format": "hostile_format",
    }
    asking = [replace(r, max_tokens=40) for r in requests()[:4]]
    short = TrialRequest(asking[0].prompt[:40], 8, wave=3)
    result = run(tiny, [*asking, short], section, env=environment(), **ENGINE)
    assert [len(a.token_ids) for a in result.answers] == [40] * 4 + [8]
    bounded(result)
    evicted = [a.kvplug for a in result.answers[:4]]
    assert all(a is not None and a["exact"] is False and a["evictions"] for a in evicted)
    kept = result.answers[4].kvplug
    assert kept is not None and kept["exact"] is True, "nothing was evicted from it"
    by_name = {report["name"]: report for report in result.reports}
    assert by_name["hostile_scores"]["errors"] == 2, "score and resize"
    assert by_name["hostile_format"]["errors"] > 0
    log: str = result.log  # type: ignore[attr-defined]
    assert log.count("sequence policy 'hostile_scores' failed and is retired") == 1
    assert log.count("format policy 'hostile_format' failed in attend") == 1
    assert "changed the default dtype" in log
