"""sink_window in the engine: every token must come out as the oracle says, whatever vLLM does.

What a token sees depends on its position alone, so chunk sizes, batch mixes, preemption,
speculation and parallelism must not change one token.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import Oracle

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

SINK, WINDOW = 40, 100
SECTION = {"sequence": {"use": "sink_window", "sink": SINK, "window": WINDOW}}
ENGINE = {"dtype": "float32", "max_model_len": 1024, "block_size": 32}
LENGTHS = [3, 150, 320, 701]
GENERATED = 40


def prompts(seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in LENGTHS]


def requests(seed: int = 0) -> list[TrialRequest]:
    return [TrialRequest(p, GENERATED) for p in prompts(seed)]


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> list[list[int]]:
    return [oracle.greedy(p, GENERATED, sink=SINK, window=WINDOW) for p in prompts()]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


def test_the_oracle_sees_a_difference(oracle: Oracle, expected: list[list[int]]) -> None:
    """The window matters on these prompts: the full cache answers otherwise."""
    full = [oracle.greedy(p, GENERATED) for p in prompts()]
    assert full[0] == expected[0], "a text inside the budget is exact"
    assert full[3] != expected[3]


@pytest.mark.parametrize("chunk", [100, 1024])
def test_tokens_are_the_oracles_whatever_the_chunk(
    run: Run, tiny: Path, expected: list[list[int]], chunk: int
) -> None:
    result = run(tiny, requests(), SECTION, max_num_batched_tokens=chunk, **ENGINE)
    assert tokens(result) == expected
    assert result.classes["managers"] == ["WindowedManager"]
    report = next(r for r in result.reports if r["kind"] == "sequence")
    assert report["acted"] > 0
    assert report["counters"]["split_rows"] > 0
    assert [a.kvplug for a in result.answers[:2]] == [None, None], "inside the budget: exact"
    assert all(a.kvplug and not a.kvplug["exact"] for a in result.answers[2:])


def test_freed_blocks_are_overwritten_and_never_read(
    run: Run, tiny: Path, expected: list[list[int]]
) -> None:
    """A pool smaller than one request undropped: freed blocks are reused while it still runs."""
    result = run(
        tiny,
        requests(),
        SECTION,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=18,
        **ENGINE,
    )
    assert tokens(result) == expected
    assert result.num_blocks == 17 < LENGTHS[3] // 32
    assert result.handed_over > 0
    assert result.largest <= result.cap_blocks[0]


def test_preemption_recomputes_the_same(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    result = run(
        tiny, requests(), SECTION, max_num_batched_tokens=128, reset_running_at=25, **ENGINE
    )
    assert tokens(result) == expected
    assert result.preemptions > 0


def test_admission_agrees_with_freeing(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    """Many requests in a pool for few: they are admitted by their cap, and none gets stuck."""
    many = [r for _ in range(4) for r in requests()]
    result = run(
        tiny, many, SECTION, max_num_batched_tokens=64, num_gpu_blocks_override=40, **ENGINE
    )
    assert tokens(result) == expected * 4
    assert result.largest <= result.cap_blocks[0]
    assert all(s.held <= result.num_blocks for s in result.steps)


def test_without_prefix_caching(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    result = run(tiny, requests(), SECTION, enable_prefix_caching=False, **ENGINE)
    assert tokens(result) == expected


def test_ngram_speculation_changes_nothing(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    result = run(
        tiny,
        requests(),
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
    assert tokens(result) == expected
    assert len(result.steps) > 0


@pytest.mark.slow  # as under pipeline parallelism, with one worker
def test_processes_of_their_own(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    result = run(tiny, requests(), SECTION, watched=False, **ENGINE)
    assert tokens(result) == expected
    assert "kvplug summary after" in result.log


@pytest.mark.slow  # of windows, ranks share positions alone; scoring and reuse have two ranks too
def test_tensor_parallel_2(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    result = run(
        tiny,
        requests(),
        SECTION,
        watched=False,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        max_num_batched_tokens=100,
        **ENGINE,
    )
    assert tokens(result) == expected


def test_pipeline_parallel_2(run: Run, tiny: Path, expected: list[list[int]]) -> None:
    result = run(
        tiny,
        requests(),
        SECTION,
        watched=False,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        pipeline_parallel_size=2,
        enforce_eager=False,
        max_num_batched_tokens=100,
        **ENGINE,
    )
    assert tokens(result) == expected
    assert "kvplug summary after" in result.log


def test_a_window_per_layer_group(run: Run, tiny: Path, oracle: Oracle) -> None:
    """Layers with different windows hold different blocks: two KV-cache groups."""
    section = {
        "sequence": {
            "use": "sink_window",
            "sink": SINK,
            "window": WINDOW,
            "layers": {"0": 300},
        }
    }
    result = run(tiny, requests(), section, max_num_batched_tokens=100, **ENGINE)
    expected = [oracle.greedy(p, GENERATED, sink=SINK, windows=[300, WINDOW]) for p in prompts()]
    assert tokens(result) == expected
    assert result.classes["managers"] == ["WindowedManager"] * 2
    assert result.cap_blocks[0] != result.cap_blocks[1]


def test_budget_beyond_the_context_is_exact(run: Run, tiny: Path, oracle: Oracle) -> None:
    section = {"sequence": {"use": "sink_window", "sink": 32, "window": 4096}}
    result = run(tiny, requests(), section, **ENGINE)
    assert tokens(result) == [oracle.greedy(p, GENERATED) for p in prompts()]
    assert all(a.kvplug is None for a in result.answers)
    report = next(r for r in result.reports if r["kind"] == "sequence")
    assert report["acted"] == 0


@pytest.mark.parametrize("block_size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_other_block_sizes(run: Run, tiny: Path, oracle: Oracle, block_size: int) -> None:
    engine = ENGINE | {"block_size": block_size}
    result = run(tiny, requests(), SECTION, max_num_batched_tokens=200, **engine)
    assert tokens(result) == [
        oracle.greedy(p, GENERATED, block_size=block_size, sink=SINK, window=WINDOW)
        for p in prompts()
    ]


@pytest.mark.skipif(
    "avx512" not in torch.backends.cpu.get_cpu_capability().lower(),
    reason="vLLM's fp8 cache on a CPU needs AVX-512 or AMX",
)
def test_quantized_kv_cache(run: Run, tiny: Path) -> None:
    """vLLM's own fp8 cache beneath: cutting and freeing otherwise must not change a token."""
    engine = ENGINE | {"kv_cache_dtype": "fp8"}
    wide = run(tiny, requests(), SECTION, **engine)
    narrow = run(
        tiny,
        requests(),
        SECTION,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=18,
        **engine,
    )
    assert narrow.handed_over > 0
    assert tokens(narrow) == tokens(wide)
