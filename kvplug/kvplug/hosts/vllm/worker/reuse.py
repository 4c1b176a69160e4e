"""The worker half of reuse: segments out of pages, and stored ones into them.

A step goes: what ended requests leave is read out of their pages, stored runs are written into
theirs, what is to be computed anew inside them is computed by a forward of its own, the engine's
forward runs, and segments it completed are read out. All but the first of it stands in the step's
`ReuseOrders`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.contract import (
    FormatPolicy,
    Placement,
    ReuseCheck,
    Verdict,
)
from kvplug.deployment import Deployment
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.engine import format_policy, reuse_checks
from kvplug.hosts.vllm.messages import LoadOrder, PieceOrder, ReuseNews, ReuseOrders, SaveOrder
from kvplug.hosts.vllm.view import engine_view
from kvplug.hosts.vllm.worker.recompute import Recomputer, UnlikeStored, chosen
from kvplug.hosts.vllm.worker.segments import LayerPages, stacked
from kvplug.hosts.vllm.worker.state import WorkerState, worker_state
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
        from kvplug_attention_memo.vllm_attic import memo_builder

        return (memo_builder(self.settings.memo),)

    def impls(self) -> tuple[type[Any], ...]:
        """The mixins next to the stock implementation, outermost first."""
        own = {"kvplug_reuse_state": self.state}
        found: tuple[type[Any], ...] = (type("Reused", (ReusedImpl,), own),)
        if self.settings.memo is not None:
            from kvplug_attention_memo.vllm_attic import memo_impl

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
        told = self.memory.take_report()
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
        share = self.settings.recompute.fraction
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
        verdict = Verdict(True, "", piece.exact, piece.shift, piece.confidence)
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


def reuse_worker(deployment: Deployment, vllm_config: Any) -> ReuseWorker:
    """The worker half of reuse, on this rank."""
    from vllm.distributed import get_tensor_model_parallel_rank

    from kvplug.hosts.vllm.worker.reuse import ReuseWorker

    return ReuseWorker(
        deployment,
        vllm_config,
        reuse_checks(deployment, engine_view(vllm_config)),
        format_policy(deployment, vllm_config),
        get_tensor_model_parallel_rank(),
        int(vllm_config.parallel_config.tensor_parallel_size),
    )
