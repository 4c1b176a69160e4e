"""Scoring policies on vLLM's second model runner: every token as the oracle says.

Evictions come after the steps that reach them, in all layers at once, or in phases inside a prompt.
The oracle knows nothing of either; the first runner's tests use the same one.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pruned_oracle import PrunedOracle, Rule, Score, heavy, keydiff, tova

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ENGINE = {"dtype": "float32", "max_model_len": 1024, "block_size": 32, "enforce_eager": True}
LENGTHS = [1, 3, 150, 320, 701]
GENERATED = 40
COMMON: dict[str, Any] = {"budget": 128, "sink": 4, "interval": 32, "recent": 16}
RULE = Rule(kept=128, interval=32, sink=4, recent=16)


def section(use: str, **options: Any) -> dict[str, Any]:
    return {"sequence": {"use": use, **COMMON, **options}}


def prompts(seed: int = 0) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in LENGTHS]


def requests() -> list[TrialRequest]:
    return [TrialRequest(p, GENERATED) for p in prompts()]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


@pytest.fixture(scope="module")
def pruned(tiny: Path) -> PrunedOracle:
    return PrunedOracle(tiny)


@functools.cache
def answers(oracle: PrunedOracle, score: Score, *rules: Rule) -> list[list[int]]:
    return [oracle.greedy(p, GENERATED, score, rules) for p in prompts()]


def test_evictions_inside_a_prompt_and_after_steps(
    run_second: Run, tiny: Path, pruned: PrunedOracle
) -> None:
    """Chunks, and a pool smaller than one whole request: freed blocks are used again."""
    result = run_second(
        tiny,
        requests(),
        section("keydiff"),
        max_num_batched_tokens=64,
        num_gpu_blocks_override=23,
        **ENGINE,
    )
    assert tokens(result) == answers(pruned, keydiff, Rule(128, 32, 4, 16, hold=11 * 32))
    assert result.handed_over > 0
    report = next(r for r in result.reports if r["kind"] == "sequence")
    assert report["acted"] > 0
    assert report["errors"] == 0
    assert report["counters"]["evictions"] >= 6
    assert report["counters"]["fallbacks"] == 0


def test_observed_queries_prefix_hits_and_a_request_that_keeps_everything(
    run_second: Run, tiny: Path, pruned: PrunedOracle
) -> None:
    texts = prompts()
    again = [TrialRequest(texts[i], GENERATED, 1) for i in (3, 4)]
    result = run_second(
        tiny, [*requests(), *again], section("tova"), max_num_batched_tokens=100, **ENGINE
    )
    expected = answers(pruned, tova, RULE)
    assert tokens(result) == [*expected, expected[3], expected[4]]
    assert [a.cached_tokens for a in result.answers][5:7] == [32, 32]


def test_cumulative_attention_and_preemption(
    run_second: Run, tiny: Path, pruned: PrunedOracle
) -> None:
    result = run_second(
        tiny,
        requests(),
        section("h2o", recent_part=0.125),
        max_num_batched_tokens=75,
        reset_running_at=30,
        **ENGINE,
    )
    assert tokens(result) == answers(pruned, heavy, RULE)
    assert result.preemptions > 0


def test_a_step_ahead_and_a_budget_per_layer_group(
    run_second: Run, tiny: Path, pruned: PrunedOracle
) -> None:
    """Async scheduling: a step is planned while the one before it runs; two KV-cache groups."""
    result = run_second(
        tiny,
        requests(),
        section("keydiff", layers={"0": 2.0}),
        max_num_batched_tokens=100,
        ahead=True,
        **ENGINE,
    )
    layers = pruned.model.config.num_hidden_layers
    rules = [Rule(256, 32, 4, 16)] + [RULE] * (layers - 1)
    assert tokens(result) == answers(pruned, keydiff, *rules)


@pytest.mark.parametrize("use", ["snapkv", "smart_window"])
def test_the_first_runners_tokens_and_sizes(
    run: Run, run_second: Run, tiny: Path, use: str
) -> None:
    """Measurements of smart_window reach the scheduler some steps later, and decide the same."""
    first = run(tiny, requests(), section(use), max_num_batched_tokens=100, **ENGINE)
    second = run_second(
        tiny, requests(), section(use), max_num_batched_tokens=100, ahead=True, **ENGINE
    )
    assert tokens(second) == tokens(first)
    assert [a.kvplug for a in second.answers] == [a.kvplug for a in first.answers]


@pytest.mark.slow
def test_heads_of_two_ranks(run_second: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """Each rank decides for its own heads, by the same plans and slots."""
    result = run_second(
        tiny,
        requests(),
        section("keydiff"),
        tensor_parallel_size=2,
        watched=False,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        max_num_batched_tokens=100,
        **ENGINE,
    )
    assert tokens(result) == answers(pruned, keydiff, RULE)


def test_triton_attention_with_tokens_before_heads(
    run_second: Run, tiny: Path, pruned: PrunedOracle
) -> None:
    """The page layout that vLLM prefers on a GPU."""
    choose = random.Random(3)
    prompt = [choose.randrange(10, 300) for _ in range(150)]
    result = run_second(
        tiny,
        [TrialRequest(prompt, 14)],
        section("keydiff", budget=64, interval=32),
        backend="TRITON_ATTN",
        **ENGINE,
    )
    rule = Rule(kept=64, interval=32, sink=4, recent=16)
    assert tokens(result) == [pruned.greedy(prompt, 14, keydiff, [rule])]
    assert result.answers[0].kvplug is not None
    assert len(result.answers[0].kvplug["evictions"]) >= 1
