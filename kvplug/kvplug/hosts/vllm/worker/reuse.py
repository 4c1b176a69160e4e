"""Reuse on a worker: segments out of pages, and stored ones into them.

A step goes: segments left by ended requests are read out of their pages, stored runs are written
into theirs, the spans to recompute inside them go through a forward of their own, the engine's
forward runs, and segments it completed are read out. `ReuseDirectives` has all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.contract import Kind, Placement, ReuseCheck, Verdict
from kvplug.deployment import Deployment
from kvplug.errors import KVPlugError
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.messages import (
    LoadOrder,
    PieceOrder,
    ReuseDirectives,
    ReuseReport,
    SaveOrder,
    StepDirectives,
    StepReport,
)
from kvplug.hosts.vllm.view import engine_view
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.recompute import Recomputer, StopForward, with_deviating
from kvplug.hosts.vllm.worker.segments import LayerPages, stacked
from kvplug.hosts.vllm.worker.state import WorkerState
from kvplug.hosts.vllm.worker.steps import (
    Attend,
    AttendCall,
    AttentionStep,
    Build,
    BuildCall,
    MetadataStep,
    Write,
    WriteCall,
)
from kvplug.reuse.deviation import deviation
from kvplug.reuse.file import SegmentHeader
from kvplug.reuse.measures import QUERIES, RunningScale, measures
from kvplug.reuse.memory import SegmentMemory, StoredSegment
from kvplug_kernels.segment_stats import segment_stats

logger = init_logger("vllm.kvplug")

CompareLayer = Callable[[Any, Tensor, Tensor], None]
"""``compare(layer, key, value)``: shown the K and V that each layer writes."""

LOOKED_BACK = 2048
"""Tokens before a segment over which its attention is measured."""

ObservedQueries = tuple[str, int, int]
"""A segment, and the first and end of its last queries among the step's tokens."""


class ReuseWorker(KindWorker):
    """Reuse on a worker.

    Args:
        deployment: The deployment; it has a reuse section.
        vllm_config: The engine's config.
        state: The worker's state.
        origin: Source and key of the first check in its deployment, for messages.

    Attributes:
        watched: Segments the step completes, by slot of their request.
        compare: What the layers' new K and V are shown to, or None.
        queries: Last queries of watched segments, by segment and layer name.
        layers: Pages of each layer, by layer name.
    """

    kind = Kind.REUSE

    def __init__(
        self, deployment: Deployment, vllm_config: Any, state: WorkerState, origin: Origin
    ):
        super().__init__(origin)
        self.settings = deployment.reuse
        self.watched: dict[int, list[SaveOrder]] = {}
        self.compare: CompareLayer | None = None
        self.queries: dict[tuple[str, str], Tensor] = {}
        self.layers: dict[str, LayerPages] = {}
        self._deployment = deployment
        self._config = vllm_config
        self._state = state
        self._block_size = int(vllm_config.cache_config.block_size)
        self._checks: list[ReuseCheck] = []
        self._rank, self._world = 0, 1
        self._recomputer = Recomputer(vllm_config, state)
        self._report = ReuseReport()
        self._running = RunningScale()
        self._unfilled: set[int] = set()
        self._wanted: dict[str, StoredSegment] = {}
        self._logged: set[str] = set()

    # -- layers --------------------------------------------------------------------------------

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        from vllm.v1.kv_cache_interface import replace_as

        from kvplug.hosts.vllm.spec import ReusedSpec

        return replace_as(spec, ReusedSpec)

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        return (WatchedRows(self),)

    def attention_step(self) -> AttentionStep:
        return WatchedAttention(self)

    # -- steps ---------------------------------------------------------------------------------

    def start(self, num_groups: int) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank

        self._rank = get_tensor_model_parallel_rank()
        self._world = int(self._config.parallel_config.tensor_parallel_size)
        self._checks = engine.reuse_checks(self._deployment, engine_view(self._config))
        self._memory = SegmentMemory(self.settings.store.directory, self._rank, self._world)

    def register(self, caches: dict[str, Tensor]) -> None:
        if self.settings.recompute.needed and not self._recomputer.ready:
            raise KVPlugError(
                "vLLM's worker gave its extension no model runner, so nothing can be recomputed "
                "inside a reused run: remove reuse.recompute; see `kvplug doctor`"
            )
        from vllm.model_executor.models.utils import extract_layer_index

        context = self._config.compilation_config.static_forward_context
        views = self._checks[0].engine.layers
        stored = engine.format_policy(self._deployment, self._config)
        self.layers = {
            name: LayerPages(context[name], caches[name], views[extract_layer_index(name)], stored)
            for name in sorted(caches, key=extract_layer_index)
            if name in context
        }

    def begin(self, directives: StepDirectives) -> None:
        self.queries.clear()
        self.watched = {}
        own = directives.reuse
        if own is None:
            return
        for save in own.saves:
            self.watched.setdefault(save.slot, []).append(save)
        # A segment may be loaded, dropped and stored again in one step.
        wanted = {piece.segment for order in own.loads for piece in order.pieces}
        self._wanted = {name: self._memory.get(name) for name in wanted if name in self._memory}
        self._guarded("drop", self._memory.drop, own.drop)
        self._guarded("delete", self._memory.delete, own.delete)
        self._guarded("fetch", self._memory.fetch, own.fetch)
        for save in own.left:
            self._guarded("save", self._save, save)

    def load(self, directives: StepDirectives) -> None:
        own = directives.reuse or ReuseDirectives()
        for order in own.loads:
            try:
                self._load(order)
            except Exception as error:
                self._failed("load", error)
                self._report.unloaded.append(order.request)
                starts = [a for a, _ in order.spans] + [p.start for p in order.pieces]
                first = min(starts, default=0) // self._block_size
                self._unfilled.update(order.blocks[first:].tolist())
        self._wanted = {}

    def end(self, directives: StepDirectives) -> None:
        self.watched = {}
        own = directives.reuse or ReuseDirectives()
        unloaded = set(self._report.unloaded)
        for save in own.saves:
            if save.fingerprint.request_id in unloaded:
                # What the step computed for it saw pages that were never filled.
                self._report.failed[save.segment] = "could not be stored"
            else:
                self._guarded("save", self._save, save)
        self.queries.clear()

    def report(self, into: StepReport) -> None:
        found, self._report = self._report, ReuseReport()
        stored = self._memory.take_report()
        found.written += stored.written
        found.fetched += stored.fetched
        found.failed |= stored.failed
        found.guard, self._state.guard_reports = list(self._state.guard_reports), []
        into.reuse = found if found else None

    def unfilled(self) -> set[int]:
        """Return blocks that could not be filled since last asked; vLLM computes their tokens."""
        found, self._unfilled = self._unfilled, set()
        return found

    def stop(self) -> None:
        """Finish writing files."""
        self._memory.close()

    def _guarded(self, what: str, call: Any, argument: Any) -> None:
        try:
            call(argument)
        except Exception as error:
            self._failed(what, error)
            if isinstance(argument, SaveOrder):
                self._report.failed[argument.segment] = "could not be stored"

    def _failed(self, what: str, error: Exception) -> None:
        self._report.errors += 1
        if not self._report.error:
            self._report.error = f"{what}: {type(error).__name__}: {error}"
        if what not in self._logged:
            self._logged.add(what)
            logger.error("reuse failed in %s; the engine computes instead", what, exc_info=error)

    # -- loading -------------------------------------------------------------------------------

    def _load(self, order: LoadOrder) -> None:
        blocks = torch.from_numpy(order.blocks)
        for piece in order.pieces:
            self._write(self._wanted[piece.segment], piece, blocks)
        spans = list(order.spans)
        approximate = [(p.start, p.start + p.length) for p in order.pieces if not p.exact]
        if self.settings.recompute.fraction and approximate and self._recomputer.ready:
            spans = self._with_deviating(order, blocks, spans, approximate)
        if spans:
            self._recomputer.compute(order.tokens, blocks, spans)
            self._report.computed += sum(b - a for a, b in spans)

    def _with_deviating(
        self,
        order: LoadOrder,
        blocks: Tensor,
        spans: list[tuple[int, int]],
        approximate: list[tuple[int, int]],
    ) -> list[tuple[int, int]]:
        """Add the tokens of approximate pieces whose K and V in layer 1 deviate most."""
        second = list(self.layers)[min(1, len(self.layers) - 1)]
        pages = self.layers[second]
        # Layer 1 sees what layer 0 made of everything before, so what is missing is computed too.
        begin = min([approximate[0][0], *(a for a, _ in spans)])
        end = approximate[-1][1]
        before = pages.read(blocks, begin, end)
        found = torch.zeros(end - begin)
        # A forward takes so many tokens; the first layer's K and V of one are there for the next.
        for batch in self._recomputer.batches([(begin, end)]):
            part = slice(batch[0][0] - begin, batch[-1][1] - begin)
            self.compare = _comparison(second, [t[part] for t in before], found[part])
            try:
                self._recomputer.forward(order.tokens, blocks, batch)
            except StopForward:
                pass
            finally:
                self.compare = None
        if self._world > 1:
            from vllm.distributed import tensor_model_parallel_all_reduce

            found = tensor_model_parallel_all_reduce(found)
        return with_deviating(found, begin, approximate, spans, self.settings.recompute.fraction)

    def _write(self, stored: StoredSegment, piece: PieceOrder, blocks: Tensor) -> None:
        header = stored.header
        positions = torch.arange(piece.start, piece.start + piece.length)
        slots = blocks[positions // self._block_size] * self._block_size
        slots += positions % self._block_size
        run = slice(piece.offset, piece.offset + piece.length)
        verdict = Verdict(True, "", piece.exact, piece.shift, piece.confidence)
        placement = Placement(header.fingerprint, piece.offset, piece.length, piece.start, verdict)
        adapting = [c for c in self._checks if c.adapts(placement)]
        for index, pages in enumerate(self.layers.values()):
            own = {name: plane[index, run] for name, plane in stored.planes.items()}
            if not adapting:
                pages.put(slots, own)
                continue
            key, value = pages.decoded(slots, own)
            for check in adapting:
                key, value = check.adapt(pages.view, placement, key, value)
            pages.write(slots, key, value)
        done, corrected = self._report.loaded
        self._report.loaded = (
            done + piece.length,
            corrected + (piece.length if adapting else 0),
        )

    # -- saving --------------------------------------------------------------------------------

    def observed(self, call: BuildCall) -> list[ObservedQueries]:
        """Return the queries of a step to remember.

        Args:
            call: The call of a metadata builder.
        """
        if not self.watched:
            return []
        common = call.common
        starts, lens = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        found = []
        for row, slot in enumerate(call.slots[: common.num_reqs].tolist()):
            length = lens[row]
            begun = length - (starts[row + 1] - starts[row])
            for save in self.watched.get(slot, ()):
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
            self._rank,
            self._world,
            order.session,
        )
        self._memory.put(header, made)
        self._report.saved[order.segment] = found
        self._report.counts[order.segment] = 1

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
        query, before = self.queries.get((order.segment, name)), None
        if query is not None:
            before = pages.keys(blocks, max(0, start - LOOKED_BACK), start)
        return segment_stats(*read, query, before, pages.scale).cpu()


class WatchedRows(MetadataStep):
    """Finds the last queries of segments that the step completes; they ride on its metadata."""

    def __init__(self, kind: ReuseWorker):
        self._kind = kind

    def build(self, inner: Build, call: BuildCall) -> Any:
        observed = self._kind.observed(call)
        metadata = inner(call)
        metadata.kvplug_observed = observed
        return metadata


class WatchedAttention(AttentionStep):
    """Keeps queries that were asked for, and shows new K and V to a comparison."""

    def __init__(self, kind: ReuseWorker):
        self._kind = kind

    def write(self, inner: Write, call: WriteCall) -> None:
        if self._kind.compare is not None:
            self._kind.compare(call.layer, call.key, call.value)
        inner(call)

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        name = call.layer.layer_name
        for segment, first, last in getattr(call.metadata, "kvplug_observed", ()):
            self._kind.queries[segment, name] = call.query[first:last].detach().clone()
        return inner(call)


def _comparison(name: str, stored: Sequence[Tensor], into: Tensor) -> CompareLayer:
    """Make a comparison that writes how far stored K and V of one layer deviate from recomputed
    ones, and ends the forward there."""

    def compare(layer: Any, key: Tensor, value: Tensor) -> None:
        if layer.layer_name == name:
            n = len(into)
            into.copy_(deviation(stored[0], stored[1], key[:n], value[:n]))
            raise StopForward

    return compare
