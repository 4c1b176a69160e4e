"""The prefix_cache kind in the scheduler process: a policy's order for vLLM's free blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kvplug.containment import PolicyFailure
from kvplug.contract import BlockFact, Kind, PolicyReport, PrefixCachePolicy, RequestView
from kvplug.hosts.vllm import compat, engine
from kvplug.hosts.vllm.messages import StepDirectives
from kvplug.hosts.vllm.scheduler.blocks import BlockTracker, computed_keys, request_view
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.scheduler.queue import HitCollector, PolicyQueue
from kvplug.observe.catalogue import (
    EVICTED_BLOCKS,
    EVICTED_BYTES,
    HIT_BLOCKS,
    REORDERED_BLOCKS,
)
from kvplug.observe.events import EventType
from kvplug.observe.metric import Sample
from kvplug.request_options import RequestOptions

TRACKED = frozenset({BlockFact.POSITION, BlockFact.REQUEST, BlockFact.PARENT})
"""Facts that a `BlockTracker` knows."""


class PrefixCacheScheduler(KindScheduler):
    """Puts a policy into the block pool's free queue, and tells it what it asks for.

    Attributes:
        policy: The policy.
        needs: Facts it asked for when it was built.
        queue: The pool's free queue; None before `bind`.
    """

    kind = Kind.PREFIX_CACHE

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        choice = context.deployment.choice(Kind.PREFIX_CACHE)
        assert choice is not None
        policy = engine.at_start(context.deployment, choice, choice.build, context.engine)
        assert isinstance(policy, PrefixCachePolicy)
        self.policy = policy
        self.needs: frozenset[BlockFact] = engine.at_start(
            context.deployment, choice, _needs, policy
        )
        self.queue: PolicyQueue | None = None
        self._tracker: BlockTracker | None = None
        self._hash_size = 0
        self._views: dict[str, RequestView] = {}
        self._evicted = 0

    def bind(self, manager: Any) -> None:
        """Replace the pool's free queue."""
        pool = manager.block_pool
        if self.needs & TRACKED:
            self._tracker = BlockTracker(pool.num_gpu_blocks)
        self._hash_size = pool.hash_block_size
        self.queue = PolicyQueue(
            pool.free_block_queue, self.policy, self._tracker, self._on_failure, self.needs
        )
        compat.install_queue(pool, self.queue, HitCollector(self.queue, pool.metrics_collector))

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Remember the request where the policy asks about requests."""
        if self._tracker is None and BlockFact.FINISHED not in self.needs:
            return
        view = request_view(request, options)
        self._views[request.request_id] = view
        if self._tracker is not None:
            self._tracker.add(view)

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Follow which blocks requests were given."""
        if self._tracker is not None:
            self._tracker.update(step.output)
        self._count_evictions()

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """Pass the end on to a policy that asks for it."""
        view = self._views.pop(request.request_id, None)
        if view is None or self.queue is None or BlockFact.FINISHED not in self.needs:
            return
        keys = computed_keys(request, self._hash_size, self.context.engine.block_size)
        self.queue.finished(view, keys, request.num_output_tokens)

    def reports(self) -> list[PolicyReport]:
        """The policy's report; evictions and ended requests count as decisions."""
        report = PolicyReport(str(self.kind), type(self.policy).name, exact=True)
        if self.queue is not None:
            report.exact = self.queue.contained.exact
            counters = asdict(self.queue.counters)
            report.errors = int(counters.pop("errors"))
            report.acted = self.queue.counters.evicted + self.queue.finishes
            # A retired policy is not asked any more.
            report.retired = self.queue.policy is None
            report.own = {} if report.retired else self.queue.contained.counters()
            report.counters = counters | report.own
        return [report]

    def samples(self) -> Iterator[Sample]:
        """What was evicted and matched."""
        if self.queue is None:
            return
        counters, policy = self.queue.counters, self.queue.contained.policy_name
        yield EVICTED_BLOCKS.of(counters.evicted, policy)
        yield EVICTED_BYTES.of(counters.evicted * self.context.block_bytes, policy)
        yield REORDERED_BLOCKS.of(counters.reordered, policy)
        yield HIT_BLOCKS.of(counters.hits, policy)

    def stop(self) -> None:
        """Let the policy finish its work."""
        if self.queue is not None:
            self.queue.stop()
            self._count_evictions()

    def _count_evictions(self) -> None:
        if self.queue is None:
            return
        new = self.queue.counters.evicted - self._evicted
        if new:
            self._evicted += new
        observer = self.context.misses
        if new and (observer is None or observer.misses is None):
            self.context.events.add(EventType.EVICTED, self.kind, new)

    def _on_failure(self, failure: PolicyFailure) -> None:
        if self.context.misses is not None:
            self.context.misses.retired()
        self._fall_back(failure.cause)


def _needs(policy: PrefixCachePolicy) -> frozenset[BlockFact]:
    return frozenset(BlockFact(fact) for fact in policy.needs)
