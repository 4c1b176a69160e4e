"""The plugin of docs/examples/kvplug-recency-norm, installed like anybody's, on a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult
from kvplug_lab.models import tiny_llama

BLOCK = 32
PROMPT = [1 + (61 * i + i * i) % 300 for i in range(640)]
SECTION = {"use": "recency_norm", "budget": 128, "interval": BLOCK, "recent": 16}

pytestmark = pytest.mark.engine

Start = Callable[[dict[str, Any] | None], TrialResult]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), dtype="float32")


@pytest.fixture(scope="module")
def start(run: Callable[..., TrialResult], model: Path) -> Start:
    def started(section: dict[str, Any] | None) -> TrialResult:
        requests = [TrialRequest(PROMPT, 64), TrialRequest(PROMPT[:60], 8)]
        engine = {"dtype": "float32", "block_size": BLOCK, "max_model_len": 1024}
        return run(model, requests, None if section is None else {"sequence": section}, **engine)

    return started


def test_it_decides_what_a_real_engine_keeps(start: Start) -> None:
    result = start(SECTION)
    (report,) = result.reports
    assert (report["name"], report["errors"]) == ("recency_norm", 0)
    assert report["counters"]["fallbacks"] == 0, "the policy was retired"
    assert report["counters"]["evictions"] == 2
    assert report["counters"]["freed"] > 0
    long, short = result.answers
    assert long.kvplug is not None
    assert long.kvplug["evictions"] == [[640, 128], [672, 128]]
    assert short.kvplug is None


@pytest.mark.slow
def test_the_option_reaches_the_engine_and_a_budget_beyond_the_text_is_exact(start: Start) -> None:
    stock = start(None)
    roomy = start(SECTION | {"budget": 1024})
    assert [a.token_ids for a in roomy.answers] == [a.token_ids for a in stock.answers]
    ages = [start(SECTION | {"half_life": n}).answers[0].token_ids for n in (1, 1 << 20)]
    assert ages[0] != ages[1]
