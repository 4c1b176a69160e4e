"""A stored run that cannot be loaded is computed: nothing is answered from pages that nobody
filled, and other requests are given none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reuse_oracle import ReuseOracle
from reused_prompt import texts
from test_failing_policy import environment

from kvplug.hosts.vllm.flags import EXTENSION
from kvplug_lab import models
from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

N = 8
"""Tokens of an answer."""
BLOCK = 32


D, Q1, Q2, Q3, FILLER = texts(96, 20, 44, 25, 660, seed=11)
ENGINE: dict[str, Any] = {
    "max_model_len": 672,
    "num_gpu_blocks_override": 22,
    "block_size": BLOCK,
    "dtype": "float32",
    "enforce_eager": True,
    "worker_extension_cls": EXTENSION,
}


def section(**options: Any) -> dict[str, Any]:
    return {
        "reuse": {
            "use": ["structure", "position", {"fails_to_load": options}],
            "approximate": True,
            "segments": {"by": "request", "min_tokens": 16},
            "recompute": {"gaps": 64},
        }
    }


def requests() -> list[TrialRequest]:
    """D is stored and loses its place in the prefix cache; then two take it at once, and a third
    goes on from what one of them left there."""
    parts = {"segments": [len(D)]}
    return [
        TrialRequest(D + Q1, 1, 0, parts),
        TrialRequest(FILLER, 1, 1, {"reuse": "off"}),
        TrialRequest(D + Q1, N, 2, parts),
        TrialRequest(D + Q2, N, 2, parts),
        TrialRequest(D + Q2 + Q3, N, 3, {"reuse": "off"}),
    ]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deep enough for a token's KV to depend on the text before it."""
    return models.tiny_llama(tmp_path_factory.mktemp("deep"), layers=6, seed=2)


@pytest.fixture(scope="module")
def right(deep: Path) -> list[list[int]]:
    oracle = ReuseOracle(deep)
    return [oracle.greedy(r.prompt, [], [], r.max_tokens) for r in requests()]


@pytest.mark.parametrize("ahead", [False, True], ids=["in the step", "a step ahead"])
def test_a_run_that_cannot_be_loaded_is_computed(
    run: Run, run_second: Run, deep: Path, right: list[list[int]], ahead: bool
) -> None:
    """On the first model runner; and on the second, a step ahead, where vLLM waits for the run."""
    start = run_second if ahead else run
    result = start(deep, requests(), section(), ahead=ahead, env=environment(), **ENGINE)
    assert [a.token_ids for a in result.answers] == right
    counters = result.reports[0]["counters"]
    assert counters["refused load failed"] == 1
    assert counters["loaded"] == len(D), "the other one was loaded"
    assert result.reports[0]["errors"] == 1
    refused = [(a.kvplug or {}).get("not_reused") for a in result.answers[2:4]]
    assert sorted(refused, key=bool) == [None, {"load failed": 1}]
    assert result.answers[4].cached_tokens == (len(D + Q2) // BLOCK) * BLOCK


def test_one_of_two_ranks_cannot_load_its_part(
    run: Run, deep: Path, right: list[list[int]]
) -> None:
    """With tokens to compute inside the run: no rank begins a forward that the other does not."""
    shifted = [
        *requests()[:2],
        TrialRequest(Q3 + D + Q1, N, 2, {"segments": [len(Q3), len(D)], "reuse": "approximate"}),
    ]
    result = run(
        deep,
        shifted,
        section(rank=1),
        watched=False,
        env=environment() | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        tensor_parallel_size=2,
        **ENGINE,
    )
    expected = ReuseOracle(deep).greedy(Q3 + D + Q1, [], [], N)
    assert result.answers[2].token_ids == expected
    assert result.answers[2].kvplug["not_reused"] == {"load failed": 1}
