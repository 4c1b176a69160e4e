"""The KV cache of one text: dense keys and values per layer, and each token's position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvplug.contract import LayerView, ResidentView, Window

PAGE = 16
"""Tokens per page as GPU kernels see them, which want a power of two; room grows by it."""


@dataclass(frozen=True)
class Watched:
    """The statistics recorded beside keys and values, for policies that ask for them.

    Attributes:
        observation: Latest queries kept.
        totals: Whether the cumulative attention of each kept token is recorded.
    """

    observation: int = 0
    totals: bool = False

    def covers(self, other: Watched) -> bool:
        """True if all that the other records is recorded here."""
        return self.observation >= other.observation and self.totals >= other.totals


class LayerCache:
    """The keys and values of one text in one layer.

    Every KV head holds the same number of tokens, each head tokens of its own after an eviction.

    Args:
        view: The layer.
        scale: Softmax scale.
        watched: What to record; ``Watched()`` for a layer that is never pruned.
        like: A tensor of the model's dtype and device.
        sliding: Tokens its sliding window spans, the query's own among them; 0 for full attention.
        window: The block rule of a positional policy, and the tokens of a block; or None.
    """

    def __init__(
        self,
        view: LayerView,
        scale: float,
        watched: Watched,
        like: Tensor,
        sliding: int = 0,
        window: tuple[Window, int] | None = None,
    ):
        self.view = view
        self.scale = scale
        self.softcap = 0.0
        self.watched = watched
        self.sliding = sliding
        self.window = window
        self.kept = 0
        heads = view.num_kv_heads
        self._keys = like.new_empty(1, heads, 0, view.head_size)
        self._values = self._keys
        self._positions = torch.empty(1, heads, 0, dtype=torch.int32, device=like.device)
        self._totals = torch.empty(1, heads, 0, device=like.device) if watched.totals else None
        self._queries = like.new_empty(1, 0, view.num_heads, view.head_size)
        self._query_positions = torch.empty(1, 0, dtype=torch.int32, device=like.device)
        self._shared = False

    @property
    def keys(self) -> Tensor:
        """``[1, kv_heads, kept, head_size]``, after RoPE."""
        return self._keys[:, :, : self.kept]

    @property
    def values(self) -> Tensor:
        """``[1, kv_heads, kept, head_size]``."""
        return self._values[:, :, : self.kept]

    @property
    def positions(self) -> Tensor:
        """``[1, kv_heads, kept]`` int32."""
        return self._positions[:, :, : self.kept]

    @property
    def totals(self) -> Tensor | None:
        """``[1, kv_heads, kept]`` float32: attention received since written; or None."""
        return None if self._totals is None else self._totals[:, :, : self.kept]

    @property
    def masked(self) -> bool:
        """True if a query may see fewer than all earlier tokens that are kept."""
        return bool(self.sliding) or self.window is not None

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Append tokens.

        Args:
            keys: ``[1, kv_heads, n, head_size]``, after RoPE.
            values: The same shape.
            positions: ``[n]``.
        """
        kept = self.kept + keys.shape[2]
        if kept > self._keys.shape[2] or self._shared:
            # Room for half as much again: decoding appends one token at a time.
            room = -(-(kept + kept // 2) // PAGE) * PAGE
            self._keys, self._values = _grown(self.keys, room), _grown(self.values, room)
            self._positions = _grown(self.positions, room)
            if self.totals is not None:
                self._totals = _grown(self.totals, room)
            self._shared = False
        self._keys[:, :, self.kept : kept] = keys
        self._values[:, :, self.kept : kept] = values
        self._positions[:, :, self.kept : kept] = positions.to(torch.int32)
        if self._totals is not None:
            self._totals[:, :, self.kept : kept] = 0
        self.kept = kept

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """Record queries ``[1, num_heads, n, head_size]`` at ``positions [n]``, the latest ones."""
        most = self.watched.observation
        if not most:
            return
        queries, positions = queries.transpose(1, 2)[:, -most:], positions[None, -most:]
        if self._queries.shape[1] > 2 * most:
            self._queries = self._queries[:, -most:]
            self._query_positions = self._query_positions[:, -most:]
        self._queries = torch.cat([self._queries, queries], 1)
        self._query_positions = torch.cat([self._query_positions, positions.to(torch.int32)], 1)

    def receive(self, mass: Tensor) -> None:
        """Add attention ``[kv_heads, kept]`` to the cumulative attention of the kept tokens."""
        assert self._totals is not None and not self._shared
        self._totals[0, :, : self.kept] += mass

    def keep(self, indices: Tensor) -> None:
        """Keep only the tokens at ``[kv_heads, n]``, ascending per head."""
        at = indices.long()[None]
        wide = at[..., None].expand(-1, -1, -1, self.view.head_size)
        self._keys, self._values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self._positions = self.positions.gather(2, at)
        if self.totals is not None:
            self._totals = self.totals.gather(2, at)
        self.kept = at.shape[2]
        self._shared = False

    def fork(self, watched: Watched) -> LayerCache:
        """Another text's layer with the same contents; nothing is copied before it is changed.

        Args:
            watched: What the other records; `watched` must cover it.
        """
        assert self.watched.covers(watched)
        other = LayerCache(self.view, self.scale, watched, self._keys, self.sliding, self.window)
        other.softcap, other.kept = self.softcap, self.kept
        other._keys, other._values, other._positions = self._keys, self._values, self._positions
        if watched.totals:
            other._totals = self._totals
        if watched.observation:
            other._queries = self._queries[:, -watched.observation :]
            other._query_positions = self._query_positions[:, -watched.observation :]
        self._shared = other._shared = True
        return other

    def visible(self, queries: Tensor) -> Tensor:
        """Mask the tokens that queries at ``[n]`` see, ``[n, kept]``; for layers all of whose heads
        keep the same tokens."""
        own, keys = queries[:, None], self.positions[0, :1]
        seen = keys <= own
        if self.sliding:
            seen &= own - keys < self.sliding
        if self.window is not None:
            rule, size = self.window
            first = torch.clamp(own // size - rule.window_blocks, min=rule.sink_blocks)
            block = keys // size
            seen &= (block < rule.sink_blocks) | (block >= first)
        return seen

    def view_for(
        self, policy_needs: Watched, num_tokens: int, num_prompt_tokens: int
    ) -> ResidentView:
        """Make the view of the layer that a policy scores."""
        device = self._keys.device
        if self._keys.is_cuda:
            pages, table = self._paged(), torch.arange(-(-self.kept // PAGE), device=device)
        else:
            # One page of everything: `ResidentView.keys` gathers nothing then.
            pages, table = (self.keys, self.values), torch.zeros(1, device=device)

        def one(value: int) -> Tensor:
            return torch.tensor([value], dtype=torch.int32, device=device)

        queries = query_positions = None
        if policy_needs.observation:
            queries, query_positions = self._observed(policy_needs.observation)
        return ResidentView(
            layer=self.view,
            scale=self.scale,
            softcap=self.softcap,
            num_tokens=one(num_tokens),
            num_prompt_tokens=one(num_prompt_tokens),
            count=self.kept,
            positions=self.positions,
            key_pages=pages[0],
            value_pages=pages[1],
            block_table=table.to(torch.int32)[None],
            queries=queries,
            query_positions=query_positions,
            cumulative_attention=self.totals if policy_needs.totals else None,
            longest=num_tokens,
            dense=pages[0] is self.keys,
        )

    def _observed(self, most: int) -> tuple[Tensor, Tensor]:
        """The latest ``most`` queries and their positions, padded at the front."""
        queries, positions = self._queries[:, -most:], self._query_positions[:, -most:]
        lack = most - queries.shape[1]
        if lack:
            queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, lack, 0))
            positions = torch.nn.functional.pad(positions, (lack, 0), value=-1)
        return queries.contiguous(), positions.contiguous()

    def _paged(self) -> tuple[Tensor, Tensor]:
        """Keys and values as ``[pages, kv_heads, PAGE, head_size]``."""
        room = -(-self.kept // PAGE) * PAGE
        heads, size = self.view.num_kv_heads, self.view.head_size

        def pages(tensor: Tensor) -> Tensor:
            whole = tensor if tensor.shape[2] >= room else _grown(tensor, room)
            return whole[0, :, :room].view(heads, room // PAGE, PAGE, size).transpose(0, 1)

        return pages(self._keys), pages(self._values)


def _grown(tensor: Tensor, room: int) -> Tensor:
    """A copy with ``room`` places in the third dimension."""
    grown = tensor.new_empty(*tensor.shape[:2], room, *tensor.shape[3:])
    grown[:, :, : tensor.shape[2]] = tensor
    return grown
