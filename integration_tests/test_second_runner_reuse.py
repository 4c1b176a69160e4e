"""Stored KV on vLLM's second model runner: the oracle's tokens, with what is computed inside a run,
and answers that are watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_oracle import ReuseOracle
from reused_prompt import AT_A, GAP, WHOLE, A, B, Q, S, texts

from kvplug.hosts.vllm.flags import EXTENSION, GUARD
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ASKS = {"reuse": "approximate"}
N = 8
"""Tokens of an answer."""


LENGTHS = [len(part) for part in (S, B, GAP, A)]
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "num_gpu_blocks_override": 64,
    "block_size": 32,
    "dtype": "float32",
    "enforce_eager": True,
    "worker_extension_cls": EXTENSION,
}


def section(**keys: Any) -> dict[str, Any]:
    return {
        "reuse": {
            "use": ["structure", "position", "mask"],
            "approximate": True,
            "segments": {"by": "request", "min_tokens": 16},
        }
        | keys
    }


def learning() -> list[TrialRequest]:
    """Requests that leave S, A and B behind."""
    return [
        TrialRequest(S + part, 1, wave, {"segments": [len(S), len(part)]})
        for wave, part in enumerate((A, B))
    ]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for a token's KV to depend on the text before it."""
    return models.tiny_llama(tmp_path_factory.mktemp("deep"), layers=6, seed=2)


@pytest.fixture(scope="module")
def oracle(deep: Path) -> ReuseOracle:
    return ReuseOracle(deep)


@pytest.fixture(scope="module")
def loaded(oracle: ReuseOracle) -> list[tuple[int, Any]]:
    return [(AT_A, oracle.rerotated(oracle.stored(S, A), AT_A - len(S)))]


def test_computing_inside_a_run_answers_what_the_oracle_answers(
    run_second: Run, deep: Path, oracle: ReuseOracle, loaded: list[tuple[int, Any]]
) -> None:
    """Beside another request, in forwards of at most 96 tokens, scheduled ahead; and the guard sees
    how the answer drifts from an exact one over the same segments."""
    tail, beside = texts(len(Q), 150, seed=8)
    other = WHOLE[: -len(Q)] + tail
    work = [
        *learning(),
        TrialRequest(other, N, 2, {"segments": LENGTHS, "reuse": "off"}),
        TrialRequest(WHOLE, N, 3, ASKS | {"segments": LENGTHS}),
        TrialRequest(beside, N, 3),
    ]
    guard = {"max_entropy_drift": 0.001, "max_logprob_drift": 0.001, "history": 1}
    result = run_second(
        deep,
        work,
        section(recompute={"gaps": 64, "boundary": 8}) | {"guard": guard},
        max_num_batched_tokens=96,
        ahead=True,
        enable_prefix_caching=False,
        logits_processors=[GUARD],
        **ENGINE,
    )
    plain = oracle.greedy(WHOLE, [], [], N)
    foreign = oracle.greedy(WHOLE, loaded, [(AT_A - len(GAP), AT_A + 8)], N)
    assert foreign != plain, "the case would show nothing"
    off, approximate, untouched = result.answers[2:]
    assert approximate.token_ids == foreign
    assert approximate.kvplug["recomputed"] == len(GAP) + 8
    assert approximate.kvplug["shifted"] == len(A)
    assert off.token_ids == oracle.greedy(other, [], [], N)
    assert untouched.token_ids == oracle.greedy(beside, [], [], N)
    counters = result.reports[0]["counters"]
    assert result.reports[0]["errors"] == 0
    assert counters["corrected"] == len(A)
    assert counters["drifted"] == 1


def test_tokens_before_heads_under_vllms_triton_attention(
    run_second: Run, deep: Path, oracle: ReuseOracle
) -> None:
    """Segments out of pages and into others, and what is computed between and among them."""
    s, b, a, gap, q = texts(6, 20, 24, 4, 4, seed=1)
    whole, at = s + b + gap + a + q, 30
    work = [
        TrialRequest(s + a, 1, 0, {"segments": [6, 24]}),
        TrialRequest(s + b, 1, 1, {"segments": [6, 20]}),
        TrialRequest(whole, 6, 2, ASKS | {"segments": [6, 20, 4, 24]}),
    ]
    result = run_second(
        deep,
        work,
        section(recompute={"gaps": 64, "boundary": 8, "fraction": 0.5}),
        backend="TRITON_ATTN",
        **ENGINE | {"block_size": 16, "max_model_len": 128},
    )
    loaded = [(at, oracle.rerotated(oracle.stored(s, a), at - 6))]
    answer = result.answers[2]
    assert result.reports[0]["errors"] == 0
    assert answer.kvplug["recomputed"] == 4 + 12
    # Beside the gap, half of the loaded tokens, 8 of which are the boundary.
    _, fresh = oracle.forward(whole)
    off = torch.zeros(24)
    for stale, true in zip(loaded[0][1][1], fresh[1], strict=True):
        scale = true[:, 26:54].square().sum((0, 2)).mean()
        off += (stale - true[:, at:54]).square().sum((0, 2)) / scale
    off[:8] = 0
    picked = [(at + i, at + i + 1) for i in off.argsort(descending=True)[:4].tolist()]
    expected = oracle.greedy(whole, loaded, [(26, 38), *picked], 6)
    assert answer.token_ids == expected
    assert expected != oracle.greedy(whole, [], [], 6), "the case would show nothing"
