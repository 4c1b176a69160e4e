"""Exact means exact: token for token what stock vLLM answers, on the real model and real text."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kvplug_lab.engine.trial import TrialRequest, TrialResult

Run = Callable[..., TrialResult]

ENGINE = {"max_model_len": 3328, "max_num_batched_tokens": 1024, "num_gpu_blocks_override": 200}
"""A pool of two of the longest requests: cached blocks are evicted all the time."""


@pytest.fixture(scope="module")
def workload(passages: Callable[..., list[str]]) -> list[TrialRequest]:
    """22 prompts of about 200 to 3,000 tokens in three waves; later ones share prefixes."""
    words = [140, 200, 300, 420, 560, 700, 850, 1000, 1150, 1300, 1450, 1600, 1750]
    texts = [passages(1, n, seed=n)[0] for n in words]
    first = [TrialRequest(t, 12, 0) for t in texts]
    shared = [TrialRequest(texts[i] + " Then said the king:", 12, 1) for i in (2, 5, 8, 11, 3)]
    again = [TrialRequest(texts[i], 12, 2) for i in (0, 3, 7, 11)]
    return first + shared + again


@pytest.fixture(scope="module")
def stock(run: Run, smollm2: Path, workload: list[TrialRequest]) -> TrialResult:
    result = run(smollm2, workload, None, **ENGINE)
    assert result.classes["queue"] == ["FreeKVCacheBlockQueue"]
    assert "kvplug" not in result.classes["attention"][0]
    return result


def same(ours: TrialResult, stock: TrialResult) -> None:
    assert [a.token_ids for a in ours.answers] == [a.token_ids for a in stock.answers]
    assert [a.cached_tokens for a in ours.answers] == [a.cached_tokens for a in stock.answers]
    assert len(ours.steps) == len(stock.steps)
    assert [s.held for s in ours.steps] == [s.held for s in stock.steps]


def test_the_workload_is_what_it_says(stock: TrialResult) -> None:
    lengths = [a.prompt_tokens for a in stock.answers]
    assert len(lengths) >= 20
    assert min(lengths) >= 200
    assert 2_800 <= max(lengths) <= 3_300
    assert sum(a.cached_tokens for a in stock.answers) > 1_000


def test_empty_section_is_stock(run: Run, tiny: Path) -> None:
    """On the small model: no class of kvplug's is in use, so none of its code depends on a text."""
    choose = random.Random(5)
    texts = [[choose.randrange(10, 300) for _ in range(n)] for n in (200, 330, 520, 700, 960)]
    work = [TrialRequest(text, 12, wave) for wave in (0, 1) for text in texts]
    engine = {"max_model_len": 1024, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 66}
    stock, ours = (run(tiny, work, section, **engine) for section in (None, {}))
    assert sum(a.cached_tokens for a in stock.answers) > 0
    same(ours, stock)
    assert ours.classes == stock.classes
    assert "no policy configured" in ours.log


@pytest.mark.slow
def test_empty_section_is_stock_on_the_real_model(
    run: Run, smollm2: Path, workload: list[TrialRequest], stock: TrialResult
) -> None:
    ours = run(smollm2, workload, {}, **ENGINE)
    same(ours, stock)
    assert ours.classes == stock.classes
    assert "no policy configured" in ours.log


def test_lru_is_stock(
    run: Run, smollm2: Path, workload: list[TrialRequest], stock: TrialResult
) -> None:
    ours = run(smollm2, workload, {"prefix_cache": "lru"}, **ENGINE)
    same(ours, stock)
    (report,) = ours.reports
    assert report["counters"]["evicted"] > 100
    assert report["counters"]["reordered"] == 0, "every decision is the one stock would make"
    assert report["counters"]["hits"] > 30
    assert report["errors"] == 0


def test_fifo_gives_up_what_came_first_and_lru_what_was_used_last(run: Run, tiny: Path) -> None:
    """A is cached, then B, then A is used again, then C needs room: the two policies differ."""
    choose = random.Random(3)
    a, b, c = ([choose.randrange(10, 300) for _ in range(n)] for n in (321, 322, 450))
    order = [a, b, a, c, b, a]
    work = [TrialRequest(prompt, 4, wave) for wave, prompt in enumerate(order)]
    engine = {"max_model_len": 1024, "num_gpu_blocks_override": 33, "dtype": "float32"}
    lru, fifo = (run(tiny, work, {"prefix_cache": name}, **engine) for name in ("lru", "fifo"))
    assert [x.token_ids for x in lru.answers] == [x.token_ids for x in fifo.answers]
    cached = {name: [x.cached_tokens for x in r.answers] for name, r in (("l", lru), ("f", fifo))}
    assert cached["l"][:4] == cached["f"][:4] == [0, 0, 320, 0]
    assert cached["f"][4] == 320 > cached["l"][4]
    assert lru.reports[0]["counters"]["reordered"] == 0
    assert fifo.reports[0]["counters"]["reordered"] > 0
