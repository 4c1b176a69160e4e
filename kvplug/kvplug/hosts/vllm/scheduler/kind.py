"""The protocol of one policy kind in the scheduler process."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from vllm.logger import init_logger

from kvplug.contract import EngineView, Kind, Policy, PolicyReport
from kvplug.deployment import Deployment
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.events import Events
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.request_options import RequestOptions

logger = init_logger("vllm.kvplug")


@dataclass(frozen=True)
class SchedulerContext:
    """Everything a kind is built from.

    Attributes:
        deployment: The deployment, checked against the engine.
        vllm_config: The engine's config.
        engine: The engine as policies see it.
        events: Takes the kind's events.
        slots: Slots of requests.
        block_bytes: Bytes of one block in all layers.
    """

    deployment: Deployment
    vllm_config: Any
    engine: EngineView
    events: Events
    slots: Slots
    block_bytes: int = 0


class SchedulerStep:
    """One scheduler step.

    Args:
        output: vLLM's ``SchedulerOutput``.
        number: Number of the step, from 1.
        slots: Slots of requests.

    Attributes:
        output: As given.
        number: As given.
        scheduled: Tokens scheduled, by request.
    """

    def __init__(self, output: Any, number: int, slots: Slots):
        self.output = output
        self.number = number
        self.scheduled: dict[str, int] = output.num_scheduled_tokens
        self._slots = slots

    @cached_property
    def starts(self) -> dict[str, int]:
        """Tokens computed before the step, by request scheduled."""
        cached = self.output.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return starts | {r.req_id: r.num_computed_tokens for r in self.output.scheduled_new_reqs}

    @cached_property
    def added(self) -> set[str]:
        """Requests that take a place on the workers in this step: new ones, those that start over
        after a preemption, and those whose input goes on."""
        cached = self.output.scheduled_cached_reqs
        return {r.req_id for r in self.output.scheduled_new_reqs} | set(cached.resumed_req_ids)

    @cached_property
    def slots(self) -> dict[str, int]:
        """Slot of each request scheduled. Workers learn the slots of a step only if a kind reads
        this, so directives that name slots must take them from here."""
        return {request_id: self._slots.take(request_id) for request_id in self.starts}

    @property
    def names_slots(self) -> bool:
        """True once a kind has read `slots`."""
        return "slots" in self.__dict__


@dataclass
class Answer:
    """Facts about a request that its output carries.

    Attributes:
        exact: False once a kind has approximated anything.
        fields: Facts by name.
        refused: Reason by refused request option.
    """

    exact: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def as_params(self) -> dict[str, Any] | None:
        """The answer as ``kv_transfer_params``, or None if there is nothing to say."""
        if self.exact and not self.fields and not self.refused:
            return None
        refused = {"refused": self.refused} if self.refused else {}
        return {"kvplug": {"exact": self.exact, **self.fields, **refused}}


class KindScheduler:
    """One kind's part of the scheduler process. Every method but `reports` does nothing by default.

    No method may raise because a policy failed: the kind falls back to what vLLM does, and says so
    with an event and in its reports.

    Args:
        context: Everything it is built from.

    Attributes:
        kind: The kind.
    """

    kind: ClassVar[Kind]

    def __init__(self, context: SchedulerContext):
        self.context = context
        self._without_counters: set[str] = set()

    def bind(self, manager: Any) -> None:
        """Bind to vLLM's KV-cache manager, before its first allocation."""

    def started(self) -> list[str]:
        """Lines for the log at start-up, after `bind`."""
        return []

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Take in a request, before it is looked up or scheduled.

        Args:
            request: vLLM's ``Request``.
            options: Its valid options.
        """

    def matched(self, request: Any, num_local: int) -> int | None:
        """Tokens after the engine's own ``num_local`` cached ones that the kind provides; None to
        be asked again later."""
        return 0

    def allocated(self, request: Any, blocks: Any, num_external: int) -> None:
        """Take note of a request's blocks; ``num_external`` of its tokens must be loaded."""

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Add the kind's part of a step's directives."""

    def on_report(self, report: StepReport) -> None:
        """Take in the kind's part of the workers' report."""

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """Forget a request that ended and add to its answer.

        Args:
            request: vLLM's ``Request``.
            blocks: Its blocks in the first KV-cache group.
            answer: The answer.
        """

    def reports(self) -> list[PolicyReport]:
        """Reports of the kind's policies, in the deployment's order."""
        raise NotImplementedError

    def mark(self) -> object:
        """A value that differs whenever `reports` may have changed; cheap, read every step."""
        return None

    def stop(self) -> None:
        """Release what the kind holds, at the engine's end."""

    def own_counters(self, policy: Policy) -> dict[str, float]:
        """Counters of the policy itself; none any more once it failed to give them."""
        if policy.name in self._without_counters:
            return {}
        try:
            return {str(name): float(value) for name, value in policy.counters().items()}
        except Exception:
            self._without_counters.add(policy.name)
            logger.exception("policy %r failed in counters(); they are left out", policy.name)
            return {}
