"""vLLM's second model runner, and its Triton attention backend with a GPU's page layout, on the
CPU: stock and with deployments whose tokens must not change."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult

ENGINE = {"dtype": "float32", "max_model_len": 1024, "block_size": 32, "enforce_eager": True}


def requests(*lengths: int, generated: int = 12) -> list[TrialRequest]:
    choose = random.Random(0)
    return [TrialRequest([choose.randrange(10, 300) for _ in range(n)], generated) for n in lengths]


def tokens(result: TrialResult) -> list[list[int]]:
    return [a.token_ids for a in result.answers]


@pytest.mark.parametrize("section", [{}, {"prefix_cache": {"use": "lru"}}])
def test_the_same_tokens_as_stock(
    run: Callable[..., TrialResult],
    run_second: Callable[..., TrialResult],
    tiny: Path,
    section: Any,
) -> None:
    asked = requests(3, 150, 320)
    assert tokens(run_second(tiny, asked, section, **ENGINE)) == tokens(run(tiny, asked, **ENGINE))


@pytest.mark.parametrize(
    "section",
    [
        {"sequence": {"use": "sink_window", "sink": 32, "window": 64}},
        {"format": {"use": "int8"}},
    ],
    ids=["sink_window", "int8"],
)
def test_triton_attention_gives_the_first_runners_tokens(
    run: Callable[..., TrialResult],
    run_second: Callable[..., TrialResult],
    tiny: Path,
    section: Any,
) -> None:
    """The backend's class is found again by its name, in a GPU's page layout."""
    asked = requests(3, 170)
    mine = run_second(tiny, asked, section, backend="TRITON_ATTN", **ENGINE)
    assert tokens(mine) == tokens(run(tiny, asked, section, **ENGINE))
