"""vLLM's queue under the verbs of a policy: it decides as the policy `lru` does."""

from __future__ import annotations

import random

from kvplug.contract import EngineView, Released
from kvplug_lab.engine.scale import PolicyCache, measure_named
from kvplug_lab.engine.stock import StockQueue
from kvplug_policies.prefix_cache.lru import Lru


def test_it_evicts_what_lru_evicts() -> None:
    choose = random.Random(3)
    caches = StockQueue(64), PolicyCache(Lru(Lru.Options(), EngineView(16, 64)))
    free = set(range(64))
    for cache in caches:
        cache.release(Released(list(range(64))))
    for _ in range(500):
        if choose.random() < 0.5:
            ids = choose.sample(range(64), 5)
            for cache in caches:
                cache.hit(ids)
        else:
            ids, other = (list(cache.evict(5)) for cache in caches)
            assert ids == other
        assert set(ids) <= free
        for cache in caches:
            cache.release(Released(ids))


def test_it_can_be_measured() -> None:
    assert measure_named("vLLM's queue", 320, 6400)["operations"] == 6400
