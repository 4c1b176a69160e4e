"""Latest queries of every slot and layer, at addresses that a CUDA graph can keep."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from kvplug.hosts.sizes import query_places
from kvplug.hosts.vllm.worker.held import HeldMemory


class Geometry(NamedTuple):
    """Shape and type of a layer's queries."""

    num_heads: int
    head_size: int
    dtype: torch.dtype


class QueryRings:
    """A ring of the latest queries per layer and slot, and one place per layer for all others.

    Allocated while the model is loaded, so that vLLM's memory profiling counts it.

    Args:
        ring: Queries per slot.
        num_slots: Slots.
        held: The memory of their kind.
    """

    def __init__(self, ring: int, num_slots: int, held: HeldMemory):
        self._held = held
        self.ring = ring
        self.per_layer = query_places(ring, num_slots)
        self._layers: dict[str, tuple[Geometry, int]] = {}
        self._queries: dict[Geometry, Tensor] = {}

    def add(self, name: str, geometry: Geometry, num_layers: int, device: torch.device) -> None:
        """Add a layer.

        Args:
            name: Its name.
            geometry: Shape and type of its queries.
            num_layers: Layers that may be added, room for which the first one takes.
            device: Its device.
        """
        if name in self._layers:
            return
        same = sum(own is geometry or own == geometry for own, _ in self._layers.values())
        if geometry not in self._queries:
            shape = (num_layers, self.per_layer, geometry.num_heads, geometry.head_size)
            self._held.reserve(geometry, prod(shape), geometry.dtype, device)
            self._queries[geometry] = self._held.take(geometry, shape, geometry.dtype, device)
        self._layers[name] = (geometry, same)

    def write(self, name: str, query: Tensor, places: Tensor) -> None:
        """Remember queries of a layer: one launch, which a CUDA graph can hold.

        Args:
            name: The layer.
            query: ``[num_tokens, num_heads, head_size]``.
            places: Place of each, ``[>= num_tokens]`` int64; that of queries to be forgotten is
                the last one of the layer.
        """
        self.of(name).index_copy_(0, places[: query.shape[0]], query)

    def of(self, name: str) -> Tensor:
        """Queries of a layer, ``[per_layer, num_heads, head_size]``."""
        geometry, index = self._layers[name]
        return self._queries[geometry][index]

    def all_like(self, name: str) -> Tensor:
        """Queries of all layers of one geometry, ``[n * per_layer, num_heads, head_size]``."""
        geometry, _ = self._layers[name]
        return self._queries[geometry].flatten(0, 1)

    def first(self, name: str) -> int:
        """Index of a layer's first place in `all_like`."""
        return self._layers[name][1] * self.per_layer
