"""Chunks out of pages and into them: the planes of all layers together.

A chunk is a run of consecutive tokens in whole blocks; all chunks of a call go through each layer
at once, because a call per chunk and layer costs more than the bytes do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvplug.contract.transfer import PlaneShape
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug.hosts.vllm.worker.segments import LayerPages
from kvplug.hosts.vllm.worker.tier_line import Line, Slot, line_of
from kvplug_kernels.move_tokens import LayerCaches
from kvplug_kernels.pack_pages import Packed, pack_pages, unpack_pages

Chunk = tuple[Any, int]
"""Ids of a chunk's blocks, ``[n]`` int64 as an array or a tensor, and its tokens."""

Planes = dict[str, Tensor]
"""Planes of a chunk by name: ``[layers, tokens, heads, width]``; see `TransferCodec.encode`."""


@dataclass(frozen=True, slots=True)
class _Plane:
    """A plane over all layers.

    Attributes:
        dtype: Its type.
        shape: Heads and width of a token; the largest of all layers.
        own: The same of each layer.
    """

    dtype: torch.dtype
    shape: tuple[int, int]
    own: tuple[tuple[int, int], ...]


class Transfer:
    """Chunks on their way between pages and host memory.

    Attributes:
        count: Chunks that were taken, the first of the call.
    """

    def __init__(self, count: int, planes: Sequence[Planes] = ()) -> None:
        self.count = count
        self._planes = list(planes)

    def ready(self) -> bool:
        """Tell whether it is complete, without waiting for it."""
        return True

    def planes(self) -> list[Planes]:
        """Return the planes read, in host memory; waits for them if they are not ready."""
        return self._planes

    def release(self) -> None:
        """Let the memory of the planes be used again: they were encoded, or copied elsewhere."""
        self._planes = []


class _Under(Transfer):
    """Chunks on their way over a line.

    Args:
        count: Chunks that were taken.
        line: The line.
        slot: Its staging memory, which they have until they are released; None for none.
        planes: Their planes in host memory, once they are there.
    """

    def __init__(self, count: int, line: Line, slot: Slot | None, planes: Sequence[Planes] = ()):
        super().__init__(count, planes)
        self._line = line
        self._slot = slot
        self._mark = line.mark()

    def ready(self) -> bool:
        return self._mark.query()

    def planes(self) -> list[Planes]:
        if not self._mark.query():
            self._mark.synchronize()
        return super().planes()

    def release(self) -> None:
        super().release()
        if self._slot is not None:
            # A copy that is still under way reads or writes the slot.
            if not self._mark.query():
                self._mark.synchronize()
            self._line.give_back(self._slot)
            self._slot = None


class PageCopier:
    """Reads chunks out of a worker's pages and writes them into others.

    On an accelerator chunks are gathered on the stream that computes, before the step that may
    overwrite them, into staging memory of the device: a copy within the device, which is short.
    From there they go to pinned host memory on a stream of their own, while the step computes.
    Chunks that come back are copied and scattered on that stream, after all that was computed when
    they were ordered: their blocks belong to requests that wait until `Transfer.ready`. The host
    waits for neither. A call takes as many chunks as its staging memory holds.

    Args:
        layers: Pages of each layer by name, in the order of the model; their caches have the same
            blocks.
        line: The line to host memory; None for that of the pages' device, which on a CPU is none.

    Raises:
        KVPlugError: A format stores some of the layers and not others.
    """

    def __init__(self, layers: Mapping[str, LayerPages], line: Line | None = None):
        self._layers = tuple(layers.values())
        self._planes = _planes_of(self._layers)
        self._device = self._layers[0].device
        self._line = line or line_of(self._device)
        self._fused: list[_Fused] | None = None
        if self._line is not None:
            self._fused = _fused(self._layers)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._layers[0].block_size

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's planes in all layers."""
        sizes = (p.dtype.itemsize * p.shape[0] * p.shape[1] for p in self._planes.values())
        return len(self._layers) * sum(sizes)

    def shapes(self, tokens: int) -> dict[str, PlaneShape]:
        """Return type and shape of the planes of a chunk of so many tokens."""
        return {
            name: PlaneShape(
                str(plane.dtype).removeprefix("torch."), (len(self._layers), tokens, *plane.shape)
            )
            for name, plane in self._planes.items()
        }

    def read(self, chunks: Sequence[Chunk]) -> list[Planes]:
        """Read chunks: the planes of each, as `TransferCodec.encode` takes them.

        Args:
            chunks: Blocks and tokens of each.

        Returns:
            Planes on the pages' device. Those of one call share memory.
        """
        if not chunks:
            return []
        blocks, counts = self._blocks(chunks)
        spans = [len(one) * self.block_size for one in blocks]
        flat = torch.cat(blocks)
        alike = len(set(counts)) == 1 and len(set(spans)) == 1
        made: dict[str, Tensor | list[Tensor]] = {}
        for index, layer in enumerate(self._layers):
            found = layer.stored(flat, 0, sum(spans))
            for name, tensor in found.items():
                into = made.get(name)
                if into is None:
                    into = made[name] = self._room(name, counts, alike, tensor.device)
                heads, width = tensor.shape[1:]
                if isinstance(into, Tensor):
                    parts = tensor.view(len(chunks), spans[0], heads, width)
                    into[:, index, :, :heads, :width] = parts[:, : counts[0]]
                    continue
                for one, part in zip(into, torch.split(tensor, spans), strict=True):
                    one[index, :, :heads, :width] = part[: one.shape[1]]
        return [{name: into[i] for name, into in made.items()} for i in range(len(chunks))]

    def write(self, chunks: Sequence[Chunk], planes: Sequence[Mapping[str, Tensor]]) -> None:
        """Write chunks; the inverse of `read`.

        Args:
            chunks: Blocks and tokens of each.
            planes: Planes of each, as `read` gave them, in host memory or on the pages' device.
        """
        if not chunks:
            return
        blocks, counts = self._blocks(chunks)
        size = self.block_size
        within = torch.arange(size)
        slots = torch.cat(
            [
                (own[:, None] * size + within).flatten()[:count]
                for own, count in zip(blocks, counts, strict=True)
            ]
        )
        for index, layer in enumerate(self._layers):
            own = {}
            for name, plane in self._planes.items():
                heads, width = plane.own[index]
                parts = [one[name][index, :, :heads, :width] for one in planes]
                own[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
            layer.put(slots, own)

    def begin_read(self, chunks: Sequence[Chunk]) -> Transfer:
        """Read chunks into host memory, without waiting for an accelerator.

        Returns:
            The transfer of the first chunks, as many as there is staging memory for.
        """
        if self._line is None:
            return Transfer(len(chunks), self.read(chunks))
        count, slot = self._take(chunks, out=True)
        if slot is None:
            return Transfer(0)
        tokens = chunks[0][1]
        staged = self._views(slot.device, count, tokens)
        self._gather(chunks[:count], tokens, staged)
        host = self._views(slot.host, count, tokens)
        with self._line.after_compute():
            used = count * tokens * self.bytes_per_token
            slot.host[:used].copy_(slot.device[:used], non_blocking=True)
            planes = [{name: plane[i] for name, plane in host.items()} for i in range(count)]
            return _Under(count, self._line, slot, planes)

    def begin_write(
        self, chunks: Sequence[Chunk], planes: Sequence[Mapping[str, Tensor]]
    ) -> Transfer:
        """Write chunks out of host memory, without waiting for an accelerator.

        Returns:
            The transfer of the first chunks, as many as there is staging memory for.
        """
        if self._line is None:
            self.write(chunks, planes)
            return Transfer(len(chunks))
        if chunks and all(t.device.type != "cpu" for t in planes[0].values()):
            # Where they come from a tier on the device, they are there already.
            self.write(chunks, planes)
            with self._line.after_compute():
                return _Under(len(chunks), self._line, None)
        count, slot = self._take(chunks, out=False)
        if slot is None:
            return Transfer(0)
        tokens = chunks[0][1]
        for name, host in self._views(slot.host, count, tokens).items():
            for into, one in zip(host, planes[:count], strict=True):
                into.copy_(one[name])
        staged = self._views(slot.device, count, tokens)
        with self._line.after_compute():
            used = count * tokens * self.bytes_per_token
            slot.device[:used].copy_(slot.host[:used], non_blocking=True)
            self._scatter(chunks[:count], tokens, staged)
            return _Under(count, self._line, slot)

    def _take(self, chunks: Sequence[Chunk], *, out: bool) -> tuple[int, Slot | None]:
        """Staging memory, and how many of the first chunks it holds: alike ones only."""
        assert self._line is not None
        if not chunks:
            return 0, None
        tokens = chunks[0][1]
        alike = next((i for i, one in enumerate(chunks) if one[1] != tokens), len(chunks))
        slot = self._line.take(out=out)
        if slot is None:
            return 0, None
        count = min(alike, slot.host.numel() // (tokens * self.bytes_per_token))
        if not count:
            self._line.give_back(slot)
            raise KVPlugError(
                f"a chunk of {tokens} tokens is larger than {slot.host.numel()} bytes of staging "
                "memory: use chunks of fewer blocks"
            )
        return count, slot

    def _views(self, buffer: Tensor, count: int, tokens: int) -> dict[str, Tensor]:
        """Planes of chunks in staging memory, ``[chunks, layers, tokens, heads, width]``."""
        found, at = {}, 0
        for name, plane in self._planes.items():
            shape = (count, len(self._layers), tokens, *plane.shape)
            size = prod(shape) * plane.dtype.itemsize
            found[name] = buffer[at : at + size].view(plane.dtype).view(shape)
            at += size
        return found

    def _gather(self, chunks: Sequence[Chunk], tokens: int, into: Mapping[str, Tensor]) -> None:
        if self._fused is None:
            for i, found in enumerate(self.read(chunks)):
                for name, plane in found.items():
                    into[name][i].copy_(plane)
            return
        blocks = self._table(chunks)
        for one in self._fused:
            plane = into[one.plane]
            whole = one.whole(plane)
            if whole is not None:
                pack_pages(one.caches, blocks, Packed(whole))
                continue
            made = one.room(len(chunks), tokens)
            pack_pages(one.caches, blocks, Packed(made))
            one.part(plane).copy_(made)

    def _scatter(self, chunks: Sequence[Chunk], tokens: int, out_of: Mapping[str, Tensor]) -> None:
        if self._fused is None:
            count = range(len(chunks))
            self.write(chunks, [{name: p[i] for name, p in out_of.items()} for i in count])
            return
        blocks = self._table(chunks)
        for one in self._fused:
            plane = out_of[one.plane]
            whole = one.whole(plane)
            if whole is None:
                whole = one.room(len(chunks), tokens)
                whole.copy_(one.part(plane))
            unpack_pages(one.caches, blocks, Packed(whole))

    def _table(self, chunks: Sequence[Chunk]) -> Tensor:
        return to_device(torch.stack(self._blocks(chunks)[0]), self._device)

    def begin_step(self) -> None:
        """Begin a step: what it computes may overwrite blocks that earlier ones read."""

    def _blocks(self, chunks: Sequence[Chunk]) -> tuple[list[Tensor], list[int]]:
        """Ids of blocks and tokens of each chunk; only blocks that hold its tokens."""
        found, counts = [], []
        for ids, tokens in chunks:
            own = ids if isinstance(ids, Tensor) else torch.from_numpy(np.asarray(ids, np.int64))
            need = -(-tokens // self.block_size)
            if not 0 < need <= len(own):
                raise KVPlugError(f"a chunk of {tokens} tokens does not lie in {len(own)} blocks")
            found.append(own[:need])
            counts.append(tokens)
        return found, counts

    def _room(
        self, name: str, counts: Sequence[int], alike: bool, device: torch.device
    ) -> Tensor | list[Tensor]:
        plane = self._planes[name]
        # Layers of fewer heads or bytes leave the rest of a token at zero.
        make = torch.zeros if len(set(plane.own)) > 1 else torch.empty

        def room(*shape: int) -> Tensor:
            return make(*shape, *plane.shape, dtype=plane.dtype, device=device)

        if alike:
            return room(len(counts), len(self._layers), counts[0])
        return [room(len(self._layers), tokens) for tokens in counts]


@dataclass(frozen=True)
class _Fused:
    """Views of all layers' pages that one launch moves.

    Attributes:
        plane: The plane they hold a part of.
        offset: First byte of the part in a head of the plane.
        caches: The views.
    """

    plane: str
    offset: int
    caches: LayerCaches

    @property
    def _size(self) -> int:
        return int(self.caches.shape[3]) * self.caches.pages[0].element_size()

    def whole(self, plane: Tensor) -> Tensor | None:
        """The plane as the bytes of the views, if they hold all of it."""
        found = plane.view(torch.uint8)
        return found if found.shape[-1] == self._size else None

    def part(self, plane: Tensor) -> Tensor:
        """The part of the plane that the views hold, as bytes."""
        return plane.view(torch.uint8)[..., self.offset : self.offset + self._size]

    def room(self, chunks: int, tokens: int) -> Tensor:
        """Memory for the bytes of the views."""
        layers, heads = len(self.caches.caches), int(self.caches.shape[1])
        shape = (chunks, layers, tokens, heads, self._size)
        return torch.empty(shape, dtype=torch.uint8, device=self.caches.device)


def _fused(layers: Sequence[LayerPages]) -> list[_Fused] | None:
    """Views of all layers' pages, or None where they are not alike or have none."""
    parts = [layer.parts() for layer in layers]
    found = []
    for alike in zip(*(part or () for part in parts), strict=False):
        plane, offset, first = alike[0]
        if any((p, o, v.shape) != (plane, offset, first.shape) for p, o, v in alike):
            return None
        try:
            caches = LayerCaches([view for _, _, view in alike])
        except ValueError:
            return None
        found.append(_Fused(plane, offset * first.element_size(), caches))
    complete = all(part is not None and len(part) == len(found) for part in parts)
    return found if found and complete else None


def _planes_of(layers: Sequence[LayerPages]) -> dict[str, _Plane]:
    if len({layer.formatted for layer in layers}) > 1:
        raise KVPlugError(
            "tiers move the layers of a chunk together, but a format stores only some of them: "
            "give the format section all layers, or remove it"
        )
    if layers[0].formatted:
        own = tuple(layer.cell for layer in layers)
        return {"cells": _plane(torch.uint8, own)}
    own = tuple(layer.head for layer in layers)
    plane = _plane(getattr(torch, layers[0].dtype), own)
    return {"key": plane, "value": plane}


def _plane(dtype: torch.dtype, own: tuple[tuple[int, int], ...]) -> _Plane:
    heads, width = (max(sizes) for sizes in zip(*own, strict=True))
    return _Plane(dtype, (heads, width), own)
