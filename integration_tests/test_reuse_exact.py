"""Exact reuse is exact: 50 prompts of real text whose KV comes from the store answer token for
token what stock vLLM answers, with chunked prefill and everybody preempted once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ENGINE = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 192,
    "num_gpu_blocks_override": 96,
    # The store is what is tested: nothing else may answer for it.
    "enable_prefix_caching": False,
    # Where chunks of a prompt end depends on what was found; in bfloat16 that alone moves tokens.
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def prompts(passages: Callable[..., list[str]]) -> list[str]:
    return [passages(1, 60 + 3 * i, seed=i)[0] for i in range(50)]


def test_fifty_prompts_from_the_store(run: Run, smollm2: Path, prompts: list[str]) -> None:
    first = [TrialRequest(p, 6, 0) for p in prompts]
    again = [TrialRequest(p, 6, 1) for p in prompts]
    stock = run(smollm2, first, None, **ENGINE)
    section = {"reuse": {"use": ["structure", "position", "mask"], "segments": {"by": "fixed"}}}
    ours = run(smollm2, first + again, section, reset_running_at=75, **ENGINE)
    answers = [a.token_ids for a in stock.answers]
    assert [a.token_ids for a in ours.answers[:50]] == answers
    assert [a.token_ids for a in ours.answers[50:]] == answers
    assert ours.preemptions > 0
    assert all(a.kvplug is not None and a.kvplug["exact"] for a in ours.answers[50:])
    reused = sum(a.kvplug["reused"] for a in ours.answers[50:])
    assert reused > 0.9 * sum(a.prompt_tokens for a in ours.answers[50:])
    report = ours.reports[0]
    assert report["errors"] == 0
    assert report["counters"]["approximate_requests"] == 0
