"""The plugin of docs/examples/kvplug-recency-norm, installed like anybody's, on a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult, TrialSpec, run_fresh
from kvplug_lab.models import tiny_llama

BLOCK = 32
PROMPT = [1 + (61 * i + i * i) % 300 for i in range(640)]
SECTION = {"use": "recency_norm", "budget": 128, "interval": BLOCK, "recent": 16}

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), dtype="float32")


def start(model: Path, section: dict[str, Any] | None) -> TrialResult:
    engine = {"dtype": "float32", "block_size": BLOCK, "max_model_len": 1024}
    requests = [TrialRequest(PROMPT, 64), TrialRequest(PROMPT[:60], 8)]
    return run_fresh(
        TrialSpec(
            str(model),
            requests,
            engine=engine,
            section=None if section is None else {"sequence": section},
        )
    )


def test_it_decides_what_a_real_engine_keeps(model: Path) -> None:
    result = start(model, SECTION)
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
def test_the_knob_reaches_the_engine_and_a_budget_beyond_the_text_is_exact(model: Path) -> None:
    stock = start(model, None)
    roomy = start(model, SECTION | {"budget": 1024})
    assert [a.token_ids for a in roomy.answers] == [a.token_ids for a in stock.answers]
    ages = [start(model, SECTION | {"half_life": n}).answers[0].token_ids for n in (1, 1 << 20)]
    assert ages[0] != ages[1]
