"""Scoring policies in the engine: every token must come out as the oracle says.

The oracle runs plain transformers over the whole text and forgets per KV head by formulas of its
own, so page orders, chunks, phases, moves in place, preemption and parallelism are all in doubt.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pruned_oracle import PrunedOracle, Rule, Score, heavy, keydiff, newest, tova

from kvplug_lab.engine.trial import TrialRequest, TrialResult
from kvplug_lab.models import tiny_llama

Run = Callable[..., TrialResult]

ENGINE = {"dtype": "float32", "max_model_len": 1024, "block_size": 32}
LENGTHS = [1, 3, 150, 320, 701]
GENERATED = 40
COMMON: dict[str, Any] = {"budget": 128, "sink": 4, "interval": 32}
RULE = Rule(kept=128, interval=32, sink=4, recent=16)


def section(use: str, **options: Any) -> dict[str, Any]:
    return {"sequence": {"use": use, "recent": 16, **COMMON, **options}}


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


def test_the_oracle_sees_a_difference(pruned: PrunedOracle) -> None:
    """The three scores part on these prompts, and from the full cache."""
    full = answers(pruned, keydiff, Rule(4096, 32, 4, 16))
    pruned_answers = [answers(pruned, score, RULE) for score in (keydiff, tova, heavy)]
    assert all(own[:2] == full[:2] for own in pruned_answers), "texts inside the budget are exact"
    for i in (3, 4):
        assert len({str(own[i]) for own in (full, *pruned_answers)}) == 4


def test_key_similarity_in_a_small_pool(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """Prompts in chunks, a pool smaller than one whole request: freed blocks are reused while the
    request still runs, and evictions fall inside its prompt."""
    result = run(
        tiny,
        requests(),
        section("keydiff"),
        max_num_batched_tokens=64,
        num_gpu_blocks_override=23,
        **ENGINE,
    )
    hold = 11 * 32
    assert tokens(result) == answers(pruned, keydiff, Rule(128, 32, 4, 16, hold=hold))
    assert result.classes["managers"] == ["PrunedManager"]
    assert result.num_blocks == 22 < (LENGTHS[4] + GENERATED) // 32
    assert result.handed_over > 0
    assert result.largest <= result.cap_blocks[0] < (LENGTHS[4] + GENERATED) // 32
    report = next(r for r in result.reports if r["kind"] == "sequence")
    assert report["acted"] > 0
    assert report["errors"] == 0
    assert report["counters"]["evictions"] >= 6
    assert [a.kvplug is None for a in result.answers] == [True, True, False, False, False]
    reported = result.answers[4].kvplug
    assert reported is not None
    assert reported["exact"] is False
    assert reported["evictions"][0][0] < LENGTHS[4], "an eviction inside the prompt"
    assert reported["evictions"][-1][1] == 128


def test_latest_query_whatever_the_chunk(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """Observed queries cross steps and phases; a second wave finds what is exact in the cache."""
    texts = prompts()
    again = [TrialRequest(texts[i], GENERATED, 1) for i in (3, 4)]
    keep = TrialRequest(texts[4], GENERATED, 2, {"sequence": "off"})
    result = run(
        tiny,
        [*requests(), *again, keep],
        section("tova"),
        max_num_batched_tokens=100,
        **ENGINE,
    )
    expected = answers(pruned, tova, RULE)
    full = pruned.greedy(texts[4], GENERATED, keydiff, [Rule(4096, 32, 4, 16)])
    assert tokens(result) == [*expected, expected[3], expected[4], full]
    cached = [a.cached_tokens for a in result.answers]
    assert cached[5:7] == [32, 32], "no hit beyond what no eviction writes"
    assert result.answers[7].kvplug == {"exact": True, "blocks_freed": 0}


def test_cumulative_attention_and_preemption(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """Every query counts once, whatever chunk it came in; all requests start over at step 30."""
    result = run(
        tiny,
        requests(),
        section("h2o", recent_part=0.125),
        max_num_batched_tokens=75,
        reset_running_at=30,
        **ENGINE,
    )
    assert tokens(result) == answers(pruned, heavy, RULE)
    assert result.preemptions > 0


def test_a_budget_per_layer_group(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """Layers with different shares hold different blocks: two KV-cache groups."""
    result = run(
        tiny,
        requests(),
        section("keydiff", layers={"0": 2.0}),
        max_num_batched_tokens=100,
        **ENGINE,
    )
    layers = pruned.model.config.num_hidden_layers
    rules = [Rule(256, 32, 4, 16)] + [RULE] * (layers - 1)
    assert tokens(result) == answers(pruned, keydiff, *rules)
    assert result.classes["managers"] == ["PrunedManager"] * 2


@pytest.mark.slow
def test_blocks_of_128_in_processes_of_their_own(
    run: Run, tiny: Path, pruned: PrunedOracle
) -> None:
    engine = ENGINE | {"block_size": 128}
    result = run(tiny, requests(), section("keydiff", interval=128), watched=False, **engine)
    rule = Rule(128, 128, 4, 16, block=128)
    assert tokens(result) == answers(pruned, keydiff, rule)
    assert "kvplug summary after" in result.log


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [pytest.param(4, 4, id="MHA", marks=pytest.mark.slow), pytest.param(4, 1, id="MQA")],
)
def test_other_head_counts(run: Run, tmp_path: Path, heads: int, kv_heads: int) -> None:
    model = tiny_llama(tmp_path, heads=heads, kv_heads=kv_heads)
    result = run(model, requests(), section("tova"), max_num_batched_tokens=200, **ENGINE)
    assert tokens(result) == answers(PrunedOracle(model), tova, RULE)


@pytest.mark.parametrize(
    "parallel",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        pytest.param(
            {"pipeline_parallel_size": 2, "enforce_eager": False},
            id="pipeline",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_ranks(run: Run, tiny: Path, pruned: PrunedOracle, parallel: dict[str, Any]) -> None:
    """Each rank decides for its own heads or layers; together they are one model."""
    result = run(
        tiny,
        requests(),
        section("h2o", recent_part=0.125),
        watched=False,
        env={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        max_num_batched_tokens=100,
        **parallel,
        **ENGINE,
    )
    assert tokens(result) == answers(pruned, heavy, RULE)


def test_a_budget_beyond_the_context_is_exact(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    result = run(tiny, requests(), section("snapkv", budget=4096), **ENGINE)
    assert tokens(result) == answers(pruned, keydiff, Rule(4096, 32, 4, 16))
    assert all(a.kvplug is None for a in result.answers)
    (report,) = result.reports
    assert report["acted"] == 0


def test_a_failing_policy_keeps_the_latest(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """An exception while scoring retires the policy and costs the engine no request."""
    plugins = Path(__file__).parent / "plugins"
    path = os.pathsep.join(filter(None, [str(plugins), os.environ.get("PYTHONPATH")]))
    result = run(
        tiny,
        requests(),
        section("fails_to_score"),
        env={"PYTHONPATH": path},
        max_num_batched_tokens=100,
        **ENGINE,
    )
    assert tokens(result) == answers(pruned, newest, RULE)
    (report,) = result.reports
    assert report["errors"] == 1
    assert report["counters"]["fallbacks"] > 0
    assert result.log.count("sequence policy 'fails_to_score' failed and is retired") == 1  # type: ignore[attr-defined]


def test_evicted_tokens_are_recalled_from_host(run: Run, tiny: Path, pruned: PrunedOracle) -> None:
    """With nothing lost, a policy that wants everything back differs from one that drops; texts
    that were never pruned stay exact, and the cost is reported."""
    result = run(tiny, requests(), section("tova", on_demand=1024), **ENGINE)
    expected = answers(pruned, tova, RULE)
    found = tokens(result)
    assert found[:2] == expected[:2]
    (report,) = result.reports
    assert report["errors"] == 0
    assert report["counters"]["recalled_tokens"] > 0
    assert report["counters"]["recall_us"] > 0
    assert result.largest <= result.cap_blocks[0]
