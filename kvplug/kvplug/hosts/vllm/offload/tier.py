"""Any tier below host memory in vLLM's offloading framework.

One of ``secondary_tiers``: ``{type: KVPlugTier, module_path: kvplug.hosts.vllm.offload.tier,
tier: {disk: {...}}}``. A chunk is stored in the wire format, so whatever a medium gives back is
checked before a byte of it reaches the pool. What stores it is called by threads; the scheduler
never waits for a medium.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from kvplug.contract import CorruptPayload, EngineView, Kind, PlaneShape, Tier, TierPlace
from kvplug.deployment import Choice
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm.offload.orders import OrderedChunks, order
from kvplug.parser import load_deployment
from kvplug.tiers.causes import cause_of
from kvplug.tiers.wire import ChunkHeader, pack, unpack

logger = logging.getLogger("kvplug")

THREADS = 4
QUEUED = 256
"""Jobs that wait at most; what comes on top fails at once, and is a miss."""


class KVPlugTier(SecondaryTierManager):
    """A tier of kvplug as a secondary tier of vLLM.

    Args:
        offloading_spec: The spec it belongs to.
        primary_kv_view: Host memory, a row a chunk.
        tier_type: Its type in the config.
        backpressure_detector: vLLM's own, or None.
        tier: The tier as in a deployment's ``tiers``, e.g. ``{"host": {"size": "1GiB"}}``.
        identity: A name for the weights, for tiers that outlive the engine or are shared: chunks
            are found only under the name they were stored under. Change it when they change.
        locality: ``LOCAL`` or ``REMOTE``.

    Raises:
        DeploymentError: The tier is not one, cannot serve, or needs an identity.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        tier: Mapping[str, Any] | None = None,
        identity: str = "",
        locality: str | None = None,
    ):
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._rows = torch.frombuffer(primary_kv_view.cast("B"), dtype=torch.uint8).view(
            -1, self.block_size_bytes
        )
        choice = _choice(tier, identity)
        self._identity = _identity(offloading_spec.config, identity)
        self._tier = _opened(choice, offloading_spec.config, self._identity)
        self._order = _ordered(choice, self._tier)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="kvplug-tier")
        self._lock = threading.Lock()
        self._finished: list[JobResult] = []
        self._jobs: set[Future[None]] = set()
        # What the tier said of a chunk, for as long as a request asks about it.
        self._asked: dict[OffloadKey, bool | None] = {}
        self._of_request: dict[str, set[OffloadKey]] = {}
        self._ask: list[OffloadKey] = []

    # -- lookups -------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Have every new chunk of a request offloaded."""
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Say whether a chunk is here, or to ask again once the tier has answered."""
        with self._lock:
            self._of_request.setdefault(req_context.req_id, set()).add(key)
            if key not in self._asked:
                self._asked[key] = None
                self._ask.append(key)
                return LookupResult.RETRY
            found = self._asked[key]
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Ask the tier about all chunks of the step together."""
        with self._lock:
            keys, self._ask = self._ask, []
        if keys:
            self._submit(self._look, keys)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget what the tier said of chunks that no request asks about any more."""
        with self._lock:
            mine = self._of_request.pop(req_context.req_id, set())
            for others in self._of_request.values():
                mine = mine - others
            for key in mine:
                self._asked.pop(key, None)

    def _look(self, keys: list[OffloadKey]) -> None:
        found = [False] * len(keys)
        try:
            asked = self._tier.has([_key(key) for key in keys])
            has = [bool(one) for one in islice(asked, len(keys) + 1)]
            if len(has) != len(keys):
                raise TypeError(f"has() answered {len(has)} of {len(keys)}")
            found = has
        except BaseException as error:
            self._failed("has", error)
        with self._lock:
            for key, there in zip(keys, found, strict=True):
                if key in self._asked:
                    self._asked[key] = there

    # -- transfers -----------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Store chunks of host memory; they stay there until the job is finished."""
        self._queue(self._store, job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Load chunks into host memory."""
        self._queue(self._load, job_metadata)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return jobs that ended since last asked."""
        with self._lock:
            found, self._finished = self._finished, []
        return found

    def has_pending_work(self) -> bool:
        """Return True while jobs are under way or not reported."""
        with self._lock:
            return bool(self._jobs or self._finished or self._ask)

    def drain_jobs(self) -> None:
        """Wait for every job."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            job.exception()

    def shutdown(self) -> None:
        """Finish what was accepted, and close the tier."""
        self._pool.shutdown(wait=True)
        self._tier.close()
        self._rows = torch.empty(0)

    def _queue(self, call: Any, job: TransferJob) -> None:
        with self._lock:
            full = len(self._jobs) >= QUEUED
        if full:
            self._end(job, [])
        else:
            self._submit(call, job)

    def _submit(self, call: Any, argument: Any) -> None:
        try:
            future = self._pool.submit(call, argument)
        except RuntimeError:
            # The pool was shut down.
            if isinstance(argument, TransferJob):
                self._end(argument, [])
            return
        with self._lock:
            self._jobs.add(future)
        future.add_done_callback(self._done)

    def _done(self, job: Future[None]) -> None:
        with self._lock:
            self._jobs.discard(job)

    def _store(self, job: TransferJob) -> None:
        begun = time.perf_counter()
        stored: list[OffloadKey] = []
        try:
            keys = list(job.keys)
            payloads = [
                (_key(key), pack(self._header(key), {"cells": self._rows[int(chunk)]}))
                for key, chunk in zip(keys, job.chunk_ids, strict=True)
            ]
            answers = self._put(payloads)
            stored = [key for key, answer in zip(keys, answers, strict=True) if not answer]
        except BaseException as error:
            self._failed("put", error)
        with self._lock:
            for key in stored:
                if self._asked.get(key) is False:
                    self._asked[key] = True
        self._end(job, stored, time.perf_counter() - begun)

    def _put(self, payloads: list[tuple[bytes, Any]]) -> list[str]:
        """Store payloads; where the tier is full, others go first, as its order says."""
        answers = self._tier.put(payloads)
        refused = [own for own, answer in zip(payloads, answers, strict=True) if answer]
        if refused:
            keys: Any = {key for key, _ in payloads}
            with self._lock:
                gone = self._order.evict(min(len(refused), self._order.idle(keys)), keys) or []
            if gone:
                self._tier.remove([key for key, _ in gone])
                again = iter(self._tier.put(refused))
                answers = [answer and next(again) for answer in answers]
        with self._lock:
            for (key, _), answer in zip(payloads, answers, strict=True):
                if not answer and self._order.get(key) is None:
                    self._order.insert(key, _IDLE)
        return answers

    def _load(self, job: TransferJob) -> None:
        begun = time.perf_counter()
        loaded: list[OffloadKey] = []
        keys = list(job.keys)
        try:
            payloads = self._tier.get([_key(key) for key in keys])
            for key, chunk, payload in zip(keys, job.chunk_ids, payloads, strict=True):
                # What was checked is copied; a row is never half of a chunk that is refused.
                if payload is None:
                    continue
                try:
                    cells = unpack(payload, self._header(key))["cells"]
                except CorruptPayload as problem:
                    self._failed("get", problem)
                    continue
                self._rows[int(chunk)] = cells.view(-1)
                loaded.append(key)
        except BaseException as error:
            self._failed("get", error)
        with self._lock:
            self._order.touch([_key(key) for key in loaded], job.req_context)
            for key in set(keys) - set(loaded):
                if key in self._asked:
                    self._asked[key] = False
        self._end(job, loaded, time.perf_counter() - begun)

    def _end(self, job: TransferJob, done: Collection[OffloadKey], taken: float = 0.0) -> None:
        whole = len(done) == len(job.keys)
        result = JobResult(
            job_id=job.job_id,
            success=whole,
            successful_keys=None if whole or not done else tuple(done),
            transfer_time=taken,
            transfer_bytes=len(done) * self.block_size_bytes,
        )
        with self._lock:
            self._finished.append(result)

    def _header(self, key: OffloadKey) -> ChunkHeader:
        size = self.block_size_bytes
        shape = {"cells": PlaneShape("uint8", (size,))}
        return ChunkHeader(_key(key), self._identity, "raw", 1, "", True, 0, 1, 0, 1, shape)

    def _failed(self, what: str, error: BaseException) -> None:
        _log_once(self.tier_type, what, *cause_of(error))


@functools.lru_cache(maxsize=256)
def _log_once(tier: str, what: str, cause: str, text: str) -> None:
    logger.warning("tier %s: %s failed (%s); its chunks are computed again", tier, what, text)


@functools.lru_cache(maxsize=1 << 16)
def _key(key: OffloadKey) -> OffloadKey:
    """The chunk's key: a digest of vLLM's own, which is as long as its hash and a group."""
    digest = hashlib.blake2b(bytes(key), digest_size=32, person=b"vllm-offload").digest()
    return OffloadKey(digest)


@dataclass(frozen=True)
class _Idle:
    """A chunk that nothing copies, as an order reads vLLM's own.

    Attributes:
        ref_cnt: Copies under way.
    """

    ref_cnt: int = 0


_IDLE: Any = _Idle()


def _choice(section: Mapping[str, Any] | None, identity: str) -> Choice:
    source = "secondary_tiers"
    deployment = load_deployment({"tiers": [section or {}]}, source=source)
    choice = deployment.choice(Kind.TIERS)
    assert choice is not None
    name = choice.policy.name
    tier = choice.policy
    assert issubclass(tier, Tier)
    if tier.on_device:
        problem = f"{name} holds memory of an accelerator, which is not below host memory."
        raise DeploymentError(source, [Refusal("tier", problem, "name another tier.")])
    if (tier.durable or tier.shared) and not identity:
        problem = (
            f"what {name} stores outlives this engine, and vLLM's framework does not say which "
            "weights made it."
        )
        fix = "set identity to a name for the weights, and change it when they change."
        raise DeploymentError(source, [Refusal("identity", problem, fix)])
    return choice


def _opened(choice: Choice, config: Any, identity: str) -> Tier:
    built = choice.build(EngineView(block_size=1, host="vllm"))
    assert isinstance(built, Tier)
    # A chunk's row has the parts of all workers, and one process reads and writes it.
    built.open(TierPlace(identity, 0, 1, int(config.parallel.data_parallel_index)))
    return built


def _ordered(choice: Choice, tier: Tier) -> OrderedChunks:
    """The order in which chunks leave the tier, with those that are there already."""
    options: Any = choice.options
    name = options.order if isinstance(options.order, str) else options.order["use"]
    made = order(name)(1 << 16)
    for key, _, _ in sorted(tier.stored(), key=lambda one: one[2]):
        made.insert(OffloadKey(key), _IDLE)
    return made


def _identity(config: Any, identity: str) -> str:
    """Digest of what bytes of chunks depend on, as far as vLLM's framework says it."""
    parallel = config.parallel
    facts = {
        "engine": identity or config.engine_id,
        "model": [config.model.name, config.model.dtype],
        "groups": [[g.tokens_per_block, list(g.layer_names)] for g in config.groups],
        "bytes": [config.worker_kv_bytes_per_block, config.cache.blocks_per_chunk],
        "hash": config.cache.tokens_per_hash,
        "parallel": [parallel.world_size, parallel.tp_size, parallel.pp_size, parallel.dcp_size],
        "layout": [config.kv_cache_layout, config.canonical_layout, config.replicated_layout],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
