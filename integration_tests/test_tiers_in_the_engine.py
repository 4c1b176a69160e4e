"""Tiers under real requests: what leaves the pool comes back, and every token is what stock vLLM
answers, whatever a tier does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from test_failing_policy import environment

from kvplug_lab import models
from kvplug_lab.engine.trial import TrialFailed, TrialRequest, TrialResult

Run = Callable[..., TrialResult]

BLOCK = 32
N = 8
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "num_gpu_blocks_override": 20,
    "block_size": BLOCK,
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_batched_tokens": 256,
}


def texts(*lengths: int, seed: int = 3) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in lengths]


A, B, C, Q, R = texts(200, 200, 330, 20, 20)
EVENTS = {"enable_kv_cache_events": True, "publisher": "null"}
FILLER = texts(*[500] * 18, seed=5)
(LONG,) = texts(480, seed=7)


def requests() -> list[TrialRequest]:
    """A is computed and pushed out of the pool by others; then it is asked for again, twice at
    once; B goes on from an answer."""
    return [
        TrialRequest(A + Q, N, 0),
        TrialRequest(B + Q, N, 1),
        TrialRequest(C, N, 2),
        TrialRequest(A + R, N, 3),
        TrialRequest(A + Q, N, 3),
        TrialRequest(C, N, 4),
        TrialRequest(R, N, 5, after=1),
    ]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for a token's KV to depend on the text before it."""
    return models.tiny_llama(tmp_path_factory.mktemp("deep"), layers=4, seed=2)


@pytest.fixture(scope="module")
def right(deep: Path) -> list[list[int]]:
    oracle = Oracle(deep)
    answers: list[list[int]] = []
    for request in requests():
        prompt = list(request.prompt)
        if request.after is not None:
            prompt = [*requests()[request.after].prompt, *answers[request.after], *prompt]
        answers.append(oracle.greedy(prompt, N))
    return answers


def host(**options: Any) -> dict[str, Any]:
    return {"tiers": [{"host": {"size": "64MiB"} | options}], "lifecycle": "loads"}


def test_what_left_the_pool_comes_back(run: Run, deep: Path, right: list[list[int]]) -> None:
    result = run(deep, requests(), host(), env=environment(), **ENGINE)
    assert [a.token_ids for a in result.answers] == right
    counters = result.reports[0]["counters"]
    assert counters["loads"] >= 3 and counters["failed_loads"] == 0
    assert counters["stored"] == counters["late"] + counters["ahead"]
    loaded = [(a.kvplug or {}).get("loaded", 0) for a in result.answers]
    assert counters["loaded_tokens"] == sum(loaded)
    assert loaded[:3] == [0] * 3 and loaded[5] and loaded[6]
    assert sorted(loaded[3:5]) == [0, 160], "the other one waited for it"
    assert [a.cached_tokens for a in result.answers[3:]] == [192, 192, 320, 224]
    assert all((a.kvplug or {"exact": True})["exact"] for a in result.answers)
    assert result.leftovers == []
    assert "FAILED" not in result.log  # type: ignore[attr-defined]


def test_on_the_second_runner(run_second: Run, deep: Path, right: list[list[int]]) -> None:
    """A step ahead, as GPUs run it."""
    result = run_second(deep, requests(), host(), ahead=True, env=environment(), **ENGINE)
    assert [a.token_ids for a in result.answers] == right
    assert result.reports[0]["counters"]["loads"] >= 3


FAULTS = ["hang", "raise", "flip", "garbage", "exit", "forget", "short", "strange", "swap"]


def test_whatever_a_tier_does_answers_are_right(run: Run, deep: Path) -> None:
    """Each text is pushed out and asked for again until no read fails any more."""
    rounds = len(FAULTS) + 9
    # One takes more than half of the pool.
    asked = [(A + Q, LONG, C)[i % 3] for i in range(rounds)]
    # What the filler pushes out of the pool only tiers have.
    workload = [
        TrialRequest(prompt, N, 2 * i + j)
        for i, text in enumerate(asked)
        for j, prompt in enumerate((text, FILLER[i]))
    ]
    section = {
        "tiers": [{"faulty": {"size": "64MiB", "reads": FAULTS, "writes": ["raise"]}}],
        "lifecycle": "loads",
    }
    result = run(deep, workload, section, env=environment(), **ENGINE)
    oracle = Oracle(deep)
    texts = {tuple(r.prompt): oracle.greedy(r.prompt, N) for r in workload}
    assert [a.token_ids for a in result.answers] == [texts[tuple(r.prompt)] for r in workload]
    counters = result.reports[0]["counters"]
    assert counters["failed_loads"] >= len(FAULTS)
    assert counters["loads"] >= 2, "of those after the last fault"
    causes = {name.removeprefix("failed faulty ") for name in counters if "failed f" in name}
    assert causes >= {"RuntimeError", "refused", "SystemExit", "TypeError"}, "the tier's own"
    assert causes >= {"bad checksum", "truncated", "other key", "no answer in time"}


def test_what_a_codec_changed_is_never_called_exact(
    run: Run, deep: Path, right: list[list[int]]
) -> None:
    result = run(deep, requests(), host(transfer="rounded"), env=environment(), **ENGINE)
    said = [(a.kvplug or {"exact": True})["exact"] for a in result.answers]
    loaded = [bool((a.kvplug or {}).get("loaded")) for a in result.answers]
    assert any(loaded) and said == [not one for one in loaded]
    exact = [i for i, one in enumerate(said) if one]
    assert [result.answers[i].token_ids for i in exact] == [right[i] for i in exact]


def test_a_request_may_leave_nothing_behind(run: Run, deep: Path, right: list[list[int]]) -> None:
    quiet = [TrialRequest(r.prompt, N, r.wave, {"store": False}) for r in requests()[:6]]
    result = run(deep, quiet, host(), env=environment(), **ENGINE)
    assert [a.token_ids for a in result.answers] == right[:6]
    counters = result.reports[0]["counters"]
    assert counters["chunks"] == 0 and "stored" not in counters


@pytest.mark.parametrize(
    "beside",
    [
        {"prefix_cache": "s3fifo"},
        {"prefix_cache": "tree", "sequence": {"use": "sink_window", "sink": 64, "window": 128}},
        {"format": "int8"},
    ],
    ids=["an order", "a window", "a format"],
)
def test_beside_other_policies(run: Run, deep: Path, beside: dict[str, Any]) -> None:
    """The answers are those of the same policies without tiers."""
    one = [TrialRequest(r.prompt, N, i) for i, r in enumerate(requests()[:6])]
    with_tiers = run(deep, one, host() | beside, env=environment(), **ENGINE)
    without = run(deep, one, beside, **ENGINE | {"num_gpu_blocks_override": 80})
    assert [a.token_ids for a in with_tiers.answers] == [a.token_ids for a in without.answers]
    assert with_tiers.reports[0]["counters"].get("loads", 0) or beside.get("sequence")
    assert not any(report["errors"] for report in with_tiers.reports)


TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


def test_two_ranks_store_their_heads_and_load_them_together(run: Run, deep: Path) -> None:
    """A chunk that one of them cannot read is computed on both."""
    again = [r.prompt for r in requests()[:6]] * 2
    workload = [TrialRequest(prompt, N, i) for i, prompt in enumerate(again)]
    section = {
        "tiers": [{"faulty": {"size": "64MiB", "reads": ["forget", "raise"], "rank": 1}}],
        "lifecycle": "loads",
    }
    result = run(
        deep,
        workload,
        section,
        watched=False,
        env=environment() | TWO_RANKS,
        tensor_parallel_size=2,
        **ENGINE,
    )
    oracle = Oracle(deep)
    expected = [oracle.greedy(list(r.prompt), N) for r in workload]
    assert [a.token_ids for a in result.answers] == expected
    said = [a.kvplug or {} for a in result.answers]
    assert any(one.get("not_loaded") for one in said)
    assert any(one.get("loaded") for one in said)


def test_an_engine_that_was_killed_starts_with_what_it_had_saved(
    run: Run, deep: Path, right: list[list[int]], tmp_path: Path
) -> None:
    """Of a cached request, and of one that was still answered."""

    def section(chunks: int) -> dict[str, Any]:
        return {
            "tiers": [{"dying": {"path": str(tmp_path), "size": "64MiB", "chunks": chunks}}],
            "lifecycle": {"use": "loads", "checkpoint": 0.01},
        }

    roomy = ENGINE | {"num_gpu_blocks_override": 60}
    workload = [TrialRequest(A + Q, N, 0), TrialRequest(C, 150, 1), TrialRequest(FILLER[0], N, 2)]
    with pytest.raises(TrialFailed, match="code"):
        run(deep, workload, section(14), env=environment(), **roomy)
    again = [TrialRequest(A + Q, N, 0), TrialRequest(C, N, 1)]
    result = run(deep, again, section(0), env=environment(), **roomy)
    assert [a.token_ids for a in result.answers] == [right[0], right[2]]
    assert result.answers[0].cached_tokens == 192, "what a request had left in the pool"
    assert result.answers[1].cached_tokens >= 160, "what another was still using"
    assert result.reports[0]["counters"]["loads"] == 2


def test_a_second_tier_holds_what_the_first_one_cannot(
    run: Run, deep: Path, tmp_path: Path
) -> None:
    """The upper one has no room for two texts, so the second one comes back from below."""
    tiers = [{"host": {"size": "1MiB"}}, {"disk": {"path": str(tmp_path), "size": "64MiB"}}]
    asked = [A + Q, B + Q, FILLER[0], B + R]
    result = run(
        deep,
        [TrialRequest(text, N, i) for i, text in enumerate(asked)],
        {"tiers": tiers, "lifecycle": "loads"},
        env=environment(),
        **ENGINE | {"kv_events_config": EVENTS},
    )
    oracle = Oracle(deep)
    assert [a.token_ids for a in result.answers] == [oracle.greedy(text, N) for text in asked]
    upper, lower = (report["counters"] for report in result.reports[:2])
    assert upper["stored"] and lower["stored"]
    assert upper["bytes"] <= 1 << 20
    assert result.answers[3].cached_tokens == 192 and lower["used"]
    assert result.leftovers == []
