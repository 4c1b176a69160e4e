"""The sequence kind in the scheduler process: running requests that give blocks back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug.containment import ContainedPolicy
from kvplug.contract import Kind, PolicyReport, ScoringPolicy
from kvplug.hosts.sizes import default_prefill_limit
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.messages import SequenceDirectives, StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.block_pool import held_blocks
from kvplug.hosts.vllm.scheduler.evictions import EvictionPlanner
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.spec import PrunedManager, ShorteningManager
from kvplug.observe.catalogue import (
    COMPRESSION,
    FREED_BLOCKS,
    FREED_BYTES,
    RECALL_SECONDS,
    RECALLED_TOKENS,
    SAVED_READS,
    SCORED_EVICTIONS,
    SEQUENCE_REQUESTS,
    SEQUENCE_ROWS,
)
from kvplug.observe.events import EventType
from kvplug.observe.metric import Sample
from kvplug.request_options import RequestOptions

logger = init_logger("vllm.kvplug")


@dataclass
class SequenceCounters:
    """Counters of a sequence policy.

    Attributes:
        freed: Blocks given back by running requests.
        freed_bytes: The same in bytes of KV, all layers.
        requests: Requests that gave back at least one block.
        rows: Attention rows compacted on a worker.
        split_rows: Rows added by splitting prefill chunks.
        exempt: Requests that asked to keep every token and do.
        exempt_refused: Requests that asked and could not.
    """

    freed: int = 0
    freed_bytes: int = 0
    requests: int = 0
    rows: int = 0
    split_rows: int = 0
    exempt: int = 0
    exempt_refused: int = 0


@dataclass
class EvictionCounters:
    """Further counters of a scoring policy.

    Attributes:
        evictions: Evictions by score, once per request, eviction and KV-cache group.
        fallbacks: Decisions of a layer made by position because the policy had failed.
        recalled_tokens: Evicted tokens recalled from host memory, per layer and KV head.
        recall_us: Microseconds spent on decisions with evicted tokens kept in host memory.
    """

    evictions: int = 0
    fallbacks: int = 0
    recalled_tokens: int = 0
    recall_us: int = 0


class SequenceScheduler(KindScheduler):
    """Follows blocks that requests give back, exempts requests, and plans evictions by score.

    Attributes:
        policy: The sequence policy.
        managers: KV-cache managers of the groups it applies to.
        planner: Plans evictions; None for a policy that decides by position.
        counters: Counters of any sequence policy.
        eviction_counters: Counters of a scoring policy.
    """

    kind = Kind.SEQUENCE

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        policy = engine.sequence_policy(context.deployment, context.vllm_config)
        assert policy is not None
        self.policy = policy
        self.contained = ContainedPolicy(policy, log=logger)
        self.managers: list[ShorteningManager] = []
        self.planner: EvictionPlanner | None = None
        self.counters = SequenceCounters()
        self.eviction_counters = EvictionCounters()
        self._freed: dict[str, int] = {}
        self._pool: Any = None
        # Blocks that requests under way hold no more, and bytes that were not read for that.
        self._held_no_more: dict[str, int] = {}
        self._missing = 0
        self._unread = 0
        self._exempt: set[str] = set()
        self._refused: dict[str, str] = {}

    def bind(self, manager: Any) -> None:
        """Bind to the managers of shortened groups."""
        self._pool = manager.block_pool
        self.managers = [
            m for m in manager.coordinator.single_type_managers if isinstance(m, ShorteningManager)
        ]
        for shortening in self.managers:
            shortening.exempt = self._exempt
            shortening.on_freed = self._on_freed
        pruned = [m for m in self.managers if isinstance(m, PrunedManager)]
        if pruned and isinstance(self.policy, ScoringPolicy):
            choice = self.context.deployment.choice(Kind.SEQUENCE)
            assert choice is not None
            shares = engine.at_start(
                self.context.deployment, choice, engine.share_groups, self.policy
            )
            limit = default_prefill_limit(self.context.engine.num_blocks, len(pruned))
            for one in pruned:
                one.limit_prefill(limit)
            groups = [shares.index(m.limits.share) for m in pruned]
            self.planner = EvictionPlanner(self.contained, pruned, groups, self.context.slots)

    def started(self) -> list[str]:
        """Most blocks of a request, per group."""
        return [
            f"group {m.kv_cache_group_id}: a request holds at most "
            f"{m.max_admission_blocks_per_request} blocks of {m.block_size} tokens; the first "
            f"{m.kv_cache_spec.exact_tokens} tokens are exact"
            for m in self.managers
        ]

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Exempt the request if it asks for that and fits; plan its evictions otherwise."""
        if options.sequence == "off":
            cause = self._cannot_exempt(request)
            if cause is None:
                self._exempt.add(request.request_id)
                self.counters.exempt += 1
                return
            self._refused[request.request_id] = cause
            self.counters.exempt_refused += 1
            self.context.events.add(EventType.REFUSED, self.kind, detail=cause)
        if self.planner is None:
            return
        if request.resumable and self.context.vllm_config.use_v2_model_runner:
            # Its input goes on in another place of the runner, where no query of it is remembered.
            self._exempt.add(request.request_id)
            self.counters.exempt += 1
            return
        self.planner.add(request.request_id, request.num_prompt_tokens)

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Send the plans of a scoring policy, or which requests are exempt from a window."""
        for request_id in step.output.preempted_req_ids or ():
            self._missing -= self._held_no_more.pop(request_id, 0)
        self._unread += self._missing * self.context.block_bytes
        if self.planner is not None:
            self._plan(self.planner, step, into)
        elif self._exempt:
            exempt = {name: step.slots[name] for name in self._exempt & step.starts.keys()}
            if exempt:
                slots = np.array([*exempt.values()], dtype=np.int32)
                into.sequence = SequenceDirectives(exempt=slots)
                # The second runner builds without them, and again once it knows their rows.
                into.names |= exempt
                into.before_forward |= bool(self.context.vllm_config.use_v2_model_runner)

    def _plan(self, planner: EvictionPlanner, step: SchedulerStep, into: StepDirectives) -> None:
        phased = False
        if self.context.vllm_config.use_v2_model_runner:
            plans, phased = planner.due(step)
            into.before_forward |= phased
            if plans:
                named = {slot for _, slot in plans}
                into.names |= {r: slot for r, slot in step.slots.items() if slot in named}
        else:
            plans = planner.step(step)
        if plans:
            into.sequence = SequenceDirectives(phased=phased)
            into.sequence.set_plans(plans)

    def on_report(self, report: StepReport) -> None:
        """Count what workers did, and take in measurements."""
        part = report.sequence
        if part is None:
            return
        self.counters.rows += part.rows
        self.counters.split_rows += part.split_rows
        counters = self.eviction_counters
        counters.evictions += part.evictions
        counters.fallbacks += part.fallbacks
        counters.recalled_tokens += part.recalled_tokens
        counters.recall_us += part.recall_us
        if part.measured is not None and self.planner is not None:
            self.planner.take(part.measured)
        if part.failed is not None:
            self._fall_back(part.failed)

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """State what the request gave back and lost, if anything, or if it asked to keep all."""
        request_id = request.request_id
        freed = self._freed.pop(request_id, 0)
        self._missing -= self._held_no_more.pop(request_id, 0)
        cause = self._refused.pop(request_id, None)
        asked = request_id in self._exempt or cause is not None
        self._exempt.discard(request_id)
        sizes = self.planner.finish(request_id) if self.planner is not None else []
        # Evicted blocks are freed once computed and acknowledged: maybe after the last step.
        evicted = any(at < request.num_computed_tokens for at, _ in sizes)
        if not freed and not evicted and not asked:
            return
        answer.exact &= not freed and not evicted
        answer.fields["blocks_freed"] = freed
        if sizes:
            answer.fields["evictions"] = [list(size) for size in sizes]
        if cause is not None:
            answer.refused["sequence"] = cause

    def reports(self) -> list[PolicyReport]:
        """The policy's report; blocks given back count as decisions."""
        planner = self.planner
        scored = asdict(self.eviction_counters) if planner is not None else {}
        resize_failed = planner is not None and planner.resize_error is not None
        errors = int(self._failed is not None) + int(resize_failed)
        own = self.contained.counters()
        return [
            PolicyReport(
                str(self.kind),
                self.contained.policy_name,
                self.contained.exact,
                acted=self.counters.freed,
                errors=errors,
                counters=asdict(self.counters) | scored | own,
                own=own,
                retired=errors > 0,
            )
        ]

    def samples(self) -> Iterator[Sample]:
        """What was given back, and by whom; what is not read and not held because of that."""
        policy, kind = self.contained.policy_name, str(self.kind)
        counters, scored = self.counters, self.eviction_counters
        yield FREED_BLOCKS.of(counters.freed, policy)
        yield FREED_BYTES.of(counters.freed_bytes, policy)
        yield SEQUENCE_REQUESTS.of(counters.requests, policy, "shortened")
        yield SEQUENCE_REQUESTS.of(counters.exempt, policy, "exempt")
        yield SEQUENCE_REQUESTS.of(counters.exempt_refused, policy, "exempt_refused")
        yield SEQUENCE_ROWS.of(counters.rows, policy, "compacted")
        yield SEQUENCE_ROWS.of(counters.split_rows, policy, "split")
        yield SCORED_EVICTIONS.of(scored.evictions, policy, "score")
        yield SCORED_EVICTIONS.of(scored.fallbacks, policy, "position")
        yield RECALLED_TOKENS.of(scored.recalled_tokens, policy)
        yield RECALL_SECONDS.of(scored.recall_us / 1e6, policy)
        yield SAVED_READS.of(self._unread, kind, policy)
        held = held_blocks(self._pool)
        yield COMPRESSION.of((held + self._missing) / held if held else 1.0, kind, policy)

    def _cannot_exempt(self, request: Any) -> str | None:
        view = self.context.engine
        limit = min(request.num_prompt_tokens + request.max_tokens, view.max_model_len)
        need = sum(-(-limit // m.block_size) for m in self.managers)
        if need > view.num_blocks:
            return f"the request may need {need} blocks, but the pool has {view.num_blocks}"
        return None

    def _on_freed(self, group: int, request_id: str, count: int) -> None:
        counters = self.counters
        if request_id not in self._freed:
            counters.requests += 1
            self._freed[request_id] = 0
        self._freed[request_id] += count
        self._held_no_more[request_id] = self._held_no_more.get(request_id, 0) + count
        self._missing += count
        counters.freed += count
        counters.freed_bytes += count * self.context.block_bytes
        self.context.events.add(EventType.FREED, self.kind, count)
        if self.context.spans is not None:
            self.context.spans.freed(request_id, count)
