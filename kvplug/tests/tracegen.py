"""Made-up traces, for tests: conversations that grow, share beginnings and come back."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np

from kvplug.hosts.trace.traces import Trace


def conversations(
    seed: int, requests: int = 120, longest: int = 9, sessions: int = 12, name: str = "made"
) -> Trace:
    """Requests over a growing prefix tree; every id is one path from the root.

    Each request goes down the tree from the root, mostly along its session's way so far, and
    some are empty.
    """
    choose = random.Random(seed)
    tree: dict[tuple[int, int], int] = {}
    ways: list[list[int]] = [[] for _ in range(sessions)]
    rows: list[list[int]] = []
    session_of = []
    for _ in range(requests):
        session = choose.randrange(sessions)
        way = ways[session]
        if choose.random() < 0.15:
            del way[choose.randint(0, len(way)) :]
        if len(way) >= longest:
            way.clear()
        way += [choose.randrange(3) for _ in range(choose.randint(0, 3))]
        del way[longest:]
        ids, above = [], -1
        for turn in way:
            above = tree.setdefault((above, turn), len(tree))
            ids.append(above)
        rows.append(ids)
        session_of.append(session)
    lengths = [len(r) for r in rows]
    return Trace(
        name=name,
        off=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        ids=np.array([i for r in rows for i in r], dtype=np.int64),
        arrival=np.cumsum([choose.random() for _ in rows]),
        prompt_tokens=np.array([16 * n + 3 for n in lengths], dtype=np.int64),
        output_tokens=np.array([choose.randrange(50) for _ in rows], dtype=np.int64),
        session=np.array(session_of, dtype=np.int64),
        block_size=16,
        num_distinct=len(tree),
    )


def requests_of(trace: Trace) -> list[list[int]]:
    """The block ids of each request."""
    off, ids = trace.off.tolist(), trace.ids.tolist()
    return [ids[a:b] for a, b in pairwise(off)]
