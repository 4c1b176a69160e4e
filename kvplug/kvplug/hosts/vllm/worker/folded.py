"""Layers decided together: their caches as one cache with the blocks of all of them.

An eviction between steps is made in all layers of a KV-cache group at once. vLLM allocates the
caches of alike layers at a constant distance in one allocation, so a block of any of them has a
number in one larger cache, and everything that a decision does with rows of one layer it does with
the rows of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision, ResidentBlocks


class Fold:
    """Caches of equal shape at equal distances, as one cache.

    Args:
        cache: The first cache, ``[num_blocks, ...]``.
        distance: Elements from a cache to the next.
        num_layers: Caches.

    Attributes:
        cache: All of them, ``[blocks, ...]``: block ``b`` of layer ``l`` is block
            ``b * per_block + l * per_layer``.
    """

    def __init__(self, cache: Tensor, distance: int, num_layers: int):
        stride = cache.stride(0)
        unit = stride if num_layers == 1 else min(stride, distance)
        self.num_layers = num_layers
        self._per_block = stride // unit
        self._per_layer = distance // unit
        last = (cache.shape[0] - 1) * self._per_block + (num_layers - 1) * self._per_layer
        self.cache = cache.as_strided(
            (last + 1, *cache.shape[1:]), (unit, *cache.stride()[1:]), cache.storage_offset()
        )

    @classmethod
    def of(cls, caches: Sequence[Tensor]) -> Fold | None:
        """Fold caches, or return None where they do not lie so."""
        first = caches[0]
        like = (first.shape, first.stride(), first.dtype, first.untyped_storage().data_ptr())
        for one in caches:
            if (one.shape, one.stride(), one.dtype, one.untyped_storage().data_ptr()) != like:
                return None
        at = [int(one.storage_offset()) for one in caches]
        distance = at[1] - at[0] if len(at) > 1 else 0
        if any(b - a != distance for a, b in pairwise(at)):
            return None
        stride = first.stride(0)
        if len(at) > 1 and (distance <= 0 or max(stride, distance) % min(stride, distance)):
            return None
        return cls(first, distance, len(caches))

    def blocks(self, blocks: Tensor, layers: Tensor) -> Tensor:
        """Number blocks of some layers, ``[layers * rows, n]`` int64.

        Args:
            blocks: Block ids of each row, ``[rows, n]`` int64.
            layers: Layers, ``[layers]`` int64.
        """
        return (blocks * self._per_block + layers[:, None, None] * self._per_layer).flatten(0, 1)

    def resident(self, resident: ResidentBlocks, layers: Tensor) -> ResidentBlocks:
        """Return resident blocks of some rows in some layers, layer by layer."""
        n = layers.shape[0]
        return ResidentBlocks(
            self.blocks(resident.blocks, layers),
            resident.logical.repeat(n, 1),
            resident.mixed.repeat(n),
            resident.tokens,
        )

    def decision(
        self, decision: EvictionDecision, layers: Tensor, rings: Tensor
    ) -> EvictionDecision:
        """Return a decision in some layers.

        Args:
            decision: The decision in one layer.
            layers: Layers, ``[layers]`` int64.
            rings: Where each layer's queries start, ``[layers]`` int64.
        """
        n = layers.shape[0]
        return replace(
            decision,
            resident=self.resident(decision.resident, layers),
            slots=decision.slots * n,
            num_tokens=decision.num_tokens.repeat(n),
            num_prompt_tokens=decision.num_prompt_tokens.repeat(n),
            rings=(decision.rings + rings[:, None]).flatten(),
        )

    def flush(self, flush: AttentionFlush, layers: Tensor, rings: Tensor) -> AttentionFlush:
        """Return a flush in some layers, in one where queries are fresh; see `decision`."""
        n = layers.shape[0]
        old = flush.remembered
        return AttentionFlush(
            self.resident(flush.resident, layers),
            None if old is None else (old + rings[:, None, None]).flatten(0, 1),
            flush.fresh,
            flush.positions.repeat(n, 1),
        )


def chunks(num_layers: int, tokens: int, most: int) -> list[range]:
    """Split layers so that no part has more than ``most`` resident tokens, or is one layer."""
    size = max(1, most // max(tokens, 1))
    return [range(i, min(i + size, num_layers)) for i in range(0, num_layers, size)]


def layer_indices(layers: range, device: torch.device) -> Tensor:
    """Layers as an index, ``[n]`` int64, without a copy from the host."""
    return torch.arange(layers.start, layers.stop, device=device)
