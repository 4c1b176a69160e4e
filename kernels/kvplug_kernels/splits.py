"""How many programs share the tokens of a row and head."""

from __future__ import annotations

import functools

import torch
import triton

PROGRAMS = 2
"""Programs for each multiprocessor: as many as run at once."""

INTERPRETED = 4
"""Programs in all where Triton is interpreted, one after another."""


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for a CPU, on which Triton is interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _programs(device: torch.device) -> int:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return INTERPRETED
    return PROGRAMS * multiprocessors(device)


def tokens_of_split(pairs: int, tokens: int, tile: int, device: torch.device) -> int:
    """Return the tokens that one program takes, a multiple of ``tile``.

    Args:
        pairs: Rows times heads, each of which has splits of its own.
        tokens: Most tokens of a row, at least 1.
        tile: Tokens of a tile.
        device: Where the programs run.
    """
    tiles = -(-tokens // tile)
    splits = min(max(_programs(device) // max(pairs, 1), 1), tiles)
    return -(-tiles // splits) * tile
