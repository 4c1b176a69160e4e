"""Costs of a prefix-cache policy at a million blocks: operations per second, bytes per block.

``python -m kvplug_lab.engine.scale`` gives every policy the same load, each in a process of its
own, and vLLM's queue of free blocks with them where vLLM is installed. An operation is one block
released, hit or evicted. The cache is filled first; then requests of 32 blocks either hit cached
blocks, a few of them most of the time, and release them, or evict and release new content in equal
number. Counted is processor time inside the policy's calls, and the growth of the process's
resident memory from before the policy was built to the end, keys it keeps included.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json as json_module
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from kvplug.contract import (
    BlockFact,
    EngineView,
    Feature,
    Kind,
    PrefixCachePolicy,
    Released,
    RequestView,
)
from kvplug.registry import plugins

REQUEST = 32
"""Blocks of a request."""

KEY_BYTES = 36
"""Bytes of a key in vLLM: a SHA-256 and the number of the group."""

HITS = 0.5
"""Share of requests that hit."""

SESSIONS = 1000
STOCK = "vLLM's queue"


class Cache(Protocol):
    """The measured object: a policy, or vLLM's own queue."""

    def release(self, released: Released) -> None: ...

    def hit(self, ids: Sequence[int]) -> None: ...

    def evict(self, n: int) -> Sequence[int]: ...


class PolicyCache:
    """A policy as a cache: victims are evicted as they are named."""

    def __init__(self, policy: PrefixCachePolicy):
        self._policy = policy
        self.release = policy.on_release
        self.hit = policy.on_hit

    def evict(self, n: int) -> Sequence[int]:
        victims = self._policy.victims(n)
        self._policy.on_remove(victims)
        return victims


def measure(
    build: Callable[[], Cache], needs: frozenset[BlockFact], blocks: int, operations: int
) -> dict[str, float]:
    """Put one cache under the load.

    Args:
        build: Makes the cache.
        needs: Facts it is given.
        blocks: Its size.
        operations: Blocks released, hit and evicted in all, the filling included.

    Returns:
        ``operations``, ``seconds`` of processor time, ``operations_per_second``,
        ``bytes_per_block``.
    """
    blocks -= blocks % REQUEST
    choose = np.random.default_rng(0)
    slots = list(range(blocks))
    depths = list(range(REQUEST - 1, -1, -1)) if BlockFact.POSITION in needs else None
    with_parents, with_keys = BlockFact.PARENT in needs, BlockFact.KEY in needs
    keys = [i.to_bytes(KEY_BYTES, "little") for i in range(blocks)]
    made = blocks
    views: list[RequestView | None] = [None]
    if BlockFact.REQUEST in needs:
        views = [
            RequestView(str(i), REQUEST * 16, session_id=str(i), arrival=float(i))
            for i in range(SESSIONS)
        ]
    steps = max(0, operations - blocks) // (2 * REQUEST)
    hits = choose.random(steps) < HITS

    def released(ids: Sequence[int], turn: int) -> Released:
        return Released(
            ids,
            depths,
            [keys[i] for i in ids] if with_keys else None,
            views[turn % len(views)],
            [*ids[1:], -1] if with_parents else None,
        )

    clock = time.process_time_ns
    spent = 0
    before = _resident()
    cache = build()
    for first in range(0, blocks, REQUEST):
        what = released(slots[first : first + REQUEST], first)
        start = clock()
        cache.release(what)
        spent += clock() - start
    for turn, hit in enumerate(hits.tolist()):
        if hit:
            # The cube gathers most hits on a part of the blocks; odd steps keep them distinct.
            at = int(blocks * choose.random() ** 3)
            ids = [slots[(at + i * 37) % blocks] for i in range(REQUEST)]
            start = clock()
            cache.hit(ids)
            spent += clock() - start
        else:
            start = clock()
            gone = cache.evict(REQUEST)
            spent += clock() - start
            ids = [slots[i] for i in gone]
            for i in ids:
                keys[i] = made.to_bytes(KEY_BYTES, "little")
                made += 1
        what = released(ids, turn)
        start = clock()
        cache.release(what)
        spent += clock() - start
    done = blocks + len(hits) * 2 * REQUEST
    return {
        "operations": done,
        "seconds": spent / 1e9,
        "operations_per_second": done / (spent / 1e9),
        "bytes_per_block": max(0, _resident() - before) / blocks,
    }


def _resident() -> int:
    """Resident bytes of this process, freed memory given back first."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def measure_named(name: str, blocks: int, operations: int) -> dict[str, float]:
    """`measure` a registered policy, or vLLM's queue under the name `STOCK`."""
    if name == STOCK:
        from kvplug_lab.engine.stock import StockQueue

        return measure(lambda: StockQueue(blocks), frozenset(), blocks, operations)
    registry = plugins().registry
    policy = registry.get(Kind.PREFIX_CACHE, name)
    if policy is None or not issubclass(policy, PrefixCachePolicy):
        fix = registry.choose(Kind.PREFIX_CACHE, name)
        raise typer.BadParameter(f"unknown prefix_cache policy {name!r}. Fix: {fix}.")
    chosen: type[PrefixCachePolicy] = policy
    engine = EngineView(16, blocks, features=frozenset({Feature.PREFIX_CACHING}), host="trace")
    return measure(
        lambda: PolicyCache(chosen(chosen.Options(), engine)), chosen.needs, blocks, operations
    )


def _in_a_process(name: str, blocks: int, operations: int) -> dict[str, float] | str:
    command = [sys.executable, "-m", "kvplug_lab.engine.scale", "--one", name]
    command += ["--blocks", str(blocks), "--operations", str(operations)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
    found: dict[str, float] = json_module.loads(done.stdout.splitlines()[-1])
    return found


def main(
    policy: Annotated[str | None, typer.Option(help="Policies, a,b; all by default.")] = None,
    blocks: Annotated[int, typer.Option(min=REQUEST, help="Blocks of the cache.")] = 1_000_000,
    operations: Annotated[int, typer.Option(min=1, help="Operations on blocks.")] = 10_000_000,
    json: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure prefix-cache policies at scale, beside vLLM's own queue."""
    if one is not None:
        print(json_module.dumps(measure_named(one, blocks, operations)))
        return
    names = policy.split(",") if policy else plugins().registry.names(Kind.PREFIX_CACHE)
    found: dict[str, Any] = {}
    for name in [STOCK, *names]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        found[name] = _in_a_process(name, blocks, operations)
    table = Table(title=f"{blocks:,} blocks, {operations:,} operations on blocks")
    for column in ("policy", "operations/s", "us each", "of vLLM's queue", "bytes a block"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    stock = found[STOCK]
    for name, row in found.items():
        if isinstance(row, str):
            table.add_row(name, f"not measured: {row}")
            continue
        speed = row["operations_per_second"]
        share = "-" if isinstance(stock, str) else f"{speed / stock['operations_per_second']:.2f}"
        table.add_row(
            name, f"{speed:,.0f}", f"{1e6 / speed:.2f}", share, f"{row['bytes_per_block']:,.0f}"
        )
    Console(soft_wrap=True).print(table)
    if json is not None:
        text = json_module.dumps({"blocks": blocks, "policies": found}, indent=1)
        json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
