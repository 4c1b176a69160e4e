"""The reuse kind in the scheduler process: what requests take of stored KV, and leave."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vllm.logger import init_logger

from kvplug.contract import Kind, PolicyReport, ReuseCheck
from kvplug.counts import Causes
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.fingerprint import ONCE, once
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.identity import identity
from kvplug.hosts.vllm.messages import (
    LoadOrder,
    ReuseDirectives,
    ReuseReport,
    SaveOrder,
    StepDirectives,
    StepReport,
)
from kvplug.hosts.vllm.scheduler import reuse_measured
from kvplug.hosts.vllm.scheduler.adapters import Adapters
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
from kvplug.hosts.vllm.scheduler.reuse_traces import ReuseTraces
from kvplug.hosts.vllm.spec import ApproximateManager
from kvplug.hosts.vllm.view import kv_dtype, token_bytes, tokenizer
from kvplug.hosts.vllm.weights import no_model
from kvplug.observe.catalogue import CHECK_SECONDS, LOADING, PLAN_SECONDS, WAITS
from kvplug.observe.events import EventType
from kvplug.observe.live import Breakers, Facts, outcomes
from kvplug.observe.metric import Sample
from kvplug.request_options import RequestOptions
from kvplug.reuse.catalog import Catalog
from kvplug.reuse.folder import engine_folder, remove_files
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
        identity: Fingerprint fields that all segments of the engine have in common.
        awaits_loads: True where the engine schedules a step before it has heard of the one before:
            vLLM then schedules a request once its run is loaded, and else in the same step.
    """

    kind = Kind.REUSE

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        deployment, vllm_config, view = context.deployment, context.vllm_config, context.engine
        self.settings = deployment.reuse
        self.counters = ReuseCounters()
        self.refused = Causes()
        self.checks: list[ReuseCheck] = engine.reuse_checks(deployment, view)
        self.requests: dict[str, ReusingRequest] = {}
        stored = engine.format_policy(deployment, vllm_config)
        parallel = vllm_config.parallel_config
        world = int(parallel.world_size)
        per_token = token_bytes(view, stored, kv_dtype(vllm_config)) * world
        spans = context.spans
        self._traces = ReuseTraces(spans, per_token) if spans is not None else None
        self.catalog = Catalog(
            self.settings.store,
            per_token,
            prefetch=self.settings.prefetch,
            min_tokens=self.settings.segments.min_tokens,
            world=world,
        )
        self.identity = identity(vllm_config, view, stored)
        planner = Planner(self.settings.recompute, bool(parallel.worker_extension_cls))
        guard = deployment.guard
        self._drift = DriftWatch(guard, context) if guard is not None else None
        self._breakers = (0, 0)
        self.matcher = RunMatcher(
            self.catalog,
            planner,
            self.checks,
            self._drift.guard if self._drift is not None else None,
            self.identity,
            spans,
        )
        self._saver = SegmentSaver(
            self.catalog, self.settings, self.identity, view.block_size, world
        )
        self._adapters = Adapters(time.time())
        self._splitter = Splitter(self.settings.segments, tokenizer(vllm_config))
        self._costs_us: Counter[str] = Counter()
        self._plan_seconds = PLAN_SECONDS.distribution()
        self._managers: list[ApproximateManager] = []
        self._world = world
        self.awaits_loads = int(vllm_config.max_concurrent_batches) > 1
        self._loads: list[LoadOrder] = []
        self._numbers = itertools.count()
        self._loading: dict[int, ReusingRequest] = {}
        self._left: list[SaveOrder] = []
        self._unsure: dict[int, list[SaveOrder]] = {}
        self._generation = 0
        self._folder = engine_folder(self.settings.store.directory, parallel.data_parallel_index)
        self._require_identity(deployment)
        if self._folder:
            self.refused.add_all(self.catalog.scan(self._folder))

    def _require_identity(self, deployment: Deployment) -> None:
        """Refuse files that outlive an engine whose model cannot be told from another's."""
        if not self.identity["model"].startswith(ONCE):
            return
        key = deployment.choices[Kind.REUSE][0].key.split(".use")[0]
        above = key.removesuffix("reuse")
        refusals = [
            Refusal(
                name,
                f"{what} outlive the engine, and nothing tells its model from another: "
                f"{no_model(self.context.vllm_config)}.",
                f"load the weights from files on this machine, or remove {last}.",
            )
            for name, what, last, on in (
                (f"{key}.store.directory", "segments", "directory", self._folder),
                (
                    f"{above}guard.records",
                    "records",
                    "records",
                    deployment.guard is not None and deployment.guard.records,
                ),
            )
            if on
        ]
        if refusals:
            raise DeploymentError(deployment.source, refusals)

    def bind(self, manager: Any) -> None:
        """Bind to the managers of groups whose requests may reuse KV."""
        managers = manager.coordinator.single_type_managers
        self._managers = [m for m in managers if isinstance(m, ApproximateManager)]

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Take in a request; its cache salt is still the user's own."""
        self._guarded("on_new_request", None, self._take_in, request, options)

    def _take_in(self, request: Any, options: RequestOptions) -> None:
        lora = self._adapters.identity(request.lora_request)
        if lora is None:
            self.refused.add("adapter of unknown content")
            return
        reusing = ReusingRequest.of(
            request, options, self._splitter, self.settings.approximate, lora
        )
        if reusing is None:
            self.refused.add("not plain text")
            return
        self.requests[request.request_id] = reusing
        if self._drift is not None:
            self._drift.on_new_request(reusing)
        if self.settings.prefetch and reusing.approximate:
            self.catalog.prefetch(reusing.tokens, reusing.tenant, reusing.spans)

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that are stored; None to be asked again."""
        reusing = self.requests.get(request.request_id)
        if reusing is not None:
            self._start_over(reusing)
        found: int | None = self._guarded("matched", 0, self._match, request, num_local)
        return found

    def _start_over(self, reusing: ReusingRequest) -> None:
        """Forget the run of a request that holds no blocks: it is new, or was preempted."""
        run = reusing.taken
        if run is not None and run.approximate_from is not None:
            reusing.answered_approximately |= reusing.request.num_output_tokens > 0
        reusing.plan, reusing.taken, reusing.ancestry = None, None, 0
        self._settle(reusing)
        self._set_limit(reusing, None)

    def _match(self, request: Any, num_local: int) -> int | None:
        reusing = self.requests.get(request.request_id)
        # vLLM computes all of a prompt whose log-probabilities are requested.
        if (
            reusing is None
            or reusing.options.reuse == "off"
            or reusing.barred
            or request.skip_reading_prefix_cache
            or len(self.catalog) == 0
            or not self._keeps(reusing)
        ):
            return 0
        before = time.perf_counter()
        plan = self.matcher.plan(reusing, num_local)
        self.counters.plans += 1
        seconds = time.perf_counter() - before
        self.counters.plan_us += 1e6 * seconds
        self._plan_seconds.add(seconds)
        if self.matcher.waits(reusing, plan):
            self.counters.waited += 1
            return None
        reusing.plan = plan
        self._set_limit(reusing, plan.approximate_from)
        if plan.length:
            # Now: vLLM hashes blocks while it allocates them.
            self._hold(reusing, plan.begin)
        return plan.length

    def _keeps(self, reusing: ReusingRequest) -> bool:
        """True if a request's KV is what its fingerprint says: its adapter is still the same."""
        if not reusing.keeps or not reusing.lora:
            return reusing.keeps
        if self._adapters.identity(reusing.request.lora_request) != reusing.lora:
            reusing.keeps = False
            # It may have been loaded between the last look and now, under the identity of before.
            doubtful = [one.id for one in self.catalog if one.fingerprint.lora == reusing.lora]
            self.catalog.invalidate(ids=doubtful)
            self.refused.add("adapter changed")
        return reusing.keeps

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
        if plan is None and reusing.taken is not None:
            # Its run is there, and vLLM has given it the blocks for the tokens after that.
            return
        reusing.next_span = 0
        if plan is not None:
            self._count_checks(reusing, plan)
        if plan is None or not num_external:
            self._hold(reusing, None)
            self._set_limit(reusing, None)
        else:
            assert num_external == plan.length, "vLLM takes a run whole or not at all"
            number = next(self._numbers)
            self._loading[number] = reusing
            self._loads.append(take_run(reusing, plan, blocks, number, self.awaits_loads))
            self.catalog.touch([p.segment.id for p in plan.pieces])
            self.counters.count_run(plan)
            used = plan.length - plan.recomputed
            self.context.events.add(EventType.REUSED, self.kind, used, request=request.request_id)
            if self._traces is not None:
                self._traces.loads(reusing, plan, number)
        if self._drift is not None:
            self._drift.started(reusing)

    def _count_checks(self, reusing: ReusingRequest, plan: ReusePlan) -> None:
        reusing.refused = plan.refused
        self.refused.add_all(plan.refused)
        self._costs_us.update(plan.costs_us)
        self.counters.check_us += sum(plan.costs_us.values())
        for cause, count in plan.refused.items():
            self.context.events.add(
                EventType.REFUSED, self.kind, count, cause, request=reusing.request.request_id
            )

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """Order what the request leaves to be stored, and state what it reused."""
        reusing = self.requests.pop(request.request_id, None)
        if reusing is not None:
            self._guarded("finished", None, self._finish, reusing, blocks, answer)
            self._settle(reusing)
        for manager in self._managers:
            manager.set_approximate(self.kind, request.request_id, None)

    def _finish(self, reusing: ReusingRequest, blocks: list[int], answer: Answer) -> None:
        reusing.describe(answer)
        number = reusing.loading
        if self._keeps(reusing) and (number is None or not self.awaits_loads):
            left = self._saver.left(reusing, blocks)
            if self._traces is not None:
                self._traces.saves(reusing, left)
            if number is None:
                self._left += left
            else:
                # It ended in the step that loads its run, whose report comes right after.
                self._unsure[number] = left
        drift = self._drift.finished(reusing) if self._drift is not None else None
        self._tell_breakers(reusing.request.request_id)
        if drift is None:
            return
        worst = drift.families[0]
        self.counters.drifted += 1
        detail = f"entropy by {worst.entropy:.2f}, {worst.logprob:.2f} nats"
        request_id = reusing.request.request_id
        add = self.context.events.add
        add(EventType.DRIFTED, self.kind, detail=detail, request=request_id)
        if reusing.taken is not None or reusing.refused:
            answer.fields["drift"] = {"entropy": worst.entropy, "logprob": worst.logprob}

    def _tell_breakers(self, request_id: str) -> None:
        """Tell of breakers that an answer opened or closed."""
        if self._drift is None:
            return
        now = self._drift.guard.opened_and_closed()
        for state, count, before in zip(("open", "closed"), now, self._breakers, strict=True):
            if count > before:
                self.context.events.add(
                    EventType.BREAKER, self.kind, count - before, state, request=request_id
                )
        self._breakers = now

    # -- steps ---------------------------------------------------------------------------------

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Send loads that were promised, segments to store, and what the catalog wants."""
        directives = ReuseDirectives(
            loads=self._loads, left=self._left, generation=self._generation
        )
        now = {order.number for order in self._loads}
        self._loads, self._left = [], []
        # Loads come before the forward, whoever waits for them.
        into.before_forward |= bool(directives.loads)
        try:
            self._forget_unsure("load not reported")
            for request_id, start in step.starts.items():
                reusing = self.requests.get(request_id)
                if reusing is None or (reusing.loading is not None and reusing.loading not in now):
                    continue
                end = start + step.scheduled[request_id]
                if self._saver.completes(reusing, end) and self._keeps(reusing):
                    blocks = [b.block_id for b in self._managers[0].req_to_blocks[request_id]]
                    slot = step.slots[request_id]
                    saves = self._saver.completed(reusing, end, blocks, slot)
                    if self._traces is not None:
                        self._traces.saves(reusing, saves)
                    directives.saves += saves
                    # The second runner's layers look for its row in the forward.
                    into.names[request_id] = slot
                    into.before_forward |= bool(self.context.vllm_config.use_v2_model_runner)
            self.catalog.expire()
            commands = self.catalog.take_commands()
            directives.drop, directives.fetch = commands.drop, commands.fetch
            directives.delete = commands.delete
        except Exception as error:
            # Loads were promised: they are sent whatever happens to what is stored.
            self.errors += 1
            logger.error("reuse cannot order a step's segments", exc_info=error)
        if directives:
            into.reuse = directives

    def reset(self) -> bool:
        """Drop every segment, in memory and in the folder, and what is on its way.

        vLLM resets its caches because the weights are about to change, or have, or for any other
        reason, and does not say which. So what is stored from now on belongs to this run alone.
        """
        filed = self.catalog.clear()
        self._left.clear()
        self._unsure.clear()
        self._saver.forget()
        self._generation += 1
        self.identity["model"] = once()
        for reusing in self.requests.values():
            reusing.plan = None
            # What is computed already goes on being used by the request itself, and by nobody else.
            reusing.keeps &= reusing.request.num_computed_tokens == 0
        if self._drift is not None:
            self._drift.guard.clear()
        logger.info("kvplug: the store of segments was reset")
        # Workers remove their files with the next step; until then nobody may find them.
        return not self._folder or remove_files(self._folder, filed, self._world)

    def on_report(self, report: StepReport) -> None:
        """Take in what workers stored, loaded and failed to."""
        part = report.reuse
        if part is None:
            return
        if part.error:
            self._fall_back(part.error)
        if part.reloaded:
            self.reset()
        self._guarded("on_report", None, self._take_loads, part)
        self._guarded("on_report", None, self._take_report, part)

    def _take_loads(self, report: ReuseReport) -> None:
        for request_id in report.unloaded:
            self._not_loaded(request_id)
        for number, ranks in report.filled.items():
            if ranks == self._world:
                self._loaded(number, report.adapted.get(number, 0.0))
        self._forget_unsure("load failed")

    def _take_report(self, report: ReuseReport) -> None:
        self.counters.segments += self._saver.saved(report)
        if self._traces is not None:
            self._traces.saved(report)
        for cause, count in Counter(report.failed.values()).items():
            self.refused.add(cause, count)
            self.context.events.add(EventType.REFUSED, self.kind, count, cause)
        self.counters.count_report(report)
        self.errors += report.errors
        if self._drift is not None and report.guard:
            self._drift.on_report(report.guard)

    def _loaded(self, number: int, seconds: float = 0.0) -> None:
        """Let the run of a request into the prefix cache, and store what an ended one left."""
        self._left += self._unsure.pop(number, [])
        reusing = self._loading.pop(number, None)
        if reusing is None:
            return
        reusing.loading = None
        if self._traces is not None:
            self._traces.loaded(reusing, number, seconds)
        # After a reset it is the request's alone, for as long as it runs.
        if reusing.keeps:
            self._hold(reusing, None)

    def _not_loaded(self, request_id: str) -> None:
        """Take note that vLLM computes a run which could not be loaded."""
        self.refused.add("load failed")
        reusing = self.requests.get(request_id)
        if reusing is not None and reusing.taken is not None:
            if self._traces is not None and reusing.loading is not None:
                self._traces.loaded(reusing, reusing.loading, failed="load failed")
            reusing.taken, reusing.ancestry, reusing.barred = None, 0, True
            reusing.refused["load failed"] += 1
            # Segments of the step that failed are computed, and so completed, once more.
            reusing.next_span = 0
            self._settle(reusing)
            self._set_limit(reusing, None)

    def _settle(self, reusing: ReusingRequest) -> None:
        """Stop waiting for a request's load: it is there, or its blocks are not of interest."""
        if reusing.loading is not None:
            del self._loading[reusing.loading]
            reusing.loading = None
        self._hold(reusing, None)

    def _hold(self, reusing: ReusingRequest, first: int | None) -> None:
        """Keep a request's blocks out of the prefix cache until its run is there."""
        for manager in self._managers:
            manager.hold(reusing.request.request_id, first)

    def _forget_unsure(self, cause: str) -> None:
        """Give up what requests left whose load nobody has reported."""
        for orders in self._unsure.values():
            for order in orders:
                self.catalog.failed(order.segment, cause)
        self._unsure.clear()

    # -- reports -------------------------------------------------------------------------------

    def reports(self) -> list[PolicyReport]:
        """One report per check; the first one has the counters of reuse as a whole."""
        found: list[PolicyReport] = []
        for check in self.matcher.checks:
            name = check.policy_name
            own = check.counters()
            counters: dict[str, float] = {
                "asked": self.matcher.asked[name],
                "refusals": self.matcher.refusals[name],
                "us": round(self._costs_us[name]),
                **own,
            }
            if not found:
                counters |= self.counters.table() | self.catalog.counters()
                counters |= {f"refused {c}": n for c, n in sorted(self.refused.items())}
                if self._drift is not None:
                    counters |= self._drift.guard.counters()
            found.append(
                PolicyReport(
                    str(self.kind),
                    name,
                    check.exact,
                    acted=self.matcher.asked[name],
                    errors=self.errors,
                    counters=counters,
                    own=own,
                )
            )
        return found

    def samples(self) -> Iterator[Sample]:
        """What requests took, what was refused and failed, what is stored and watched; times of
        the checks, and how far answers were off."""
        for stage, seconds in self.matcher.seconds.items():
            yield CHECK_SECONDS.of(seconds, stage)
        if self._drift is not None:
            yield from self._drift.samples()
            yield from reuse_measured.of_guard(self._drift.guard)
        yield from reuse_measured.of_requests(self.counters)
        yield from reuse_measured.of_checks(self.matcher)
        yield from reuse_measured.of_causes(self.refused, self.catalog.failures())
        yield from reuse_measured.of_store(self.catalog)
        yield PLAN_SECONDS.of(self._plan_seconds)
        yield LOADING.of(len(self._loading), str(self.kind))
        yield WAITS.of(self.counters.waited, str(self.kind))

    def show(self, facts: Facts) -> None:
        """Tokens reused, refusals by cause, and breakers by state."""
        facts.outcomes += outcomes("segments", "tokens", {"hit": self.counters.tokens})
        facts.outcomes += outcomes("segments", "refusals", self.refused)
        if self._drift is not None:
            states = Counter(family.state.name.lower() for family in self._drift.guard.families())
            facts.breakers = Breakers(**states)
