"""The attention kind in the engine, with the attention memory as its policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
