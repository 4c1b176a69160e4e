"""The scheduler half: policies in vLLM's scheduler process, one object per kind."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.logger import init_logger

from kvplug.contract import Kind, PolicyReport
from kvplug.deployment import Deployment
from kvplug.hosts.vllm.admission import require_groups
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.attention import AttentionScheduler
from kvplug.hosts.vllm.scheduler.events import Events, call_each
from kvplug.hosts.vllm.scheduler.format import FormatScheduler
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.scheduler.prefix_cache import PrefixCacheScheduler
from kvplug.hosts.vllm.scheduler.reuse import ReuseScheduler
from kvplug.hosts.vllm.scheduler.sequence import SequenceScheduler
from kvplug.hosts.vllm.scheduler.slots import Slots, row_slots
from kvplug.hosts.vllm.view import engine_view
from kvplug.observe.events import EventType
from kvplug.observe.summary import summary_lines
from kvplug.registry import plugins
from kvplug.request_options import RequestOptions

logger = init_logger("vllm.kvplug")

KINDS: tuple[type[KindScheduler], ...] = (
    # Takes a request's cache salt for the user's own, so before format makes it longer.
    ReuseScheduler,
    # After reuse: at a request's end, reuse must still see what attention has approximated.
    AttentionScheduler,
    FormatScheduler,
    SequenceScheduler,
    PrefixCacheScheduler,
)
"""Kinds in the order in which they see requests, steps and reports."""


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
        steps: Steps so far.
        refused: Request options refused, by cause.

    Raises:
        DeploymentError: The model's layers do not fit the deployment's policies.
    """

    def __init__(self, deployment: Deployment, vllm_config: Any, kv_cache_config: Any):
        require_groups(deployment, vllm_config, kv_cache_config)
        self.deployment = deployment
        self.engine = engine_view(vllm_config, num_blocks=kv_cache_config.num_blocks - 1)
        self.steps = 0
        self.refused: Counter[str] = Counter()
        self._events = Events(deployment)
        self._slots = Slots()
        sizes = {tensor.size for tensor in kv_cache_config.kv_cache_tensors}
        context = SchedulerContext(
            deployment,
            vllm_config,
            self.engine,
            self._events,
            self._slots,
            block_bytes=max(sizes, default=0) // kv_cache_config.num_blocks,
        )
        self.kinds = tuple(of(context) for of in KINDS if deployment.choice(of.kind) is not None)
        self._managers: list[Any] = []
        self._second_runner = bool(vllm_config.use_v2_model_runner)
        speculative = vllm_config.speculative_config
        self._drafts = speculative.num_speculative_tokens if speculative is not None else 0
        self._refused: dict[str, dict[str, str]] = {}
        self._reported: dict[str, float] = {}
        self._mark: object = None
        self._stopped = False

    def bind(self, manager: Any) -> None:
        """Bind policies to a KV-cache manager, before its first allocation."""
        self._managers = list(manager.coordinator.single_type_managers)
        for kind in self.kinds:
            kind.bind(manager)
        chosen = [
            f"{c.policy.kind}: {c.policy.name} {c.options.model_dump()}"
            for c in self.deployment.all()
        ]
        logger.info("kvplug is on: %s", "; ".join(chosen) or "no policy")
        for kind in self.kinds:
            for line in kind.started():
                logger.info("kvplug: %s", line)
        hook = "kvplug_engine_started"
        call_each(plugins().callers(hook), hook, engine=self.engine)

    # -- requests ------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Take in a request and its options."""
        parsed = RequestOptions.parse(
            request.kv_transfer_params,
            num_prompt_tokens=request.num_prompt_tokens,
            session_id=request.session_id,
        )
        if parsed.refused:
            self._refused[request.request_id] = parsed.sentences
        for key, refused in parsed.refused.items():
            self.refused[str(refused.cause)] += 1
            kind = Kind(key) if key in set(Kind) else None
            self._events.add(EventType.REFUSED, kind, detail=refused.sentence)
        for one in self.kinds:
            one.on_new_request(request, parsed.options)

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own hit that need no prefill; None to be asked again."""
        for kind in self.kinds:
            found = kind.matched(request, num_local)
            if found != 0:
                return found
        return 0

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """Take note that a request was given its blocks."""
        for kind in self.kinds:
            kind.allocated(request, blocks, num_external)

    def finished(self, request: Any, blocks: list[int]) -> dict[str, Any] | None:
        """Forget a request that ended; returns what its output says about it, or None."""
        answer = Answer(refused=self._refused.pop(request.request_id, {}))
        for kind in self.kinds:
            kind.finished(request, blocks, answer)
        self._slots.release(request.request_id)
        return answer.as_params()

    # -- steps ---------------------------------------------------------------------------------

    def step(self, output: Any) -> StepDirectives:
        """Close a scheduler step; returns what the workers do in it."""
        step = SchedulerStep(output, self.steps + 1, self._slots)
        directives = StepDirectives()
        for kind in self.kinds:
            kind.step(step, directives)
        if directives.before_forward:
            # The runner then starts loads, and with them tells the requests of rows, before.
            output.has_sync_kv_loads = True
        if step.names_slots and not self._second_runner:
            directives.rows = row_slots(
                self._managers, step.starts, step.scheduled, step.slots, self._drafts
            )
        self._events.emit()
        self.steps += 1
        self._events.step = self.steps + 1
        return directives

    def on_report(self, report: StepReport) -> None:
        """Take in what the workers did in a step."""
        for kind in self.kinds:
            kind.on_report(report)

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

    def increments(self) -> dict[str, float]:
        """Counter increments since the last call, by ``kind:policy:counter``.

        Called every step, so it looks closer only where a mark changed.
        """
        mark = (self.refused.total(), *(kind.mark() for kind in self.kinds))
        if mark == self._mark:
            return {}
        self._mark = mark
        counters: dict[str, float] = {
            f"request:options:refused {cause}": count for cause, count in self.refused.items()
        }
        for report in self.reports():
            for name, value in {**report.counters, "errors": report.errors}.items():
                counters[f"{report.kind}:{report.name}:{name}"] = value
        found = {}
        for key, value in counters.items():
            before = self._reported.get(key, 0)
            # A Prometheus counter cannot go down; an attempt would end the engine.
            if value > before:
                found[key] = value - before
                self._reported[key] = value
        return found

    def stop(self) -> None:
        """Stop every kind and log the summary. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        for kind in self.kinds:
            kind.stop()
        self._events.emit()
        reports = self.reports()
        for line in summary_lines(reports, self.steps):
            logger.info("%s", line)
        if self.refused:
            counts = ", ".join(f"{cause} {n:,}" for cause, n in sorted(self.refused.items()))
            logger.info("  request options refused: %s", counts)
        hook = "kvplug_engine_stopping"
        call_each(plugins().callers(hook), hook, reports=reports)
