"""The scheduler half: policies bound to vLLM's KV-cache manager, and what they did."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger

from kvplug.contract import (
    BlockFact,
    EngineView,
    Kind,
    Policy,
    PolicyReport,
    PrefixCachePolicy,
)
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm import compat, engine
from kvplug.hosts.vllm.blocks import BlockTracker
from kvplug.hosts.vllm.queue import HitCollector, PolicyQueue
from kvplug.hosts.vllm.spec import WindowedManager, WindowedSpec
from kvplug.observe.events import Event, EventType
from kvplug.observe.summary import summary_lines
from kvplug.registry import plugins

logger = init_logger("vllm.kvplug")


@dataclass
class SequenceCounters:
    """What the sequence policy did.

    Attributes:
        freed: Blocks given back by running requests.
        freed_bytes: The same in bytes of KV, all layers.
        requests: Requests that gave back at least one block.
        rows: Attention rows compacted on a worker.
        split_rows: Rows added by splitting prefill chunks.
        exempt: Requests that asked to keep everything and do.
        exempt_refused: Requests that asked and could not.
    """

    freed: int = 0
    freed_bytes: int = 0
    requests: int = 0
    rows: int = 0
    split_rows: int = 0
    exempt: int = 0
    exempt_refused: int = 0


class SchedulerHalf:
    """Owns the policy objects that run in the scheduler.

    Args:
        deployment: A deployment that was checked against the engine.
        vllm_config: The engine's config.
        kv_cache_config: Its KV-cache groups and pool.

    Raises:
        DeploymentError: The model's layers do not fit the deployment's policies.
    """

    def __init__(self, deployment: Deployment, vllm_config: Any, kv_cache_config: Any):
        self.deployment = deployment
        self.vllm_config = vllm_config
        self.engine: EngineView = engine.engine_view(
            vllm_config, num_blocks=kv_cache_config.num_blocks - 1
        )
        self.steps = 0
        self.sequence = SequenceCounters()
        self.queue: PolicyQueue | None = None
        self.managers: list[WindowedManager] = []
        self._tracker: BlockTracker | None = None
        self._shortened: dict[str, int] = {}
        self._exempt: set[str] = set()
        self._refused: dict[str, str] = {}
        self._reported: dict[str, float] = {}
        self._news_mark: object = None
        self._events: list[Event] = []
        self._evicted_told = 0
        self._stopped = False
        self._observers = plugins().callers("kvplug_event")
        sizes = {t.size for t in kv_cache_config.kv_cache_tensors}
        self.block_bytes = max(sizes, default=0) // kv_cache_config.num_blocks
        self.sequence_policy = engine.sequence_policy(deployment, vllm_config)
        self._speechless: set[str] = set()
        self._check_groups(kv_cache_config)

    def _check_groups(self, kv_cache_config: Any) -> None:
        from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

        choice = self.deployment.choice(Kind.SEQUENCE)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        policy = self.sequence_policy
        asked = {policy.window(layer) for layer in self.engine.layers} if policy else set()
        # vLLM caches the choice of attention backend per process, whatever the section says.
        if {s.window for s in specs if isinstance(s, WindowedSpec)} - asked:
            raise DeploymentError(
                self.deployment.source,
                [
                    Refusal(
                        choice.key if choice is not None else "kvplug.sequence",
                        "an engine with another sequence section ran in this process before, and "
                        "vLLM still uses its windows.",
                        "start each engine in a process of its own.",
                    )
                ],
            )
        if choice is None:
            return
        mixed = any(isinstance(s, UniformTypeKVCacheSpecs) for s in specs)
        if mixed or not any(isinstance(s, WindowedSpec) for s in specs):
            names = ", ".join(sorted({type(s).__name__ for s in specs})) or "none"
            raise DeploymentError(
                self.deployment.source,
                [
                    Refusal(
                        choice.key,
                        f"{choice.policy.name} cannot run on this model: its KV-cache groups are "
                        f"{names}, and only full-attention layers on CPU_ATTN, FLASH_ATTN or "
                        "TRITON_ATTN, in groups of their own, can give blocks back.",
                        "remove the sequence section, or set --attention-backend and leave "
                        "--disable-hybrid-kv-cache-manager out.",
                    )
                ],
            )

    # -- start ---------------------------------------------------------------------------------

    def bind(self, manager: Any) -> None:
        """Bind policies to a KV-cache manager, before its first allocation."""
        self.managers = [
            m for m in manager.coordinator.single_type_managers if isinstance(m, WindowedManager)
        ]
        for windowed in self.managers:
            windowed.exempt = self._exempt
            windowed.on_freed = self._on_freed
        choice = self.deployment.choice(Kind.PREFIX_CACHE)
        if choice is not None:
            policy = choice.build(self.engine)
            assert isinstance(policy, PrefixCachePolicy)
            pool = manager.block_pool
            if policy.needs & {BlockFact.POSITION, BlockFact.REQUEST}:
                self._tracker = BlockTracker(pool.num_gpu_blocks)
            self.queue = PolicyQueue(
                pool.free_block_queue, policy, self._tracker, self._on_prefix_failure
            )
            compat.install_queue(pool, self.queue, HitCollector(self.queue, pool.metrics_collector))
        for line in self._started():
            logger.info("%s", line)
        hook = "kvplug_engine_started"
        self._tell(plugins().callers(hook), hook, engine=self.engine)

    def _started(self) -> list[str]:
        chosen = [
            f"{c.policy.kind}: {c.policy.name} {c.options.model_dump()}"
            for c in self.deployment.all()
        ]
        lines = [f"kvplug is on: {'; '.join(chosen) or 'no policy'}"]
        for m in self.managers:
            spec = m.kv_cache_spec
            lines.append(
                f"kvplug: group {m.kv_cache_group_id}: a request holds at most {spec.cap_blocks} "
                f"blocks of {m.block_size} tokens; the first {spec.exact_tokens} tokens are exact"
            )
        return lines

    # -- steps ---------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Take in a request and what it asks of kvplug."""
        if self._tracker is not None:
            self._tracker.add(request)
        if not self.managers:
            return
        wishes = (request.kv_transfer_params or {}).get("kvplug")
        if not isinstance(wishes, dict) or wishes.get("sequence") not in ("off", False):
            return
        if cause := self._cannot_exempt(request):
            self._refused[request.request_id] = cause
            self.sequence.exempt_refused += 1
            self._event(EventType.REFUSED, Kind.SEQUENCE, detail=cause)
        else:
            self._exempt.add(request.request_id)
            self.sequence.exempt += 1

    def _cannot_exempt(self, request: Any) -> str | None:
        if self.vllm_config.use_v2_model_runner:
            return "this engine's model runner learns of it one step late"
        limit = min(request.num_prompt_tokens + request.max_tokens, self.engine.max_model_len)
        need = sum(-(-limit // m.block_size) for m in self.managers)
        if need > self.engine.num_blocks:
            return f"it may need {need} blocks and the pool has {self.engine.num_blocks}"
        return None

    def step(self, output: Any) -> npt.NDArray[np.int32] | None:
        """Close a scheduler step; returns the blocks exempt requests write, or None."""
        if self._tracker is not None:
            self._tracker.update(output)
        if self._observers:
            self._emit()
        self.steps += 1
        if not self._exempt:
            return None
        tails: list[int] = []
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        for request_id in self._exempt & starts.keys():
            start = starts[request_id]
            end = start + output.num_scheduled_tokens[request_id]
            for m in self.managers:
                blocks = m.req_to_blocks[request_id]
                span = range(start // m.block_size, (end - 1) // m.block_size + 1)
                tails += [blocks[i].block_id for i in span if i < len(blocks)]
        return np.array(tails, dtype=np.int32) if tails else None

    def on_worker_report(self, rows: int, split_rows: int) -> None:
        """A worker's acknowledgement of a step."""
        self.sequence.rows += rows
        self.sequence.split_rows += split_rows

    def on_finished(self, request: Any) -> dict[str, Any] | None:
        """A request ended; returns what its output says about it, or None."""
        request_id = request.request_id
        freed = self._shortened.pop(request_id, 0)
        cause = self._refused.pop(request_id, None)
        asked = request_id in self._exempt or cause is not None
        self._exempt.discard(request_id)
        if not freed and not asked:
            return None
        said: dict[str, Any] = {"exact": not freed, "blocks_freed": freed}
        if cause is not None:
            said["refused"] = cause
        return {"kvplug": said}

    def _on_freed(self, group: int, request_id: str, count: int) -> None:
        counters = self.sequence
        if request_id not in self._shortened:
            counters.requests += 1
            self._shortened[request_id] = 0
        self._shortened[request_id] += count
        counters.freed += count
        counters.freed_bytes += count * self.block_bytes
        self._event(EventType.FREED, Kind.SEQUENCE, count)

    def _on_prefix_failure(self, error: BaseException) -> None:
        detail = f"{type(error).__name__}: {error}"
        self._event(EventType.FALLEN_BACK, Kind.PREFIX_CACHE, detail=detail)

    def _event(self, what: EventType, kind: Kind, count: int = 1, detail: str = "") -> None:
        if self._observers:
            choice = self.deployment.choice(kind)
            name = choice.policy.name if choice is not None else ""
            self._events.append(Event(what, kind, name, self.steps + 1, count, detail))

    def _emit(self) -> None:
        if self.queue is not None and (new := self.queue.counters.evicted - self._evicted_told):
            self._evicted_told += new
            self._event(EventType.EVICTED, Kind.PREFIX_CACHE, new)
        events, self._events = self._events, []
        for event in events:
            for name in self._tell(self._observers, "kvplug_event", event=event):
                del self._observers[name]
                logger.error("kvplug plugin %r hears of no events from now on", name)

    def _tell(self, callers: dict[str, Any], hook: str, **what: Any) -> list[str]:
        """Call a hook of each plugin; returns the plugins that failed."""
        failed = []
        for name, caller in callers.items():
            try:
                caller(**what)
            except Exception:
                logger.exception("kvplug plugin %r failed in %s; the engine goes on", name, hook)
                failed.append(name)
        return failed

    # -- telling -------------------------------------------------------------------------------

    def reports(self) -> list[PolicyReport]:
        """What each active policy did so far."""
        found = []
        for choice in self.deployment.all():
            policy = choice.policy
            report = PolicyReport(str(policy.kind), policy.name, policy.exact)
            if policy.kind is Kind.PREFIX_CACHE and self.queue is not None:
                counters = asdict(self.queue.counters)
                report.errors = int(counters.pop("errors"))
                report.acted = self.queue.counters.evicted
                report.counters = counters | self._own_counters(self.queue.policy)
            elif policy.kind is Kind.SEQUENCE:
                report.acted = self.sequence.freed
                report.counters = asdict(self.sequence) | self._own_counters(self.sequence_policy)
            found.append(report)
        return found

    def _own_counters(self, policy: Policy | None) -> dict[str, float]:
        """What a policy counted itself; one that cannot say is not asked again."""
        if policy is None or policy.name in self._speechless:
            return {}
        try:
            return {str(name): float(value) for name, value in policy.counters().items()}
        except Exception:
            self._speechless.add(policy.name)
            logger.exception("policy %r failed in counters(); they are left out", policy.name)
            return {}

    def news(self) -> dict[str, float]:
        """Counter increments since the last call, by ``kind:policy:counter``.

        Called every step, so it looks closer only once something was evicted, hit or freed.
        """
        queue = self.queue.counters if self.queue is not None else None
        mark = (
            self.sequence.freed,
            self.sequence.exempt_refused,
            (queue.evicted, queue.hits, queue.errors) if queue is not None else None,
        )
        if mark == self._news_mark:
            return {}
        self._news_mark = mark
        found: dict[str, float] = {}
        for report in self.reports():
            for name, value in {**report.counters, "errors": report.errors}.items():
                key = f"{report.kind}:{report.name}:{name}"
                before = self._reported.get(key, 0)
                if value != before:
                    found[key] = value - before
                    self._reported[key] = value
        return found

    def stop(self) -> None:
        """Say what every policy did. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._observers:
            self._emit()
        reports = self.reports()
        for line in summary_lines(reports, self.steps):
            logger.info("%s", line)
        hook = "kvplug_engine_stopping"
        self._tell(plugins().callers(hook), hook, reports=reports)
