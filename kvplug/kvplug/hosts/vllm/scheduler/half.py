"""The scheduler half: policies in vLLM's scheduler process, one object per kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind
from vllm.v1.request import RequestStatus

from kvplug.contract import EngineView, Kind, PolicyReport
from kvplug.deployment import Deployment
from kvplug.errors import DeploymentError, Refusal
from kvplug.hosts import torch_state
from kvplug.hosts.vllm import compat
from kvplug.hosts.vllm.flops import PromptFlops
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.planned import require_managers, require_planned
from kvplug.hosts.vllm.scheduler.attention import AttentionScheduler
from kvplug.hosts.vllm.scheduler.block_pool import BlockPool
from kvplug.hosts.vllm.scheduler.blocks import parse_options
from kvplug.hosts.vllm.scheduler.energy import EnergyWatch
from kvplug.hosts.vllm.scheduler.events import Events, call_each
from kvplug.hosts.vllm.scheduler.format import FormatScheduler
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.scheduler.latency import LatencyWatch
from kvplug.hosts.vllm.scheduler.live import LiveView
from kvplug.hosts.vllm.scheduler.measured import HookTimes, Measurements, OfKinds
from kvplug.hosts.vllm.scheduler.misses import MissObserver
from kvplug.hosts.vllm.scheduler.prefix_cache import PrefixCacheScheduler
from kvplug.hosts.vllm.scheduler.prompts import Prompts
from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
from kvplug.hosts.vllm.scheduler.sequence import SequenceScheduler
from kvplug.hosts.vllm.scheduler.shadow import ShadowWatch
from kvplug.hosts.vllm.scheduler.slots import Slots, row_slots
from kvplug.hosts.vllm.scheduler.tiers import TiersScheduler
from kvplug.hosts.vllm.scheduler.unmet_options import unmet_options
from kvplug.hosts.vllm.shadow_orders import ShadowOrder
from kvplug.hosts.vllm.tracing import SpanExporter
from kvplug.hosts.vllm.view import engine_view
from kvplug.observe.catalogue import EVENTS_LOST, OPTIONS_REFUSED, STEPS
from kvplug.observe.causes import word
from kvplug.observe.events import EventType
from kvplug.observe.log import MIB, EventLog, of_rank
from kvplug.observe.metric import Sample
from kvplug.observe.summary import summary_lines
from kvplug.registry import plugins

logger = init_logger("vllm.kvplug")

KINDS: tuple[type[KindScheduler], ...] = (
    # Takes a request's cache salt for the user's own, so before format makes it longer.
    ReuseScheduler,
    # Takes the user's own salt too.
    TiersScheduler,
    # After reuse: at a request's end, reuse must still see what attention has approximated.
    AttentionScheduler,
    FormatScheduler,
    SequenceScheduler,
    PrefixCacheScheduler,
)
"""Kinds in the order in which they see requests, steps and reports."""

FOUND_IN = {Kind.REUSE: "segment", Kind.TIERS: "tier"}
"""What holds the tokens that a kind finds, in the attributes of a lookup's span."""


class SchedulerHalf:
    """Runs the kinds of a deployment in the scheduler process.

    Args:
        deployment: A deployment that was checked against the engine.
        vllm_config: The engine's config.
        kv_cache_config: Its KV-cache groups and pool.

    Attributes:
        deployment: As given.
        engine: The engine as policies see it.
        kinds: Kinds that the deployment has a policy for, in the order of `KINDS`.
        shadow: The guard's shadow, or None.
        steps: Steps so far.
        refused: Request options refused, by cause.
        times: Times of vLLM's calls.
        measurements: What is measured; others may be added.
        misses: Follows why prompts miss; None where that is off.

    Raises:
        DeploymentError: The model's layers do not fit the deployment's policies.
    """

    def __init__(self, deployment: Deployment, vllm_config: Any, kv_cache_config: Any):
        require_planned(deployment, vllm_config, kv_cache_config)
        self.deployment = deployment
        self.engine = engine_view(vllm_config, num_blocks=kv_cache_config.num_blocks - 1)
        self.steps = 0
        self.refused: Counter[str] = Counter()
        observe = deployment.observe
        self._events = Events(deployment, _event_log(deployment, vllm_config, self.engine))
        self.misses = (
            MissObserver(self._events, tokens=observe.events_tokens) if observe.misses else None
        )
        self._asked: set[str] = set()
        self._slots = Slots()
        self._latency = LatencyWatch.of(deployment, vllm_config)
        self._energy = EnergyWatch(vllm_config)
        self._tracing = SpanExporter.of(vllm_config)
        self._spans = self._tracing.spans if self._tracing is not None else None
        sizes = {tensor.size for tensor in kv_cache_config.kv_cache_tensors}
        context = SchedulerContext(
            deployment,
            vllm_config,
            self.engine,
            self._events,
            self._slots,
            block_bytes=max(sizes, default=0) // kv_cache_config.num_blocks,
            spans=self._spans,
            misses=self.misses,
        )
        self.kinds = tuple(of(context) for of in KINDS if deployment.choice(of.kind) is not None)
        self._managers: list[Any] = []
        self._second_runner = bool(vllm_config.use_v2_model_runner)
        speculative = vllm_config.speculative_config
        self._drafts = speculative.num_speculative_tokens if speculative is not None else 0
        self._refused: dict[str, dict[str, str]] = {}
        self._said: dict[str, dict[str, Any] | None] = {}
        self.times = HookTimes()
        self.measurements = Measurements()
        self._prompts = Prompts(PromptFlops.of(vllm_config))
        self._latest: SchedulerStep | None = None
        self.measurements.measured += [self, self.times, OfKinds(self.kinds), self._prompts]
        self.measurements.measured += [self._latency, self._energy]
        guard = deployment.guard
        self.shadow = (
            ShadowWatch(guard.shadow, context)
            if guard is not None and guard.shadow is not None
            else None
        )
        if self.shadow is not None:
            self.measurements.measured.append(self.shadow)
        if self.misses is not None:
            self.measurements.measured.append(self.misses)
        beside = (part for part in (self.misses, self.shadow) if part is not None)
        self._live = (
            LiveView(context, (*self.kinds, *beside), self.reports, kv_cache_config)
            if observe.page
            else None
        )
        self._requests: set[str] = set()
        self._stopped = False
        self._torch = torch_state.state()
        self._torch_changed = False

    @property
    def awaits_loads(self) -> bool:
        """True if vLLM schedules a request that takes stored tokens only once they are there."""
        return any(kind.awaits_loads for kind in self.kinds)

    def bind(self, manager: Any) -> None:
        """Bind policies to a KV-cache manager, before its first allocation."""
        self._torch = torch_state.state()
        self._managers = list(manager.coordinator.single_type_managers)
        require_managers(self.deployment, self._managers)
        pool = BlockPool(manager.block_pool, self.engine.block_size, lambda: self._latest)
        self.measurements.measured.append(pool)
        for kind in self.kinds:
            kind.bind(manager)
        if self.misses is not None:
            self.misses.bind(manager)
        chosen = [
            f"{c.policy.kind}: {c.policy.name} {c.options.model_dump()}"
            for c in self.deployment.all()
        ]
        logger.info("kvplug is on: %s", "; ".join(chosen) or "no policy")
        for kind in self.kinds:
            for line in kind.started():
                logger.info("kvplug: %s", line)
        if self._live is not None:
            self._live.bind(manager)
        hook = "kvplug_engine_started"
        call_each(plugins().callers(hook), hook, engine=self.engine)

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Take in a request and its options."""
        compat.unmark_request(request)
        self._requests.add(request.request_id)
        if self._spans is not None:
            tokens = request.num_prompt_tokens
            self._spans.began(request.request_id, request.trace_headers, tokens)
        parsed = parse_options(request)
        refusals = dict(parsed.refused)
        if parsed.options.model_fields_set:
            refusals |= unmet_options(parsed.options, self.deployment)
        if parsed.options.missed or self.deployment.observe.answers:
            self._asked.add(request.request_id)
        if refusals:
            self._refused[request.request_id] = {k: r.sentence for k, r in refusals.items()}
        for key, refused in refusals.items():
            self.refused[str(refused.cause)] += 1
            kind = Kind(key) if key in set(Kind) else None
            self._events.add(EventType.REFUSED, kind, detail=refused.sentence)
        options = parsed.options
        if self.shadow is not None:
            options = self.shadow.on_new_request(request, options)
        if self.shadow is None or not self.shadow.is_of(request.request_id):
            self._latency.on_new_request(request)
        for one in self.kinds:
            one.on_new_request(request, options)
        if self._live is not None:
            self._live.on_new_request(request)

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that need no prefill; None to be asked again."""
        if self.shadow is not None:
            self.shadow.looked_up(request.request_id, num_local)
        if self._spans is None:
            found, where = self._matched(request, num_local)
        else:
            begin = self._spans.looking(request.request_id)
            found, where = self._matched(request, num_local)
            self._spans.looked_up(request.request_id, begin, num_local, found, where)
        if self._live is not None:
            self._live.matched(request, num_local, found)
        return found

    def _matched(self, request: Any, num_local: int) -> tuple[int | None, str]:
        for kind in self.kinds:
            found = kind.matched(request, num_local)
            if found != 0:
                self._prompts.matched(request, num_local, kind.kind)
                if found is not None and self.misses is not None:
                    self.misses.looked_up(request, num_local, kind.kind)
                return found, FOUND_IN.get(kind.kind, str(kind.kind))
        self._prompts.matched(request, num_local, None)
        if self.misses is not None:
            self.misses.looked_up(request, num_local, None)
        return 0, ""

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """Take note that a request was given its blocks."""
        self._prompts.allocated(request, num_external)
        if self._spans is not None:
            self._spans.allocated(request.request_id)
        for kind in self.kinds:
            kind.allocated(request, blocks, num_external)
        if self.misses is not None:
            self.misses.admitted(request, blocks, num_external)

    def finished(self, request: Any, blocks: list[int]) -> dict[str, Any] | None:
        """Forget a request that ended; returns what its output says about it, or None."""
        self._requests.discard(request.request_id)
        self._latency.finished(request)
        self._prompts.forget(request.request_id)
        answer = Answer(refused=self._refused.pop(request.request_id, {}))
        for kind in self.kinds:
            kind.finished(request, blocks, answer)
        if self.shadow is not None:
            self.shadow.finished(request, answer)
        asked = request.request_id in self._asked
        self._asked.discard(request.request_id)
        if self.misses is not None:
            missed = self.misses.finished(request)
            if asked and missed is not None:
                answer.fields["prompt_blocks"] = _by_name(missed.sources)
                answer.fields["missed"] = _by_name(missed.causes)
                if missed.first is not None:
                    answer.fields["first_miss"] = missed.first.sentence()
        self._slots.release(request.request_id)
        if self._spans is not None:
            self._spans.ended(request.request_id, answer.as_attributes())
        if self._live is not None:
            self._live.finished(request)
        params = answer.as_params()
        if _is_left_out(request):
            self._said[request.request_id] = params
        return params

    def take_said(self) -> dict[str, dict[str, Any] | None]:
        """What requests that ended since the last call say and their outputs do not, by their
        ids."""
        said, self._said = self._said, {}
        return said

    def shadow_order(self) -> ShadowOrder | None:
        """What the server is to do for the guard's shadow now, or None."""
        return self.shadow.orders() if self.shadow is not None else None

    def take_events(self) -> list[Any]:
        """vLLM's KV events of what the kinds store and give up outside the pool."""
        return [event for kind in self.kinds for event in kind.take_events()]

    # -- steps ---------------------------------------------------------------------------------

    def step(self, output: Any) -> StepDirectives:
        """Close a scheduler step; returns what the workers do in it."""
        # Workers hold memory for as many slots as run at once.
        for request_id in output.preempted_req_ids or ():
            self._slots.release(request_id)
        self._latency.step(output)
        step = self._latest = SchedulerStep(output, self.steps + 1, self._slots)
        directives = StepDirectives()
        for kind in self.kinds:
            kind.step(step, directives)
        if directives.before_forward:
            compat.load_before_forward(output)
        if step.names_slots and not self._second_runner:
            directives.rows = row_slots(
                self._managers, step.starts, step.scheduled, step.slots, self._drafts
            )
        if self.misses is not None:
            self.misses.step(self.steps + 2, output.preempted_req_ids or ())
        self._events.emit()
        if torch_state.state() != self._torch:
            self._restore_torch()
        self.steps += 1
        self._events.step = self.steps + 1
        if self._live is not None:
            self._live.step(output.total_num_scheduled_tokens)
        return directives

    def _restore_torch(self) -> None:
        changed = ", ".join(torch_state.restore(self._torch))
        if not self._torch_changed:
            self._torch_changed = True
            logger.warning("kvplug: a plugin changed %s in the scheduler; put back", changed)

    def on_report(self, report: StepReport) -> None:
        """Take in what the workers did in a step."""
        for kind in self.kinds:
            kind.on_report(report)
        if self.shadow is not None and report.shadow is not None:
            self.shadow.on_report(report.shadow)

    def reset(self) -> bool:
        """Drop all stored KV; returns False if some of it may still be used."""
        if self.shadow is not None:
            self.shadow.clear()
        done = [kind.reset() for kind in self.kinds]
        return all(done)

    # -- reports -------------------------------------------------------------------------------

    def reports(self) -> list[PolicyReport]:
        """Reports of all policies so far, in the deployment's order."""
        by_kind = {kind.kind: kind for kind in self.kinds}
        return [
            report
            for kind in self.deployment.choices
            if kind in by_kind
            for report in by_kind[kind].reports()
        ]

    def increments(self) -> dict[str, Any]:
        """What was measured since the last call (`Increments`); empty where nothing is due.

        vLLM asks at the end of every step, when its tokens are there.
        """
        self._latency.outputs()
        return self.measurements.increments(bool(self._requests))

    def samples(self) -> Iterator[Sample]:
        """What is measured whatever the kinds."""
        yield STEPS.of(self.steps)
        for cause, count in self.refused.items():
            yield OPTIONS_REFUSED.of(count, word(cause))
        if self._events.log is not None:
            yield EVENTS_LOST.of(self._events.log.lost)

    def stop(self) -> None:
        """Stop every kind and log the summary. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._live is not None:
            self._live.close()
        for kind in self.kinds:
            kind.stop()
        self._events.emit()
        reports = self.reports()
        for line in summary_lines(reports, self.steps):
            logger.info("%s", line)
        if self.refused:
            counts = ", ".join(f"{cause} {n:,}" for cause, n in sorted(self.refused.items()))
            logger.info("  request options refused: %s", counts)
        self._latency.stop()
        self._energy.stop()
        if self._tracing is not None:
            self._tracing.stop()
        log = self._events.log
        if log is not None:
            log.close()
            if log.lost:
                logger.warning("  events lost, not in %s: %s", log.path, f"{log.lost:,}")
        hook = "kvplug_engine_stopping"
        call_each(plugins().callers(hook), hook, reports=reports)


def _event_log(deployment: Deployment, vllm_config: Any, engine: EngineView) -> EventLog | None:
    """The log that a deployment asks for, or None.

    Raises:
        DeploymentError: It cannot be written.
    """
    observe = deployment.observe
    if observe.events is None:
        return None
    rank = int(vllm_config.parallel_config.data_parallel_index)
    path = of_rank(Path(observe.events), rank)
    facts = {"block_size": engine.block_size, "pool_blocks": engine.num_blocks, "rank": rank}
    try:
        return EventLog(path, int(observe.events_size * MIB), facts)
    except ValueError as error:
        fix = "name a file in a folder that the engine may write to, one for each engine."
        problem = Refusal("kvplug.observe.events", f"{error}.", fix)
        raise DeploymentError(deployment.source, [problem]) from None


def _by_name(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(name): count for name, count in counts.items() if count}


def _is_left_out(request: Any) -> bool:
    """True if the request's output does not carry what is said of it: a streamed one's never does,
    and one that the server ended, at a stop string, has ended there by then."""
    params = request.sampling_params
    if params is None:
        return False
    aborted = request.status == RequestStatus.FINISHED_ABORTED
    return aborted or params.output_kind == RequestOutputKind.DELTA
