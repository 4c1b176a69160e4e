"""Reuse on a worker: segments out of pages, and stored ones into them.

A step goes: segments left by ended requests are read out of their pages, stored runs are written
into theirs, the spans to recompute inside them go through a forward of their own, the engine's
forward runs, and segments it completed are read out. `ReuseDirectives` has all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.client_names import request_name
from kvplug.containment import ON_WORKER
from kvplug.contract import Kind
from kvplug.deployment import Deployment
from kvplug.errors import KVPlugError
from kvplug.hosts.torch_state import TorchPolicy
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.messages import (
    LoadOrder,
    ReuseDirectives,
    ReuseReport,
    SaveOrder,
    StepDirectives,
    StepReport,
)
from kvplug.hosts.vllm.view import engine_view
from kvplug.hosts.vllm.weights import Weights
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.recompute import Recomputer
from kvplug.hosts.vllm.worker.reuse_loading import RunLoader
from kvplug.hosts.vllm.worker.reuse_saving import ObservedQueries, SegmentSaver
from kvplug.hosts.vllm.worker.segments import LayerPages, stored_planes
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
from kvplug.reuse.folder import engine_folder
from kvplug.reuse.memory import SegmentMemory, StoredSegment

logger = init_logger("vllm.kvplug")


class ReuseWorker(KindWorker):
    """Reuse on a worker.

    Args:
        deployment: The deployment; it has a reuse section.
        vllm_config: The engine's config.
        state: The worker's state.
        origin: Source and key of the first check in its deployment, for messages.

    Attributes:
        loader: Writes stored runs into pages.
        saver: Reads segments out of pages.
    """

    kind = Kind.REUSE

    def __init__(
        self, deployment: Deployment, vllm_config: Any, state: WorkerState, origin: Origin
    ):
        super().__init__(origin)
        self.settings = deployment.reuse
        self._deployment = deployment
        self._config = vllm_config
        self._state = state
        self._recomputer = Recomputer(vllm_config, state)
        self.loader = RunLoader(self._recomputer, self.settings.recompute.fraction)
        self.saver = SegmentSaver()
        self._report = ReuseReport()
        self._unfilled: set[int] = set()
        self._received: set[str] = set()
        self._missing: set[str] = set()
        self._wanted: dict[str, StoredSegment] = {}
        self._folder = self.settings.store.directory
        # Before the weights are loaded, to see whether they change meanwhile.
        self._seen = Weights.of(vllm_config).signature() if self._folder else ()
        self._started = False
        self._generation = 0
        self._reloaded_in: int | None = None

    # -- layers --------------------------------------------------------------------------------

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        from vllm.v1.kv_cache_interface import replace_as

        from kvplug.hosts.vllm.spec import ApproximateSpec

        return replace_as(spec, ApproximateSpec)

    def loaded(self, name: str, layer: Any, dtype: torch.dtype, vllm_config: Any) -> None:
        if self._started:
            # What is stored is of other weights, until the scheduler has reset it.
            self._reloaded_in = self._generation
            self._report.reloaded = True

    def metadata_steps(
        self, spec: Any, vllm_config: Any, device: torch.device
    ) -> Sequence[MetadataStep]:
        return (WatchedRows(self),)

    def attention_step(self) -> AttentionStep:
        return WatchedAttention(self)

    # -- steps ---------------------------------------------------------------------------------

    def start(self, num_groups: int) -> None:
        from vllm.distributed import get_tensor_model_parallel_rank

        rank = get_tensor_model_parallel_rank()
        world = int(self._config.parallel_config.tensor_parallel_size)
        checks = engine.reuse_checks(self._deployment, engine_view(self._config))
        self.loader.checks = [TorchPolicy(check, ON_WORKER, logger) for check in checks]
        self.loader.world = world
        self.saver.rank, self.saver.world = rank, world
        weights = Weights.of(self._config)
        if self._seen and weights.signature() != self._seen:
            self.refuse(
                f"the files of {weights.name} changed while they were loaded, so nothing "
                "says which weights the engine has.",
                "start it again.",
            )
        data_parallel = int(self._config.parallel_config.data_parallel_index)
        folder = engine_folder(self._folder, data_parallel)
        self._memory = SegmentMemory(folder, rank, world)
        self._started = True

    def register(self, caches: dict[str, Tensor]) -> None:
        if self.settings.recompute.needed and not self._recomputer.ready:
            raise KVPlugError(
                "vLLM's worker gave its extension no model runner, so nothing can be recomputed "
                "inside a reused run: remove reuse.recompute; see `kvplug doctor`"
            )
        from vllm.model_executor.models.utils import extract_layer_index

        context = self._config.compilation_config.static_forward_context
        views = engine_view(self._config).layers
        stored = engine.format_policy(self._deployment, self._config)
        self.loader.layers = self.saver.layers = {
            name: LayerPages(context[name], caches[name], views[extract_layer_index(name)], stored)
            for name in sorted(caches, key=extract_layer_index)
            if name in context
        }
        pages = list(self.loader.layers.values())
        if pages:
            self._memory.expect(stored_planes(pages))

    def begin(self, directives: StepDirectives) -> None:
        self.saver.begin()
        own = directives.reuse
        if own is None:
            return
        self._generation = own.generation
        if self._reloaded_in is not None and own.generation > self._reloaded_in:
            self._reloaded_in = None
        for save in own.saves:
            self.saver.watched.setdefault(save.slot, []).append(save)
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
            if self._reloaded_in is not None:
                self._leave_unfilled(order)
                continue
            try:
                self.loader.load(order, self._wanted, self._report)
            except Exception as error:
                self._caught(self._report, "load", error)
                self._leave_unfilled(order)
            else:
                self._report.filled[order.number] = 1
        self._received |= {order.request for order in own.loads if order.awaited}
        self._wanted = {}

    def _leave_unfilled(self, order: LoadOrder) -> None:
        """Have vLLM compute a run."""
        self._report.unloaded.append(order.request)
        if order.awaited:
            self._missing.add(order.request)
            return
        starts = [a for a, _ in order.spans] + [p.start for p in order.pieces]
        first = min(starts, default=0) // self._recomputer.block_size
        self._unfilled.update(order.blocks[first:].tolist())

    def end(self, directives: StepDirectives) -> None:
        own = directives.reuse or ReuseDirectives()
        unloaded = {request_name(name) for name in self._report.unloaded}
        for save in own.saves:
            if save.fingerprint.request_id in unloaded:
                # What the step computed for it saw pages that were never filled.
                self._report.failed[save.segment] = "could not be stored"
            else:
                self._guarded("save", self._save, save)
        self.saver.begin()

    def observed(self, call: BuildCall) -> list[ObservedQueries]:
        """Return the queries of a step to remember, once it has begun."""
        return self.saver.observed(call, self._state.rows)

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

    def received(self) -> tuple[set[str], set[str]]:
        """Return requests whose awaited run was loaded or failed to be since last asked, and the
        latter."""
        found = self._received, self._missing
        self._received, self._missing = set(), set()
        return found

    def stop(self) -> None:
        """Finish writing files."""
        self._memory.close()

    def _save(self, order: SaveOrder) -> None:
        if self._reloaded_in is not None:
            self._report.failed[order.segment] = "weights changed"
            return
        self.saver.save(order, self._memory, self._report)

    def _guarded(self, what: str, call: Any, argument: Any) -> None:
        try:
            call(argument)
        except Exception as error:
            self._caught(self._report, what, error)
            if isinstance(argument, SaveOrder):
                self._report.failed[argument.segment] = "could not be stored"


class WatchedRows(MetadataStep):
    """Finds the last queries of segments that the step completes; they ride on its metadata."""

    def __init__(self, kind: ReuseWorker):
        self._kind = kind

    def build(self, inner: Build, call: BuildCall) -> Any:
        metadata = inner(call)
        # Looked up in the forward: the second model runner builds before it learns of the step.
        metadata.kvplug_observed = functools.cache(lambda: self._kind.observed(call))
        return metadata


class WatchedAttention(AttentionStep):
    """Keeps queries that were asked for, and shows new K and V to a comparison."""

    def __init__(self, kind: ReuseWorker):
        self._kind = kind

    def write(self, inner: Write, call: WriteCall) -> None:
        if self._kind.loader.compare is not None:
            self._kind.loader.compare(call.layer, call.key, call.value)
        inner(call)

    def attend(self, inner: Attend, call: AttendCall) -> Tensor:
        name = call.layer.layer_name
        observed = getattr(call.metadata, "kvplug_observed", None)
        for segment, first, last in observed() if observed is not None else ():
            self._kind.saver.queries[segment, name] = call.query[first:last].detach().clone()
        return inner(call)
