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
    FormatPolicy,
    Kind,
    Policy,
    PolicyReport,
    PrefixCachePolicy,
    ScoringPolicy,
)
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts.vllm import compat, engine, view
from kvplug.hosts.vllm.messages import ReuseNews, ReuseOrders, WorkerCounters, pack_plans
from kvplug.hosts.vllm.scheduler.blocks import BlockTracker, computed_keys, request_view
from kvplug.hosts.vllm.scheduler.lanes import LaneScheduler
from kvplug.hosts.vllm.scheduler.prefix_cache import HitCollector, PolicyQueue
from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
from kvplug.hosts.vllm.scheduler.sequence import CutScheduler
from kvplug.hosts.vllm.spec import (
    PrunedManager,
    ShorteningManager,
    ShorteningSpec,
)
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


@dataclass
class CutCounters:
    """What a scoring policy did beyond that.

    Attributes:
        cuts: Requests cut by score, each time counted, once per KV-cache group.
        fallbacks: Decisions of a layer made by position because the policy had failed.
        fetched_tokens: Dropped tokens that came back from host memory, per layer and KV head.
        on_demand_us: Microseconds spent on decisions with dropped tokens kept in host memory.
    """

    cuts: int = 0
    fallbacks: int = 0
    fetched_tokens: int = 0
    on_demand_us: int = 0


@dataclass
class FormatCounters:
    """What the format did.

    Attributes:
        tokens: Tokens written, once per layer.
        bytes_per_token: Bytes of one token in all layers.
        stock_bytes_per_token: The same in the model's own dtype.
        errors: Times the policy failed to write, attend or read.
    """

    tokens: int = 0
    bytes_per_token: int = 0
    stock_bytes_per_token: int = 0
    errors: int = 0


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
        self.engine: EngineView = view.engine_view(
            vllm_config, num_blocks=kv_cache_config.num_blocks - 1
        )
        self.steps = 0
        self.sequence = SequenceCounters()
        self.scored = CutCounters()
        self.queue: PolicyQueue | None = None
        self.managers: list[ShorteningManager] = []
        self.cuts: CutScheduler | None = None
        self.lanes: LaneScheduler | None = None
        self.format_policy = engine.format_policy(deployment, vllm_config)
        self.format = FormatCounters()
        self._format_failed: str | None = None
        self._format_counters: dict[str, float] = {}
        self._format_identities: list[str] = []
        self._said_formats: dict[str, str] = {}
        if self.format_policy is not None:
            self._set_format(self.format_policy)
        self.reuse: ReuseScheduler | None = None
        if deployment.choice(Kind.REUSE) is not None:
            self.reuse = ReuseScheduler(deployment, vllm_config, self.engine, self._on_reuse)
        self._reuse_failed: str | None = None
        self._sequence_failed: str | None = None
        self._tracker: BlockTracker | None = None
        self._finished_hash_size = 0
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
        specs = [
            layer
            for group in kv_cache_config.kv_cache_groups
            for layer in (
                group.kv_cache_spec.kv_cache_specs.values()
                if isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)
                else (group.kv_cache_spec,)
            )
        ]
        policy = self.sequence_policy
        asked = engine.layer_rules(policy)
        # vLLM caches the choice of attention backend per process, whatever the section says.
        found = {engine.rule_of(s) for s in specs if isinstance(s, ShorteningSpec)}
        if found - asked:
            raise DeploymentError(
                self.deployment.source,
                [
                    Refusal(
                        choice.key if choice is not None else "kvplug.sequence",
                        "an engine with another sequence section ran in this process before, and "
                        "vLLM still uses its budgets.",
                        "start each engine in a process of its own.",
                    )
                ],
            )
        if choice is None:
            return
        if not any(isinstance(s, ShorteningSpec) for s in specs):
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

    def _set_format(self, policy: FormatPolicy) -> None:
        self._format_identities = list(policy.assignments())
        for layer in self.engine.layers:
            self.format.bytes_per_token += policy.layout(layer).token_bytes(layer)
            element = 4 if layer.dtype == "float32" else 2
            self.format.stock_bytes_per_token += 2 * layer.num_kv_heads * layer.head_size * element

    # -- start ---------------------------------------------------------------------------------

    def bind(self, manager: Any) -> None:
        """Bind policies to a KV-cache manager, before its first allocation."""
        self.managers = [
            m for m in manager.coordinator.single_type_managers if isinstance(m, ShorteningManager)
        ]
        for shortening in self.managers:
            shortening.exempt = self._exempt
            shortening.on_freed = self._on_freed
        pruned = [m for m in self.managers if isinstance(m, PrunedManager)]
        if pruned and isinstance(self.sequence_policy, ScoringPolicy):
            shares = engine.share_groups(self.sequence_policy)
            for one in pruned:
                one.hold_at_most(self.engine.num_blocks // (2 * len(pruned)))
            groups = [shares.index(m.limits.share) for m in pruned]
            self.cuts = CutScheduler(self.sequence_policy, pruned, groups)
        stored = self.format_policy
        if stored is not None and (
            len(self._format_identities) > 1
            or any(stored.recent(layer) for layer in self.engine.layers)
        ):
            self.lanes = LaneScheduler(list(manager.coordinator.single_type_managers))
        if self.reuse is not None:
            self.reuse.bind(manager.coordinator.single_type_managers)
        choice = self.deployment.choice(Kind.PREFIX_CACHE)
        if choice is not None:
            policy = choice.build(self.engine)
            assert isinstance(policy, PrefixCachePolicy)
            pool = manager.block_pool
            if policy.needs & {BlockFact.POSITION, BlockFact.REQUEST, BlockFact.PARENT}:
                self._tracker = BlockTracker(pool.num_gpu_blocks)
            if BlockFact.FINISHED in policy.needs:
                self._finished_hash_size = pool.hash_block_size
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
            cap = m.max_admission_blocks_per_request
            lines.append(
                f"kvplug: group {m.kv_cache_group_id}: a request holds at most {cap} "
                f"blocks of {m.block_size} tokens; the first {spec.exact_tokens} tokens are exact"
            )
        if self.format_policy is not None:
            own, stock = self.format.bytes_per_token, self.format.stock_bytes_per_token
            lines.append(
                f"kvplug: a token takes {own:,} bytes of KV in all layers instead of {stock:,} "
                f"({stock / own:.2f}x)"
            )
        return lines

    # -- steps ---------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Take in a request and what it asks of kvplug."""
        if self.reuse is not None:
            self._guarded(None, self.reuse.on_new_request, request)
        if self.format_policy is not None:
            assigned = self._assign(self.format_policy)
            identity = self._format_identities[assigned]
            compat.salt_request(request, f"kvplug-format:{identity}")
            self._said_formats[request.request_id] = identity
            if self.lanes is not None:
                self.lanes.add(request.request_id, assigned)
        if self._tracker is not None:
            self._tracker.add(request)
        if not self.managers:
            return
        wishes = (request.kv_transfer_params or {}).get("kvplug")
        if not isinstance(wishes, dict) or wishes.get("sequence") not in ("off", False):
            self._cut(request)
            return
        if cause := self._cannot_exempt(request):
            self._refused[request.request_id] = cause
            self.sequence.exempt_refused += 1
            self._event(EventType.REFUSED, Kind.SEQUENCE, detail=cause)
            self._cut(request)
        else:
            self._exempt.add(request.request_id)
            self.sequence.exempt += 1

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that are stored; None to be asked again."""
        if self.reuse is None:
            return 0
        found: int | None = self._guarded(0, self.reuse.matched, request, num_local)
        return found

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """A request was given its blocks."""
        if self.reuse is not None:
            # What was promised has to be ordered: nothing is caught here.
            self.reuse.allocated(request, blocks, num_external)

    def _guarded(self, instead: Any, call: Any, *arguments: Any) -> Any:
        """Call reuse; where it fails, the engine goes on without."""
        assert self.reuse is not None
        try:
            return call(*arguments)
        except Exception as error:
            self.reuse.counters.errors += 1
            if self._reuse_failed is None:
                self._reuse_failed = f"{call.__name__}: {type(error).__name__}: {error}"
                logger.error("reuse failed in %s", self._reuse_failed, exc_info=error)
                self._event(EventType.FALLEN_BACK, Kind.REUSE, detail=self._reuse_failed)
            return instead

    def on_reuse_news(self, news: ReuseNews) -> None:
        """What reuse did on the workers."""
        if self.reuse is None:
            return
        if news.error and self._reuse_failed is None:
            self._reuse_failed = news.error
            self._event(EventType.FALLEN_BACK, Kind.REUSE, detail=news.error)
        self._guarded(None, self.reuse.report, news)

    def _on_reuse(self, what: str, count: int, detail: str) -> None:
        self._event(EventType(what), Kind.REUSE, count, detail)

    def _cut(self, request: Any) -> None:
        if self.cuts is not None:
            self.cuts.add(request.request_id, request.num_prompt_tokens)

    def _cannot_exempt(self, request: Any) -> str | None:
        if self.vllm_config.use_v2_model_runner:
            return "this engine's model runner learns of it one step late"
        limit = min(request.num_prompt_tokens + request.max_tokens, self.engine.max_model_len)
        need = sum(-(-limit // m.block_size) for m in self.managers)
        if need > self.engine.num_blocks:
            return f"it may need {need} blocks and the pool has {self.engine.num_blocks}"
        return None

    def step(
        self, output: Any
    ) -> tuple[
        npt.NDArray[np.int32] | None,
        tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]] | None,
        npt.NDArray[np.int32] | None,
        ReuseOrders | None,
    ]:
        """Close a scheduler step.

        Returns:
            The blocks exempt requests write, the plans of rows that may be cut, as `pack_plans`
            packs them, the lanes of requests, and what reuse is to do; None for any there is none
            of.
        """
        if self._tracker is not None:
            self._tracker.update(output)
        if self._observers:
            self._emit()
        self.steps += 1
        if not self._exempt and not (self.cuts or self.lanes or self.reuse):
            return None, None, None, None
        cached = output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        scheduled = output.num_scheduled_tokens
        lanes = self.lanes.step(starts, scheduled) if self.lanes is not None else None
        reuse = self.reuse.step(starts, scheduled) if self.reuse is not None else None
        plans = self.cuts.step(starts, scheduled) if self.cuts else {}
        packed = pack_plans(plans) if plans else None
        if not self._exempt or self.cuts is not None:
            return None, packed, lanes, reuse
        tails: list[int] = []
        for request_id in self._exempt & starts.keys():
            start = starts[request_id]
            end = start + scheduled[request_id]
            for m in self.managers:
                blocks = m.req_to_blocks[request_id]
                span = range(start // m.block_size, (end - 1) // m.block_size + 1)
                tails += [blocks[i].block_id for i in span if i < len(blocks)]
        return (np.array(tails, dtype=np.int32) if tails else None), packed, lanes, reuse

    def on_worker_report(
        self,
        counters: WorkerCounters,
        measured: npt.NDArray[np.float64] | None = None,
        failed: str | None = None,
    ) -> None:
        """What the workers did in a step."""
        sequence = self.sequence
        sequence.rows += counters.rows
        sequence.split_rows += counters.split_rows
        scored = self.scored
        scored.cuts += counters.cuts
        scored.fallbacks += counters.fallbacks
        scored.fetched_tokens += counters.fetched_tokens
        scored.on_demand_us += counters.on_demand_us
        self.format.tokens += counters.format_tokens
        self.format.errors += counters.format_errors
        if measured is not None and self.cuts is not None:
            self.cuts.take(measured)
        if failed is not None and self._sequence_failed is None:
            self._sequence_failed = failed
            self._event(EventType.FALLEN_BACK, Kind.SEQUENCE, detail=failed)

    def _assign(self, policy: FormatPolicy) -> int:
        if len(self._format_identities) == 1:
            return 0
        try:
            assigned = policy.assign()
            if 0 <= assigned < len(self._format_identities):
                return assigned
            raise ValueError(f"assignment {assigned} of {len(self._format_identities)}")
        except Exception as error:
            self._format_failure("assign", error)
            return 0

    def _format_failure(self, what: str, error: Exception) -> None:
        self.format.errors += 1
        if self._format_failed is None:
            self._format_failed = f"{what}: {type(error).__name__}: {error}"
            logger.error("format policy failed in %s", self._format_failed, exc_info=error)
            self._event(EventType.FALLEN_BACK, Kind.FORMAT, detail=self._format_failed)

    def on_format_report(
        self,
        failed: str | None,
        counters: dict[str, float],
        signals: list[float] | None,
    ) -> None:
        """What the format policy itself said on the workers."""
        self._format_counters = counters or self._format_counters
        if signals is not None and self.format_policy is not None:
            try:
                decided = self.format_policy.observe(signals)
            except Exception as error:
                self._format_failure("observe", error)
                decided = None
            if decided:
                logger.info("kvplug: %s", decided)
                self._event(EventType.ADJUSTED, Kind.FORMAT, detail=decided)
        if failed is not None and self._format_failed is None:
            self._format_failed = failed
            self._event(EventType.FALLEN_BACK, Kind.FORMAT, detail=failed)

    def on_finished(self, request: Any, blocks: list[int]) -> dict[str, Any] | None:
        """A request ended; returns what its output says about it, or None."""
        self._tell_of_end(request)
        reused = None
        if self.reuse is not None:
            reused = self._guarded(None, self.reuse.finished, request, blocks)
        request_id = request.request_id
        if self.lanes is not None:
            self.lanes.finish(request_id)
        freed = self._shortened.pop(request_id, 0)
        cause = self._refused.pop(request_id, None)
        asked = request_id in self._exempt or cause is not None
        self._exempt.discard(request_id)
        sizes = self.cuts.finish(request_id) if self.cuts is not None else []
        # What a cut leaves behind is freed once settled, which may be after the last step.
        cut = any(at < request.num_computed_tokens for at, _ in sizes)
        stored = self.format_policy
        if not freed and not cut and not asked and stored is None:
            return None if reused is None else {"kvplug": reused}
        exact = not freed and not cut and (stored is None or stored.exact)
        said: dict[str, Any] = {"exact": exact, "blocks_freed": freed}
        if reused is not None:
            said |= reused | {"exact": exact and reused["exact"]}
        if stored is not None:
            said["format"] = self._said_formats.pop(request_id, stored.fingerprint())
        if sizes:
            said["cuts"] = [list(size) for size in sizes]
        if cause is not None:
            said["refused"] = cause
        return {"kvplug": said}

    def _tell_of_end(self, request: Any) -> None:
        if self._finished_hash_size and self.queue is not None:
            keys = computed_keys(request, self._finished_hash_size, self.engine.block_size)
            self.queue.finished(request_view(request), keys, request.num_output_tokens)

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
                report.acted = self.queue.counters.evicted + self.queue.told
                report.counters = counters | self._own_counters(self.queue.policy)
            elif policy.kind is Kind.SEQUENCE:
                report.acted = self.sequence.freed
                report.errors = self._sequence_errors()
                scored = asdict(self.scored) if self.cuts is not None else {}
                own = self._own_counters(self.sequence_policy)
                report.counters = asdict(self.sequence) | scored | own
            elif policy.kind is Kind.FORMAT:
                counters = asdict(self.format)
                report.errors = int(counters.pop("errors"))
                report.acted = self.format.tokens
                own = self._own_counters(self.format_policy)
                # Both halves count under the same names; what one does not do stays 0 there.
                told = self._format_counters
                report.counters = (
                    counters
                    | own
                    | {name: max(value, own.get(name, value)) for name, value in told.items()}
                )
            elif policy.kind is Kind.REUSE and self.reuse is not None:
                report.acted, report.counters = self.reuse.told(policy.name)
                report.errors = self.reuse.counters.errors
            found.append(report)
        return found

    def _sequence_errors(self) -> int:
        resizing = self.cuts is not None and self.cuts.resize_error is not None
        return int(self._sequence_failed is not None) + int(resizing)

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
            self.format.tokens,
            self.reuse.mark if self.reuse is not None else None,
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
                # A Prometheus counter cannot go down, and would end the engine saying so.
                if value > before:
                    found[key] = value - before
                    self._reported[key] = value
        return found

    def stop(self) -> None:
        """Say what every policy did. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self.queue is not None:
            self.queue.stop()
        if self._observers:
            self._emit()
        reports = self.reports()
        for line in summary_lines(reports, self.steps):
            logger.info("%s", line)
        hook = "kvplug_engine_stopping"
        self._tell(plugins().callers(hook), hook, reports=reports)
