"""The attention kind in the engine, with the attention memory as its policy."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]
ASKS = {"attention": "approximate"}


def test_attention_memory_reuses_far_attention_and_keeps_out_of_the_prefix_cache(
    run: Run, smollm2: Path, passages: Callable[..., list[str]]
) -> None:
    (prompt,) = passages(1, 260, seed=5)
    work = [TrialRequest(prompt, 24, 0, ASKS), TrialRequest(prompt, 24, 1)]
    engine = {"max_model_len": 1024, "num_gpu_blocks_override": 64, "dtype": "float32"}
    stock = run(smollm2, work[1:], None, **engine)
    section = {"attention": {"use": "memo", "cosine": 0.5, "near": 64, "every": 8}}
    result = run(smollm2, work, section, **engine)
    memo, plain = result.answers
    assert plain.token_ids == stock.answers[0].token_ids
    assert memo.kvplug == {"exact": False, "attention": "memo"} and plain.kvplug is None
    counters = result.reports[0]["counters"]
    assert counters["rows"] == 23 * 30, "every decode step but the first token's, each layer"
    assert 0 < counters["reused_rows"] < counters["far_rows"]
    # Blocks of the prompt alone were cached: nothing that followed a memory.
    assert plain.cached_tokens <= plain.prompt_tokens
    never = {"attention": {"use": "memo", "cosine": 1.0, "near": 64, "every": 8}}
    again = run(smollm2, work[:1], never, **engine)
    assert again.answers[0].token_ids == plain.token_ids


@pytest.mark.slow  # a cell of test_composition has attention on the second runner, too
def test_the_second_runner_serves_the_same_rows(run: Run, run_second: Run, tiny: Path) -> None:
    """Beside requests that did not ask, whose slots pass between them."""
    choose = random.Random(0)
    work = [
        TrialRequest([choose.randrange(10, 300) for _ in range(n)], 16, kvplug=asked)
        for n, asked in ((150, ASKS), (90, None), (200, ASKS), (60, None), (130, ASKS))
    ]
    section = {"attention": {"use": "memo", "cosine": 0.05, "near": 32, "every": 4}}
    engine = {
        "dtype": "float32",
        "max_model_len": 512,
        "block_size": 32,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 100,
        "enforce_eager": True,
    }
    first, second = (one(tiny, work, section, **engine) for one in (run, run_second))
    assert [a.token_ids for a in second.answers] == [a.token_ids for a in first.answers]
    assert [a.kvplug for a in second.answers] == [a.kvplug for a in first.answers]
    mine, theirs = (result.reports[0]["counters"] for result in (second, first))
    assert mine == theirs
    assert 0 < mine["reused_rows"] < mine["far_rows"]
