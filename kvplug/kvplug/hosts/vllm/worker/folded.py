"""Layers decided together: their caches as one cache with the blocks of all of them.

An eviction between steps is made in all layers of a KV-cache group at once. vLLM allocates the
caches of alike layers at a constant distance in one allocation, so a block of any of them has a
number in one larger cache, and everything that a decision does with rows of one layer it does with
the rows of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision, ResidentBlocks
from kvplug_kernels.paging import FoldedLayers
from kvplug_kernels.resident_tokens import LayerSlice


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

    def resident(self, resident: ResidentBlocks, layers: range) -> ResidentBlocks:
        """Return resident blocks of some rows in some layers, layer by layer."""
        step, layer_step = self._layers.block_step, self._layers.layer_step
        own = LayerSlice(layers.start, len(layers), step, layer_step)
        return replace(resident, layers=own)

    def decision(
        self, decision: EvictionDecision, layers: range, starts: Tensor
    ) -> EvictionDecision:
        """Return a decision in some layers.

        Args:
            decision: The decision in one layer.
            layers: The layers.
            starts: Where each layer's queries start, ``[num_layers]`` int64.
        """
        n = len(layers)
        rows = n * len(decision.slots)
        return replace(
            decision,
            resident=self.resident(decision.resident, layers),
            slots=decision.slots * n,
            at=decision.at * n,
            shown_num_tokens=decision.shown_num_tokens[:rows],
            num_prompt_tokens=decision.num_prompt_tokens[:rows],
            starts=starts,
        )

    def flush(self, flush: AttentionFlush, layers: range, starts: Tensor) -> AttentionFlush:
        """Return a flush in some layers, in one where queries are fresh; see `decision`."""
        n, old, positions = len(layers), flush.remembered, flush.positions
        own = starts[layers.start : layers.stop, None, None]
        return replace(
            flush,
            resident=self.resident(flush.resident, layers),
            remembered=None if old is None else (old + own).flatten(0, 1),
            positions=None if positions is None else positions.repeat(n, 1),
            starts=starts,
        )


def chunks(num_layers: int, tokens: int, most: int) -> list[range]:
    """Split layers so that no part has more than ``most`` resident tokens, or is one layer."""
    size = max(1, most // max(tokens, 1))
    return [range(i, min(i + size, num_layers)) for i in range(0, num_layers, size)]
