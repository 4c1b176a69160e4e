"""Stored KV in real requests: every token is what an oracle answers that has the same foreign KV,
and requests that did not ask for it answer what a plain model does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reuse_oracle import ReuseOracle

from kvplug.hosts.vllm.flags import EXTENSION
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

CHAIN = ["structure", "position", "mask"]
ASKS = {"reuse": "approximate"}
N = 12
"""Tokens of an answer."""

choose = random.Random(7)


def text(n: int) -> list[int]:
    return [choose.randrange(10, 300) for _ in range(n)]


S, A, B, C, GAP, Q = text(40), text(70), text(90), text(64), text(10), text(20)
WHOLE = S + C + B + GAP + A + Q
LENGTHS = [len(part) for part in (S, C, B, GAP, A)]
AT_B, AT_A = 104, 204


def section(**keys: Any) -> dict[str, Any]:
    return {
        "reuse": {
            "use": CHAIN,
            "approximate": True,
            "segments": {"by": "request", "min_tokens": 16},
        }
        | keys
    }


def learning() -> list[TrialRequest]:
    """Requests that leave S, A, B and C behind."""
    return [
        TrialRequest(S + part, 1, wave, {"segments": [len(S), len(part)]})
        for wave, part in enumerate((A, B, C))
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
    return [
        (AT_B, oracle.rerotated(oracle.stored(S, B), AT_B - len(S))),
        (AT_A, oracle.rerotated(oracle.stored(S, A), AT_A - len(S))),
    ]


ENGINE: dict[str, Any] = {
    "max_model_len": 1024,
    "num_gpu_blocks_override": 128,
    "dtype": "float32",
    "worker_extension_cls": EXTENSION,
}


def test_reuse_answers_what_the_oracle_answers(
    run: Run, deep: Path, oracle: ReuseOracle, loaded: list[tuple[int, Any]]
) -> None:
    ask = {"segments": LENGTHS}
    work = [
        *learning(),
        TrialRequest(WHOLE, N, 3, ASKS | ask),
        TrialRequest(WHOLE, N, 4, ask),
        TrialRequest(WHOLE, N, 5, ask | {"reuse": "off"}),
        TrialRequest(WHOLE, N, 6, ASKS | ask, salt="another tenant"),
        TrialRequest(WHOLE, N, 7, ASKS | ask),
    ]
    result = run(deep, work, section(recompute={"gaps": 64}), **ENGINE)
    plain = oracle.greedy(WHOLE, [], [], N)
    foreign = oracle.greedy(WHOLE, loaded, [(194, 204)], N)
    assert foreign != plain, "the case would show nothing"
    approximate, exact, off, other, again = result.answers[3:]

    assert approximate.token_ids == foreign
    # 96 tokens were in the prefix cache, 8 of C, 90 of B and 70 of A were stored, 10 computed.
    assert approximate.kvplug == {
        "exact": False,
        "reused": 168,
        "recomputed": 10,
        "segments": 3,
        "shifted": 160,
    }
    assert approximate.cached_tokens == 274
    # Approximate blocks never entered the prefix cache: the exact ones end with C.
    assert exact.token_ids == off.token_ids == other.token_ids == plain
    assert exact.cached_tokens == 96
    assert exact.kvplug == {"exact": True, "not_reused": {"approximate not allowed": 1}}
    assert other.cached_tokens == 0, "the tenants' texts are equal and nothing is shared"
    assert again.token_ids == plain, "by then the exact text was in the prefix cache"
    assert again.kvplug is None or again.kvplug["exact"]
    report = result.reports[0]
    assert report["errors"] == 0
    assert report["counters"]["shifted_tokens"] == report["counters"]["corrected"] == 160
    assert report["counters"]["loaded"] == 168
    assert report["counters"]["approximate_requests"] == 1


def test_without_the_model_at_hand_a_run_ends_at_a_gap(
    run: Run, deep: Path, oracle: ReuseOracle, loaded: list[tuple[int, Any]]
) -> None:
    work = [*learning(), TrialRequest(WHOLE, N, 3, ASKS | {"segments": LENGTHS})]
    engine = ENGINE | {"worker_extension_cls": ""}
    result = run(deep, work, section(), **engine)
    assert result.answers[3].token_ids == oracle.greedy(WHOLE, loaded[:1], [], N)
    assert result.answers[3].kvplug["reused"] == 98


def test_boundaries_and_deviating_tokens_are_computed(
    run: Run, deep: Path, oracle: ReuseOracle, loaded: list[tuple[int, Any]]
) -> None:
    """In forwards of at most 48 tokens, with two requests at once in a pool for one and a half."""
    work = [
        *learning(),
        TrialRequest(WHOLE, N, 3, ASKS | {"segments": LENGTHS}),
        TrialRequest(text(150), N, 3),
    ]
    engine = ENGINE | {
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": 17,
        "max_model_len": 512,
    }
    result = run(
        deep, work, section(recompute={"gaps": 64, "boundary": 8, "fraction": 0.2}), **engine
    )
    spans = [(AT_B, AT_B + 8), (194, AT_A + 8)]
    _, fresh = oracle.forward(WHOLE)
    off = torch.zeros(len(WHOLE))
    for start, layers in loaded:
        for stale, true in zip(layers[1], fresh[1], strict=True):
            own = true[:, start : start + stale.shape[1]]
            scale = true[:, AT_B : AT_A + len(A)].square().sum((0, 2)).mean()
            off[start : start + stale.shape[1]] += (stale - own).square().sum((0, 2)) / scale
    for a, b in spans:
        off[a:b] = 0
    # 20% of the 160 approximate tokens, 16 of which are boundaries.
    picked = off.argsort(descending=True)[:16].tolist()
    fresh_spans = [*spans, *((i, i + 1) for i in picked)]
    answer = result.answers[3]
    assert answer.token_ids == oracle.greedy(WHOLE, loaded, fresh_spans, N)
    assert answer.kvplug["recomputed"] == 10 + 16 + 16
    assert result.reports[0]["counters"]["computed"] == 42
