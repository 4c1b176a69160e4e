"""vLLM's KV-cache manager and block pool with kvplug's queue and managers, driven at random, and a
model of what every block holds beside them."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from simulated_worker import BLOCK, Approximate, Text, require
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from kvplug.contract import (
    BlockFact,
    EngineView,
    Kind,
    LayerView,
    PolicyOptions,
    PrefixCachePolicy,
    ScoringPolicy,
)
from kvplug.hosts.pruning import Limits, layout
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.scheduler.blocks import BlockTracker, computed_keys, request_view
from kvplug.hosts.vllm.scheduler.evictions import EvictionPlanner
from kvplug.hosts.vllm.scheduler.kind import SchedulerStep
from kvplug.hosts.vllm.scheduler.prefix_cache import TRACKED
from kvplug.hosts.vllm.scheduler.queue import HitCollector, PolicyQueue
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.hosts.vllm.spec import (
    ApproximateManager,
    ApproximateSpec,
    PrunedManager,
    PrunedSpec,
    ShorteningManager,
    WindowedManager,
    WindowedSpec,
)
from kvplug.request_options import RequestOptions

MANAGERS = ("stock", "windowed", "pruned", "approximate")
MAX_TOKENS = 640
IN_FLIGHT = 96
RUNNING = 12


class Resizing(ScoringPolicy):
    """Asks for budgets that no policy should ask for."""

    name = "resizing"
    changes = "what a request sees"
    resizes = True

    def __init__(self, options: PolicyOptions, engine: EngineView):
        super().__init__(options, engine)
        self._choose = random.Random(5)

    def score(self, held: Any) -> Any:
        raise NotImplementedError

    def resize(self, measured: Any, budget: int, num_tokens: int) -> int:
        if self._choose.random() < 0.001:
            odd: Any = self._choose.choice([float("nan"), float("inf"), "x", None])
            return odd
        return self._choose.choice([budget, budget // 2, budget + 32, budget * 2, 0, -5, 10**9])


@dataclass
class Running:
    """A request that holds blocks.

    Attributes:
        request: The request.
        text: Its text.
        approximate: First token whose KV is not exactly what the text gives, or None.
        unfilled: First token of a run that no worker has filled yet, or None.
        own: Block of each token that still has its KV there.
        flight: Tokens of each step that is not acknowledged yet.
    """

    request: Request
    text: Text
    approximate: int | None = None
    unfilled: int | None = None
    own: dict[int, int] = field(default_factory=dict)
    flight: list[int] = field(default_factory=list)


class PoolFuzz:
    """A KV-cache manager and its requests.

    Args:
        managed: One of `MANAGERS`.
        policy: The prefix-cache policy, or None for vLLM's own queue.
        seed: Seed of everything that is chosen.

    Attributes:
        counts: What happened.
    """

    def __init__(self, managed: str, policy: type[PrefixCachePolicy] | None, seed: int):
        init_none_hash(sha256)
        self._choose = random.Random(f"{managed} {policy and policy.name} {seed}")
        self.counts: Counter[str] = Counter()
        blocks = self._choose.choice([45, 60, 90])
        spec = self._spec(managed)
        self._exact = getattr(spec, "exact_tokens", 10**9)
        self._pages = KVCacheManager(
            KVCacheConfig(blocks, [], [KVCacheGroupSpec(["l0"], spec)], hash_block_size=BLOCK),
            max_model_len=MAX_TOKENS,
            scheduler_block_size=BLOCK,
            hash_block_size=BLOCK,
            max_in_flight_tokens=IN_FLIGHT,
            enable_caching=True,
        )
        self._pool = self._pages.block_pool
        self._manager = self._pages.coordinator.single_type_managers[0]
        self._blocks = blocks
        self._exempt: set[str] = set()
        self._slots = Slots()
        self._planner: EvictionPlanner | None = None
        self._bind_sequence(blocks)
        self._tracker: BlockTracker | None = None
        self._queue: PolicyQueue | None = None
        if policy is not None:
            self._bind_queue(policy)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._number = 0
        self._waiting: list[Request] = []
        self._running: dict[str, Running] = {}
        self._ended: list[str] = []
        self._content: dict[int, list[Any]] = defaultdict(lambda: [None] * BLOCK)
        self._written: Counter[int] = Counter()
        self._checked: dict[int, Any] = {}
        self._hashed: dict[bytes, list[int]] = {}
        self._texts = [[self._choose.randrange(1000) for _ in range(400)] for _ in range(4)]

    def run(self, steps: int, every: int = 8) -> None:
        """Do some random things, and end.

        Args:
            steps: Things to do.
            every: Things between two looks at everything.

        Raises:
            Violation: Something happened that must not.
        """
        for nth in range(steps):
            self._act()
            if nth % every == 0:
                self.check()
        for running in list(self._running.values()):
            self._finish(running)
        self.check()
        self._at_rest()

    # -- what is tested ------------------------------------------------------------------------

    def _spec(self, managed: str) -> FullAttentionSpec:
        choose = self._choose
        common: dict[str, Any] = {
            "block_size": BLOCK,
            "num_kv_heads": 2,
            "head_size": 8,
            "dtype": torch.float32,
        }
        shorter = common | {"in_flight_tokens": IN_FLIGHT, "max_tokens": MAX_TOKENS}
        if managed == "windowed":
            sink, window = choose.randrange(4), choose.randrange(6)
            return WindowedSpec(
                **shorter,
                sink_tokens=sink * BLOCK,
                window_tokens=window * BLOCK,
                exact_tokens=(sink + window + 1) * BLOCK,
            )
        if managed == "pruned":
            limits = Limits(
                BLOCK,
                budget=choose.choice([64, 96, 160]),
                share=1.0,
                always=20,
                interval=choose.choice([1, 2, 3]),
                protected=0,
            )
            limits = replace(
                limits,
                protected=max(limits.interval, choose.choice([1, 2, 4])),
                prefill_limit=choose.choice([0, 0, 14, 18]),
            )
            return PrunedSpec(**shorter, limits=limits, exact_tokens=limits.protected * BLOCK)
        made = ApproximateSpec if managed == "approximate" else FullAttentionSpec
        return made(**common)

    def _bind_sequence(self, blocks: int) -> None:
        manager = self._manager
        if isinstance(manager, ShorteningManager):
            manager.exempt = self._exempt
        if not isinstance(manager, PrunedManager):
            return
        manager.limit_prefill((blocks - 1) // 2)
        layer = LayerView(
            index=0,
            num_layers=1,
            num_kv_heads=2,
            num_heads=2,
            head_size=8,
            dtype="float32",
            rope=None,
        )
        policy = Resizing(Resizing.Options(), EngineView(BLOCK, blocks - 1, layers=(layer,)))
        policy.resizes = self._choose.random() < 0.5
        self._planner = EvictionPlanner(policy, [manager], [0], self._slots)

    def _bind_queue(self, policy: type[PrefixCachePolicy]) -> None:
        made = policy(policy.Options(), EngineView(BLOCK, self._blocks - 1))
        if made.needs & TRACKED:
            self._tracker = BlockTracker(self._pool.num_gpu_blocks)
        self._queue = PolicyQueue(self._pool.free_block_queue, made, self._tracker)
        self._tells_ends = BlockFact.FINISHED in made.needs
        compat.install_queue(
            self._pool, self._queue, HitCollector(self._queue, self._pool.metrics_collector)
        )
        take = self._queue.popleft_n

        def popleft_n(n: int) -> list[Any]:
            free = self._free()
            plain = sum(b.block_hash is None for b in free)
            taken = take(n)
            require(len({b.block_id for b in taken}) == n, "a block is handed out twice")
            require(all(b.ref_cnt == 0 for b in taken), "a block is handed out that is held")
            cached = sum(b.block_hash is not None for b in taken)
            require(cached == max(0, n - plain), "cached content is evicted before it must be")
            return taken

        self._queue.popleft_n = popleft_n  # type: ignore[method-assign]

    # -- what happens --------------------------------------------------------------------------

    def _act(self) -> None:
        chance = self._choose.random()
        if chance < 0.18 and len(self._waiting) < 8:
            self._arrive()
        elif chance < 0.33:
            self._admit()
        elif chance < 0.95:
            self._advance()
        elif chance < 0.97 and self._running:
            self._finish(self._any())
        elif chance < 0.975 and self._running:
            self._preempt(self._last())
        elif chance < 0.98:
            self._pages.evict_blocks({self._choose.randrange(1, self._blocks) for _ in range(4)})
        elif chance < 0.99:
            self._reset()

    def _reset(self) -> None:
        """Empty the prefix cache, which vLLM does only while nothing is held."""
        if self._pages.reset_prefix_cache() or self._choose.random() < 0.5:
            return
        for running in list(self._running.values()):
            self._preempt(running)
        require(self._pages.reset_prefix_cache(), "no reset although nothing runs")
        self.counts["resets"] += 1
        self.check()

    def _any(self) -> Running:
        return self._running[self._choose.choice([*self._running])]

    def _last(self) -> Running:
        return self._running[next(reversed(self._running))]

    def _arrive(self) -> None:
        choose = self._choose
        self._number += 1
        shared = choose.choice(self._texts)[: choose.randrange(300)]
        tokens = [*shared, *(choose.randrange(1000, 2000) for _ in range(choose.randrange(1, 80)))]
        tokens = tokens[: MAX_TOKENS - 60]
        request = Request(
            f"r{self._number}",
            tokens,
            SamplingParams(max_tokens=choose.randrange(1, 60)),
            None,
            cache_salt=choose.choice([None, None, "a", "b"]),
            block_hasher=self._hasher,
        )
        if self._tracker is not None:
            self._tracker.add(
                request_view(request, RequestOptions(session_id=choose.choice([None, "s1"])))
            )
        longest = -(-min(len(tokens) + request.max_tokens, MAX_TOKENS) // BLOCK)
        if isinstance(self._manager, ShorteningManager):
            if choose.random() < 0.1 and longest < self._blocks:
                self._exempt.add(request.request_id)
            elif self._planner is not None:
                self._planner.add(request.request_id, len(tokens))
        self._waiting.append(request)

    def _admit(self) -> None:
        """Start the first waiting request, if it fits."""
        if not self._waiting or len(self._running) >= RUNNING:
            return
        choose, request = self._choose, self._waiting[0]
        hit, cached, _ = self._pages.get_computed_blocks(request)
        running = Running(request, Text(request.cache_salt, list(request.all_token_ids)))
        left = request.num_tokens - cached - 1
        loaded = 0
        if isinstance(self._manager, ApproximateManager):
            if left > 0 and choose.random() < 0.5:
                loaded = choose.randrange(left)
            if loaded:
                running.unfilled = cached
                if choose.random() < 0.5:
                    running.approximate = cached + choose.randrange(loaded)
            elif choose.random() < 0.2:
                running.approximate = max(cached, request.num_prompt_tokens)
            self._manager.set_approximate(Kind.REUSE, request.request_id, running.approximate)
            self._manager.hold(request.request_id, running.unfilled)
        count = max(1, min(left + 1 - loaded, choose.choice([5, 16, 48, 96])))
        given = self._pages.allocate_slots(
            request,
            count,
            num_new_computed_tokens=cached,
            new_computed_blocks=hit,
            num_external_computed_tokens=loaded,
            full_sequence_must_fit=True,
            has_scheduled_reqs=bool(self._running),
        )
        if given is None:
            require(bool(self._running), "a request that is alone never fits")
            return
        resumed = request.status == RequestStatus.PREEMPTED
        self._waiting.pop(0)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = cached + loaded
        self._running[request.request_id] = running
        table = self._manager.req_to_blocks[request.request_id]
        self.counts["admitted"] += 1
        self.counts["hits"] += cached // BLOCK
        self._require_alone(running, cached, cached + loaded + count)
        digests = running.text.upto(cached)
        for nth, block in enumerate(hit.blocks[0]):
            require(
                self._content[block.block_id] == digests[nth * BLOCK : nth * BLOCK + BLOCK],
                f"{request.request_id} is given block {block.block_id}, which holds another text",
            )
        for i in range(cached):
            running.own[i] = table[i // BLOCK].block_id
        ids = self._pages.get_block_ids(request.request_id)
        self._tell(request.request_id, ids, new=not resumed, resumed=resumed)
        if loaded and choose.random() < 0.8:
            self._fill(running, cached, cached + loaded)
        self._computed(running, count)

    def _fill(self, running: Running, start: int, end: int) -> None:
        """Load a run, and report that it is there."""
        running.unfilled = None
        self._write(running, start, end)
        self._manager.hold(running.request.request_id, None)

    def _advance(self) -> None:
        """Compute some tokens of a running request, and acknowledge earlier steps of others."""
        if not self._running:
            return
        choose, running = self._choose, self._any()
        request = running.request
        left = request.num_tokens - request.num_computed_tokens
        count = min(left, choose.choice([1, 7, 16, 31, 64]))
        count = min(count, IN_FLIGHT - request.num_in_flight_tokens)
        if count > 0:
            given = self._make_room(running, count)
            if given is None:
                return
            self._check_seen(running)
            start = request.num_computed_tokens
            self._require_alone(running, start, start + count)
            self._tell(request.request_id, given.get_block_ids(allow_none=True))
            if running.unfilled is not None:
                # The load has failed: its tokens are computed again.
                start, running.unfilled = running.unfilled, None
                self._write(running, start, request.num_computed_tokens)
                self._manager.hold(request.request_id, None)
            self._computed(running, count)
        for other in list(self._running.values()):
            if choose.random() < 0.3:
                self._settle(other)

    def _make_room(self, running: Running, count: int) -> Any:
        """Allocate, and preempt others for it as vLLM does."""
        request = running.request
        while True:
            given = self._pages.allocate_slots(request, count)
            if given is not None:
                return given
            require(len(self._running) > 1, f"{request.request_id} is alone and gets no block")
            victim = self._last()
            self._preempt(victim)
            if victim is running:
                return None

    def _tell(self, request_id: str, ids: Any, *, new: bool = False, resumed: bool = False) -> None:
        if self._tracker is None:
            return
        started = [SimpleNamespace(req_id=request_id, block_ids=ids)] if new else []
        cached = SimpleNamespace(
            req_ids=[] if new else [request_id],
            new_block_ids=[] if new else [ids],
            resumed_req_ids={request_id} if resumed else set(),
        )
        ended, self._ended = self._ended, []
        self._tracker.update(
            SimpleNamespace(
                scheduled_new_reqs=started, scheduled_cached_reqs=cached, finished_req_ids=ended
            )
        )

    def _computed(self, running: Running, count: int) -> None:
        """Run a step of one request."""
        request = running.request
        start, end = request.num_computed_tokens, request.num_computed_tokens + count
        if running.unfilled is None:
            self._write(running, start, end)
        self._evict(running, start, count)
        request.num_computed_tokens = end
        request.num_in_flight_tokens += count
        running.flight.append(count)
        self._sample(running)

    def _evict(self, running: Running, start: int, count: int) -> None:
        """Make the evictions that a scoring policy plans for a step."""
        planner, request_id = self._planner, running.request.request_id
        if planner is None:
            return
        cached = SimpleNamespace(
            req_ids=[request_id], num_computed_tokens=[start], resumed_req_ids=set()
        )
        output = SimpleNamespace(
            num_scheduled_tokens={request_id: count},
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
        )
        plans = planner.step(SchedulerStep(output, 1, self._slots))
        table = self._manager.req_to_blocks[request_id]
        for (_, slot), plan in plans.items():
            last = plan.state
            for eviction in plan.evictions:
                laid = layout(last, eviction, self._manager.limits.protected, BLOCK)
                last = eviction
                self.counts["evictions"] += 1
                for nth in laid.blocks[: laid.survivors]:
                    block = table[nth]
                    require(not block.is_null, "survivors are moved into no block")
                    require(block.ref_cnt == 1, "survivors are moved into a shared block")
                    require(block.block_hash is None, "survivors are moved into a cached block")
                    self._content[block.block_id] = [Approximate(request_id)] * BLOCK
                    self._written[block.block_id] += 1
                    for i in range(nth * BLOCK, nth * BLOCK + BLOCK):
                        running.own.pop(i, None)
                if planner.policy.resizes:
                    planner.take(np.array([[slot, 0, eviction.at, 1, 1.0]]))

    def _write(self, running: Running, start: int, end: int) -> None:
        request_id = running.request.request_id
        table = self._manager.req_to_blocks[request_id]
        limit = self._exact_until(running)
        digests = running.text.upto(end)
        for i in range(start, end):
            block = table[i // BLOCK]
            require(not block.is_null, f"{request_id} writes at {i} into no block")
            value: Any = digests[i] if i < limit else Approximate(request_id)
            self._content[block.block_id][i % BLOCK] = value
            self._written[block.block_id] += 1
            running.own[i] = block.block_id

    def _exact_until(self, running: Running) -> int:
        exempt = running.request.request_id in self._exempt
        limit = 10**9 if exempt else self._exact
        return limit if running.approximate is None else min(limit, running.approximate)

    def _require_alone(self, running: Running, start: int, end: int) -> None:
        table = self._manager.req_to_blocks[running.request.request_id]
        for nth in range(start // BLOCK, (end - 1) // BLOCK + 1):
            block = table[nth]
            require(
                not block.is_null and block.ref_cnt == 1,
                f"{running.request.request_id} is to write into block {block.block_id}, which "
                f"{block.ref_cnt} hold",
            )

    def _settle(self, running: Running) -> None:
        """Acknowledge the oldest step of a request in flight."""
        request = running.request
        if not running.flight:
            return
        request.num_in_flight_tokens -= running.flight.pop(0)
        if not running.flight and self._is_complete(request):
            self._finish(running)
        else:
            self._sample(running)

    def _is_complete(self, request: Request) -> bool:
        return request.num_computed_tokens == request.num_tokens and (
            request.num_output_tokens >= request.max_tokens or request.num_tokens >= MAX_TOKENS
        )

    def _sample(self, running: Running) -> None:
        """Go on with another token, up to three steps ahead of what is acknowledged."""
        request = running.request
        done = request.num_computed_tokens == request.num_tokens
        if done and not self._is_complete(request) and len(running.flight) < 3:
            token = self._choose.randrange(5)
            request.append_output_token_ids(token)
            running.text.tokens.append(token)

    def _preempt(self, running: Running) -> None:
        request = running.request
        self._leave(running)
        request.num_computed_tokens = request.num_in_flight_tokens = 0
        request.status = RequestStatus.PREEMPTED
        self._waiting.insert(0, request)
        self.counts["preempted"] += 1

    def _finish(self, running: Running) -> None:
        request = running.request
        if self._queue is not None and self._tells_ends:
            self._queue.finished(
                request_view(request, None),
                computed_keys(request, BLOCK, BLOCK),
                request.num_output_tokens,
            )
        self._leave(running)
        self._exempt.discard(request.request_id)
        if self._planner is not None:
            self._planner.finish(request.request_id)
        self._slots.release(request.request_id)
        self._ended.append(request.request_id)
        self.counts["finished"] += 1

    def _leave(self, running: Running) -> None:
        """Give all blocks of a request back."""
        self._learn(running)
        request_id = running.request.request_id
        if isinstance(self._manager, ApproximateManager):
            self._manager.set_approximate(Kind.REUSE, request_id, None)
            self._manager.hold(request_id, None)
        self._pages.free(running.request)
        del self._running[request_id]

    # -- what must hold ------------------------------------------------------------------------

    def check(self) -> None:
        """Look at everything once."""
        free = self._free()
        self._check_books(free)
        for running in self._running.values():
            self._check_running(running)
        self._check_prefix_cache()
        queue = self._queue
        if queue is not None:
            require(queue.counters.errors == 0, "the policy named blocks that are not free")
            cached = {b.block_id for b in free if b.block_hash is not None}
            require(set(queue._candidates) == cached, "the policy is asked about other blocks")

    def _free(self) -> list[Any]:
        """Free blocks in the queue's order, which reads the same backwards."""
        queue, found = self._pool.free_block_queue, []
        block = queue.fake_free_list_head.next_free_block
        while block is not queue.fake_free_list_tail:
            require(block.next_free_block.prev_free_block is block, "the queue is broken")
            found.append(block)
            require(len(found) <= self._blocks, "the queue goes in a circle")
            block = block.next_free_block
        require(len(found) == queue.num_free_blocks, "the queue has another length than it says")
        return found

    def _check_books(self, free: list[Any]) -> None:
        held: Counter[int] = Counter()
        for running in self._running.values():
            table = self._manager.req_to_blocks[running.request.request_id]
            held.update(b.block_id for b in table if not b.is_null)
        for block in self._pool.blocks:
            if not block.is_null:
                require(
                    block.ref_cnt == held[block.block_id],
                    f"block {block.block_id} counts {block.ref_cnt} holders, and has "
                    f"{held[block.block_id]}",
                )
        ids = {b.block_id for b in free}
        require(len(ids) == len(free), "a block is free twice")
        require(not ids & held.keys(), "a block is free that is held")
        require(len(ids) + len(held) == self._blocks - 1, "a block is neither free nor held")

    def _check_running(self, running: Running) -> None:
        request_id, limit = running.request.request_id, self._exact_until(running)
        self._learn(running)
        table = self._manager.req_to_blocks[request_id]
        if isinstance(self._manager, ShorteningManager) and request_id not in self._exempt:
            mine, most = [b for b in table if not b.is_null], self._cap
            require(len(mine) <= most, f"{request_id} holds {len(mine)} blocks, and not {most}")
        self._check_seen(running)
        digests = running.text.upto(running.request.num_computed_tokens)
        for i in range(self._choose.randrange(5), running.request.num_computed_tokens, 5):
            block = table[i // BLOCK]
            if block.is_null or i not in running.own:
                continue
            held = self._content[block.block_id][i % BLOCK]
            wanted: Any = digests[i] if i < limit else Approximate(request_id)
            require(held == wanted, f"the KV of {request_id} at {i} was overwritten")

    @property
    def _cap(self) -> int:
        return int(self._manager.max_admission_blocks_per_request)

    def _check_seen(self, running: Running) -> None:
        """What a step in flight reads is there."""
        request, manager = running.request, self._manager
        if not isinstance(manager, ShorteningManager) or request.request_id in self._exempt:
            return
        table = manager.req_to_blocks[request.request_id]
        settled = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        if isinstance(manager, WindowedManager):
            window, oldest = manager.window, settled // BLOCK
            seen = [
                *range(window.sink_blocks),
                *range(max(0, oldest - window.window_blocks), oldest + 1),
            ]
        else:
            plan = manager.plan(request.request_id)
            made = [e for e in plan.evictions if e.at <= settled] if plan is not None else []
            seen = [*range(len(table))]
            if made:
                last, protected = made[-1], manager.limits.protected
                seen = [*range(protected, protected + last.kept)]
                seen += [*range(last.end - last.grown, len(table))]
        for nth in seen:
            there = nth >= len(table) or not table[nth].is_null
            require(there, f"{request.request_id} reads block {nth}, and it is gone")

    def _check_prefix_cache(self) -> None:
        for block in self._pool.blocks:
            if block.is_null or block.block_hash is None:
                continue
            seen = (block.block_hash, self._written[block.block_id])
            if self._checked.get(block.block_id) != seen:
                self._checked[block.block_id] = seen
                require(
                    self._content[block.block_id] == self._hashed[get_block_hash(block.block_hash)],
                    f"block {block.block_id} is cached and does not hold its text's KV",
                )

    def _learn(self, running: Running) -> None:
        """Note which text each hash of a request stands for."""
        hashes = running.request.block_hashes
        digests = running.text.upto(min(len(hashes) * BLOCK, len(running.text.tokens)))
        for nth in range(len(hashes) - 1, -1, -1):
            if hashes[nth] in self._hashed:
                break
            self._hashed[hashes[nth]] = digests[nth * BLOCK : nth * BLOCK + BLOCK]

    def _at_rest(self) -> None:
        """Nothing runs any more: nothing is held, and no request is remembered."""
        require(self._pool.get_num_free_blocks() == self._blocks - 1, "blocks are not given back")
        # A waiting request that was preempted may be remembered.
        names = {r.request_id for r in self._waiting}
        for name, value in vars(self._manager).items():
            if isinstance(value, dict | set) and value is not self._exempt:
                kept = [k for k in value if isinstance(k, str) and k not in names]
                require(not kept, f"the manager's {name} keeps {kept[:3]}")
