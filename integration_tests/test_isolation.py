"""An approximate request leaves nothing behind that changes another request's answer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from oracle import Oracle

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

SECTION = {"sequence": {"use": "sink_window", "sink": 32, "window": 65}}
ENGINE = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 128}
KEEP = {"sequence": "off"}
TOKENS = 24


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    choose = random.Random(7)
    return [choose.randrange(10, 300) for _ in range(600)]


@pytest.fixture(scope="module")
def answers(oracle: Oracle, prompt: list[int]) -> tuple[list[int], list[int]]:
    """The exact and the approximate answer; they differ."""
    exact = oracle.greedy(prompt, TOKENS)
    approximate = oracle.greedy(prompt, TOKENS, sink=32, window=65)
    assert exact != approximate
    return exact, approximate


def test_an_approximate_request_never_changes_anothers_answer(
    run: Run, tiny: Path, oracle: Oracle, prompt: list[int], answers: tuple[list[int], list[int]]
) -> None:
    """One engine, one prompt: approximate, then exact, then approximate, then both at once.

    The prefix cache is on throughout, so whatever one request leaves there the next one finds.
    """
    exact, approximate = answers
    short = prompt[:120]
    order: list[tuple[list[int], dict[str, str] | None, int]] = [
        (prompt, None, 0),
        (prompt, KEEP, 1),
        (prompt, None, 2),
        (prompt, KEEP, 3),
        (prompt, None, 4),
        (prompt, KEEP, 4),
        (prompt, None, 4),
        (short, None, 5),
    ]
    result = run(
        tiny,
        [TrialRequest(p, TOKENS, wave, options) for p, options, wave in order],
        SECTION,
        **ENGINE,
    )
    got = [a.token_ids for a in result.answers]
    expected = [
        approximate, exact, approximate, exact, approximate, exact, approximate,
        oracle.greedy(short, TOKENS, sink=32, window=65),
    ]  # fmt: skip
    assert got == expected
    cached = [a.cached_tokens for a in result.answers]
    assert cached[0] == 0
    assert set(cached[1:7]) == {128}, "only the exact prefix is shared: sink + window + own block"
    assert [a.kvplug and a.kvplug["exact"] for a in result.answers[:4]] == [
        False,
        True,
        False,
        True,
    ]


def test_an_exact_deployment_answers_exactly(
    run: Run, tiny: Path, prompt: list[int], answers: tuple[list[int], list[int]]
) -> None:
    """The same prompt on an exact deployment, computed and then from the prefix cache."""
    exact, _ = answers
    engine = ENGINE | {"num_gpu_blocks_override": 64}
    result = run(tiny, [TrialRequest(prompt, TOKENS, w) for w in (0, 1)], {}, **engine)
    assert [a.token_ids for a in result.answers] == [exact, exact]


def test_a_request_option_that_cannot_be_met_is_refused_and_reported(
    run: Run, tiny: Path, prompt: list[int], answers: tuple[list[int], list[int]]
) -> None:
    """A pool too small for the whole text: served approximately, and the answer says why."""
    result = run(
        tiny,
        [TrialRequest(prompt, TOKENS, 0, KEEP)],
        SECTION,
        num_gpu_blocks_override=16,
        **ENGINE,
    )
    (answer,) = result.answers
    assert answer.token_ids == answers[1]
    assert answer.kvplug is not None
    assert answer.kvplug["exact"] is False
    assert answer.kvplug["refused"] == {
        "sequence": "the request may need 20 blocks, but the pool has 15"
    }
    report = next(r for r in result.reports if r["kind"] == "sequence")
    assert report["counters"]["exempt_refused"] == 1


def test_a_second_engine_in_one_process_never_inherits_windows(tiny: Path) -> None:
    """vLLM caches attention backends per process; the second engine is refused, not windowed."""
    code = f"""
from vllm import LLM
from kvplug_lab.engine.trial import connector_flags

def start(section):
    return LLM({str(tiny)!r}, max_model_len=512, enforce_eager=True, block_size=32,
               num_gpu_blocks_override=64, kv_transfer_config=connector_flags(section))

if __name__ == "__main__":
    start({{"sequence": "sink_window"}}).llm_engine.engine_core.shutdown()
    try:
        start({{}})
    except ValueError as error:
        print("REFUSED", error)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "REFUSED" in done.stdout, done.stderr[-3000:]
    assert "start each engine in a process of its own" in done.stdout
