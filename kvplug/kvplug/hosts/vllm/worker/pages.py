"""K and V of single tokens in a layer's pages: the backend's own, or a format's.

vLLM's CPU kernels pack keys in an order of their own that depends on the instruction set, and
nothing states it. So a page is written through the backend with numbers that name their slot and
element, and read back: what comes out is the order, whatever it is. A backend whose pages are no
plain permutation of the elements is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvplug.containment import PolicyFailure
from kvplug.contract import LayerView, PageLayout, WriteBatch
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.worker.stored_format import StoredFormat
from kvplug_kernels.move_tokens import LayerCaches, move_tokens
from kvplug_kernels.move_tokens.vectorized import put_beside

Beside = Sequence[tuple[Tensor, Tensor]]
"""Pairs of what is kept beside pages and its values; see `move_tokens`."""

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""``write(key, value, cache, slots)``: store tokens ``[n, kv_heads, head_size]`` in a cache."""


class TokenPages(Protocol):
    """One layer's pages, by token."""

    @property
    def views(self) -> tuple[Tensor, Tensor] | None:
        """K and V as ``[num_blocks, kv_heads, block_size, head_size]`` with the last dimension
        contiguous, as kernels read pages; None where the pages do not allow it."""

    def gather(self, which: int, blocks: Tensor) -> Tensor:
        """Read keys (0) or values (1) of whole blocks.

        Args:
            which: 0 for keys, 1 for values.
            blocks: Block ids, ``[rows, n]`` int64.

        Returns:
            ``[rows, kv_heads, n * block_size, head_size]``, contiguous.
        """

    def move(
        self,
        heads: Tensor,
        from_blocks: Tensor,
        from_slots: Tensor,
        to_blocks: Tensor,
        to_slots: Tensor,
    ) -> None:
        """Copy single tokens of single heads, K and V, all read before any is written.

        Args:
            heads: KV head of each copy, int64 of any shape, the same for all arguments.
            from_blocks: Block it is read from.
            from_slots: Slot in that block.
            to_blocks: Block it is written to.
            to_slots: Slot in that block.
        """

    def relocate(self, blocks: Tensor, source: Tensor, beside: Beside = ()) -> None:
        """Move survivors together, K and V. Does not wait for an accelerator.

        Args:
            blocks: Blocks of each row in resident order, ``[rows, n]`` int32.
            source: Resident index that each place takes its token from, its own where nothing
                moves, ``[rows, kv_heads, count]`` int32; no place is both read and written.
            beside: What is kept beside the pages, and its values; see `move_tokens`.
        """

    def write(
        self, heads: Tensor, blocks: Tensor, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store single tokens of single heads.

        Args:
            heads: KV head of each, ``[n]`` int64.
            blocks: Block it is written to.
            slots: Slot in that block.
            key: ``[n, head_size]``.
            value: The same shape.
        """


@dataclass(frozen=True)
class PageOrder:
    """Element offsets within one page of one KV head.

    Attributes:
        key: Offset of each key element, ``[block_size, head_size]`` int64.
        value: Offset of each value element, the same shape.
    """

    key: Tensor
    value: Tensor

    @classmethod
    def probe(
        cls, write: Write, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device
    ) -> PageOrder:
        """Find the order in which a backend stores a page.

        Raises:
            KVPlugError: Its pages are not a permutation of what was written.
        """
        # Small integers are exact in every KV dtype but fp8, which is refused before.
        slot = torch.arange(block_size, device=device)[:, None].expand(block_size, head_size)
        element = torch.arange(head_size, device=device)[None, :].expand(block_size, head_size)
        found = []
        for which in (0, 1):
            digits = []
            for number in (slot % 16, slot // 16, element % 16, element // 16):
                cache = torch.full((2, 1, block_size, 2 * head_size), -1, device=device).to(dtype)
                coded = (number + 1).to(dtype)[:, None, :].contiguous()
                other = torch.full_like(coded, -2)
                pair = (coded, other) if which == 0 else (other, coded)
                slots = torch.arange(block_size, 2 * block_size, device=device)
                write(*pair, cache, slots)
                digits.append(cache[1, 0].reshape(-1).to(torch.int64) - 1)
            where = torch.nonzero(digits[0] >= 0)[:, 0]
            slots_found = digits[0][where] + 16 * digits[1][where]
            elements_found = digits[2][where] + 16 * digits[3][where]
            index = slots_found * head_size + elements_found
            expected = torch.arange(block_size * head_size, device=device)
            if not torch.equal(index.sort().values, expected):
                raise KVPlugError(
                    "this attention backend does not store each key and value element once per "
                    "page, so tokens cannot be moved in it; remove the sequence section or choose "
                    "a positional policy such as sink_window"
                )
            order = torch.empty_like(where)
            order[index] = where
            found.append(order.view(block_size, head_size))
        return cls(*found)


def _strides(order: Tensor) -> tuple[int, int, int] | None:
    """``(offset, slot stride, element stride)`` where the order is one, else None."""
    offset = int(order[0, 0])
    slot = int(order[1, 0]) - offset if order.shape[0] > 1 else 0
    element = int(order[0, 1]) - offset if order.shape[1] > 1 else 0
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    columns = torch.arange(order.shape[1], device=order.device)[None, :]
    plain = offset + rows * slot + columns * element
    return (offset, slot, element) if torch.equal(order, plain) else None


class Pages:
    """Pages in the backend's own order.

    Args:
        cache: The layer's cache, ``[num_blocks, kv_heads, block_size, 2 * head_size]``, in any
            order of blocks, heads and slots.
        order: The order of its pages, found in a page whose slots are neighbours.

    Raises:
        KVPlugError: The backend mixes the slots of a page, and here they are not neighbours.
    """

    def __init__(self, cache: Tensor, order: PageOrder):
        self._orders = (order.key, order.value)
        num_blocks, kv_heads, block_size, content = cache.shape
        # vLLM's own preference on a GPU has tokens before heads, so a head's slots lie apart.
        neighbours = cache.stride(2) == content
        self._flat = (
            cache.as_strided(
                (num_blocks, kv_heads, block_size * content),
                (cache.stride(0), cache.stride(1), 1),
                cache.storage_offset(),
            )
            if neighbours
            else None
        )
        self._views: list[Tensor | None] = []
        by_slot = [_strides(own) for own in self._orders]
        # Each slot's key and value lie in the slot's own content.
        whole = all(found is not None and found[1] == content for found in by_slot)
        if not neighbours and not whole:
            raise KVPlugError(
                "this attention backend mixes the tokens of a page, and vLLM's KV cache layout "
                "keeps them apart; set VLLM_KV_CACHE_LAYOUT=LBHNC"
            )
        for own, strides in zip(self._orders, by_slot, strict=True):
            self._views.append(
                None
                if strides is None
                else cache.as_strided(
                    (num_blocks, kv_heads, *own.shape),
                    (
                        cache.stride(0),
                        cache.stride(1),
                        strides[1] if neighbours else cache.stride(2),
                        strides[2],
                    ),
                    cache.storage_offset() + strides[0],
                )
            )
        self._caches = LayerCaches([cache]) if whole and cache.device.type != "cpu" else None

    @property
    def views(self) -> tuple[Tensor, Tensor] | None:
        """K and V as ``[num_blocks, kv_heads, block_size, head_size]`` with the last dimension
        contiguous, as kernels read pages; None where the order does not allow it."""
        key, value = self._views
        if key is None or value is None or key.stride(3) != 1 or value.stride(3) != 1:
            return None
        return key, value

    def gather(self, which: int, blocks: Tensor) -> Tensor:
        """Read keys (0) or values (1) of whole blocks; see `TokenPages.gather`."""
        view, order = self._views[which], self._orders[which]
        size, width = order.shape
        if view is not None:
            taken = view[blocks]
        else:
            assert self._flat is not None
            taken = self._flat[blocks][..., order.reshape(-1)]
            taken = taken.view(*taken.shape[:3], size, width)
        rows, n, heads = taken.shape[:3]
        return taken.transpose(1, 2).reshape(rows, heads, n * size, width).contiguous()

    def move(
        self,
        heads: Tensor,
        from_blocks: Tensor,
        from_slots: Tensor,
        to_blocks: Tensor,
        to_slots: Tensor,
    ) -> None:
        """Copy single tokens of single heads; see `TokenPages.move`."""
        for view, order in zip(self._views, self._orders, strict=True):
            if view is not None:
                view[to_blocks, heads, to_slots] = view[from_blocks, heads, from_slots]
            else:
                assert self._flat is not None
                self._flat[to_blocks[..., None], heads[..., None], order[to_slots]] = self._flat[
                    from_blocks[..., None], heads[..., None], order[from_slots]
                ]

    def relocate(self, blocks: Tensor, source: Tensor, beside: Beside = ()) -> None:
        """Move survivors together; see `TokenPages.relocate`."""
        if self._caches is not None:
            move_tokens(self._caches, blocks, source[None], beside)
        else:
            relocate(self, blocks, source, self._orders[0].shape[0], beside)

    def write(
        self, heads: Tensor, blocks: Tensor, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store single tokens of single heads; see `TokenPages.write`."""
        for view, order, what in zip(self._views, self._orders, (key, value), strict=True):
            if view is not None:
                view[blocks, heads, slots] = what
            else:
                assert self._flat is not None
                self._flat[blocks[:, None], heads[:, None], order[slots]] = what


class CodedPages:
    """Pages in the bytes of a format.

    Args:
        stored: The format.
        layer: The layer.
        layout: Its layout.
        cache: Its cache.
    """

    views = None

    def __init__(self, stored: StoredFormat, layer: LayerView, layout: PageLayout, cache: Tensor):
        self._format = stored
        self._layer = layer
        self._layout = layout
        self._cache = cache
        self._dtype: torch.dtype = getattr(torch, layer.dtype)
        self._planes = layout.planes(cache)
        self._read: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def gather(self, which: int, blocks: Tensor) -> Tensor:
        """Read keys (0) or values (1) of whole blocks; see `TokenPages.gather`."""
        # Values are always asked for right after the keys of the same blocks.
        if which == 0 or self._read is None or self._read[0] is not blocks:
            self._read = (blocks, self._format.read(self._layer, self._cache, blocks.flatten()))
        found = self._read[1][which].to(self._dtype)
        rows, n = blocks.shape
        _, heads, size, width = found.shape
        if which == 1:
            self._read = None
        taken = found.view(rows, n, heads, size, width).transpose(1, 2)
        return taken.reshape(rows, heads, n * size, width).contiguous()

    def move(
        self,
        heads: Tensor,
        from_blocks: Tensor,
        from_slots: Tensor,
        to_blocks: Tensor,
        to_slots: Tensor,
    ) -> None:
        """Copy single tokens of single heads, codes and scales; see `TokenPages.move`."""
        for plane in self._planes:
            plane[to_blocks, heads, to_slots] = plane[from_blocks, heads, from_slots]

    def relocate(self, blocks: Tensor, source: Tensor, beside: Beside = ()) -> None:
        """Move survivors together; see `TokenPages.relocate`."""
        relocate(self, blocks, source, self._cache.shape[2], beside)

    def write(
        self, heads: Tensor, blocks: Tensor, slots: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Store single tokens of single heads; see `TokenPages.write`."""
        n, count, size = len(heads), self._cache.shape[1], self._cache.shape[2]
        scratch = self._cache.new_zeros((-(-n // size), *self._cache.shape[1:]))
        place = torch.arange(n, device=heads.device)
        wide = (
            key[:, None].expand(-1, count, -1).contiguous(),
            value[:, None].expand(-1, count, -1).contiguous(),
        )
        try:
            self._format.write(self._layer, WriteBatch(*wide, place), scratch)
        except PolicyFailure:
            scratch.zero_()
            self._format.lose(blocks)
        made = self._layout.planes(scratch)
        for plane, own in zip(self._planes, made, strict=True):
            plane[blocks, heads, slots] = own[place // size, heads, place % size]


def relocate(
    pages: TokenPages, blocks: Tensor, source: Tensor, block_size: int, beside: Beside = ()
) -> None:
    """Move survivors together through `TokenPages.move`; see `TokenPages.relocate`."""
    put_beside(blocks, source[None], beside)
    rows, heads, count = source.shape
    source, blocks = source.long(), blocks.long()
    place = torch.arange(count, device=source.device)
    if source.device.type == "cpu":
        row, head, place = torch.nonzero(source != place, as_tuple=True)
        origin = source[row, head, place]
        origins, places = blocks[row, origin // block_size], blocks[row, place // block_size]
    else:
        # All places, moved or not: to find those that are, the host would have to wait.
        head, place = torch.arange(heads, device=source.device)[:, None], place.expand(heads, -1)
        head, place = head.expand(rows, heads, count), place.expand(rows, heads, count)
        origin = source
        origins = blocks.gather(1, (origin // block_size).view(rows, -1)).view_as(origin)
        places = blocks.gather(1, (place // block_size).reshape(rows, -1)).view_as(origin)
    pages.move(head, origins, origin % block_size, places, place % block_size)


def open_pages(impl: Any, layer: Any, cache: Tensor) -> TokenPages:
    """Open a layer's pages, in whatever bytes they are.

    Args:
        impl: vLLM's attention implementation.
        layer: vLLM's attention layer.
        cache: Its cache.

    Raises:
        KVPlugError: The backend's pages are not a permutation of what is written.
    """
    coded: TokenPages | None = None
    if hasattr(impl, "kvplug_pages"):
        coded = impl.kvplug_pages(layer, cache)
    return coded if coded is not None else Pages(cache, order_of(impl, layer, cache))


def order_of(impl: Any, layer: Any, cache: Tensor) -> PageOrder:
    """Find the order of a layer's pages by writing through its own ``do_kv_cache_update``."""

    def write(key: Tensor, value: Tensor, probe: Tensor, slots: Tensor) -> None:
        heads = cache.shape[1]
        wide = probe.expand(2, heads, *probe.shape[2:]).contiguous()
        many = (
            key.expand(-1, heads, -1).contiguous(),
            value.expand(-1, heads, -1).contiguous(),
        )
        impl.do_kv_cache_update(layer, *many, wide, slots)
        probe.copy_(wide[:, :1])

    size, content = cache.shape[2], cache.shape[3]
    return PageOrder.probe(write, size, content // 2, cache.dtype, cache.device)
