"""One choice per layer, at least cost, within a budget of bytes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from kvplug.errors import KVPlugError


def assign(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Solve the multiple-choice knapsack exactly, by dynamic programming over bytes.

    Args:
        sizes: Bytes of each choice of each layer.
        costs: Its cost, finite; costs of layers add up.
        budget: Bytes there are for all layers.

    Returns:
        The choice of each layer. Of equal costs, one with fewer bytes.

    Raises:
        KVPlugError: Even the smallest choices need more; the message says how much.
    """
    least = sum(min(row) for row in sizes)
    if least > budget:
        raise KVPlugError(
            f"{budget} bytes per token are too few: the smallest candidates take {least}; raise "
            "--bytes-per-token or add a smaller candidate"
        )
    if not all(math.isfinite(cost) for row in costs for cost in row):
        raise KVPlugError("a candidate's cost is not finite: remove it from --candidates")
    unit = functools.reduce(math.gcd, (size for row in sizes for size in row))
    room = min(budget, sum(max(row) for row in sizes)) // unit
    best = np.zeros(room + 1)
    chosen = np.zeros((len(sizes), room + 1), dtype=np.int32)
    for layer, (row, cost) in enumerate(zip(sizes, costs, strict=True)):
        following = np.full(room + 1, np.inf)
        # Smaller choices first, so that a larger one has to be better.
        for choice in sorted(range(len(row)), key=lambda c: (row[c], cost[c])):
            size = row[choice] // unit
            if size > room:
                continue
            reached = np.full(room + 1, np.inf)
            reached[size:] = best[: room + 1 - size] + cost[choice]
            better = reached < following
            following[better] = reached[better]
            chosen[layer][better] = choice
        best = following
    # The fewest bytes at which the least cost is reached.
    at = int(np.argmin(best))
    found: list[int] = []
    for layer in range(len(sizes) - 1, -1, -1):
        choice = int(chosen[layer][at])
        found.append(choice)
        at -= sizes[layer][choice] // unit
    return found[::-1]
