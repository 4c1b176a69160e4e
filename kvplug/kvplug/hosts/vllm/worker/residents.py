"""Resident tokens of one layer under a scoring policy, as a decision sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvplug.contract import LayerView, ResidentView, ScoringPolicy
from kvplug.hosts.pruning import FLUSH
from kvplug.hosts.vllm.worker.pages import TokenPages, open_pages
from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision, ResidentBlocks
from kvplug_kernels.attention_mass import attention_mass

MASS_ELEMENTS = 1 << 24
"""Attention masses computed at once: it bounds the memory of a long chunk."""


def _repeat(rows: Tensor, times: int) -> Tensor:
    """Each row ``times`` times, one after the other."""
    shape = (rows.shape[0], times, *rows.shape[1:])
    return rows[:, None].expand(shape).reshape(-1, *rows.shape[1:]).contiguous()


class LayerResidents:
    """Pages of one layer, and what is kept beside them.

    Beside each cache slot: the position of its token, and its cumulative attention where the
    policy asks for it. Per request: its latest queries, in a ring.

    Args:
        policy: The policy.
        layer: The layer.
        ring: Queries remembered per request.
        scale: Softmax scale.
        softcap: Soft cap of logits; 0 for none.

    Attributes:
        queries: Remembered queries, ``[n, num_heads, head_size]``: a ring per slot.
        positions: Position of each survivor, ``[num_blocks, kv_heads, block_size]`` int32.
        cumulative: Cumulative attention of each token, the same shape, float32.
    """

    def __init__(
        self, policy: ScoringPolicy, layer: LayerView, ring: int, scale: float, softcap: float
    ):
        self.policy = policy
        self.layer = layer
        self.ring = ring
        self.scale = scale
        self.softcap = softcap
        self._pages: TokenPages | None = None
        self._cache_at = -1
        self.queries: Tensor | None = None
        self.positions: Tensor | None = None
        self.cumulative: Tensor | None = None

    @property
    def pages(self) -> TokenPages:
        """The layer's pages, once opened."""
        assert self._pages is not None, "not opened"
        return self._pages

    def open(self, impl: Any, layer: Any, cache: Tensor) -> None:
        """Open the layer's pages, on first use and when the cache has moved."""
        if self._pages is None or self._cache_at != cache.data_ptr():
            self._pages = open_pages(impl, layer, cache)
            self._cache_at = cache.data_ptr()
            blocks, heads, size = cache.shape[:3]
            self.positions = torch.zeros(
                (blocks, heads, size), dtype=torch.int32, device=cache.device
            )
            if self.policy.wants_cumulative_attention:
                self.cumulative = torch.zeros((blocks, heads, size), device=cache.device)

    def remember(self, query: Tensor, tokens: Tensor, places: Tensor) -> None:
        """Keep the queries of some tokens for later evictions."""
        need = (int(places.max()) // self.ring + 1) * self.ring
        if self.queries is None or self.queries.shape[0] < need:
            grown = query.new_zeros((max(need, 16 * self.ring), *query.shape[1:]))
            if self.queries is not None:
                grown[: self.queries.shape[0]] = self.queries
            self.queries = grown
        self.queries[places] = query[tokens]

    def flush(self, query: Tensor | None, flush: AttentionFlush) -> None:
        """Add the attention of some queries to the cumulative attention of what they saw.

        Args:
            query: The step's queries, ``[num_tokens, num_heads, head_size]``; None where all that
                are asked for are remembered.
            flush: Which queries, and what they saw.
        """
        resident = flush.resident
        view = self.view(resident)
        mass = self._mass(view, self._queries_of(query, flush), flush.positions)
        self._add_attention(resident, view.over_groups(mass), flush.positions.shape[1])

    def _mass(self, view: ResidentView, queries: Tensor, positions: Tensor) -> Tensor:
        """Attention mass of the resident tokens, ``[rows, num_heads, count]``.

        The queries of a chunk go `FLUSH` at a time, as rows of their own: then a chunk runs the
        kernels of a decode step, whatever its length.

        Args:
            view: The rows.
            queries: ``[rows, n, num_heads, head_size]``.
            positions: ``[rows, n]`` int32.
        """
        rows, n, heads, size = queries.shape
        parts = -(-n // FLUSH)
        lack = parts * FLUSH - n
        if lack:
            queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, lack))
            positions = torch.nn.functional.pad(positions, (0, lack), value=-1)
        queries = queries.view(rows, parts, FLUSH, heads, size)
        positions = positions.view(rows, parts, FLUSH)
        at_once = max(1, MASS_ELEMENTS // max(rows * heads * view.count, 1))
        total = None
        for first in range(0, parts, at_once):
            some = slice(first, min(first + at_once, parts))
            k = some.stop - some.start
            mass = attention_mass(
                queries[:, some].flatten(0, 1),
                view.key_pages,
                _repeat(view.block_table, k),
                _repeat(view.lens, k),
                self.scale,
                key_positions=_repeat(view.positions, k),
                query_positions=positions[:, some].flatten(0, 1),
                softcap=self.softcap,
                # Pages may end behind the resident tokens.
                out=queries.new_empty((rows * k, heads, view.count), dtype=torch.float32),
            )
            mass = mass.view(rows, k, heads, view.count).sum(1)
            total = mass if total is None else total + mass
        assert total is not None, "a flush has queries"
        return total

    def _queries_of(self, query: Tensor | None, flush: AttentionFlush) -> Tensor:
        if flush.fresh is None:
            assert self.queries is not None and flush.remembered is not None
            return self.queries[flush.remembered]
        assert query is not None
        fresh = query[flush.fresh.clamp_min(0)]
        if self.queries is None or flush.remembered is None:
            return fresh
        old = self.queries[flush.remembered.clamp_min(0)]
        return torch.where((flush.fresh >= 0)[..., None, None], fresh, old)

    def _add_attention(self, resident: ResidentBlocks, add: Tensor, new: int) -> None:
        """Add to the cumulative attention, ``[rows, kv_heads, n]`` in resident order; the last
        ``new`` tokens had received nothing."""
        assert self.cumulative is not None
        rows, (_, heads, size) = len(resident.blocks), self.cumulative.shape
        before = self._attention_of(resident)
        before[..., resident.tokens - new :] = 0
        whole = resident.blocks.shape[1] * size
        sums = torch.nn.functional.pad(before + add, (0, whole - add.shape[2]))
        self.cumulative[resident.blocks] = sums.view(rows, heads, -1, size).transpose(1, 2)

    def _attention_of(self, resident: ResidentBlocks) -> Tensor:
        """Cumulative attention in resident order, ``[rows, kv_heads, n]``, a copy."""
        assert self.cumulative is not None
        rows, (_, heads, _size) = len(resident.blocks), self.cumulative.shape
        taken = self.cumulative[resident.blocks].transpose(1, 2)
        return taken.reshape(rows, heads, -1)[..., : resident.tokens]

    def _positions_of(self, resident: ResidentBlocks) -> Tensor:
        assert self.positions is not None
        rows, (_, heads, size) = len(resident.blocks), self.positions.shape
        offsets = torch.arange(size, dtype=torch.int32, device=resident.blocks.device)
        plain = (resident.logical[..., None] * size + offsets).to(torch.int32)
        mixed = (resident.logical < resident.mixed[:, None])[:, None, :, None]
        found = torch.where(
            mixed, self.positions[resident.blocks].transpose(1, 2), plain[:, None]
        ).reshape(rows, heads, -1)
        return found[..., : resident.tokens].contiguous()

    def view(
        self, resident: ResidentBlocks, decision: EvictionDecision | None = None
    ) -> ResidentView:
        """Return what a policy sees of some rows, with their observed queries at a decision."""
        pages = self.pages
        queries = None
        if decision is not None and self.policy.observation:
            queries = self.latest_queries(decision, self.policy.observation)
        rows = resident.blocks.shape[0]
        device = resident.blocks.device
        plain = pages.views
        paged = plain is not None and self.paged(device)
        if plain is not None and paged:
            key, value, table = *plain, resident.blocks.to(torch.int32)
        else:
            key = pages.gather(0, resident.blocks)[:, :, : resident.tokens]
            value = pages.gather(1, resident.blocks)[:, :, : resident.tokens]
            table = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        none = torch.zeros(rows, dtype=torch.int32, device=device)
        num_tokens = decision.num_tokens if decision is not None else none
        positions = None
        if queries is not None:
            window = torch.arange(-self.policy.observation, 0, device=device, dtype=torch.int32)
            positions = (num_tokens[:, None] + window).clamp_min(-1)
        return ResidentView(
            layer=self.layer,
            scale=self.scale,
            softcap=self.softcap,
            num_tokens=num_tokens,
            num_prompt_tokens=decision.num_prompt_tokens if decision is not None else none,
            count=resident.tokens,
            positions=self._positions_of(resident),
            key_pages=key,
            value_pages=value,
            block_table=table,
            queries=queries,
            query_positions=positions,
            cumulative_attention=self._attention_of(resident)
            if self.cumulative is not None
            else None,
            dense=not paged,
        )

    def paged(self, device: torch.device) -> bool:
        """Return True if a policy's kernels read the pages, rather than a copy of them."""
        return device.type != "cpu"

    def latest_queries(self, decision: EvictionDecision, window: int) -> Tensor:
        """Return the latest queries of each row, ``[rows, window, num_heads, head_size]``."""
        assert self.queries is not None
        device = decision.num_tokens.device
        positions = decision.num_tokens[:, None].long() + torch.arange(-window, 0, device=device)
        return self.queries[decision.rings[:, None] + positions % self.ring]

    def put(self, resident: ResidentBlocks, source: Tensor, view: ResidentView) -> None:
        """Let positions and cumulative attention follow the tokens that moved.

        Args:
            resident: Resident blocks before the move.
            source: Resident index each survivor comes from, ``[rows, kv_heads, n]`` int64.
            view: What the decision saw.
        """
        rows, heads, count = source.shape
        size = self.policy.engine.block_size
        survivors = resident.blocks[:, : count // size]

        def store(side: Tensor, values: Tensor) -> None:
            moved = values.gather(2, source).view(rows, heads, -1, size)
            side[survivors] = moved.transpose(1, 2)

        assert self.positions is not None
        store(self.positions, view.positions)
        if self.cumulative is not None and view.cumulative_attention is not None:
            store(self.cumulative, view.cumulative_attention)
