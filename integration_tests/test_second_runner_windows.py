"""sink_window on vLLM's second model runner: the oracle's tokens, whatever vLLM does; and requests
that keep everything, whose rows it learns only after it has built a step."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from oracle import Oracle

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

SINK, WINDOW = 40, 100
SECTION = {"sequence": {"use": "sink_window", "sink": SINK, "window": WINDOW}}
ENGINE = {"dtype": "float32", "max_model_len": 1024, "block_size": 32, "enforce_eager": True}
KEEP = {"sequence": "off"}
LENGTHS = [3, 320, 150, 701, 333, 240]
KEEPS = [1, 3, 5]
"""Numbers of the prompts that keep everything where a test lets some."""
GENERATED = 30


def prompts() -> list[list[int]]:
    choose = random.Random(0)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in LENGTHS]


def requests(keeps: list[int]) -> list[TrialRequest]:
    return [
        TrialRequest(p, GENERATED, kvplug=KEEP if i in keeps else None)
        for i, p in enumerate(prompts())
    ]


@pytest.fixture(scope="module")
def full(oracle: Oracle) -> list[list[int]]:
    return [oracle.greedy(p, GENERATED) for p in prompts()]


@pytest.fixture(scope="module")
def windowed(oracle: Oracle) -> list[list[int]]:
    return [oracle.greedy(p, GENERATED, sink=SINK, window=WINDOW) for p in prompts()]


@pytest.fixture(scope="module")
def expected(full: list[list[int]], windowed: list[list[int]]) -> list[list[int]]:
    """With the requests of `KEEPS` keeping everything."""
    return [(full if i in KEEPS else windowed)[i] for i in range(len(LENGTHS))]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


def test_the_oracle_sees_a_difference(full: list[list[int]], windowed: list[list[int]]) -> None:
    assert [a == b for a, b in zip(full, windowed, strict=True)] == [
        True,
        False,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("asynchronous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_chunks_and_requests_that_keep_everything(
    run_second: Run, tiny: Path, expected: list[list[int]], asynchronous: bool
) -> None:
    """Slots pass from requests that keep everything to others, and back."""
    result = run_second(
        tiny,
        requests(KEEPS),
        SECTION,
        max_num_batched_tokens=100,
        max_num_seqs=2,
        ahead=asynchronous,
        **ENGINE,
    )
    assert tokens(result) == expected
    report = next(r for r in result.reports if r["kind"] == "sequence")
    assert report["acted"] > 0
    assert report["counters"]["split_rows"] > 0
    assert (report["counters"]["exempt"], report["counters"]["exempt_refused"]) == (3, 0)
    kept = [result.answers[i].kvplug for i in KEEPS]
    assert kept == [{"exact": True, "blocks_freed": 0}] * 3


def test_preemption_recomputes_the_same(
    run_second: Run, tiny: Path, expected: list[list[int]]
) -> None:
    result = run_second(
        tiny,
        requests(KEEPS),
        SECTION,
        max_num_batched_tokens=128,
        reset_running_at=20,
        **ENGINE,
    )
    assert tokens(result) == expected
    assert result.preemptions > 0


@pytest.mark.slow
def test_freed_blocks_are_overwritten_and_never_read(
    run_second: Run, tiny: Path, windowed: list[list[int]]
) -> None:
    """A pool smaller than one request unshortened."""
    result = run_second(
        tiny,
        requests([]),
        SECTION,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=18,
        **ENGINE,
    )
    assert tokens(result) == windowed
    assert result.num_blocks == 17 < LENGTHS[3] // 32
    assert result.handed_over > 0


def test_ngram_speculation_changes_nothing(
    run_second: Run, tiny: Path, windowed: list[list[int]]
) -> None:
    result = run_second(
        tiny,
        requests([]),
        SECTION,
        max_num_batched_tokens=256,
        speculative_config={
            "method": "ngram",
            "num_speculative_tokens": 5,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
        **ENGINE,
    )
    assert tokens(result) == windowed


def test_a_request_that_keeps_everything_under_vllms_triton_attention(
    run_second: Run, tiny: Path, oracle: Oracle
) -> None:
    prompt = prompts()[1][:170]
    section = {"sequence": {"use": "sink_window", "sink": 32, "window": 32}}
    asked = [TrialRequest(prompt, 6, kvplug=KEEP), TrialRequest(prompt, 6)]
    result = run_second(tiny, asked, section, backend="TRITON_ATTN", **ENGINE)
    full, windowed = oracle.greedy(prompt, 6), oracle.greedy(prompt, 6, sink=32, window=32)
    assert full != windowed
    assert tokens(result) == [full, windowed]
