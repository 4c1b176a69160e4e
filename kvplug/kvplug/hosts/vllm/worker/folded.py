"""Layers decided together: their caches as one cache with the blocks of all of them.

An eviction between steps is made in all layers of a KV-cache group at once. vLLM allocates the
caches of alike layers at a constant distance in one allocation, so a block of any of them has a
number in one larger cache, and everything that a decision does with rows of one layer it does with
the rows of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision, ResidentBlocks
from kvplug_kernels.paging import FoldedLayers


class Fold:
    """Layers whose rows are decided together.

    Args:
        layers: Their caches as one.

    Attributes:
        cache: All of them, ``[num_blocks, kv_heads, block_size, content]``.
        num_layers: Layers.
    """

    def __init__(self, layers: FoldedLayers):
        self.cache = layers.pages
        self.num_layers = layers.num_layers
        self._layers = layers

    @classmethod
    def of(cls, caches: Sequence[Tensor]) -> Fold | None:
        """Fold caches, or return None where they do not lie at equal distances."""
        layers = FoldedLayers.of(caches)
        return None if layers is None else cls(layers)

    def blocks(self, blocks: Tensor, layers: Tensor) -> Tensor:
        """Number blocks of some layers, ``[layers * rows, n]`` int64.

        Args:
            blocks: Block ids of each row, ``[rows, n]`` int64.
            layers: Layers, ``[layers]`` int64.
        """
        return (
            blocks * self._layers.block_step + layers[:, None, None] * self._layers.layer_step
        ).flatten(0, 1)

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
            at=decision.at * n,
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
