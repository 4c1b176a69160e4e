"""Cost of knowing why prompts miss: time per eviction and per request, bytes per block.

``python -m kvplug_lab.engine.miss_cost`` drives `kvplug.observe.misses.Misses` without an engine.
Requests of ``--prompt`` blocks arrive at a full pool: half of them share the first half of their
prompt with an earlier one, a part of which was evicted, and each evicts as many blocks as it
brings. Counted are the processor time of each call, whose median is stated, and by `tracemalloc`,
in a second run, the bytes that full tables hold.
"""

from __future__ import annotations

import hashlib
import json as json_module
import statistics
import time
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from kvplug.observe.misses import Misses

SHARED = 0.5


def measure(blocks: int, block_size: int, prompt: int, requests: int) -> dict[str, float]:
    """Put the tables under the load.

    Args:
        blocks: Blocks of the pool.
        block_size: Tokens of a block.
        prompt: Full blocks of a prompt.
        requests: Requests.

    Returns:
        Microseconds ``per_eviction``, ``per_request`` (lookup, admission and end) and
        ``per_missed_block``, medians of requests; ``missed`` blocks of all.
    """
    choose = np.random.default_rng(0)
    misses = Misses(blocks, block_size)
    cached: OrderedDict[bytes, None] = OrderedDict()
    texts: list[list[int]] = []
    clock = time.process_time_ns
    evicting: list[float] = []
    asking: list[float] = []
    missing: list[float] = []
    missed = 0
    for number in range(requests):
        tokens: list[int] = choose.integers(50_000, size=prompt * block_size).tolist()
        if texts and choose.random() < SHARED:
            half = prompt // 2 * block_size
            tokens[:half] = texts[choose.integers(len(texts))][:half]
        texts = [*texts[-63:], tokens]
        hashes = _hashes(tokens, block_size)
        hit = 0
        while hit < prompt - 1 and hashes[hit] in cached:
            hit += 1
        room = len(cached) + prompt - hit - blocks
        victims = [one for one, _ in zip(cached, range(room), strict=False)] if room > 0 else []
        begin = clock()
        serial = misses.looked_up()
        middle = clock()
        for one in victims:
            misses.evicted(one)
        end = clock()
        asked = middle - begin
        if victims:
            evicting.append((end - middle) / len(victims))
        for one in victims:
            del cached[one]
        begin = clock()
        found = misses.admitted(
            str(number),
            tokens,
            hashes,
            prompt_tokens=len(tokens),
            served=hit * block_size,
            serial=serial,
            cached=lambda block, of=hashes: of[block] in cached,  # type: ignore[misc]
            computed=lambda: prompt * block_size,
        )
        misses.ended(str(number), tokens, hashes, prompt)
        asked += clock() - begin
        asking.append(asked)
        count = sum(found.causes.values())
        missing.append(asked / count)
        missed += count
        for one in hashes:
            cached[one] = None
            cached.move_to_end(one)
        misses.next_step(number + 2)
    return {
        "per_eviction": statistics.median(evicting or [0]) / 1000,
        "per_request": statistics.median(asking) / 1000,
        "per_missed_block": statistics.median(missing) / 1000,
        "missed": missed,
    }


def bytes_per_block(blocks: int, block_size: int, prompt: int) -> float:
    """Bytes that full tables hold, for each block of a pool; hashes and tokens included."""
    tracemalloc.start()
    try:
        misses = Misses(blocks, block_size)
        before = tracemalloc.get_traced_memory()[0]
        for number in range(2 * misses.limit // prompt + 2):
            start = number * prompt * block_size
            tokens = range(start, start + prompt * block_size)
            hashes = _hashes(list(tokens), block_size)
            misses.admitted(
                str(number),
                tokens,
                hashes,
                prompt_tokens=len(tokens),
                served=0,
                serial=misses.looked_up(),
                cached=lambda _: False,
                computed=lambda: prompt * block_size,
            )
            misses.ended(str(number), tokens, hashes, prompt)
            for one in hashes:
                misses.evicted(bytes(bytearray(one)))
            misses.next_step(number + 2)
        del tokens, hashes
        return (tracemalloc.get_traced_memory()[0] - before) / blocks
    finally:
        tracemalloc.stop()


def _hashes(tokens: list[int], block_size: int) -> list[bytes]:
    found, before = [], b""
    for start in range(0, len(tokens), block_size):
        text = repr(tokens[start : start + block_size]).encode()
        before = hashlib.sha256(before + text).digest()
        found.append(before)
    return found


def main(
    blocks: Annotated[int, typer.Option(min=64, help="Blocks of the pool.")] = 20_000,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 16,
    prompt: Annotated[int, typer.Option(min=2, help="Full blocks of a prompt.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Requests.")] = 1000,
    json: Annotated[Path | None, typer.Option(help="File for the figures.")] = None,
) -> None:
    """Measure what knowing why prompts miss costs."""
    found = measure(blocks, block_size, prompt, requests)
    found["bytes_per_block"] = bytes_per_block(min(blocks, 20_000), block_size, prompt)
    typer.echo(f"an eviction: {found['per_eviction']:.2f} us")
    typer.echo(
        f"a request of {prompt} blocks: {found['per_request']:.0f} us, "
        f"{found['per_missed_block']:.2f} us for each block it missed"
    )
    typer.echo(f"tables, when full: {found['bytes_per_block']:,.0f} bytes for a block of the pool")
    if json is not None:
        json.write_text(json_module.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
