"""An approximate request leaves nothing behind that changes another request's answer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


SECTIONS: list[dict[str, Any] | None] = [
    {"format": "int8"},
    {"sequence": {"use": "sink_window", "sink": 32, "window": 65}},
    {"format": {"use": "kivi", "group": 32}},
    {},
    None,
    {"sequence": {"use": "snapkv", "budget": 128}},
]


@pytest.fixture(scope="module")
def one_process(tiny: Path) -> list[list[Any]]:
    """What each of `SECTIONS` gave, one engine after the other in one process, with the bytes that
    kvplug held when vLLM measured memory and after requests; and what two others said that were
    started while an engine was running there."""
    code = f"""
import json
from held_walk import held_storages
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_worker import CPUWorker
from kvplug_lab.engine.trial import connector_flags

measure, held = CPUWorker.determine_available_memory, []

def measured(self):
    held.append(sum(held_storages(()).values()))
    return measure(self)

CPUWorker.determine_available_memory = measured

def start(section):
    flags = {{}} if section is None else {{"kv_transfer_config": connector_flags(section)}}
    return LLM({str(tiny)!r}, max_model_len=512, enforce_eager=True, block_size=32,
               num_gpu_blocks_override=64, dtype="float32", **flags)

if __name__ == "__main__":
    for section in {SECTIONS!r}:
        llm = start(section)
        manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
        (group,) = manager.kv_cache_config.kv_cache_groups
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        answer, *_ = llm.generate(
            [{{"prompt_token_ids": list(range(10 + i, 310 - i))}} for i in range(3)], params
        )
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        after = sum(held_storages(runner.model_runner.kv_caches).values())
        spec = group.kv_cache_spec
        print("FOUND", json.dumps([
            type(spec).__name__, spec.page_size_bytes, answer.kv_transfer_params,
            held[-1], after,
        ]))
        if section != {SECTIONS[-1]!r}:
            llm.llm_engine.engine_core.shutdown()
    for section in ({{"format": "int8"}}, None):
        try:
            start(section)
        except ValueError as error:
            print("FOUND", json.dumps(["refused", 0, str(error), 0, 0]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(SECTIONS) + 2, done.stderr[-3000:]
    return [json.loads(line.removeprefix("FOUND ")) for line in lines]


def test_engines_of_one_process_each_run_their_own_section(one_process: list[list[Any]]) -> None:
    """vLLM keeps the choice of an attention backend for the life of a process."""
    kinds = [kind for kind, *_ in one_process[: len(SECTIONS)]]
    full = "FullAttentionSpec"
    assert kinds == [full, "WindowedSpec", full, full, full, "PrunedSpec"]
    int8, window, kivi, plain, stock, scored = (size for _, size, *_ in one_process[:6])
    assert window == plain == stock
    assert stock * 17 == int8 * 64 and kivi < int8
    assert stock < scored < 1.05 * stock, "a position beside each token of each head"
    said = [answer and answer["kvplug"] for _, _, answer, *_ in one_process[: len(SECTIONS)]]
    assert said[0]["format"].startswith("int8") and said[2]["format"].startswith("kivi")
    assert said[1]["blocks_freed"] > 0 and said[5]["evictions"]
    assert said[3] is None and said[4] is None


def test_engines_at_once_in_one_process_are_refused(one_process: list[list[Any]]) -> None:
    """vLLM keeps one connector per process, and would hand it the pages of both."""
    for kind, _, error, *_ in one_process[len(SECTIONS) :]:
        assert kind == "refused"
        assert "belongs to another engine of this process" in error
        assert "start each engine in a process of its own" in error


def test_what_is_held_was_taken_before_memory_was_measured(one_process: list[list[Any]]) -> None:
    before = [held for *_, held, _ in one_process[: len(SECTIONS)]]
    after = [held for *_, held in one_process[: len(SECTIONS)]]
    # A page's order is found in pages: 2 layers, keys and values, 8 bytes an element.
    order = 2 * 2 * 8 * 32 * 64
    for section, first, last in zip(SECTIONS, before, after, strict=True):
        assert last - first < order + (1 << 14), f"{section}: {first:,} bytes, then {last:,}"
    assert before[2] > 1 << 20, "recent tokens of kivi"
    assert before[5] > 1 << 20, "latest queries of snapkv"
    assert after[4] == after[3] < 1 << 14, "nothing without a policy"
