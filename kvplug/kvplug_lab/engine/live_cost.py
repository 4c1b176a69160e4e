"""Measures what the live page costs the scheduler: ``python -m kvplug_lab.engine.live_cost``.

A pool of vLLM's with half of its blocks held, a quarter cached and a quarter empty; requests whose
tables are vLLM's own lists of blocks. Steps are those of `LiveView` alone: the rest of a step is
the same with and without it. Times are the thread's own, in which waiting for a processor that
others use does not count.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import RequestStatus

from kvplug.hosts.vllm.scheduler.kind import SchedulerContext
from kvplug.hosts.vllm.scheduler.live import LiveView

UNWATCHED = 100_000
"""Steps and requests whose mean is taken where nobody watches."""


class _Tables:
    """Stands for a KV-cache manager: tables of requests, some of whose blocks were given back."""

    block_size = 16

    def __init__(self, tables: dict[str, list[Any]]):
        self.req_to_blocks = tables


def _view(blocks: int, requests: int) -> tuple[LiveView, dict[str, Any]]:
    """A view over a pool that is used, and its requests."""
    choose = random.Random(0)
    pool = BlockPool(blocks, True, 16)
    used = pool.get_new_blocks(3 * blocks // 4)
    for block in used:
        pool._insert_block_hash(choose.randbytes(36), block, num_tokens=16)
    held, cached = used[: blocks // 2], used[blocks // 2 :]
    pool.free_blocks(cached)
    size = max(1, len(held) // max(1, requests))
    tables, known = {}, {}
    for i in range(requests):
        name, table = f"cmpl-{i:032x}-0", held[i * size : (i + 1) * size]
        # As a window leaves it: what is between sink and window is the null block.
        tables[name] = [*table[:4], *[pool.null_block] * len(table), *table[4:]]
        known[name] = SimpleNamespace(
            request_id=name,
            status=RequestStatus.RUNNING,
            num_prompt_tokens=16 * size,
            num_computed_tokens=16 * size,
            num_output_tokens=100,
            num_preemptions=0,
            arrival_time=time.time(),
        )
    parallel = SimpleNamespace(data_parallel_index=0)
    model = SimpleNamespace(served_model_name="made up")
    config = SimpleNamespace(parallel_config=parallel, model_config=model)
    engine = SimpleNamespace(block_size=16, layers=())
    context: Any = SimpleNamespace(vllm_config=config, engine=engine, block_bytes=1 << 20)
    assert SchedulerContext.__dataclass_fields__.keys() >= vars(context).keys()
    view = LiveView(context, (), list, SimpleNamespace(kv_cache_groups=[]))
    view._pool, view._managers = pool, [_Tables(tables)]
    for request in known.values():
        view.on_new_request(request)
    return view, known


def _seconds(call: Callable[[], object]) -> float:
    began = time.thread_time()
    call()
    return time.thread_time() - began


def measure(blocks: int, requests: int, snapshots: int) -> dict[str, Any]:
    """Measure what the page costs.

    Args:
        blocks: Blocks of the pool.
        requests: Requests that hold half of them.
        snapshots: Snapshots to take.
    """
    view, known = _view(blocks, requests)
    some = next(iter(known.values()))

    def steps() -> None:
        for _ in range(UNWATCHED):
            view.step(1)

    def arrivals() -> None:
        for _ in range(UNWATCHED):
            view.on_new_request(some)
            view.matched(some, 16, 0)
            view.finished(some)

    idle, arriving = _seconds(steps) / UNWATCHED, _seconds(arrivals) / UNWATCHED
    view.on_new_request(some)
    each: list[float] = []
    totals, built, size = [], [], 0
    for _ in range(snapshots):
        view._sweep, view._due = view._go_through(), True
        own: list[float] = []
        while view._due:
            own.append(_seconds(lambda: view.step(1)))
        each += own
        totals.append(sum(own))
        taken = view._taken
        assert taken is not None
        began = time.thread_time()
        size = len(view._built(taken).json_bytes())
        built.append(time.thread_time() - began)
    return {
        "blocks": blocks,
        "requests": requests,
        "unwatched_step_us": round(1e6 * idle, 2),
        "unwatched_request_us": round(1e6 * arriving, 2),
        "watched_steps_per_snapshot": len(each) // snapshots,
        "watched_step_p50_ms": round(1e3 * statistics.median(each), 2),
        "watched_step_max_ms": round(1e3 * max(each), 2),
        "snapshot_in_steps_ms": round(1e3 * statistics.median(totals), 2),
        "snapshot_in_the_thread_ms": round(1e3 * statistics.median(built), 2),
        "snapshot_bytes": size,
    }


def main(
    blocks: Annotated[int, typer.Option(min=100, help="Blocks of the pool.")] = 100_000,
    requests: Annotated[int, typer.Option(min=1, help="Requests that run.")] = 256,
    snapshots: Annotated[int, typer.Option(min=1, help="Snapshots to take.")] = 30,
) -> None:
    """Measure what the live page costs the scheduler."""
    typer.echo(json.dumps(measure(blocks, requests, snapshots), indent=2))


if __name__ == "__main__":
    typer.run(main)
