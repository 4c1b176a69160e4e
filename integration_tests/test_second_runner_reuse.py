"""Stored KV on vLLM's second model runner: the oracle's tokens, with what is computed inside a run,
and answers that are watched."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reuse_oracle import ReuseOracle

from kvplug.hosts.vllm.flags import EXTENSION, GUARD
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ASKS = {"reuse": "approximate"}
N = 8
"""Tokens of an answer."""


def texts(*lengths: int, seed: int) -> list[list[int]]:
    choose = random.Random(seed)
    return [[choose.randrange(10, 300) for _ in range(n)] for n in lengths]


S, A, B, GAP, Q = texts(40, 70, 90, 10, 20, seed=7)
WHOLE = S + B + GAP + A + Q
LENGTHS = [len(part) for part in (S, B, GAP, A)]
AT_A = len(S) + len(B) + len(GAP)
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
        async_scheduling=True,
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
