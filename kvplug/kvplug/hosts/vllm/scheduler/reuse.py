"""The reuse kind in the scheduler process: what requests take of stored KV, and leave."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from vllm.logger import init_logger

from kvplug.contract import Kind, PolicyReport, ReuseCheck
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.messages import (
    LoadOrder,
    ReuseDirectives,
    ReuseReport,
    SaveOrder,
    StepDirectives,
    StepReport,
)
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.scheduler.reuse_counters import ReuseCounters
from kvplug.hosts.vllm.scheduler.reuse_drift import DriftWatch
from kvplug.hosts.vllm.scheduler.reuse_loading import take_run
from kvplug.hosts.vllm.scheduler.reuse_matching import RunMatcher
from kvplug.hosts.vllm.scheduler.reuse_requests import ReusingRequest
from kvplug.hosts.vllm.scheduler.reuse_saving import SegmentSaver
from kvplug.hosts.vllm.spec import ApproximateManager
from kvplug.hosts.vllm.view import identity, token_bytes, tokenizer
from kvplug.observe.events import EventType
from kvplug.request_options import RequestOptions
from kvplug.reuse.catalog import Catalog
from kvplug.reuse.plan import Planner, ReusePlan
from kvplug.reuse.splitting import Splitter

logger = init_logger("vllm.kvplug")


class ReuseScheduler(KindScheduler):
    """Matches requests with stored segments, and orders what workers load and store.

    Attributes:
        counters: Counters of reuse.
        refused: Candidates and requests not served, by cause.
        checks: The chain of checks.
        catalog: Stored segments.
        matcher: Finds runs.
        requests: Requests under way.
    """

    kind = Kind.REUSE

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        deployment, vllm_config, view = context.deployment, context.vllm_config, context.engine
        self.settings = deployment.reuse
        self.counters = ReuseCounters()
        self.refused: Counter[str] = Counter()
        self.checks: list[ReuseCheck] = engine.reuse_checks(deployment, view)
        self.requests: dict[str, ReusingRequest] = {}
        stored = engine.format_policy(deployment, vllm_config)
        parallel = vllm_config.parallel_config
        world = int(parallel.world_size)
        self.catalog = Catalog(
            self.settings.store,
            token_bytes(view, stored) * world,
            prefetch=self.settings.prefetch,
            min_tokens=self.settings.segments.min_tokens,
            world=world,
        )
        common = identity(vllm_config, view, stored)
        planner = Planner(self.settings.recompute, bool(parallel.worker_extension_cls))
        guard = deployment.guard
        self._drift = DriftWatch(guard, context) if guard is not None else None
        self.matcher = RunMatcher(
            self.catalog,
            planner,
            self.checks,
            self._drift.guard if self._drift is not None else None,
            common,
        )
        self._saver = SegmentSaver(self.catalog, self.settings, common, view.block_size, world)
        self._splitter = Splitter(self.settings.segments, tokenizer(vllm_config))
        self._costs_us: Counter[str] = Counter()
        self._managers: list[ApproximateManager] = []
        self._loads: list[LoadOrder] = []
        self._left: list[SaveOrder] = []
        self._failed: str | None = None
        if self.settings.store.directory:
            self.refused.update(self.catalog.scan(self.settings.store.directory))

    def bind(self, manager: Any) -> None:
        """Bind to the managers of groups whose requests may reuse KV."""
        managers = manager.coordinator.single_type_managers
        self._managers = [m for m in managers if isinstance(m, ApproximateManager)]

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Take in a request; its cache salt is still the user's own."""
        self._guarded("on_new_request", None, self._take_in, request, options)

    def _take_in(self, request: Any, options: RequestOptions) -> None:
        reusing = ReusingRequest.of(request, options, self._splitter, self.settings.approximate)
        if reusing is None:
            self.refused["not plain text"] += 1
            return
        self.requests[request.request_id] = reusing
        if self._drift is not None:
            self._drift.on_new_request(reusing)
        if self.settings.prefetch and reusing.approximate:
            self.catalog.prefetch(reusing.tokens, reusing.tenant, reusing.spans)

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that are stored; None to be asked again."""
        found: int | None = self._guarded("matched", 0, self._match, request, num_local)
        return found

    def _match(self, request: Any, num_local: int) -> int | None:
        reusing = self.requests.get(request.request_id)
        # vLLM computes all of a prompt whose log-probabilities are requested.
        if (
            reusing is None
            or reusing.options.reuse == "off"
            or request.skip_reading_prefix_cache
            or len(self.catalog) == 0
        ):
            return 0
        before = time.perf_counter()
        plan = self.matcher.plan(reusing, num_local)
        self.counters.plans += 1
        self.counters.plan_us += 1e6 * (time.perf_counter() - before)
        if self.matcher.waits(reusing, plan):
            self.counters.waited += 1
            return None
        reusing.plan = plan
        self._set_limit(reusing, plan.approximate_from)
        return plan.length

    def _set_limit(self, reusing: ReusingRequest, first: int | None) -> None:
        """Keep a request's blocks out of the prefix cache from a token on; None for no limit."""
        request_id = reusing.request.request_id
        for manager in self._managers:
            manager.set_approximate(self.kind, request_id, first)
            # Of all kinds: what another one approximates is not stored as exact either.
            first = manager.approximate_from(request_id)
        reusing.approximate_from = first

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """Order the load of a run into a request's blocks.

        Nothing is caught here: a load that was promised to vLLM has to be ordered.
        """
        reusing = self.requests.get(request.request_id)
        if reusing is None:
            return
        plan, reusing.plan = reusing.plan, None
        reusing.next_span, reusing.taken, reusing.ancestry = 0, None, 0
        if plan is not None:
            self._count_checks(reusing, plan)
        if plan is None or not num_external:
            self._set_limit(reusing, None)
        else:
            assert num_external == plan.length, "vLLM takes a run whole or not at all"
            self._loads.append(take_run(reusing, plan, blocks))
            self.catalog.touch([p.segment.id for p in plan.pieces])
            self.counters.count_run(plan)
            self.context.events.add(EventType.REUSED, self.kind, plan.length - plan.recomputed)
        if self._drift is not None:
            self._drift.started(reusing)

    def _count_checks(self, reusing: ReusingRequest, plan: ReusePlan) -> None:
        reusing.refused = plan.refused
        self.refused.update(plan.refused)
        self._costs_us.update(plan.costs_us)
        self.counters.check_us += sum(plan.costs_us.values())
        for cause, count in plan.refused.items():
            self.context.events.add(EventType.REFUSED, self.kind, count, cause)

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """Order what the request leaves to be stored, and state what it reused."""
        reusing = self.requests.pop(request.request_id, None)
        if reusing is not None:
            self._guarded("finished", None, self._finish, reusing, blocks, answer)
        for manager in self._managers:
            manager.set_approximate(self.kind, request.request_id, None)

    def _finish(self, reusing: ReusingRequest, blocks: list[int], answer: Answer) -> None:
        reusing.describe(answer)
        self._left += self._saver.left(reusing, blocks)
        drift = self._drift.finished(reusing) if self._drift is not None else None
        if drift is None:
            return
        worst = drift.families[0]
        self.counters.drifted += 1
        detail = f"entropy by {worst.entropy:.2f}, {worst.logprob:.2f} nats"
        self.context.events.add(EventType.DRIFTED, self.kind, detail=detail)
        if reusing.taken is not None or reusing.refused:
            answer.fields["drift"] = {"entropy": worst.entropy, "logprob": worst.logprob}

    # -- steps ---------------------------------------------------------------------------------

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Send loads that were promised, segments to store, and what the catalog wants."""
        directives = ReuseDirectives(loads=self._loads, left=self._left)
        self._loads, self._left = [], []
        try:
            for request_id, start in step.starts.items():
                reusing = self.requests.get(request_id)
                end = start + step.scheduled[request_id]
                if reusing is not None and self._saver.completes(reusing, end):
                    blocks = [b.block_id for b in self._managers[0].req_to_blocks[request_id]]
                    slot = step.slots[request_id]
                    directives.saves += self._saver.completed(reusing, end, blocks, slot)
                    # The second runner's layers look for its row in the forward.
                    into.names[request_id] = slot
                    into.before_forward |= bool(self.context.vllm_config.use_v2_model_runner)
            self.catalog.expire()
            commands = self.catalog.take_commands()
            directives.drop, directives.fetch = commands.drop, commands.fetch
            directives.delete = commands.delete
        except Exception as error:
            # Loads were promised: they are sent whatever happens to what is stored.
            self.counters.errors += 1
            logger.error("reuse cannot order a step's segments", exc_info=error)
        if directives:
            into.reuse = directives

    def on_report(self, report: StepReport) -> None:
        """Take in what workers stored, loaded and failed to."""
        part = report.reuse
        if part is None:
            return
        if part.error:
            self._fall_back(part.error)
        self._guarded("on_report", None, self._take_report, part)

    def _take_report(self, report: ReuseReport) -> None:
        self.counters.segments += self._saver.saved(report)
        for cause, count in Counter(report.failed.values()).items():
            self.refused[cause] += count
            self.context.events.add(EventType.REFUSED, self.kind, count, cause)
        for request_id in report.unloaded:
            self._not_loaded(request_id)
        self.counters.count_report(report)
        if self._drift is not None and report.guard:
            self._drift.on_report(report.guard)

    def _not_loaded(self, request_id: str) -> None:
        """Take note that vLLM computes a run which could not be loaded."""
        reusing = self.requests.get(request_id)
        if reusing is not None and reusing.taken is not None:
            reusing.taken, reusing.ancestry = None, 0
            reusing.refused["load failed"] += 1
            self.refused["load failed"] += 1
            self._set_limit(reusing, None)

    # -- reports -------------------------------------------------------------------------------

    def reports(self) -> list[PolicyReport]:
        """One report per check; the first one has the counters of reuse as a whole."""
        found = []
        for check in self.checks:
            counters: dict[str, float] = {
                "asked": self.matcher.asked[check.name],
                "refusals": self.matcher.refusals[check.name],
                "us": round(self._costs_us[check.name]),
                **self.own_counters(check),
            }
            if check is self.checks[0]:
                counters |= self.counters.table() | self.catalog.counters()
                counters |= {f"refused {c}": n for c, n in sorted(self.refused.items())}
                if self._drift is not None:
                    counters |= self._drift.guard.counters()
            found.append(
                PolicyReport(
                    str(self.kind),
                    check.name,
                    check.exact,
                    acted=self.matcher.asked[check.name],
                    errors=self.counters.errors,
                    counters=counters,
                )
            )
        return found

    def mark(self) -> object:
        """Segments, plans, recomputed tokens and refusals."""
        counters = self.counters
        return counters.segments, counters.plans, counters.computed, self.refused.total()

    # -- failures ------------------------------------------------------------------------------

    def _guarded(self, hook: str, instead: Any, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a part of reuse; if it fails, the engine goes on without."""
        try:
            return call(*arguments)
        except Exception as error:
            self.counters.errors += 1
            cause = f"{hook}: {type(error).__name__}: {error}"
            if self._failed is None:
                logger.error("reuse failed in %s", cause, exc_info=error)
            self._fall_back(cause)
            return instead

    def _fall_back(self, cause: str) -> None:
        if self._failed is None:
            self._failed = cause
            self.context.events.add(EventType.FALLEN_BACK, self.kind, detail=cause)
