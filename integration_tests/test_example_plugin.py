"""The plugin of docs/examples/kvplug-mru, installed like anybody's, on a real engine."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult
from kvplug_lab.models import tiny_llama

BLOCK = 32
ROUNDS, PROMPTS = 3, 4
PROMPT_BLOCKS = 4

pytestmark = pytest.mark.engine

Cycle = Callable[..., TrialResult]


def prompt(which: int) -> list[int]:
    """Four blocks and one token, shared with no other prompt."""
    return [1 + (which * 61 + 7 * i) % 300 for i in range(PROMPT_BLOCKS * BLOCK + 1)]


@pytest.fixture(scope="module")
def cycle(run: Callable[..., TrialResult], tmp_path_factory: pytest.TempPathFactory) -> Cycle:
    """Four prompts in a cycle, one after another, on a pool that holds three of them."""
    model = tiny_llama(tmp_path_factory.mktemp("model"), dtype="float32")
    requests = [
        TrialRequest(prompt(i % PROMPTS), max_tokens=4, wave=i) for i in range(ROUNDS * PROMPTS)
    ]
    engine = {
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": (PROMPT_BLOCKS + 1) * BLOCK,
        "num_gpu_blocks_override": 3 * PROMPT_BLOCKS + 2,
    }

    @functools.cache
    def start(policy: str, protect: int | None = None) -> TrialResult:
        options = {} if protect is None else {"protect": protect}
        section = {"prefix_cache": {"use": policy, **options}} if policy else None
        return run(model, requests, section, **engine)

    return start


def cached(result: TrialResult) -> list[int]:
    return [a.cached_tokens for a in result.answers]


def test_mru_decides_what_a_real_engine_evicts(cycle: Cycle) -> None:
    result = cycle("mru")
    (report,) = result.reports
    assert (report["name"], report["errors"]) == ("mru", 0)
    assert report["counters"]["evicted"] > 0
    assert report["counters"]["reordered"] > 0, "the order is stock's"
    assert sum(cached(result)) > 0


@pytest.mark.slow
def test_the_outputs_are_those_of_stock_and_the_order_is_not(cycle: Cycle) -> None:
    stock, lru, mru = cycle(""), cycle("lru"), cycle("mru")

    # A cycle longer than the cache is where the stock order never hits.
    assert cached(stock) == [0] * len(stock.answers)
    assert sum(cached(mru)) > 0

    # kvplug's own LRU is stock's order, so the counter can tell the two apart.
    (report,) = lru.reports
    assert report["counters"]["evicted"] > 0
    assert report["counters"]["reordered"] == 0
    assert cached(lru) == cached(stock)

    # Exact: a policy of this kind changes what is computed again, never what comes out.
    tokens = [a.token_ids for a in stock.answers]
    assert [a.token_ids for a in mru.answers] == tokens
    assert [a.token_ids for a in lru.answers] == tokens


@pytest.mark.slow
def test_the_option_reaches_the_engine(cycle: Cycle) -> None:
    """All blocks protected: the oldest of them goes, and a cycle never hits again."""
    result = cycle("mru", protect=1000)
    (report,) = result.reports
    assert report["counters"]["evicted"] > 0
    assert report["errors"] == 0
    assert sum(cached(result)) == 0
