"""Stored segments in the pages of one layer: reading them out, and writing them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvplug.contract import FormatPolicy, LayerView, WriteBatch
from kvplug.hosts.vllm.worker.metadata import to_device
from kvplug.hosts.vllm.worker.pages import Pages, order_of
from kvplug.hosts.vllm.worker.stored_format import StoredFormat
from kvplug.reuse.memory import PagePlane


class LayerPages:
    """Pages of one layer, by position in a request's text.

    Args:
        layer: vLLM's attention layer.
        cache: Its cache.
        view: The layer as policies see it.
        stored: The format its pages are in; None for the backend's own.
    """

    def __init__(self, layer: Any, cache: Tensor, view: LayerView, stored: FormatPolicy | None):
        self.view = view
        self.scale = float(layer.impl.scale)
        self._layer = layer
        self._cache = cache
        self._format = StoredFormat(stored) if stored is not None else None
        self._size = int(cache.shape[2])
        self._dtype = getattr(torch, view.dtype)
        self._pages: Pages | None = None
        if stored is not None:
            self._layout = stored.layout(view)
            self._planes = self._layout.planes(cache)

    @property
    def head(self) -> tuple[int, int]:
        """KV heads, and values of a head, of a token that no format stores."""
        return int(self._cache.shape[1]), int(self._cache.shape[3]) // 2

    @property
    def cell(self) -> tuple[int, int]:
        """Heads and bytes of a token as a format stores it."""
        return int(self._cache.shape[1]), int(self._layout.bytes_per_token_head)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self._size

    @property
    def device(self) -> torch.device:
        """Device of the pages."""
        return self._cache.device

    @property
    def formatted(self) -> bool:
        """True if a format stores the layer."""
        return self._format is not None

    @property
    def dtype(self) -> str:
        """Name of the type in which the pages hold K and V."""
        return str(self._cache.dtype).removeprefix("torch.")

    def parts(self) -> list[tuple[str, int, Tensor]] | None:
        """Return views of the pages that hold `stored`'s planes between them.

        Returns:
            Plane, first element of a head there, and view ``[num_blocks, heads, block_size, n]``;
            None where the backend's pages have no such views.
        """
        if self._format is not None:
            fields = zip(self._layout.fields, self._planes, strict=True)
            return [("cells", field.offset, plane) for field, plane in fields]
        views = self._own_pages().views
        if views is None:
            return None
        return [("key", 0, views[0]), ("value", 0, views[1])]

    def _own_pages(self) -> Pages:
        if self._pages is None:
            self._pages = Pages(self._cache, order_of(self._layer.impl, self._layer, self._cache))
        return self._pages

    def read(self, blocks: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Read K and V at positions ``[start, end)``, each ``[n, kv_heads, head_size]``.

        Args:
            blocks: Ids of its blocks, ``[m]`` int64.
            start: First position.
            end: Position after the last.
        """
        key, value = self._gather((0, 1), blocks, start, end)
        return key, value

    def keys(self, blocks: Tensor, start: int, end: int) -> Tensor:
        """Read the keys alone; see `read`."""
        return self._gather((0,), blocks, start, end)[0]

    def _gather(
        self, which: tuple[int, ...], blocks: Tensor, start: int, end: int
    ) -> tuple[Tensor, ...]:
        if start >= end:
            shape = (0, self.view.num_kv_heads, self.view.head_size)
            empty = torch.zeros(shape, dtype=self._dtype, device=self._cache.device)
            return tuple(empty for _ in which)
        first = start // self._size
        own = to_device(blocks[first : -(-end // self._size)], self._cache.device)
        run = slice(start - first * self._size, end - first * self._size)
        if self._format is not None:
            found = self._format.read(self.view, self._cache, own)
            return tuple(found[i].transpose(1, 2).flatten(0, 1).to(self._dtype)[run] for i in which)
        pages = self._own_pages()
        return tuple(pages.gather(i, own[None])[0].transpose(0, 1)[run] for i in which)

    def stored(
        self,
        blocks: Tensor,
        start: int,
        end: int,
        read: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Read the tokens at ``[start, end)`` as they are stored: the page's own bytes.

        Args:
            blocks: Ids of the request's blocks, ``[m]`` int64.
            start: First position.
            end: Position after the last.
            read: Result of `read` for the same tokens, if there is one.

        Returns:
            ``key`` and ``value`` as `read` returns them, or ``cells``, uint8 ``[n, heads, bytes]``.
        """
        if self._format is None:
            key, value = read or self.read(blocks, start, end)
            return {"key": key.contiguous(), "value": value.contiguous()}
        at = torch.arange(start, end)
        own, slots = self._on_device(blocks[at // self._size], at % self._size)
        heads, width = self._cache.shape[1], self._layout.bytes_per_token_head
        cells = self._cache.new_zeros((end - start, heads, width))
        for f, plane in zip(self._layout.fields, self._planes, strict=True):
            cells[..., f.offset : f.offset + f.size] = plane[own, :, slots]
        return {"cells": cells}

    def put(self, slots: Tensor, planes: dict[str, Tensor]) -> None:
        """Write bytes from `stored` to other cache slots, unchanged.

        Args:
            slots: ``[n]`` int64.
            planes: Result of `stored`.
        """
        if self._format is None:
            self.write(slots, planes["key"], planes["value"])
            return
        heads, width = self._cache.shape[1], self._layout.bytes_per_token_head
        cells = to_device(planes["cells"][:, :heads, :width], self._cache.device)
        blocks, offsets = self._on_device(slots // self._size, slots % self._size)
        for f, plane in zip(self._layout.fields, self._planes, strict=True):
            plane[blocks, :, offsets] = cells[..., f.offset : f.offset + f.size]

    def decoded(self, slots: Tensor, planes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Decode bytes from `stored`: K and V ``[n, kv_heads, head_size]`` in the model's dtype.

        Args:
            slots: Cache slots they go to, ``[n]`` int64; a format decodes them there.
            planes: Result of `stored`.
        """
        if self._format is None:
            key, value = self._on_device(planes["key"], planes["value"])
            return key, value
        # A format reads whole blocks, so its bytes go where they are overwritten afterwards.
        self.put(slots, planes)
        blocks, index = torch.unique(slots // self._size, return_inverse=True)
        blocks, index, at = self._on_device(blocks, index, slots % self._size)
        found = self._format.read(self.view, self._cache, blocks)
        key, value = (t[index, :, at].to(self._dtype) for t in found)
        return key, value

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store K and V of some tokens.

        Args:
            slots: ``[n]`` int64.
            key: ``[n, kv_heads, head_size]``.
            value: The same shape.
        """
        where, k, v = self._on_device(slots, key, value)
        k, v = k.contiguous(), v.contiguous()
        if self._format is not None:
            self._format.write(self.view, WriteBatch(k, v, where), self._cache)
        else:
            self._layer.impl.do_kv_cache_update(self._layer, k, v, self._cache, where)

    def _on_device(self, *tensors: Tensor) -> list[Tensor]:
        device = self._cache.device
        return [t if t.device == device else to_device(t, device) for t in tensors]


def stored_planes(layers: Sequence[LayerPages]) -> dict[str, PagePlane]:
    """Describe what `LayerPages.stored` gives for a token, over all layers stacked."""
    if layers[0].formatted:
        heads, width = (max(sizes) for sizes in zip(*(p.cell for p in layers), strict=True))
        return {"cells": PagePlane("uint8", len(layers), (heads, width))}
    view = layers[0].view
    plane = PagePlane(layers[0].dtype, len(layers), (view.num_kv_heads, view.head_size))
    return {"key": plane, "value": plane}


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """Stack layers' planes, ``[layers, tokens, ...]``; narrower ones are padded with zeros."""
    if all(t.shape == layers[0].shape for t in layers):
        return torch.stack(list(layers))
    shape = [max(sizes) for sizes in zip(*(t.shape for t in layers), strict=True)]
    found = layers[0].new_zeros((len(layers), *shape))
    for one, tensor in zip(found, layers, strict=True):
        one[: tensor.shape[0], : tensor.shape[1], : tensor.shape[2]] = tensor
    return found
