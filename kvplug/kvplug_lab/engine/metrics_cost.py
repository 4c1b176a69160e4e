"""What metrics cost, without an engine: ``python -m kvplug_lab.engine.metrics_cost``."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from kvplug.hosts.vllm.metrics import Exposition
from kvplug.hosts.vllm.scheduler.block_pool import LOOKED_AT, BlockPool
from kvplug.hosts.vllm.scheduler.measured import HookTimes, Measurements
from kvplug.observe.catalogue import Hook, catalogue
from kvplug.observe.metric import Named, Sample, Type
from kvplug.parser import load_deployment

SECTION = {
    "prefix_cache": "tree",
    "format": "int8",
    "tiers": [{"host": {"size": "1GiB"}}, {"disk": {"path": "/tmp/kvplug", "size": "1GiB"}}],
}
BLOCKS = 100_000
ROUNDS = 15


class _All:
    """Every series of a deployment, each with a new value."""

    def __init__(self) -> None:
        deployment = load_deployment(SECTION)
        named = Named.of(deployment)
        self._series = [
            (metric, labels)
            for metric in catalogue().values()
            if metric.is_in(deployment) and metric.type is not Type.HISTOGRAM
            for labels in metric.series(named)
        ]
        self._now = 0

    def samples(self) -> Iterator[Sample]:
        """Each one more than before."""
        self._now += 1
        for metric, labels in self._series:
            yield metric.of(self._now, *labels)

    def __len__(self) -> int:
        return len(self._series)


def measure() -> dict[str, float]:
    """Microseconds of each part, by name; the median of several rounds."""
    times, hooks = Measurements(), HookTimes()
    times.measured.append(hooks)
    times.increments(False)
    times._due = time.monotonic() + 3600
    everything, changed = Measurements(), _All()
    everything.measured.append(changed)
    still = Measurements()
    last = list(_All().samples())
    still.measured.append(SimpleNamespace(samples=lambda: last))
    blocks = [KVCacheBlock(i) for i in range(BLOCKS)]
    pool = SimpleNamespace(
        blocks=blocks, num_gpu_blocks=BLOCKS, get_num_free_blocks=lambda: BLOCKS - 1
    )
    looked = BlockPool(pool, 16, lambda: None)
    registry = CollectorRegistry()
    types = {of: partial(of, registry=registry) for of in (Counter, Gauge, Histogram)}
    exposition = Exposition(
        catalogue().values(), load_deployment(SECTION), types, ["model_name", "engine"], {0: [1, 2]}
    )
    increments = everything.increments(False)

    def hook() -> None:
        hooks.add(Hook.STEP, time.perf_counter())

    return {
        "one call of a hook, timed": _of(hook, 20_000),
        "a step in which nothing is due": _of(lambda: times.increments(True), 20_000),
        f"a look at {len(changed)} series, none of them new": _of(
            lambda: still.increments(False), 100
        ),
        f"a look at {len(changed)} series, all of them new": _of(
            lambda: everything.increments(False), 100
        ),
        f"a look at {LOOKED_AT:,} of {BLOCKS:,} blocks": _of(lambda: list(looked.samples()), 100),
        f"{len(changed)} series in the API server": _of(lambda: exposition.add(increments), 100),
    }


def _of(call: Callable[[], object], times: int) -> float:
    """Microseconds of a call, of the processor's time: others may be at work."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(times):
            call()
        rounds.append((time.thread_time() - began) / times)
    return 1e6 * statistics.median(rounds)


if __name__ == "__main__":
    print(json.dumps({name: round(value, 2) for name, value in measure().items()}, indent=2))
