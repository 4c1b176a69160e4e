"""Resident tokens of one layer under a scoring policy, as a decision sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvplug.containment import PolicyFailure
from kvplug.contract import LayerView, ResidentView, ScoringPolicy
from kvplug.hosts.pruning import FLUSH, Rules
from kvplug.hosts.vllm.worker.page_tails import tail_of
from kvplug.hosts.vllm.worker.pages import TokenPages, open_pages
from kvplug.hosts.vllm.worker.phases import AttentionFlush, EvictionDecision, ResidentBlocks
from kvplug_kernels.add_mass import add_mass
from kvplug_kernels.attention_mass import attention_mass
from kvplug_kernels.resident_tokens import LatestQueries, resident_tokens

MASS_ELEMENTS = 1 << 24
"""Attention masses computed at once: it bounds the memory of a long chunk."""


def _repeat(rows: Tensor, times: int) -> Tensor:
    """Each row ``times`` times, one after the other."""
    shape = (rows.shape[0], times, *rows.shape[1:])
    return rows[:, None].expand(shape).reshape(-1, *rows.shape[1:]).contiguous()


@dataclass(frozen=True)
class Residents:
    """The resident tokens of some rows at one moment.

    Attributes:
        view: What a policy sees. It may write where it should not: nothing is read from it.
        table: Blocks of each row, ``[rows, n]`` int32.
        positions: Position in the text of each token, ``[rows, kv_heads, tokens]`` int32.
        totals: Cumulative attention of each, likewise, float32; None for none.
    """

    view: ResidentView
    table: Tensor
    positions: Tensor
    totals: Tensor | None


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
        tails: Whether the pages have tails for what is kept beside slots; see `page_tails`.

    Attributes:
        rules: What the policy declared.
        queries: Remembered queries, ``[n, num_heads, head_size]``: a ring per slot.
        positions: Position of each survivor, ``[num_blocks, kv_heads, block_size]`` int32.
        cumulative: Cumulative attention of each token, the same shape, float32.
    """

    def __init__(
        self,
        policy: ScoringPolicy,
        layer: LayerView,
        ring: int,
        scale: float,
        softcap: float,
        tails: bool = False,
    ):
        self.policy = policy
        self.rules = Rules.of(policy)
        self.layer = layer
        self.ring = ring
        self.scale = scale
        self.softcap = softcap
        self._tails = tails
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
            self.positions = self._beside(cache, 0, torch.int32)
            if self.rules.cumulative:
                self.cumulative = self._beside(cache, 1, torch.float32)

    def _beside(self, cache: Tensor, field: int, dtype: torch.dtype) -> Tensor:
        if self._tails:
            return tail_of(cache, field, dtype)
        return torch.zeros(cache.shape[:3], dtype=dtype, device=cache.device)

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
        assert self.cumulative is not None
        if flush.settled is not None:
            assert self.queries is not None
            found = self.look(resident, latest=flush.latest(self.queries, self.ring))
            queries, positions = found.view.queries, found.view.query_positions
            assert queries is not None and positions is not None
        else:
            found = self.look(resident)
            assert flush.positions is not None
            queries, positions = self._queries_of(query, flush), flush.positions
        mass = self._mass(found.view, queries, positions)
        add_mass(self.cumulative, found.table, mass, new=flush.new)

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
        if n == FLUSH and rows * heads * view.count <= MASS_ELEMENTS:
            return self._mass_of(view, queries, positions, 1)
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
            mass = self._mass_of(
                view, queries[:, some].flatten(0, 1), positions[:, some].flatten(0, 1), k
            )
            mass = mass.view(rows, k, heads, view.count).sum(1)
            total = mass if total is None else total + mass
        assert total is not None, "a flush has queries"
        return total

    def _mass_of(self, view: ResidentView, queries: Tensor, positions: Tensor, k: int) -> Tensor:
        """Attention mass of ``k`` parts of each row's queries, each part a row."""
        rows, _, heads, _ = queries.shape
        table, lens, key_positions = view.block_table, view.lens, view.positions
        if k > 1:
            table, lens, key_positions = (_repeat(x, k) for x in (table, lens, key_positions))
        return attention_mass(
            queries,
            view.key_pages,
            table,
            lens,
            self.scale,
            key_positions=key_positions,
            query_positions=positions,
            softcap=self.softcap,
            # Pages may end behind the resident tokens.
            out=queries.new_empty((rows, heads, view.count), dtype=torch.float32),
        )

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

    def view(
        self, resident: ResidentBlocks, decision: EvictionDecision | None = None
    ) -> ResidentView:
        """Return what a policy sees of some rows; see `look`."""
        return self.look(resident, decision).view

    def look(
        self,
        resident: ResidentBlocks,
        decision: EvictionDecision | None = None,
        latest: LatestQueries | None = None,
    ) -> Residents:
        """Lay out the resident tokens of some rows: one launch on an accelerator.

        Args:
            resident: Their blocks.
            decision: The decision they are laid out for, with the queries that the policy observes;
                None for none.
            latest: Queries wanted where there is no decision.
        """
        assert self.positions is not None
        pages = self.pages
        if decision is not None and self.rules.observation:
            assert self.queries is not None
            latest = decision.latest(self.queries, self.ring, self.rules.observation)
        found = resident_tokens(
            resident.table,
            resident.requests,
            resident.logical,
            resident.mixed,
            self.positions,
            resident.layers,
            count=resident.tokens,
            totals=self.cumulative,
            latest=latest,
        )
        shown, own = found.table
        plain = pages.views
        paged = plain is not None and self.paged(shown.device)
        if plain is not None and paged:
            key, value, table = *plain, shown
        else:
            key, value = self._gathered(pages, own.long(), resident.tokens)
            table = torch.arange(len(own), dtype=torch.int32, device=own.device)[:, None]
        none = found.lens
        view = ResidentView(
            layer=self.layer,
            scale=self.scale,
            softcap=self.softcap,
            num_tokens=decision.shown_num_tokens if decision is not None else none,
            num_prompt_tokens=decision.num_prompt_tokens if decision is not None else none,
            count=resident.tokens,
            positions=found.positions[0],
            key_pages=key,
            value_pages=value,
            block_table=table,
            queries=found.queries,
            query_positions=found.query_positions,
            cumulative_attention=found.totals[0] if found.totals is not None else None,
            longest=max(decision.at) if decision is not None else 0,
            dense=not paged,
        )
        # As the property would make it, without another launch.
        vars(view)["lens"] = found.lens
        totals = found.totals[1] if found.totals is not None else None
        return Residents(view, own, found.positions[1], totals)

    def _gathered(self, pages: TokenPages, blocks: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of some rows; zeros where a format cannot read its pages back."""
        try:
            key, value = pages.gather(0, blocks), pages.gather(1, blocks)
        except PolicyFailure:
            layer = self.layer
            shape = (len(blocks), layer.num_kv_heads, tokens, layer.head_size)
            dtype: torch.dtype = getattr(torch, layer.dtype)
            zeros = torch.zeros(shape, dtype=dtype, device=blocks.device)
            return zeros, zeros
        return key[:, :, :tokens], value[:, :, :tokens]

    def paged(self, device: torch.device) -> bool:
        """Return True if a policy's kernels read the pages, rather than a copy of them."""
        return device.type != "cpu"

    def latest_queries(self, decision: EvictionDecision, window: int) -> Tensor:
        """Return the latest queries of each row, ``[rows, window, num_heads, head_size]``."""
        assert self.queries is not None
        device = decision.num_tokens.device
        positions = decision.num_tokens[:, None].long() + torch.arange(-window, 0, device=device)
        places = decision.rings[:, None].long() + positions % self.ring
        if decision.starts is not None:
            layers = decision.resident.layers
            own = decision.starts[layers.first : layers.first + layers.num_layers]
            places = (places + own[:, None, None]).flatten(0, 1)
        return self.queries[places]

    def beside(self, positions: Tensor, totals: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Pair what is kept beside the pages with its values, in resident order."""
        assert self.positions is not None
        pairs = [(self.positions, positions)]
        if self.cumulative is not None and totals is not None:
            pairs.append((self.cumulative, totals))
        return pairs
