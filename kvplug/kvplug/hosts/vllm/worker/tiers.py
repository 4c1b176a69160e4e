"""Tiers on a worker: chunks out of pages on their way out, and stored ones into them.

A step goes: chunks that are about to be overwritten are read out of their pages, what tiers have
read for waiting requests is written into theirs, and then the engine computes. Everything else
happens in the tiers' own threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvplug.contract import Kind, TierError, TierPlace, TransferCodec
from kvplug.deployment import Deployment, TierChoice
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.identity import chunk_identity
from kvplug.hosts.vllm.messages import (
    ChunkLoad,
    ChunkMove,
    ChunkStore,
    StepDirectives,
    StepReport,
    TiersDirectives,
    TiersReport,
)
from kvplug.hosts.vllm.view import engine_view
from kvplug.hosts.vllm.worker.device_shelf import DeviceShelf
from kvplug.hosts.vllm.worker.kind import KindWorker, Origin
from kvplug.hosts.vllm.worker.segments import LayerPages
from kvplug.hosts.vllm.worker.tier_copy import PageCopier, Transfer
from kvplug.tiers.keys import stored_identity
from kvplug.tiers.queued import Carried, ChunkRef, Fetched, QueuedTier, Stored
from kvplug.tiers.wire import ChunkHeader

logger = init_logger("vllm.kvplug")

WRITE_BYTES = 256 << 20
"""Bytes of loaded chunks that are written into pages before a step, so that it is not held up."""


@dataclass
class _Loading:
    """A run on its way into a request's pages.

    Attributes:
        order: The order.
        until: Monotonic time after which it counts as failed.
        blocks: Blocks of each chunk, by key.
        left: Chunks that are not in their pages yet.
        failed: Why it failed, or empty.
    """

    order: ChunkLoad
    until: float
    blocks: dict[bytes, Any]
    left: int
    failed: str = ""


@dataclass
class _Reading:
    """Chunks on their way out of pages, by tier, and parts of them that are not encoded yet."""

    transfer: Transfer
    chunks: dict[str, list[tuple[int, ChunkRef]]]
    left: int = 0
    done: list[None] = field(default_factory=list)

    def encoded(self) -> None:
        """Take note that a tier needs its part no longer; called in the tier's thread."""
        self.done.append(None)


class TiersWorker(KindWorker):
    """Tiers on a worker.

    Args:
        deployment: The deployment; it has tiers.
        vllm_config: The engine's config.
        origin: Source and key of the first tier in its deployment, for messages.

    Attributes:
        tiers: The tiers by name; empty before the KV caches are registered.
    """

    kind = Kind.TIERS

    def __init__(self, deployment: Deployment, vllm_config: Any, origin: Origin):
        super().__init__(origin)
        self.tiers: dict[str, QueuedTier] = {}
        self._deployment = deployment
        self._config = vllm_config
        self._approximate = any(not one.codec.policy.exact for one in deployment.tiers)
        self._report = TiersReport()
        self._queued: dict[str, int] = {}
        self._loading: dict[int, _Loading] = {}
        self._readings: list[_Reading] = []
        self._fetched: list[Fetched] = []
        self._writing: list[tuple[Transfer, _Loading, int, Fetched]] = []
        self._ending: list[_Loading] = []
        self._received: set[str] = set()
        self._missing: set[str] = set()
        self._generation = 0
        self._reloaded_in: int | None = None
        self._started = False
        self._copier: PageCopier | None = None
        self._device = torch.device("cpu")

    # -- layers --------------------------------------------------------------------------------

    def customize_spec(self, spec: Any, rule: Any, stock: type[Any]) -> Any:
        if not self._approximate:
            return spec
        from vllm.v1.kv_cache_interface import replace_as

        from kvplug.hosts.vllm.spec import ApproximateSpec

        return replace_as(spec, ApproximateSpec)

    def loaded(self, name: str, layer: Any, dtype: torch.dtype, vllm_config: Any) -> None:
        if self._started:
            # What is stored is of other weights, until the scheduler has reset it.
            self._reloaded_in = self._generation
            self._report.reloaded = True
            return
        device = torch.device(vllm_config.device_config.device)
        for one in self._deployment.tiers:
            if one.tier.policy.on_device:  # type: ignore[attr-defined]
                self.held.reserve(one.name, _slab(one, vllm_config), torch.uint8, device)

    # -- start and end -------------------------------------------------------------------------

    def register(self, caches: dict[str, Tensor]) -> None:
        from vllm.model_executor.models.utils import extract_layer_index

        context = self._config.compilation_config.static_forward_context
        view = engine_view(self._config)
        stored = engine.format_policy(self._deployment, self._config)
        layers = {
            name: LayerPages(
                context[name], caches[name], view.layers[extract_layer_index(name)], stored
            )
            for name in sorted(caches, key=extract_layer_index)
            if name in context
        }
        self._copier = PageCopier(layers)
        self._chunk = self._copier.block_size
        rank, world = _rank(self._config)
        device = self._device = next(iter(caches.values())).device
        place = TierPlace(
            chunk_identity(self._config, view, stored),
            rank,
            world,
            int(self._config.parallel_config.data_parallel_index),
            str(device),
        )
        for one in self._deployment.tiers:
            if one.name not in self.tiers:
                self.tiers[one.name] = self._open(one, view, place)
        self._started = True

    def _open(self, one: TierChoice, view: Any, place: TierPlace) -> QueuedTier:
        def made() -> tuple[Any, Any, Any, str]:
            tier: Any = one.tier.build(view)
            codec: Any = one.codec.build(view)
            if tier.on_device:
                count = _slab(one, self._config)
                tier.hold(self.held.take(one.name, (count,), torch.uint8, self._device))
            try:
                tier.open(replace(place, identity=stored_identity(place.identity, codec)))
            except TierError as error:
                self.refuse(f"tier {one.name}: {error}.", "change its options as this says.")
            found = ", ".join(f"{k} {v}" for k, v in tier.described().items())
            return tier, codec, self._header(codec, place), found

        tier, codec, header, found = engine.at_start(self._deployment, one.tier, made)
        logger.info("kvplug: tier %s is open%s", one.name, f": {found}" if found else "")
        if tier.on_device:
            return DeviceShelf(one.name, tier, codec, header, self._device, log=logger.warning)
        return QueuedTier(one.name, tier, codec, header, log=logger.warning)

    def _header(self, codec: TransferCodec, place: TierPlace) -> Callable[[ChunkRef], ChunkHeader]:
        fingerprint, exact = codec.fingerprint(), type(codec).exact

        def header(chunk: ChunkRef) -> ChunkHeader:
            assert self._copier is not None
            return ChunkHeader(
                chunk.key,
                place.identity,
                codec.name,
                codec.version,
                fingerprint,
                exact,
                chunk.start,
                chunk.tokens,
                place.rank,
                place.world,
                self._copier.shapes(chunk.tokens),
            )

        return header

    def stop(self) -> None:
        """Finish what was to be stored, as far as there is time."""
        for reading in self._readings:
            self._hand_over(reading)
        self._readings.clear()
        for tier in self.tiers.values():
            tier.close()
        self.tiers.clear()

    # -- steps ---------------------------------------------------------------------------------

    def begin(self, directives: StepDirectives) -> None:
        if self._copier is None:
            return
        self._guarded("begin a step", self._copier.begin_step)
        own = directives.tiers
        if own is None:
            own = TiersDirectives(generation=self._generation)
        if own.generation > self._generation:
            self._generation = own.generation
            # What they load is of a computation that is not the engine's any more.
            for loading in list(self._loading.values()):
                self._end(loading.order, "reset")
        if self._reloaded_in is not None and self._generation > self._reloaded_in:
            self._reloaded_in = None
        # What is dropped makes room for what is stored.
        for move in own.moves:
            self._guarded("move", self._move, move)
        if own.stores:
            self._guarded("store", self._store, own.stores)
        for load in own.loads:
            self._guarded("load", self._load, load)
            if load.number not in self._loading and load.request not in self._received:
                self._end(load, "could not be ordered")
        self._progress()

    def end(self, directives: StepDirectives) -> None:
        if self._copier is not None:
            self._progress()

    def report(self, into: StepReport) -> None:
        for name, tier in self.tiers.items():
            if self._queued.get(name, 0) != tier.waiting:
                self._queued[name] = self._report.queued[name] = tier.waiting
        found, self._report = self._report, TiersReport()
        into.tiers = found if found else None

    def received(self) -> tuple[set[str], set[str]]:
        found = self._received, self._missing
        self._received, self._missing = set(), set()
        return found

    # -- storing -------------------------------------------------------------------------------

    def _store(self, stores: Sequence[ChunkStore]) -> None:
        assert self._copier is not None
        left = list(stores)
        if self._reloaded_in is not None:
            self._not_stored(left, "weights changed")
            return
        here = [s for s in left if isinstance(self.tiers[s.tier], DeviceShelf)]
        if here:
            self._store_here(here)
            left = [s for s in left if not isinstance(self.tiers[s.tier], DeviceShelf)]
            if not left:
                return
        chunks: list[tuple[list[int], int]] = [(list(s.blocks), self._size(s)) for s in left]
        transfer = self._copier.begin_read(chunks)
        self._not_stored(left[transfer.count :], "no room to copy")
        reading = _Reading(transfer, {})
        for i, store in enumerate(left[: transfer.count]):
            ref = ChunkRef(store.key, store.start, self._size(store))
            reading.chunks.setdefault(store.tier, []).append((i, ref))
        reading.left = len(reading.chunks)
        self._readings.append(reading)

    def _store_here(self, stores: Sequence[ChunkStore]) -> None:
        """Store chunks in tiers on the device, before what is computed now overwrites them."""
        assert self._copier is not None
        planes = self._copier.read([(list(s.blocks), self._size(s)) for s in stores])
        for tier in {s.tier for s in stores}:
            own = [i for i, s in enumerate(stores) if s.tier == tier]
            refs = [ChunkRef(stores[i].key, stores[i].start, self._size(stores[i])) for i in own]
            found = [planes[i] for i in own]
            size = sum(ref.tokens for ref in refs) * self._copier.bytes_per_token
            self.tiers[tier].store(refs, _Once(found), size)

    def _size(self, store: ChunkStore) -> int:
        return len(store.blocks) * self._chunk

    def _not_stored(self, stores: Sequence[ChunkStore], cause: str) -> None:
        for one in stores:
            self._report.failed[one.tier, one.key] = cause

    def _hand_over(self, reading: _Reading) -> None:
        """Give chunks that are in host memory to their tiers."""
        assert self._copier is not None
        for name, chunks in reading.chunks.items():
            refs = [ref for _, ref in chunks]
            size = sum(ref.tokens for ref in refs) * self._copier.bytes_per_token
            planes = reading.transfer.planes()
            own = [planes[i] for i, _ in chunks]
            refused = self.tiers[name].store(refs, _Once(own), size, encoded=reading.encoded)
            if refused:
                reading.left -= 1
                for ref in refs:
                    self._report.failed[name, ref.key] = refused
        reading.chunks = {}

    # -- loading -------------------------------------------------------------------------------

    def _load(self, order: ChunkLoad) -> None:
        if self._reloaded_in is not None or order.seconds <= 0:
            self._end(order, "weights changed" if self._reloaded_in is not None else "no time")
            return
        per = len(order.blocks) // len(order.keys)
        loading = _Loading(
            order,
            time.monotonic() + order.seconds,
            {key: order.blocks[i * per : i * per + per] for i, key in enumerate(order.keys)},
            len(order.keys),
        )
        self._loading[order.number] = loading
        by_tier: dict[str, list[ChunkRef]] = {}
        tokens = per * self._chunk
        for i, (key, tier) in enumerate(zip(order.keys, order.tiers, strict=True)):
            by_tier.setdefault(tier, []).append(ChunkRef(key, order.start + i * tokens, tokens))
        for tier, chunks in by_tier.items():
            self.tiers[tier].fetch(chunks, order.number, partial(self._wants, order.number))

    def _wants(self, number: int) -> bool:
        return number in self._loading

    def _end(self, order: ChunkLoad, failed: str = "") -> None:
        """Tell that a request's run is there, or that it is not."""
        loading = self._loading.pop(order.number, None)
        if loading is not None and any(one is loading for _, one, _, _ in self._writing):
            # Its blocks may then be another request's: what is on its way into them comes first.
            loading.failed = failed
            self._ending.append(loading)
            return
        self._received.add(order.request)
        if failed:
            self._missing.add(order.request)
            self._report.unloaded[order.number] = failed
        else:
            self._report.loaded[order.number] = 1

    def _write(self) -> None:
        """Write what tiers have read into pages, as much as a step can wait for."""
        assert self._copier is not None
        room = WRITE_BYTES
        while self._fetched and room > 0:
            fetched = self._fetched.pop(0)
            loading = self._loading.get(fetched.token)
            room -= fetched.held
            if loading is None:
                self.tiers[fetched.tier].taken(fetched)
                continue
            if fetched.failed:
                self.tiers[fetched.tier].taken(fetched)
                self._end(loading.order, next(iter(fetched.failed.values())))
                continue
            planes: list[Any] = list(fetched.planes)
            chunks = [(loading.blocks[c.key], c.tokens) for c in fetched.chunks]
            while chunks:
                transfer = self._copier.begin_write(chunks, planes)
                if not transfer.count:
                    break
                done = transfer.count
                self._writing.append((transfer, loading, done, fetched))
                chunks, planes = chunks[done:], planes[done:]
            if chunks:
                # Its staging memory is full; what is left follows in the next step.
                rest = Fetched(fetched.tier, fetched.token, fetched.chunks[-len(chunks) :], planes)
                rest.held, fetched.held = fetched.held, 0
                self._fetched.insert(0, rest)
                break

    def _written(self) -> None:
        """Count chunks whose pages are complete."""
        still = []
        for transfer, loading, count, fetched in self._writing:
            if not transfer.ready():
                still.append((transfer, loading, count, fetched))
                continue
            transfer.release()
            self.tiers[fetched.tier].taken(fetched)
            fetched.held = 0
            loading.left -= count
            if not loading.left and loading.order.number in self._loading:
                self._ending.append(loading)
        self._writing = still
        ending, self._ending = self._ending, []
        for loading in ending:
            if any(one is loading for _, one, _, _ in still):
                self._ending.append(loading)
            else:
                self._end(loading.order, loading.failed)

    # -- moves ---------------------------------------------------------------------------------

    def _move(self, move: ChunkMove) -> None:
        source = self.tiers[move.source]
        if move.target is None:
            source.remove(move.keys)
        else:
            source.carry(move.keys, self.tiers[move.target])

    # -- progress ------------------------------------------------------------------------------

    def _progress(self) -> None:
        """Take what happened in the tiers' threads, and what follows from it."""
        waiting = []
        for reading in self._readings:
            if reading.chunks and reading.transfer.ready():
                self._guarded("store", self._hand_over, reading)
                reading.chunks = {}
            if reading.chunks or len(reading.done) < reading.left:
                waiting.append(reading)
            else:
                reading.transfer.release()
        self._readings = waiting
        for tier in self.tiers.values():
            for outcome in tier.outcomes():
                self._take(outcome)
        self._guarded("write pages", self._write)
        self._written()
        now = time.monotonic()
        for loading in [one for one in self._loading.values() if one.until < now]:
            for name in set(loading.order.tiers):
                self._report.down[name] = "no answer in time"
            self._end(loading.order, "no answer in time")

    def _take(self, outcome: Stored | Fetched | Carried) -> None:
        report = self._report
        if outcome.refused:
            report.down[outcome.tier] = outcome.refused
        if isinstance(outcome, Fetched):
            if outcome.size:
                report.measured.append((outcome.tier, "read", outcome.size, outcome.seconds))
            if not outcome.refused:
                report.gone |= {(outcome.tier, k): c for k, c in outcome.failed.items()}
            self._fetched.append(outcome)
            return
        if isinstance(outcome, Carried):
            for key, cause in outcome.failed.items():
                report.failed[outcome.target, key] = cause
            report.gone |= {(outcome.tier, k): c for k, c in outcome.gone.items()}
            return
        if outcome.size:
            report.measured.append((outcome.tier, "write", outcome.size, outcome.seconds))
        for key, size in outcome.sizes.items():
            report.stored[outcome.tier, key] = (1, size)
        for key, cause in outcome.failed.items():
            report.failed[outcome.tier, key] = cause

    def _guarded(self, what: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:
            self._caught(self._report, what, error)
            if what == "store" and arguments and not isinstance(arguments[0], _Reading):
                self._not_stored(arguments[0], "could not be read")


class _Once:
    """Gives planes once, and does not hold them after that."""

    def __init__(self, planes: list[Any]):
        self._planes = planes

    def __call__(self) -> list[Any]:
        planes, self._planes = self._planes, []
        return planes


def _slab(one: TierChoice, vllm_config: Any) -> int:
    """Bytes of a worker's part of a tier on the device."""
    options: Any = one.tier.options
    parallel = vllm_config.parallel_config
    return int(options.size) // int(parallel.world_size)


def _rank(vllm_config: Any) -> tuple[int, int]:
    """Rank of this worker among those of the engine that share a chunk, and their number."""
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    parallel = vllm_config.parallel_config
    tensor = int(parallel.tensor_parallel_size)
    world = tensor * int(parallel.pipeline_parallel_size)
    return int(get_pp_group().rank_in_group) * tensor + get_tensor_model_parallel_rank(), world
