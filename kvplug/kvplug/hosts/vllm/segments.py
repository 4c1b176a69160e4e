"""The worker half of reuse: segments out of pages, and stored ones into them.

A step goes: what ended requests leave is read out of their pages, stored runs are written into
theirs, what is to be computed anew inside them is computed by a forward of its own, the engine's
forward runs, and segments it completed are read out. All but the first of it stands in the step's
`ReuseOrders`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.contract import (
    Fingerprint,
    FormatPolicy,
    LayerView,
    Placement,
    ReuseCheck,
    Verdict,
    WriteBatch,
)
from kvplug.deployment import Deployment
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.pages import Pages, order_of
from kvplug.hosts.vllm.recompute import Recomputer, UnlikeStored, chosen
from kvplug.hosts.vllm.worker import WorkerState, worker_state
from kvplug.reuse.deviation import deviation
from kvplug.reuse.file import SegmentHeader
from kvplug.reuse.measures import QUERIES, RunningScale, measures
from kvplug.reuse.memory import SegmentMemory, StoredSegment
from kvplug_kernels.segment_stats import segment_stats

if TYPE_CHECKING:
    from kvplug.reuse.settings import ReuseSettings

logger = init_logger("vllm.kvplug")

Compared = Callable[[Any, Tensor, Tensor], None]

LOOKED_BACK = 2048
"""Tokens before a segment over which its attention is measured."""


@dataclass(frozen=True)
class PieceOrder:
    """A run of a stored segment to write into pages.

    Attributes:
        segment: Its id.
        offset: First token of the segment that is used.
        length: Tokens used.
        start: Position in the request of the first of them.
        exact: Whether every check called it exact.
        shift: Positions its keys are rotated by.
        credibility: What a check estimated, or None.
    """

    segment: str
    offset: int
    length: int
    start: int
    exact: bool
    shift: int
    credibility: float | None


@dataclass(frozen=True)
class LoadOrder:
    """The run one request takes.

    Attributes:
        request: Its id.
        blocks: Ids of its blocks, ``[n]`` int64.
        tokens: Its token ids up to the end of the run, ``[end]`` int32.
        pieces: What is loaded.
        spans: What is computed anew.
    """

    request: str
    blocks: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    pieces: tuple[PieceOrder, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SaveOrder:
    """A segment to read out of a request's pages.

    Attributes:
        segment: Its id.
        fingerprint: What its KV depends on; measures and checksum not known yet.
        tokens: Its token ids, ``[length]`` int32.
        context: The text before it, ``[start]`` int32.
        blocks: Ids of the request's blocks up to the segment's last token, ``[n]`` int64.
        tail: The block the request writes last in the step, or -1: the request ended.
        session: Session that keeps it, or the empty string.
    """

    segment: str
    fingerprint: Fingerprint
    tokens: npt.NDArray[np.int32]
    context: npt.NDArray[np.int32]
    blocks: npt.NDArray[np.int64]
    tail: int = -1
    session: str = ""


@dataclass
class ReuseOrders:
    """What the scheduler tells the workers of one step.

    Attributes:
        loads: Runs to write before the forward.
        left: Segments that ended requests leave, to read before anything is written.
        saves: Segments that the step completes, to read after the forward.
        drop: Segments to forget; runs that the step loads still find theirs.
        delete: Segments whose files go too.
        fetch: Segments to bring back from the folder.
        lanes: Lane of each request that may memoize attention, by the block it writes last.
    """

    loads: list[LoadOrder] = field(default_factory=list)
    left: list[SaveOrder] = field(default_factory=list)
    saves: list[SaveOrder] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    delete: list[str] = field(default_factory=list)
    fetch: list[str] = field(default_factory=list)
    lanes: dict[int, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(vars(self).values())


@dataclass
class ReuseNews:
    """What a worker did since last asked. Ranks are merged: a segment is there once all have it.

    Attributes:
        saved: Measures of each segment stored.
        written: Segments whose file is complete.
        fetched: Segments that came back from the folder.
        failed: Segments that are not there, with the cause.
        computed: Tokens computed anew.
        loaded: Tokens loaded, and those of them that were corrected on the way.
        guard: ``(request, entropy, log-probability)`` of watched answers.
        memo: Decode rows that far attention was asked for, and those that reused it.
        unloaded: Requests whose run could not be loaded; vLLM computes it.
        errors: Exceptions on the way.
        error: The first of them.
        counts: Ranks that stored each segment.
    """

    saved: dict[str, dict[str, float]] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    computed: int = 0
    loaded: tuple[int, int] = (0, 0)
    guard: list[tuple[str, float, float]] = field(default_factory=list)
    memo: tuple[int, int] = (0, 0)
    unloaded: list[str] = field(default_factory=list)
    errors: int = 0
    error: str = ""
    counts: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(
            self.saved
            or self.written
            or self.fetched
            or self.failed
            or self.computed
            or self.loaded[0]
            or self.guard
            or self.memo[0]
            or self.errors
        )

    def merge(self, other: ReuseNews) -> None:
        """Add what another rank said of the same step."""
        for name, values in other.saved.items():
            own = self.saved.get(name, values)
            self.saved[name] = {k: (v + own.get(k, v)) / 2 for k, v in values.items()}
        # Both lists may name a segment twice then; the scheduler counts ranks.
        self.written += other.written
        self.fetched += other.fetched
        self.failed |= other.failed
        for name, count in other.counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.computed = max(self.computed, other.computed)
        self.loaded = max(self.loaded, other.loaded)
        self.guard = self.guard or other.guard
        self.memo = max(self.memo, other.memo)
        self.unloaded += other.unloaded
        self.errors += other.errors
        self.error = self.error or other.error


class ReusePlug:
    """Reuse as a backend takes it.

    Args:
        deployment: The deployment; it has a reuse section.
        vllm_config: The engine's config.
    """

    def __init__(self, deployment: Deployment, vllm_config: Any):
        self.settings: ReuseSettings = deployment.reuse
        self.state = worker_state(vllm_config)

    def builders(self) -> tuple[type[Any], ...]:
        """The mixins before every other builder."""
        if self.settings.memo is None:
            return ()
        from kvplug.hosts.vllm.memo import memo_builder

        return (memo_builder(self.settings.memo),)

    def impls(self) -> tuple[type[Any], ...]:
        """The mixins next to the stock implementation, outermost first."""
        own = {"kvplug_reuse_state": self.state}
        found: tuple[type[Any], ...] = (type("Reused", (ReusedImpl,), own),)
        if self.settings.memo is not None:
            from kvplug.hosts.vllm.memo import memo_impl

            found += (memo_impl(self.settings.memo, self.state),)
        return found


class ReusedImpl:
    """Mixin of an attention implementation: shows reuse queries, and new K and V, it asked for."""

    kvplug_reuse_state: WorkerState

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        half = self.kvplug_reuse_state.reuse
        if half is not None and half.compared is not None:
            half.compared(layer, key, value)
        super().do_kv_cache_update(  # type: ignore[misc]
            layer, key, value, kv_cache, slot_mapping
        )

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
        half = self.kvplug_reuse_state.reuse
        if half is not None and half.watched and attn_metadata is not None:
            half.watch(layer.layer_name, query, attn_metadata)
        out: Tensor = super().forward(  # type: ignore[misc]
            layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs
        )
        return out


class ReuseWorker:
    """The worker half.

    Args:
        deployment: The deployment; it has a reuse section.
        vllm_config: The engine's config.
        checks: The chain, built for the engine.
        stored: The format its pages are in; None for the backend's own.
        rank: This worker's rank.
        world: Ranks there are.
    """

    def __init__(
        self,
        deployment: Deployment,
        vllm_config: Any,
        checks: Sequence[ReuseCheck],
        stored: FormatPolicy | None,
        rank: int,
        world: int,
    ):
        self.settings = deployment.reuse
        self.vllm_config = vllm_config
        self.checks = list(checks)
        self.stored = stored
        self.rank, self.world = rank, world
        self.memory = SegmentMemory(self.settings.store.directory, rank, world)
        self.block_size = int(vllm_config.cache_config.block_size)
        self.layers: dict[str, LayerPages] = {}
        self.news = ReuseNews()
        self.watched: dict[int, list[SaveOrder]] = {}
        self.compared: Compared | None = None
        self._queries: dict[tuple[str, str], Tensor] = {}
        self._rows: tuple[int, list[tuple[str, int, int]]] | None = None
        self._running = RunningScale()
        self._unloaded: set[int] = set()
        self._held: dict[str, StoredSegment] = {}
        self._said: set[str] = set()
        self.state = worker_state(vllm_config)
        self.recomputer = Recomputer(vllm_config, self.state)

    def register(self, caches: dict[str, Tensor]) -> None:
        """Take in the layers' caches, by layer name.

        Raises:
            KVPlugError: Tokens are to be computed inside runs, and the model is not at hand.
        """
        if self.settings.recompute.needed and not self.recomputer.ready:
            raise KVPlugError(
                "vLLM's worker gave its extension no model runner, so nothing can be computed "
                "inside a reused run: remove reuse.recompute; see `kvplug doctor`"
            )
        from vllm.model_executor.models.utils import extract_layer_index

        context = self.vllm_config.compilation_config.static_forward_context
        views = self.checks[0].engine.layers
        self.layers = {
            name: LayerPages(
                context[name], caches[name], views[extract_layer_index(name)], self.stored
            )
            for name in sorted(caches, key=extract_layer_index)
            if name in context
        }

    # -- a step --------------------------------------------------------------------------------

    def before(self, orders: ReuseOrders) -> None:
        """Before anything of the step is written."""
        self._rows = None
        self._queries.clear()
        self.watched = {}
        for save in orders.saves:
            self.watched.setdefault(save.tail, []).append(save)
        # A segment may be loaded, given up and stored anew in one step.
        wanted = {piece.segment for order in orders.loads for piece in order.pieces}
        self._held = {name: self.memory.get(name) for name in wanted if name in self.memory}
        self._guarded("drop", self.memory.drop, orders.drop)
        self._guarded("delete", self.memory.delete, orders.delete)
        self._guarded("fetch", self.memory.fetch, orders.fetch)
        for save in orders.left:
            self._guarded("save", self._save, save)

    def load(self, orders: ReuseOrders) -> None:
        """Write stored runs into pages, and compute what is to be computed in them."""
        # Neither is for the forwards in between.
        watched, self.watched = self.watched, {}
        lanes, self.state.memo_lanes = self.state.memo_lanes, {}
        for order in orders.loads:
            try:
                self._load(order)
            except Exception as error:
                self._failed("load", error)
                self.news.unloaded.append(order.request)
                first = min(
                    (a for a, _ in [*order.spans, *((p.start, 0) for p in order.pieces)]),
                    default=0,
                )
                self._unloaded.update(order.blocks[first // self.block_size :].tolist())
        self.watched, self._rows, self._held = watched, None, {}
        self.state.memo_lanes = lanes

    def after(self, orders: ReuseOrders) -> None:
        """After the forward."""
        self.watched = {}
        unloaded = set(self.news.unloaded)
        for save in orders.saves:
            if save.fingerprint.request_id in unloaded:
                # What the step computed for it saw pages that were never filled.
                self.news.failed[save.segment] = "could not be stored"
            else:
                self._guarded("save", self._save, save)
        self._queries.clear()

    def take_unloaded(self) -> set[int]:
        """Blocks that could not be filled: vLLM computes their tokens."""
        found, self._unloaded = self._unloaded, set()
        return found

    def take_news(self) -> ReuseNews | None:
        """What happened since last asked."""
        found, self.news = self.news, ReuseNews()
        told = self.memory.news()
        found.written += told.written
        found.fetched += told.fetched
        found.failed |= told.failed
        found.guard, self.state.guard_heard = list(self.state.guard_heard), []
        found.memo, self.state.memo_rows = self.state.memo_rows, (0, 0)
        return found if found else None

    def close(self) -> None:
        """Finish writing files."""
        self.memory.close()

    def _guarded(self, what: str, call: Any, argument: Any) -> None:
        try:
            call(argument)
        except Exception as error:
            self._failed(what, error)
            if isinstance(argument, SaveOrder):
                self.news.failed[argument.segment] = "could not be stored"

    def _failed(self, what: str, error: Exception) -> None:
        self.news.errors += 1
        if not self.news.error:
            self.news.error = f"{what}: {type(error).__name__}: {error}"
        if what not in self._said:
            self._said.add(what)
            logger.error("reuse failed in %s; the engine computes instead", what, exc_info=error)

    # -- loading -------------------------------------------------------------------------------

    def _load(self, order: LoadOrder) -> None:
        blocks = torch.from_numpy(order.blocks)
        for piece in order.pieces:
            self._write(self._held[piece.segment], piece, blocks)
        spans = list(order.spans)
        loose = [(p.start, p.start + p.length) for p in order.pieces if not p.exact]
        share = self.settings.recompute.share
        if share and loose and self.recomputer.ready:
            spans = self._with_deviating(order, blocks, spans, loose, share)
        if spans:
            self.recomputer.compute(order.tokens, blocks, spans)
            self.news.computed += sum(b - a for a, b in spans)

    def _with_deviating(
        self,
        order: LoadOrder,
        blocks: Tensor,
        spans: list[tuple[int, int]],
        loose: list[tuple[int, int]],
        share: float,
    ) -> list[tuple[int, int]]:
        """The spans, and the tokens of approximate pieces whose layer-1 K and V deviate most."""
        second = list(self.layers)[min(1, len(self.layers) - 1)]
        pages = self.layers[second]
        # Layer 1 sees what layer 0 made of everything before, so what is missing is computed too.
        begin = min([loose[0][0], *(a for a, _ in spans)])
        end = loose[-1][1]
        before = pages.read(blocks, begin, end)
        found = torch.zeros(end - begin)
        # A forward takes so many tokens; the first layer's K and V of one are there for the next.
        for batch in self.recomputer.batches([(begin, end)]):
            part = slice(batch[0][0] - begin, batch[-1][1] - begin)
            self.compared = _comparing(second, [t[part] for t in before], found[part])
            try:
                self.recomputer.forward(order.tokens, blocks, batch)
            except UnlikeStored:
                pass
            finally:
                self.compared = None
        if self.world > 1:
            from vllm.distributed import tensor_model_parallel_all_reduce

            found = tensor_model_parallel_all_reduce(found)
        return chosen(found, begin, loose, spans, share)

    def _write(self, stored: StoredSegment, piece: PieceOrder, blocks: Tensor) -> None:
        header = stored.header
        positions = torch.arange(piece.start, piece.start + piece.length)
        slots = blocks[positions // self.block_size] * self.block_size
        slots += positions % self.block_size
        run = slice(piece.offset, piece.offset + piece.length)
        verdict = Verdict(True, "", piece.exact, piece.shift, piece.credibility)
        placement = Placement(header.fingerprint, piece.offset, piece.length, piece.start, verdict)
        adapting = [c for c in self.checks if c.adapts(placement)]
        for index, pages in enumerate(self.layers.values()):
            own = {name: plane[index, run] for name, plane in stored.planes.items()}
            if not adapting:
                pages.put(slots, own)
                continue
            key, value = pages.given(slots, own)
            for check in adapting:
                key, value = check.adapt(pages.view, placement, key, value)
            pages.write(slots, key, value)
        done, corrected = self.news.loaded
        self.news.loaded = (
            done + piece.length,
            corrected + (piece.length if adapting else 0),
        )

    # -- saving --------------------------------------------------------------------------------

    def watch(self, name: str, query: Tensor, metadata: Any) -> None:
        """Remember the last queries of segments the step completes, of one layer."""
        if self._rows is None or self._rows[0] != id(metadata):
            self._rows = (id(metadata), self._observed(metadata))
        for segment, first, last in self._rows[1]:
            self._queries[segment, name] = query[first:last].detach().clone()

    def _observed(self, metadata: Any) -> list[tuple[str, int, int]]:
        """Queries to remember: a segment, its first and last query among the step's."""
        starts = metadata.query_start_loc.tolist()
        lens = metadata.seq_lens.tolist()
        found = []
        for row, length in enumerate(lens[: len(starts) - 1]):
            if length < 1:
                continue
            tail = int(metadata.block_table[row, (length - 1) // self.block_size])
            begun = length - (starts[row + 1] - starts[row])
            for save in self.watched.get(tail, ()):
                start = save.fingerprint.start
                last = min(start + save.fingerprint.length, length)
                first = max(last - QUERIES, begun, start)
                if first < last:
                    at = starts[row] - begun
                    found.append((save.segment, at + first, at + last))
        return found

    def _save(self, order: SaveOrder) -> None:
        start = order.fingerprint.start
        end = start + order.fingerprint.length
        blocks = torch.from_numpy(order.blocks)
        planes: dict[str, list[Tensor]] = {}
        measured = []
        for name, pages in self.layers.items():
            read = pages.read(blocks, start, end)
            for plane, tensor in pages.stored(blocks, start, end, read).items():
                planes.setdefault(plane, []).append(tensor.cpu())
            measured.append(self._measure(name, pages, order, blocks, read))
        stats = torch.stack(measured)
        found = measures(stats, self._running)
        self._running.add(stats)
        made = {name: stacked(tensors) for name, tensors in planes.items()}
        header = SegmentHeader.of(
            order.segment,
            replace(order.fingerprint, measures=found),
            order.tokens,
            order.context,
            made,
            self.rank,
            self.world,
            order.session,
        )
        self.memory.put(header, made)
        self.news.saved[order.segment] = found
        self.news.counts[order.segment] = 1

    def _measure(
        self,
        name: str,
        pages: LayerPages,
        order: SaveOrder,
        blocks: Tensor,
        read: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Statistics of one layer of a segment, float32 ``[kv_heads, 5]``."""
        start = order.fingerprint.start
        query, before = self._queries.get((order.segment, name)), None
        if query is not None:
            before = pages.keys(blocks, max(0, start - LOOKED_BACK), start)
        return segment_stats(*read, query, before, pages.scale).cpu()


def _comparing(name: str, stale: Sequence[Tensor], into: Tensor) -> Compared:
    """What a layer's new K and V are shown to: says how far off stale ones are, and ends the
    forward there."""

    def compared(layer: Any, key: Tensor, value: Tensor) -> None:
        if layer.layer_name == name:
            n = len(into)
            into.copy_(deviation(stale[0], stale[1], key[:n], value[:n]))
            raise UnlikeStored

    return compared


class LayerPages:
    """One layer's pages as segments are read from them and written to them.

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
        self._format = stored
        self._size = int(cache.shape[2])
        self._dtype = getattr(torch, view.dtype)
        self._pages: Pages | None = None
        if stored is not None:
            self._layout = stored.layout(view)
            self._planes = self._layout.planes(cache)

    def read(self, blocks: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """K and V at positions ``[start, end)`` of a request, each ``[n, kv_heads, head_size]``.

        Args:
            blocks: Ids of its blocks, ``[m]`` int64.
            start: First position.
            end: Position after the last.
        """
        key, value = self._taken((0, 1), blocks, start, end)
        return key, value

    def keys(self, blocks: Tensor, start: int, end: int) -> Tensor:
        """The keys of what `read` gives."""
        return self._taken((0,), blocks, start, end)[0]

    def _taken(
        self, which: tuple[int, ...], blocks: Tensor, start: int, end: int
    ) -> tuple[Tensor, ...]:
        if start >= end:
            shape = (0, self.view.num_kv_heads, self.view.head_size)
            empty = torch.zeros(shape, dtype=self._dtype, device=self._cache.device)
            return tuple(empty for _ in which)
        first = start // self._size
        own = blocks[first : -(-end // self._size)].to(self._cache.device)
        run = slice(start - first * self._size, end - first * self._size)
        if self._format is not None:
            found = self._format.read(self.view, self._cache, own)
            return tuple(found[i].transpose(1, 2).flatten(0, 1).to(self._dtype)[run] for i in which)
        if self._pages is None:
            self._pages = Pages(self._cache, order_of(self._layer.impl, self._layer, self._cache))
        pages = self._pages
        return tuple(pages.gather(i, own[None])[0].transpose(0, 1)[run] for i in which)

    def stored(
        self,
        blocks: Tensor,
        start: int,
        end: int,
        read: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What is kept of the tokens at ``[start, end)``: the page's own bytes.

        Args:
            blocks: Ids of the request's blocks, ``[m]`` int64.
            start: First position.
            end: Position after the last.
            read: What `read` gave of them, if it was asked.

        Returns:
            ``key`` and ``value`` as `read` gives them, or ``cells``, uint8 ``[n, heads, bytes]``.
        """
        if self._format is None:
            key, value = read or self.read(blocks, start, end)
            return {"key": key.contiguous(), "value": value.contiguous()}
        at = torch.arange(start, end)
        own, slots = blocks[at // self._size], at % self._size
        heads, width = self._cache.shape[1], self._layout.bytes_per_token_head
        cells = self._cache.new_zeros((end - start, heads, width))
        for f, plane in zip(self._layout.fields, self._planes, strict=True):
            cells[..., f.offset : f.offset + f.size] = plane[own, :, slots]
        return {"cells": cells}

    def put(self, slots: Tensor, planes: dict[str, Tensor]) -> None:
        """Write what `stored` gave to other slots, as it is.

        Args:
            slots: ``[n]`` int64.
            planes: What `stored` gave.
        """
        if self._format is None:
            self.write(slots, planes["key"], planes["value"])
            return
        heads, width = self._cache.shape[1], self._layout.bytes_per_token_head
        cells = planes["cells"][:, :heads, :width].to(self._cache.device)
        blocks, offsets = slots // self._size, slots % self._size
        for f, plane in zip(self._layout.fields, self._planes, strict=True):
            plane[blocks, :, offsets] = cells[..., f.offset : f.offset + f.size]

    def given(self, slots: Tensor, planes: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """K and V of what `stored` gave, ``[n, kv_heads, head_size]`` in the model's dtype.

        Args:
            slots: Where they go, ``[n]`` int64.
            planes: What `stored` gave.
        """
        device, dtype = self._cache.device, self._dtype
        if self._format is None:
            return planes["key"].to(device), planes["value"].to(device)
        # A format reads whole blocks of pages, so its bytes go where they will be written over.
        self.put(slots, planes)
        blocks, index = torch.unique(slots // self._size, return_inverse=True)
        found = self._format.read(self.view, self._cache, blocks)
        key, value = (t[index, :, slots % self._size].to(dtype) for t in found)
        return key, value

    def write(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store K and V of some tokens.

        Args:
            slots: ``[n]`` int64.
            key: ``[n, kv_heads, head_size]``.
            value: The same shape.
        """
        device = self._cache.device
        where = slots.to(device)
        k, v = key.to(device).contiguous(), value.to(device).contiguous()
        if self._format is not None:
            self._format.write(self.view, WriteBatch(k, v, where), self._cache)
        else:
            self._layer.impl.do_kv_cache_update(self._layer, k, v, self._cache, where)


def stacked(layers: Sequence[Tensor]) -> Tensor:
    """Layers' planes as one, ``[layers, tokens, ...]``; a format may give layers different bytes,
    and the narrower are filled up with zeros."""
    if all(t.shape == layers[0].shape for t in layers):
        return torch.stack(list(layers))
    shape = [max(sizes) for sizes in zip(*(t.shape for t in layers), strict=True)]
    found = layers[0].new_zeros((len(layers), *shape))
    for one, tensor in zip(found, layers, strict=True):
        one[: tensor.shape[0], : tensor.shape[1], : tensor.shape[2]] = tensor
    return found
