"""The worker half of a scoring policy: what attention sees, and the cuts themselves.

A step's rows are brought into phases at the positions where the scheduler's `Plan` cuts them. In
each layer the backend's own kernel attends one phase, the policy scores what the rows that come to
a cut hold, the survivors move together inside the request's own blocks, and the next phase sees
the result. So what a token sees depends on its position alone, wherever a prompt was chunked.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionCGSupport

from kvplug.contract import HeldView, LayerView, ScoringPolicy
from kvplug.hosts.pruning import choose, keep_best
from kvplug.hosts.spans import SpanStore, Tokens
from kvplug.hosts.vllm.engine import share_groups
from kvplug.hosts.vllm.spec import PrunedSpec
from kvplug.hosts.vllm.worker.format import FormatPages
from kvplug.hosts.vllm.worker.pages import PageOrder, Pages, order_of
from kvplug.hosts.vllm.worker.phases import (
    FLUSH,
    Decision,
    Flush,
    Holding,
    Phase,
    StepPlanner,
)
from kvplug.hosts.vllm.worker.state import WorkerState
from kvplug_kernels.attention_mass import attention_mass
from kvplug_kernels.compact_kv import plan_moves

logger = init_logger("vllm.kvplug")


ON_DEMAND_QUERIES = 8
"""Latest queries that say which dropped tokens are needed again."""


class LayerCuts:
    """One layer's side of the cuts: page order, remembered queries, positions and totals."""

    def __init__(self, policy: ScoringPolicy, layer: LayerView, state: WorkerState, scale: float):
        self.policy = policy
        self.layer = layer
        self.state = state
        self.scale = scale
        self.softcap = 0.0
        self.ring = ring_size(policy)
        self.group = share_groups(policy).index(policy.share(layer))
        self._order: PageOrder | None = None
        self._pages: Pages | FormatPages | None = None
        self._cache_at = -1
        self._queries: Tensor | None = None
        self._positions: Tensor | None = None
        self._totals: Tensor | None = None
        self._stores: dict[int, SpanStore] = {}

    def open(self, impl: Any, layer: Any, cache: Tensor) -> Pages | FormatPages:
        """The layer's pages; probes their order the first time."""
        if self._pages is None or self._cache_at != cache.data_ptr():
            pages_of = getattr(impl, "kvplug_pages", None)
            if pages_of is not None:
                self._pages = pages_of(layer, cache, getattr(torch, self.layer.dtype))
            else:
                if self._order is None:
                    self._order = order_of(impl, layer, cache)
                self._pages = Pages(cache, self._order)
            self._cache_at = cache.data_ptr()
            blocks, heads, size = cache.shape[:3]
            self._positions = torch.zeros(
                (blocks, heads, size), dtype=torch.int32, device=cache.device
            )
            if self.policy.wants_totals:
                self._totals = torch.zeros((blocks, heads, size), device=cache.device)
        return self._pages

    def forget(self, slots: Tensor) -> None:
        """Newly written slots have received no attention yet."""
        if self._totals is not None:
            slots = slots[slots >= 0]
            size = self._totals.shape[2]
            self._totals[slots // size, :, slots % size] = 0

    def remember(self, query: Tensor, tokens: Tensor, places: Tensor) -> None:
        """Keep the queries of some tokens for later decisions."""
        need = (int(places.max()) // self.ring + 1) * self.ring
        if self._queries is None or self._queries.shape[0] < need:
            grown = query.new_zeros((max(need, 16 * self.ring), *query.shape[1:]))
            if self._queries is not None:
                grown[: self._queries.shape[0]] = self._queries
            self._queries = grown
        self._queries[places] = query[tokens]

    def flush(self, pages: Pages | FormatPages, query: Tensor, flush: Flush) -> None:
        """Add the attention of some queries to the totals of what they saw."""
        assert self._totals is not None
        held = flush.holding
        fresh = query[flush.fresh.clamp_min(0)]
        if self._queries is not None and flush.remembered is not None:
            old = self._queries[flush.remembered.clamp_min(0)]
            fresh = torch.where((flush.fresh >= 0)[..., None, None], fresh, old)
        view = self._view(pages, held, None, None)
        mass = attention_mass(
            fresh,
            view.key_pages,
            view.block_table,
            view.lens,
            self.scale,
            key_positions=view.positions,
            query_positions=flush.positions,
            softcap=self.softcap,
        )
        self._totals_of(held, view.over_groups(mass[..., : held.tokens]))

    def _totals_of(self, held: Holding, add: Tensor | None = None) -> Tensor:
        """Totals in held order, ``[rows, kv_heads, held]``; adds to them first where asked."""
        assert self._totals is not None
        rows, heads, size = held.blocks.shape[0], self._totals.shape[1], self._totals.shape[2]
        if add is not None:
            whole = held.blocks.shape[1] * size
            padded = torch.nn.functional.pad(add, (0, whole - add.shape[2]))
            self._totals[held.blocks] += padded.view(rows, heads, -1, size).transpose(1, 2)
        taken = self._totals[held.blocks].transpose(1, 2)
        return taken.reshape(rows, heads, -1)[..., : held.tokens]

    def _positions_of(self, held: Holding) -> Tensor:
        assert self._positions is not None
        rows, heads, size = held.blocks.shape[0], self._positions.shape[1], self._positions.shape[2]
        offsets = torch.arange(size, dtype=torch.int32, device=held.blocks.device)
        plain = (held.logical[..., None] * size + offsets).to(torch.int32)
        mixed = (held.logical < held.mixed[:, None])[:, None, :, None]
        found = torch.where(
            mixed, self._positions[held.blocks].transpose(1, 2), plain[:, None]
        ).reshape(rows, heads, -1)
        return found[..., : held.tokens].contiguous()

    def _view(
        self,
        pages: Pages | FormatPages,
        held: Holding,
        decision: Decision | None,
        queries: Tensor | None,
    ) -> HeldView:
        rows = held.blocks.shape[0]
        device = held.blocks.device
        plain = pages.views
        if plain is not None and device.type != "cpu":
            key, value, table = *plain, held.blocks.to(torch.int32)
        else:
            key = pages.gather(0, held.blocks)[:, :, : held.tokens]
            value = pages.gather(1, held.blocks)[:, :, : held.tokens]
            table = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        none = torch.zeros(rows, dtype=torch.int32, device=device)
        num_tokens = decision.num_tokens if decision is not None else none
        positions = None
        if queries is not None:
            window = torch.arange(-self.policy.observation, 0, device=device, dtype=torch.int32)
            positions = (num_tokens[:, None] + window).clamp_min(-1)
        return HeldView(
            layer=self.layer,
            scale=self.scale,
            softcap=self.softcap,
            num_tokens=num_tokens,
            num_prompt_tokens=decision.num_prompt_tokens if decision is not None else none,
            held=held.tokens,
            positions=self._positions_of(held),
            key_pages=key,
            value_pages=value,
            block_table=table,
            queries=queries,
            query_positions=positions,
            totals=self._totals_of(held) if self._totals is not None else None,
        )

    def _observed(self, decision: Decision) -> Tensor | None:
        """The latest queries of each row, ``[rows, observation, heads, head_size]``."""
        window = self.policy.observation
        return self._latest_queries(decision, window) if window else None

    def _latest_queries(self, decision: Decision, window: int) -> Tensor:
        assert self._queries is not None
        device = decision.num_tokens.device
        lanes = torch.tensor(decision.lanes, device=device)[:, None]
        positions = decision.num_tokens[:, None].long() + torch.arange(-window, 0, device=device)
        return self._queries[lanes * self.ring + positions % self.ring]

    def cut(self, pages: Pages | FormatPages, decision: Decision) -> None:
        """Decide what survives, and move it together."""
        held, count = decision.holding, decision.count
        view = self._view(pages, held, decision, self._observed(decision))
        keep = self._choose(view, decision.lanes, decision.candidates, count)
        source = plan_moves(keep, count).long()
        size = self.state.block_size
        row, head, slot, origin = self._moved(source)
        pages.move(
            head,
            held.blocks[row, origin // size],
            origin % size,
            held.blocks[row, slot // size],
            slot % size,
        )
        self._put_sides(held, source, view)

    def cut_on_demand(self, pages: Pages | FormatPages, decision: Decision) -> None:
        """The same for one row whose dropped tokens stay in host memory and may come back."""
        (lane,) = decision.lanes
        held, candidates, count = decision.holding, decision.candidates, decision.count
        began = time.perf_counter()
        view = self._view(pages, held, decision, self._observed(decision))
        if not bool(held.mixed[0]):
            self._stores.pop(lane, None)
        store = self._stores.setdefault(lane, SpanStore(self.policy.knobs.on_demand))
        mine = Tokens(
            view.keys[0],
            view.values[0],
            view.positions[0],
            view.totals[0] if view.totals is not None else None,
        )
        queries = self._latest_queries(decision, min(self.ring, ON_DEMAND_QUERIES))
        found = store.needed(queries[0], mine.keys, count // 4)
        unwanted = None
        if found is not None:
            back, needed = found
            mine = self._insert(mine, back, candidates)
            view = self._dense_view(view, mine)
            unwanted = torch.zeros(mine.positions.shape, dtype=torch.bool, device=needed.device)
            unwanted[:, candidates : candidates + needed.shape[1]] = ~needed
            candidates += needed.shape[1]
            self.state.counters.fetched_tokens += int(needed.sum())
        keep = self._choose(view, decision.lanes, candidates, count, unwanted)
        source = plan_moves(keep, count).long()
        size = self.state.block_size
        row, head, slot, origin = self._moved(source)
        pages.write(
            head, held.blocks[row, slot // size], slot % size,
            mine.keys[head, origin], mine.values[head, origin],
        )  # fmt: skip
        self._put_sides(held, source, view)
        heads = keep.shape[1]
        gone = torch.ones(heads, candidates, dtype=torch.bool, device=keep.device)
        gone.scatter_(1, keep[0].long(), False)
        store.put(mine.take(gone.nonzero()[:, 1].view(heads, -1)))
        self.state.counters.on_demand_us += round((time.perf_counter() - began) * 1e6)

    def _insert(self, mine: Tokens, back: Tokens, at: int) -> Tokens:
        """``back`` as further candidates, before the block being filled."""
        n = mine.keys.shape[1]
        index = torch.arange(n, device=mine.keys.device).expand(mine.keys.shape[0], -1)
        if mine.totals is None:
            back.totals = None
        return Tokens.cat([mine.take(index[:, :at]), back, mine.take(index[:, at:])])

    def _dense_view(self, view: HeldView, mine: Tokens) -> HeldView:
        return replace(
            view,
            held=mine.keys.shape[1],
            positions=mine.positions[None],
            key_pages=mine.keys[None],
            value_pages=mine.values[None],
            block_table=torch.zeros_like(view.block_table[:, :1]),
            totals=mine.totals[None] if mine.totals is not None else None,
        )

    def _moved(self, source: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, KV head and slot of each survivor that moves, and the held index it comes from."""
        slots = torch.arange(source.shape[2], device=source.device)
        row, head, slot = torch.nonzero(source != slots, as_tuple=True)
        return row, head, slot, source[row, head, slot]

    def _put_sides(self, held: Holding, source: Tensor, view: HeldView) -> None:
        """Positions and totals follow the tokens."""
        rows, heads, count = source.shape
        size = self.state.block_size
        survivors = held.blocks[:, : count // size]

        def put(side: Tensor, values: Tensor) -> None:
            moved = values.gather(2, source).view(rows, heads, -1, size)
            side[survivors] = moved.transpose(1, 2)

        assert self._positions is not None
        put(self._positions, view.positions)
        if self._totals is not None and view.totals is not None:
            put(self._totals, view.totals)

    def _choose(
        self,
        view: HeldView,
        lanes: list[int],
        candidates: int,
        count: int,
        unwanted: Tensor | None = None,
    ) -> Tensor:
        if self.state.scoring_failed is None:
            try:
                keep, scores = choose(self.policy, view, candidates, count, unwanted)
                if self.policy.resizes:
                    self._measure(view, scores, lanes)
                return keep
            except Exception as error:
                self.state.scoring_failed = f"{type(error).__name__}: {error}"
                logger.error(
                    "sequence policy %r failed and is retired; from now on the latest tokens are "
                    "kept instead: %s: %s",
                    self.policy.name,
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
        self.state.counters.fallbacks += len(lanes)
        newest = view.positions.float()
        return keep_best(self.policy, view, newest, candidates, count, unwanted)

    def _measure(self, view: HeldView, scores: Tensor, lanes: list[int]) -> None:
        measured = self.policy.measure(view, scores)
        if measured is not None:
            self.state.add_measured(lanes, self.group, measured.double().cpu().numpy())


def ring_size(policy: ScoringPolicy) -> int:
    """Queries remembered per request and layer."""
    return max(
        policy.observation,
        FLUSH if policy.wants_totals else 0,
        ON_DEMAND_QUERIES if policy.knobs.on_demand else 0,
    )


class PruningBuilder:
    """Mixin placed before a stock metadata builder: phases of a step ride on its metadata."""

    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
        *args: Any,
        **kwargs: Any,
    ):
        super().__init__(  # type: ignore[call-arg]
            kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs
        )
        self._planner = (
            StepPlanner(kv_cache_spec, vllm_config, device)
            if isinstance(kv_cache_spec, PrunedSpec)
            else None
        )

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None: the number of phases differs from step to step."""
        return AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        common = common_attn_metadata
        planner = self._planner
        phases = planner.segments(common) if planner is not None else None
        if planner is None or phases is None:
            return super().build(  # type: ignore[misc]
                common_prefix_len, common, fast_build
            )
        state = planner.state
        built = []
        for segments in phases:
            whole = len(phases) == 1
            metadata = super().build(  # type: ignore[misc]
                0, planner.common_of(common, segments, whole), fast_build
            )
            tokens = None
            if not whole:
                spans = [
                    torch.arange(s.first_token, s.first_token + s.end - s.start) for s in segments
                ]
                tokens = torch.cat(spans).to(planner.device)
            phase = Phase(metadata, tokens)
            if state.ring:
                remembered = planner.remembered(segments, state.ring)
                if remembered is not None:
                    phase.remember_from, phase.remember_at = remembered
            if state.totals:
                phase.flushes = planner.flushes(common, segments, state.ring)
            phase.decisions = planner.decisions(common, segments)
            state.counters.rows += len(segments)
            state.counters.cuts += sum(len(d.lanes) for d in phase.decisions)
            built.append(phase)
        first = built[0].metadata
        first.kvplug_phases = built
        first.kvplug_slots = common.slot_mapping
        return first


class PruningImpl:
    """Mixin placed before a stock attention implementation: attends phase by phase, and cuts."""

    kvplug_policy: ScoringPolicy
    kvplug_state: WorkerState

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        attend = super().forward  # type: ignore[misc]
        phases = getattr(attn_metadata, "kvplug_phases", None)
        if not phases:
            return attend(
                layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
            )
        cuts = self._cuts(layer)
        pages = cuts.open(self, layer, kv_cache)
        cuts.forget(attn_metadata.kvplug_slots)
        for phase in phases:
            if phase.tokens is None:
                attend(layer, query, key, value, kv_cache, phase.metadata, output, *args, **kwargs)
            else:
                t = phase.tokens
                part = torch.empty_like(output[t])
                attend(
                    layer, query[t], key[t], value[t], kv_cache, phase.metadata, part,
                    *args, **kwargs,
                )  # fmt: skip
                output[t] = part
            for flush in phase.flushes:
                cuts.flush(pages, query, flush)
            if phase.remember_from is not None:
                cuts.remember(query, phase.remember_from, phase.remember_at)
            for decision in phase.decisions:
                if self.kvplug_policy.knobs.on_demand:
                    for one in decision.rows():
                        cuts.cut_on_demand(pages, one)
                else:
                    cuts.cut(pages, decision)
        return output

    def _cuts(self, layer: Any) -> LayerCuts:
        found = self.kvplug_state.layers.get(layer.layer_name)
        if found is None:
            from vllm.model_executor.models.utils import extract_layer_index

            view = self.kvplug_policy.engine.layers[extract_layer_index(layer.layer_name)]
            found = LayerCuts(self.kvplug_policy, view, self.kvplug_state, self.scale)  # type: ignore[attr-defined]
            found.softcap = float(getattr(self, "logits_soft_cap", 0) or 0)
            self.kvplug_state.layers[layer.layer_name] = found
        return found
