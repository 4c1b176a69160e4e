"""The KV cache of one text under a format: pages of coded keys and values per layer."""

from __future__ import annotations

import torch
from torch import Tensor

from kvplug.contract import AttendBatch, FormatPolicy, LayerView, Recent, WriteBatch
from kvplug.hosts.dense import attend
from kvplug.hosts.transformers.cache import LayerCache, Watched


class LayerCoded(LayerCache):
    """Coded keys and values of one text in one layer, written and attended by the format itself.

    The text has pages of its own, in order, so its block table counts up from 0. It is the only
    request there is: slot 0, where the format keeps the latest tokens exact.

    Args:
        view: The layer.
        scale: Softmax scale.
        format: The format.
        block_size: Tokens of a page.
        like: A tensor on the model's device; its dtype is the queries'.
    """

    def __init__(
        self, view: LayerView, scale: float, format: FormatPolicy, block_size: int, like: Tensor
    ):
        super().__init__(view, scale, Watched(), like)
        self.format = format
        self.block_size = block_size
        self.exact_chunk = bool(getattr(format.options, "exact_chunk", True))
        self.dtype: torch.dtype = getattr(torch, view.dtype)
        layout = format.layout(view)
        # Elements held as they are meet queries of their own type, as in an engine.
        plain = 16 in (layout.key_bits, layout.value_bits)
        self.query_dtype = self.dtype if plain else like.dtype
        self.pages = layout.pages(view, 0, block_size, like.device)
        self.recent: Recent | None = None
        size = format.recent(view)
        if size:
            shape = (1, size, view.num_kv_heads, view.head_size)
            self.recent = Recent(*(like.new_zeros(shape, dtype=self.dtype) for _ in range(2)))

    @property
    def keys(self) -> Tensor:
        """``[1, kv_heads, kept, head_size]``, decoded from the pages."""
        return self._read(0)

    @property
    def values(self) -> Tensor:
        """``[1, kv_heads, kept, head_size]``, decoded from the pages."""
        return self._read(1)

    @property
    def positions(self) -> Tensor:
        """``[1, kv_heads, kept]`` int32: no token is ever evicted."""
        own = torch.arange(self.kept, dtype=torch.int32, device=self.pages.device)
        return own.expand(1, self.view.num_kv_heads, -1)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Append tokens: the format writes them; `attend` goes before `keep_recent`."""
        new = keys.shape[2]
        self._make_room(self.kept + new)
        self.format.write(
            self.view,
            WriteBatch(
                key=self._stored(keys),
                value=self._stored(values),
                slots=torch.arange(self.kept, self.kept + new, device=keys.device),
                request_slots=None if self.recent is None else self._slot(new),
                recent=self.recent,
            ),
            self.pages,
        )
        self.kept += new

    def run(self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Write the new tokens, and attend for their queries.

        Args:
            query: ``[1, num_heads, n, head_size]``, after RoPE.
            keys: ``[1, kv_heads, n, head_size]``, after RoPE.
            values: The same shape.
            positions: ``[n]``.

        Returns:
            ``[1, n, num_heads, head_size]``.
        """
        self.append(keys, values, positions)
        new, device = query.shape[2], query.device
        dtype = self.query_dtype
        queries = query[0].transpose(0, 1).to(dtype).contiguous()
        out = torch.empty_like(queries)
        recent = self.recent
        if recent is not None:
            # Attention takes exact tokens in the dtype of the queries.
            recent = Recent(recent.key.to(dtype), recent.value.to(dtype))
        batch = AttendBatch(
            query=queries,
            query_start=torch.tensor([0, new], dtype=torch.int32, device=device),
            block_table=torch.arange(len(self.pages), dtype=torch.int32, device=device)[None],
            seq_lens=torch.tensor([self.kept], dtype=torch.int32, device=device),
            scale=self.scale,
            max_query_len=new,
            max_seq_len=self.kept,
            key=self._stored(keys).to(dtype) if self.exact_chunk else None,
            value=self._stored(values).to(dtype) if self.exact_chunk else None,
            softcap=self.softcap,
            request_slots=None if recent is None else self._slot(1),
            recent=recent,
        )
        attend(self.format, self.view, batch, self.pages, out)
        self.keep_recent(keys, values)
        return out[None].to(query.dtype)

    def keep_recent(self, keys: Tensor, values: Tensor) -> None:
        """Keep the latest tokens, ``[1, kv_heads, n, head_size]`` appended already, exact."""
        if self.recent is None:
            return
        size = self.recent.key.shape[1]
        last = min(size, keys.shape[2])
        places = torch.arange(self.kept - last, self.kept, device=keys.device) % size
        self.recent.key[0, places] = self._stored(keys)[-last:]
        self.recent.value[0, places] = self._stored(values)[-last:]

    def copy(self) -> LayerCoded:
        """Another text's layer with the same contents."""
        other = LayerCoded(self.view, self.scale, self.format, self.block_size, self._keys)
        other.softcap, other.kept = self.softcap, self.kept
        other.pages = self.pages.clone()
        if self.recent is not None:
            other.recent = Recent(self.recent.key.clone(), self.recent.value.clone())
        return other

    def _stored(self, tokens: Tensor) -> Tensor:
        """``[1, kv_heads, n, head_size]`` as ``[n, kv_heads, head_size]`` of the stored dtype."""
        return tokens[0].transpose(0, 1).to(self.dtype).contiguous()

    def _slot(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self.pages.device)

    def _make_room(self, tokens: int) -> None:
        blocks = -(-tokens // self.block_size)
        if blocks <= len(self.pages):
            return
        # Half as much again: decoding appends one token at a time.
        more = blocks + blocks // 2 - len(self.pages)
        self.pages = torch.cat([self.pages, self.pages.new_zeros(more, *self.pages.shape[1:])])

    def _read(self, which: int) -> Tensor:
        blocks = torch.arange(-(-self.kept // self.block_size), device=self.pages.device)
        pages = self.format.read(self.view, self.pages, blocks)[which]
        return pages.transpose(0, 1).flatten(1, 2)[None, :, : self.kept]
