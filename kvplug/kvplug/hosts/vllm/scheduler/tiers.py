"""Tiers in the scheduler process: what leaves the pool for them, and comes back for requests."""

from __future__ import annotations

import itertools
import operator
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug.client_names import tenant_of
from kvplug.contract import (
    Action,
    Found,
    Kind,
    Leaving,
    LifecyclePolicy,
    Move,
    PolicyReport,
    PrefixCachePolicy,
    Tier,
    TierError,
    TierPlace,
    TierView,
    TransferCodec,
)
from kvplug.counts import Causes
from kvplug.deployment import TierChoice
from kvplug.errors import DeploymentError, Refusal
from kvplug.fingerprint import once
from kvplug.hosts.vllm import compat, engine
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
from kvplug.hosts.vllm.scheduler import tiers_measured
from kvplug.hosts.vllm.scheduler.adapters import Adapters
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.scheduler.tiers_events import TierEvents
from kvplug.hosts.vllm.scheduler.tiers_lookup import Lookups, Question
from kvplug.hosts.vllm.scheduler.tiers_pool import PoolWatch
from kvplug.hosts.vllm.scheduler.tiers_requests import Run, TieredRequest
from kvplug.hosts.vllm.spec import ApproximateManager, ShorteningManager
from kvplug.hosts.vllm.view import kv_dtype, token_bytes
from kvplug.hosts.vllm.weights import no_model
from kvplug.observe.catalogue import LOADING, TIER_LOADS, WAITS
from kvplug.observe.events import EventType
from kvplug.observe.live import Facts, TierState, outcomes, plain
from kvplug.observe.metric import Sample
from kvplug.request_options import RequestOptions
from kvplug.tiers.cost import pairs
from kvplug.tiers.hierarchy import Hierarchy, TierBook, order_engine
from kvplug.tiers.keys import KeyChain, stored_identity

logger = init_logger("vllm.kvplug")

MOVED = {Action.DEMOTE: EventType.DEMOTED, Action.PROMOTE: EventType.PROMOTED}
"""Events of ordered moves."""

STORE_BYTES = 256 << 20
"""Bytes of chunks ahead of those overwritten now that are read out of the pool in one step."""

CHECKPOINT_BYTES = 16 << 20
"""Bytes that a checkpoint reads out of the pool in one step."""

LOAD_SECONDS = 10.0
"""Seconds that a load may take beside four times what was estimated."""

FAILURES = 1
"""Loads of one request that may fail before it takes nothing from tiers any more.

vLLM counts the blocks that a request whose load failed still needs against its next load: one of
more than half the pool would wait for ever, and all that come after it.
"""


@dataclass
class TiersCounters:
    """Counters of the host of the tiers.

    Attributes:
        late: Chunks that were stored only as they were overwritten.
        ahead: Chunks that were stored before that.
        kept: Chunks that a checkpoint stored.
        checkpoints: Checkpoints made.
        loads: Runs loaded.
        loaded_tokens: Their tokens.
        failed_loads: Runs that could not be loaded, and were computed.
        waited: Times a request was asked to wait for an answer, or for a chunk on its way.
    """

    late: int = 0
    ahead: int = 0
    kept: int = 0
    checkpoints: int = 0
    loads: int = 0
    loaded_tokens: int = 0
    failed_loads: int = 0
    waited: int = 0


class TiersScheduler(KindScheduler):
    """Offers what leaves the pool to the lifecycle policy, and takes back what requests need.

    Attributes:
        hierarchy: The books.
        counters: Counters of the host.
        refused: Requests and chunks that took no part, by cause.
        requests: Requests under way.
        identity: Identity of all chunks of the engine.
        chunk: Tokens of a chunk.
        chunk_bytes: Bytes of one in the pool, of all ranks.
    """

    kind = Kind.TIERS
    awaits_loads = True

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        deployment, config, view = context.deployment, context.vllm_config, context.engine
        self.counters = TiersCounters()
        self.refused = Causes()
        self.requests: dict[str, TieredRequest] = {}
        parallel = config.parallel_config
        self._world = int(parallel.tensor_parallel_size) * int(parallel.pipeline_parallel_size)
        stored = engine.format_policy(deployment, config)
        self.identity = chunk_identity(config, view, stored)
        self.chunk = view.block_size
        self.chunk_bytes = (
            token_bytes(view, stored, kv_dtype(config))
            * self.chunk
            * int(parallel.tensor_parallel_size)
        )
        self._require_identity(view)
        place = TierPlace(self.identity, -1, self._world, int(parallel.data_parallel_index))
        opened = {one.name: self._open(one, place) for one in deployment.tiers}
        self._exact = {one.name: one.codec.policy.exact for one in deployment.tiers}
        self._durable = [name for name, tier in opened.items() if tier.durable]
        lifecycle = deployment.choice(Kind.LIFECYCLE)
        assert lifecycle is not None
        policy = engine.at_start(deployment, lifecycle, lifecycle.build, view)
        assert isinstance(policy, LifecyclePolicy)
        self.lifecycle = policy
        self.hierarchy = Hierarchy(
            [self._book(one, opened[one.name]) for one in deployment.tiers], policy
        )
        self._lookups = Lookups(opened, self._tier_failed)
        self._failures: deque[tuple[str, str]] = deque()
        self._adapters = Adapters(time.time())
        self._text_identity = self.identity
        self._managers: list[ApproximateManager] = []
        self._shortening: list[ShorteningManager] = []
        self._watch: PoolWatch | None = None
        self._blocks_of: Any = None
        self._hash_size = 0
        self._numbers = itertools.count(1)
        self._loads: list[ChunkLoad] = []
        self._loading: dict[int, tuple[TieredRequest, Run]] = {}
        self._arriving: Counter[bytes] = Counter()
        self._questions: dict[str, tuple[int, Question]] = {}
        self._moves: list[Move] = []
        self._pending: dict[tuple[str, bytes], tuple[int, int]] = {}
        self._arrived: Counter[int] = Counter()
        self._reading: Counter[str] = Counter()
        self._loaded_bytes: Counter[str] = Counter()
        self._generation = self._told = 0
        every = engine.at_start(deployment, lifecycle, lambda: float(policy.checkpoint))
        self._interval = max(0.0, every) if self._durable else 0.0
        self._checkpoint_at = time.monotonic() + self._interval
        self._unsaved: deque[tuple[int, Leaving]] = deque()
        kv_events = config.kv_events_config
        self._events: TierEvents | None = None
        if kv_events is not None and kv_events.enable_kv_cache_events:
            remote = [name for name, tier in opened.items() if tier.shared]
            self._events = TierEvents(self.chunk, remote)
        self._step_began = 0.0
        self._prefilled = (0, 0.0)
        self._scheduled: dict[str, int] = {}

    # -- start ---------------------------------------------------------------------------------

    def _require_identity(self, view: Any) -> None:
        """Refuse tiers that outlive an engine, or that others see, where nothing tells its model
        from another's."""
        if view.model:
            return
        refusals = [
            Refusal(
                one.tier.key,
                f"chunks in tier {one.name} outlive the engine or are seen by others, and nothing "
                f"tells its model from another: {no_model(self.context.vllm_config)}.",
                "load the weights from files on this machine, or remove the tier.",
            )
            for one in self.context.deployment.tiers
            if getattr(one.tier.policy, "shared", False) or getattr(one.tier.policy, "durable", 0)
        ]
        if refusals:
            raise DeploymentError(self.context.deployment.source, refusals)

    def _open(self, one: TierChoice, place: TierPlace) -> Tier:
        deployment = self.context.deployment

        def opened() -> Tier:
            tier, codec = (c.build(self.context.engine) for c in (one.tier, one.codec))
            assert isinstance(tier, Tier) and isinstance(codec, TransferCodec)
            try:
                tier.open(replace(place, identity=stored_identity(place.identity, codec)))
            except TierError as error:
                problem = Refusal(
                    one.tier.key,
                    f"tier {one.name}: {error}.",
                    "change its options as this says.",
                    deployment.lines.get(one.tier.key),
                )
                raise DeploymentError(deployment.source, [problem]) from error
            return tier

        return engine.at_start(deployment, one.tier, opened)

    def _book(self, one: TierChoice, tier: Tier) -> TierBook:
        def limit() -> int:
            found = operator.index(tier.usage().capacity)
            if found < 0:
                raise ValueError(f"usage() says that it may hold {found} bytes")
            return found

        capacity = engine.at_start(self.context.deployment, one.tier, limit)
        view = order_engine(self.context.engine, capacity, self.chunk_bytes)
        order = engine.at_start(self.context.deployment, one.order, one.order.build, view)
        assert isinstance(order, PrefixCachePolicy)
        return TierBook(
            one.name, capacity, one.codec.policy.exact, tier.shared, tier.durable, order
        )

    def bind(self, manager: Any) -> None:
        """Follow the pool's blocks."""
        managers = manager.coordinator.single_type_managers
        if len(managers) != 1:
            raise DeploymentError(
                self.context.deployment.source,
                [
                    Refusal(
                        self.context.deployment.tiers[0].tier.key,
                        f"the model has {len(managers)} groups of layers with caches of their own "
                        "(sliding windows, states or budgets a layer), and tiers store one.",
                        "remove the tiers section for this model, or the policy that gives layers "
                        "budgets of their own.",
                    )
                ],
            )
        self._blocks_of = managers[0].req_to_blocks
        self._managers = [m for m in managers if isinstance(m, ApproximateManager)]
        self._shortening = [m for m in managers if isinstance(m, ShorteningManager)]
        pool = manager.block_pool
        self._hash_size = int(pool.hash_block_size)
        self._watch = PoolWatch(pool, pool.metrics_collector, self.chunk)
        compat.install_collector(pool, self._watch)

    def started(self) -> list[str]:
        """What is stored where."""
        each = ", ".join(
            f"{one.name} ({one.codec.policy.name}, {one.order.policy.name})"
            for one in self.context.deployment.tiers
        )
        return [f"chunks of {self.chunk} tokens, {self.chunk_bytes:,} bytes, go to {each}"]

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Take in a request; its cache salt is still the user's own."""
        self._guarded("on_new_request", None, self._take_in, request, options)

    def _take_in(self, request: Any, options: RequestOptions) -> None:
        lora = self._adapters.identity(request.lora_request)
        if lora is None:
            self.refused.add("adapter of unknown content")
            return
        tenant = tenant_of(request.cache_salt)
        chain = KeyChain(self._text_identity, self.chunk, tenant, lora)
        tiered = TieredRequest.of(request, options, chain, lora)
        if tiered is None:
            self.refused.add("no text")
            return
        self.requests[request.request_id] = tiered
        self.hierarchy.began(tiered.view)
        keys = tiered.extend()
        if len(self._exact) > 1:
            self._moves += self.hierarchy.promote(keys)

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that tiers hold; None to be asked again."""
        tiered = self.requests.get(request.request_id)
        if tiered is None:
            return 0
        self._start_over(tiered)
        found: int | None = self._guarded("matched", 0, self._match, tiered, num_local)
        return found

    def _start_over(self, tiered: TieredRequest) -> None:
        """Forget the run of a request that holds no blocks: it is new, or was preempted."""
        if tiered.approximate_from is not None:
            tiered.approximated |= tiered.request.num_output_tokens > 0
        tiered.run = None
        self._hold(tiered, False)
        self._set_limit(tiered, None)

    def _match(self, tiered: TieredRequest, num_local: int) -> int | None:
        request = tiered.request
        # vLLM computes all of a prompt whose log-probabilities are requested.
        if (
            request.skip_reading_prefix_cache
            or tiered.failures >= FAILURES
            or num_local % self.chunk
            or not self._keeps(tiered)
        ):
            return 0
        keys = tiered.extend()
        first = num_local // self.chunk
        # At least one token is computed, so that the next one can be sampled.
        keys = keys[first : (request.num_tokens - 1) // self.chunk]
        if not keys:
            return 0
        if self._lookups.lists:
            self.counters.waited += 1
            return None
        # Now, not with the next step: the first request after a restart is looked up before it.
        self._take_listed()
        if self._arriving[keys[0]]:
            # Another request's blocks are going to hold it.
            self.counters.waited += 1
            return None
        holders = self.hierarchy.holders(keys)
        known = next((i for i, name in enumerate(holders) if name is None), len(keys))
        if known < len(keys) and self._lookups.asks:
            asked = self._ask(tiered, keys, first, known)
            if asked is None:
                self.counters.waited += 1
                return None
            if asked:
                holders = self.hierarchy.holders(keys)
                known = next((i for i, name in enumerate(holders) if name is None), len(keys))
        if not tiered.asked:
            tiered.asked = True
            self.hierarchy.asked(keys, known)
        if not known:
            return 0
        run = self._decide(tiered, first, keys[:known], holders[:known])
        if run is None:
            return 0
        tiered.run = run
        self._hold(tiered, True)
        if not run.exact:
            # Now: vLLM hashes blocks while it allocates them.
            self._set_limit(tiered, num_local)
        return len(run.keys) * self.chunk

    def _decide(
        self,
        tiered: TieredRequest,
        first: int,
        keys: Sequence[bytes],
        holders: Sequence[str | None],
    ) -> Run | None:
        """Load or compute: the run to load, if any."""
        tiers = [name for name in holders if name is not None]
        sizes = [size or self.chunk_bytes for size in self.hierarchy.sizes(keys)]
        number, found = self.hierarchy.decide(
            Found(
                [self.chunk] * len(keys),
                sizes,
                tiers,
                first * self.chunk,
                tiered.request.num_tokens,
            )
        )
        tiered.estimated = found.seconds(number or len(keys)), found.seconds(0)
        if not number:
            return None
        seconds = float(found.loading[number]) if found.loading else 0.0
        return Run(
            first,
            tuple(keys[:number]),
            tuple(tiers[:number]),
            tuple(sizes[:number]),
            all(self._exact[name] for name in tiers[:number]),
            seconds if np.isfinite(seconds) else 0.0,
        )

    def _take_listed(self) -> None:
        """Enter what durable tiers held when they were opened into the books."""
        for tier, key, size in self._lookups.listed():
            self.hierarchy.put(tier, key, size)

    def _ask(
        self, tiered: TieredRequest, keys: Sequence[bytes], first: int, known: int
    ) -> bool | None:
        """Ask shared tiers for what the books do not know.

        Returns:
            True if something was found, False if not; None while the answer is awaited.
        """
        name = tiered.request.request_id
        at, question = self._questions.get(name, (-1, None))
        if question is None or at != first + known:
            self._questions[name] = first + known, self._lookups.ask(keys[known:])
            return None
        if not question.answered:
            if time.monotonic() < question.until:
                return None
            self._lookups.late()
            self.refused.add("no answer in time")
        found = False
        # Late as it is, the beginning may be known.
        for key, tier in zip(question.keys, question.found, strict=False):
            if tier is None:
                break
            self.hierarchy.put(tier, key, self.chunk_bytes)
            found = True
        question.found = []
        return found

    def _keeps(self, tiered: TieredRequest) -> bool:
        """True if a request's KV is what its keys say: its adapter is still the same."""
        if tiered.keeps and tiered.lora:
            tiered.keeps = self._adapters.identity(tiered.request.lora_request) == tiered.lora
            if not tiered.keeps:
                self.refused.add("adapter changed")
        return tiered.keeps

    def _set_limit(self, tiered: TieredRequest, first: int | None) -> None:
        """Keep a request's blocks out of the prefix cache from a token on; None for no limit."""
        request_id = tiered.request.request_id
        for manager in self._managers:
            manager.set_approximate(self.kind, request_id, first)
        tiered.approximate_from = first

    def _hold(self, tiered: TieredRequest, loading: bool) -> None:
        """Keep a request's blocks from being given back while they are loaded, or let them go."""
        for manager in self._shortening:
            if loading:
                manager.loading.add(tiered.request.request_id)
            else:
                manager.loading.discard(tiered.request.request_id)

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """Order the load of a run into a request's blocks.

        Nothing is caught here: a load that was promised to vLLM has to be ordered.
        """
        tiered = self.requests.get(request.request_id)
        if tiered is None:
            return
        self._questions.pop(request.request_id, None)
        run, tiered.run = tiered.run, None
        if run is None:
            return
        if not num_external:
            self._hold(tiered, False)
            self._set_limit(tiered, None)
            return
        assert num_external == len(run.keys) * self.chunk, "vLLM takes a run whole or not at all"
        number = next(self._numbers)
        ids = blocks.get_block_ids()[0][run.first : run.first + len(run.keys)]
        tiered.loading, tiered.taken = number, run
        self._loading[number] = tiered, run
        self._arriving.update(run.keys)
        self._loads.append(
            ChunkLoad(
                request.request_id,
                number,
                run.first * self.chunk,
                run.keys,
                run.tiers,
                np.array(ids, dtype=np.int64),
                LOAD_SECONDS + 4 * run.seconds,
            )
        )
        for tier, size in zip(run.tiers, run.sizes, strict=True):
            self._reading[tier] += size
        self.hierarchy.pin(run.keys)
        self.hierarchy.used(run.keys)
        if self.context.spans is not None:
            self.context.spans.open(
                request.request_id,
                ("load", number),
                "kvplug.load",
                {
                    "kvplug.medium": ", ".join(dict.fromkeys(run.tiers)),
                    "kvplug.tokens": num_external,
                    "kvplug.bytes": sum(run.sizes),
                    "kvplug.exact": run.exact,
                },
            )

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """Learn what the request leaves in the pool, and state what it loaded."""
        tiered = self.requests.pop(request.request_id, None)
        self._questions.pop(request.request_id, None)
        if tiered is not None:
            if tiered.loading is None:
                self._hold(tiered, False)
            self._guarded("finished", None, self._learn, tiered, True)
            self._guarded("finished", None, self._tell_end, tiered)
            self._guarded("finished", None, tiered.describe, answer)
        for manager in self._managers:
            manager.set_approximate(self.kind, request.request_id, None)

    def _tell_end(self, tiered: TieredRequest) -> None:
        keys = tiered.extend() if self._keeps(tiered) else []
        self.hierarchy.finished(tiered.view, keys, tiered.request.num_output_tokens)

    def _learn(self, tiered: TieredRequest, used: bool) -> None:
        if self._events is not None:
            hashes = tiered.hashes(self._hash_size, self.chunk)
            self._events.learn(tiered.extend(), hashes)
        if self._watch is not None:
            self._keeps(tiered)
            self._watch.learn(tiered, self._hash_size, used)

    # -- steps ---------------------------------------------------------------------------------

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Send loads that were promised, chunks to store, and moves."""
        directives = TiersDirectives(loads=self._loads, generation=self._generation)
        self._loads = []
        self._guarded("step", None, self._order, step, directives)
        # A reset ends loads under way, whether or not anything else is ordered.
        if directives or self._generation != self._told:
            self._told = self._generation
            into.tiers = directives

    def _order(self, step: SchedulerStep, directives: TiersDirectives) -> None:
        self._measure_prefill(step)
        for tier, cause in self._take_failures():
            self.hierarchy.failed(tier, cause)
        self._take_listed()
        for request_id in step.output.preempted_req_ids or ():
            tiered = self.requests.get(request_id)
            if tiered is not None:
                tiered.asked = False
                self._learn(tiered, True)
                self._forget_uncomputed(tiered)
        for request_id, count in step.scheduled.items():
            if (tiered := self.requests.get(request_id)) is not None:
                tiered.scheduled = step.starts[request_id] + count
        for tier in self._exact:
            self.hierarchy.queued(tier, "read", self._reading[tier])
        directives.stores = self._store()
        if self._interval:
            directives.stores += self._checkpoint(step)
        waiting = sum(t.request.num_computed_tokens == 0 for t in self.requests.values())
        running = len(self.requests) - waiting
        moves = self.hierarchy.plan(step.number, self._pool_view(), waiting, running)
        moves, self._moves = self._moves + moves, []
        # What makes room comes before what takes it.
        moves.sort(key=lambda move: move.action is not Action.DROP)
        for move in moves:
            if self._events is not None and move.action is Action.DROP:
                self._events.removed(move.source, move.keys)
            if (moved := MOVED.get(move.action)) is not None:
                self.context.events.add(
                    moved,
                    self.kind,
                    len(move.keys),
                    f"{move.source} to {move.target}",
                    blocks=move.keys,
                    policy=move.source,
                )
            directives.moves.append(
                ChunkMove(
                    str(move.action),
                    move.source,
                    move.target,
                    tuple(move.keys),
                )
            )

    def _forget_uncomputed(self, tiered: TieredRequest) -> None:
        """Give up the blocks that a request was to fill in the step that preempted it.

        vLLM hashes blocks as it schedules them. Under ``--scheduling-policy priority`` it preempts
        requests that it has scheduled in the same step, and leaves those hashes in its prefix
        cache.
        """
        if self._watch is not None:
            hashes = tiered.hashes(self._hash_size, self.chunk)
            self._watch.forget_uncomputed(hashes[tiered.computed() // self.chunk :])
        tiered.scheduled = 0

    def _store(self) -> list[ChunkStore]:
        watch = self._watch
        if watch is None:
            return []
        room = max(1, STORE_BYTES // max(1, self.chunk_bytes // self._world))
        leaving, late = watch.leaving(room)
        if not leaving:
            return []
        where = {chunk.key: (block, chunk.start) for block, chunk in reversed(leaving)}
        now = {chunk.key for _, chunk in leaving[:late]}
        stores = []
        for key, tier in self.hierarchy.leaving([chunk for _, chunk in leaving], self.chunk_bytes):
            block, start = where[key]
            stores.append(ChunkStore(tier, key, start, (block,)))
            self.counters.late += key in now
            self.counters.ahead += key not in now
        return stores

    def _checkpoint(self, step: SchedulerStep) -> list[ChunkStore]:
        """Store some of what the pool holds in a durable tier, for the engine's next start."""
        watch = self._watch
        assert watch is not None
        if not self._unsaved:
            if time.monotonic() < self._checkpoint_at:
                return []
            self._checkpoint_at = time.monotonic() + self._interval
            self.counters.checkpoints += 1
            for request_id in step.starts:
                if (tiered := self.requests.get(request_id)) is not None:
                    self._learn(tiered, False)
            self._unsaved.extend(watch.cached())
        count = max(1, CHECKPOINT_BYTES // max(1, self.chunk_bytes // self._world))
        some = [self._unsaved.popleft() for _ in range(min(count, len(self._unsaved)))]
        unfinished = self._unfinished(step)
        here = watch.holds([(block, chunk.key) for block, chunk in some])
        where = {
            chunk.key: (block, chunk)
            for (block, chunk), same in zip(some, here, strict=True)
            if same and block not in unfinished
        }
        tier = self._durable[0]
        kept = self.hierarchy.keep(tier, [chunk for _, chunk in where.values()], self.chunk_bytes)
        self.counters.kept += len(kept)
        return [ChunkStore(tier, key, where[key][1].start, (where[key][0],)) for key in kept]

    def _unfinished(self, step: SchedulerStep) -> set[int]:
        """Blocks that the step computes: the engine hashes them as it schedules it."""
        assert self._blocks_of is not None
        return {
            block.block_id
            for request_id, start in step.starts.items()
            for block in self._blocks_of[request_id][start // self.chunk :]
        }

    def _pool_view(self) -> TierView:
        assert self._watch is not None
        pool = self._watch.pool
        per_block = self.chunk_bytes
        return TierView(
            "pool",
            (pool.num_gpu_blocks - pool.get_num_free_blocks()) * per_block,
            pool.num_gpu_blocks * per_block,
        )

    def _measure_prefill(self, step: SchedulerStep) -> None:
        """Take the time between two steps as that of the first, where it was mostly prefill."""
        now = time.monotonic()
        tokens, attended = self._prefilled
        # If all of them have ended, the engine may have had nothing to do since.
        if tokens and any(name in self.requests for name in self._scheduled):
            self.hierarchy.computed(tokens, attended, now - self._step_began)
        self._step_began, self._prefilled = now, (0, 0.0)
        counts = self._scheduled = step.scheduled
        if not counts:
            return
        tokens = sum(counts.values())
        if tokens < 2 * len(counts) + 8:
            return
        starts = step.starts
        self._prefilled = tokens, sum(pairs(starts[name], n) for name, n in counts.items())

    # -- reports -------------------------------------------------------------------------------

    def on_report(self, report: StepReport) -> None:
        """Take in what workers stored, loaded and failed to."""
        part = report.tiers
        if part is None:
            return
        if part.error:
            self.errors += part.errors
            self._fall_back(part.error)
        if part.reloaded:
            self.reset()
        self._guarded("on_report", None, self._take_loads, part)
        self._guarded("on_report", None, self._take_report, part)

    def _take_loads(self, report: TiersReport) -> None:
        for number, cause in report.unloaded.items():
            self._ended(number, cause)
        for number, ranks in report.loaded.items():
            self._arrived[number] += ranks
            if self._arrived[number] >= self._world:
                self._ended(number)

    def _ended(self, number: int, failed: str = "") -> None:
        """A load was made, or failed."""
        found = self._loading.pop(number, None)
        del self._arrived[number]
        if found is None:
            return
        if self.context.spans is not None:
            self.context.spans.close(("load", number), failed=failed)
        tiered, run = found
        self._arriving -= Counter(run.keys)
        for tier, size in zip(run.tiers, run.sizes, strict=True):
            self._reading[tier] -= size
        self.hierarchy.unpin(run.keys)
        if tiered.loading == number:
            tiered.loading = None
            self._hold(tiered, False)
        if failed:
            self.counters.failed_loads += 1
            self.refused.add(failed)
            tiered.failures += 1
            tiered.taken = None
            tiered.asked = False
            if len(tiered.causes) < FAILURES:
                tiered.causes.append(failed)
            self._set_limit(tiered, None)
            self.context.events.add(
                EventType.REFUSED,
                self.kind,
                len(run.keys),
                failed,
                request=tiered.request.request_id,
            )
            return
        tokens = len(run.keys) * self.chunk
        tiered.loaded += tokens
        self.counters.loads += 1
        self.counters.loaded_tokens += tokens
        for tier, size in zip(run.tiers, run.sizes, strict=True):
            self._loaded_bytes[tier] += size
        add, request_id = self.context.events.add, tiered.request.request_id
        add(EventType.REUSED, self.kind, tokens, request=request_id)
        for tier, chunks in Counter(run.tiers).items():
            loaded = chunks * self.chunk
            add(EventType.LOADED, self.kind, loaded, request=request_id, policy=tier)

    def _take_report(self, report: TiersReport) -> None:
        books = self.hierarchy
        stored: dict[str, list[bytes]] = defaultdict(list)
        for (tier, key), (ranks, size) in report.stored.items():
            before = self._pending.pop((tier, key), (0, 0))
            ranks, size = ranks + before[0], size + before[1]
            if ranks < self._world:
                self._pending[tier, key] = ranks, size
            else:
                books.put(tier, key, size)
                stored[tier].append(key)
                if self._events is not None:
                    self._events.stored(tier, key)
        for tier, keys in stored.items():
            self.context.events.add(
                EventType.STORED, self.kind, len(keys), blocks=keys, policy=tier
            )
        incomplete: dict[str, list[bytes]] = {}
        for (tier, key), cause in [*report.failed.items(), *report.gone.items()]:
            self._pending.pop((tier, key), None)
            books.lost(tier, key, cause)
            incomplete.setdefault(tier, []).append(key)
        if self._events is not None:
            for (tier, key), _ in report.gone.items():
                self._events.removed(tier, [key])
        if self._world > 1:
            # Other ranks may have their part of it.
            self._moves += [Move(Action.DROP, keys, tier) for tier, keys in incomplete.items()]
        for tier, direction, size, seconds in report.measured:
            books.measured(tier, direction, size, seconds)
        for tier, size in report.queued.items():
            books.queued(tier, "write", size)
        for tier, cause in report.down.items():
            books.failed(tier, cause)

    def _tier_failed(self, tier: str, cause: str) -> None:
        self._failures.append((tier, cause))

    def _take_failures(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        while self._failures:
            found.append(self._failures.popleft())
        return found

    # -- reset ---------------------------------------------------------------------------------

    def reset(self) -> bool:
        """Let nothing that is stored be found any more.

        vLLM resets its caches because the weights are about to change, or have, or for any other
        reason, and does not say which. So what is stored from now on belongs to this run alone.
        """
        self._generation += 1
        self._text_identity = once()
        # What outlives the engine, or others see, stays true for those who have the same weights.
        own = [name for name, view in self.hierarchy.views().items() if not view.shared]
        held = {name: self.hierarchy.keys(name) for name in own if name not in self._durable}
        self.hierarchy.reset()
        self._moves = [Move(Action.DROP, keys, tier) for tier, keys in held.items() if keys]
        # Promised to vLLM, so it is ordered; no worker loads it.
        self._loads = [replace(order, seconds=0.0) for order in self._loads]
        self._pending.clear()
        self._unsaved.clear()
        if self._watch is not None:
            self._watch.forget()
        for tiered in self.requests.values():
            tiered.run = None
            # What it computes goes on being used by the request itself, and by nobody else.
            tiered.keeps = False
        logger.info("kvplug: the tiers were reset")
        return True

    def take_events(self) -> Sequence[Any]:
        """vLLM's KV events of the tiers, each the medium."""
        return self._events.take() if self._events is not None else ()

    # -- the summary ---------------------------------------------------------------------------

    def reports(self) -> list[PolicyReport]:
        """Reports of the tiers, the codecs and the lifecycle policy; the first has the host's
        counters."""
        deployment, books = self.context.deployment, self.hierarchy.counters()
        by_tier, rest = _by_tier(books, [one.name for one in deployment.tiers])
        found: list[PolicyReport] = []
        for one in deployment.tiers:
            counters = by_tier[one.name]
            acted = int(counters.get("stored", 0) + counters.get("used", 0))
            errors = int(counters.pop("errors", 0))
            if not found:
                counters |= asdict(self.counters)
                errors += self.errors
                counters |= {f"refused {cause}": n for cause, n in sorted(self.refused.items())}
                counters |= {f"failed {c}": n for c, n in sorted(self.hierarchy.causes().items())}
            exact = one.tier.policy.exact and one.codec.policy.exact
            report = PolicyReport(str(self.kind), one.name, exact, acted, errors, counters)
            report.retired = self.hierarchy.order_retired(one.name)
            found.append(report)
        stored = sum(int(by_tier[one.name].get("stored", 0)) for one in deployment.tiers)
        for codec in {one.codec.policy.name: one.codec.policy for one in deployment.tiers}.values():
            found.append(PolicyReport(str(Kind.TRANSFER), codec.name, codec.exact, stored))
        errors = int(rest.pop("lifecycle_errors", 0))
        name = type(self.lifecycle).name
        own = self.hierarchy.own_counters()
        report = PolicyReport(str(Kind.LIFECYCLE), name, True, stored, errors, rest | own, own=own)
        report.retired = self.hierarchy.retired
        found.append(report)
        return found

    def samples(self) -> Iterator[Sample]:
        """What the books say, what was refused, and who waits."""
        codecs = {one.name: one.codec.policy.name for one in self.context.deployment.tiers}
        yield from tiers_measured.samples(
            self.hierarchy, self.chunk_bytes, codecs, self._loaded_bytes
        )
        yield from tiers_measured.refusals(self.refused)
        yield TIER_LOADS.of(self.counters.loads, "loaded")
        yield TIER_LOADS.of(self.counters.failed_loads, "failed")
        yield LOADING.of(len(self._loading), str(self.kind))
        yield WAITS.of(self.counters.waited, str(self.kind))

    def show(self, facts: Facts) -> None:
        """Each tier, chunks found in it, and why others were not loaded."""
        books, counts = self.hierarchy, self.hierarchy.counters()
        for name, view in books.views().items():
            facts.tiers.append(
                TierState(
                    name=plain(name),
                    used=int(view.used),
                    capacity=int(view.capacity),
                    chunks=int(counts[f"{name}_chunks"]),
                    exact=view.exact,
                    shared=view.shared,
                    durable=view.durable,
                    down=view.read.down or view.write.down,
                    read=view.read.bandwidth,
                    write=view.write.bandwidth,
                )
            )
            per_tier = {what: counts.get(f"{name}_{what}", 0) for what in ("used", "lost")}
            found = {"hit": per_tier["used"], "lost": per_tier["lost"]}
            facts.outcomes += outcomes(name, "chunks", found)
        missed = counts.get("asked", 0) - counts.get("found", 0)
        facts.outcomes += outcomes("all tiers", "chunks", {"not found": missed})
        facts.outcomes += outcomes("all tiers", "refusals", self.refused)
        facts.outcomes += outcomes("all tiers", "failures", books.causes())

    def stop(self) -> None:
        """Close what was opened to ask."""
        self._lookups.close()


def _by_tier(
    books: Mapping[str, float], tiers: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """The books' counters of each tier, by name, and those of none."""
    found: dict[str, dict[str, float]] = {name: {} for name in tiers}
    rest: dict[str, float] = {}
    # The second tier of a name begins with that of the first.
    longest = sorted(tiers, key=len, reverse=True)
    for name, value in books.items():
        tier = next((one for one in longest if name.startswith(f"{one}_")), None)
        if tier is None:
            rest[name] = value
        else:
            found[tier][name.removeprefix(f"{tier}_")] = value
    return found, rest
