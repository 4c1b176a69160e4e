"""The protocol of one policy kind in the scheduler process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from vllm.logger import init_logger

from kvplug.contract import EngineView, Kind, PolicyReport
from kvplug.deployment import Deployment
from kvplug.hosts.vllm.messages import StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.events import Events
from kvplug.hosts.vllm.scheduler.misses import MissObserver
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.observe.events import EventType
from kvplug.observe.live import Facts
from kvplug.observe.metric import Sample
from kvplug.observe.request_spans import RequestSpans
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
        spans: Takes what is done for requests; None where nobody traces.
        misses: Follows why prompts miss, and tells of evictions; None where that is off.
    """

    deployment: Deployment
    vllm_config: Any
    engine: EngineView
    events: Events
    slots: Slots
    block_bytes: int = 0
    spans: RequestSpans | None = None
    misses: MissObserver | None = None


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

    def as_attributes(self) -> dict[str, str | int | float | bool]:
        """The answer as attributes of a span: its plain fields."""
        plain = {k: v for k, v in self.fields.items() if isinstance(v, str | int | float)}
        found: dict[str, str | int | float | bool] = {f"kvplug.{k}": v for k, v in plain.items()}
        return found | {"kvplug.exact": self.exact, "kvplug.refused_options": len(self.refused)}


class KindScheduler:
    """One kind's part of the scheduler process. Every method but `reports` does nothing by default.

    No method may raise because a policy failed: the kind falls back to what vLLM does, and says so
    with an event and in its reports.

    Args:
        context: Everything it is built from.

    Attributes:
        kind: The kind.
        errors: Failures of the kind and of its policy, those that workers report among them.
        awaits_loads: True if requests wait until the tokens that `matched` promised are there;
            False if they are there in the step that computes on them.
    """

    kind: ClassVar[Kind]
    awaits_loads: bool = False

    def __init__(self, context: SchedulerContext):
        self.context = context
        self.errors = 0
        self._failed: str | None = None

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

    def reset(self) -> bool:
        """Drop whatever the kind keeps of KV that requests computed, and what is on its way.

        Returns:
            False if something of it may still be used.
        """
        return True

    def take_events(self) -> Sequence[Any]:
        """vLLM's KV events of KV that the kind stored or gave up outside the pool, since the last
        call; asked where ``--kv-events-config`` is on."""
        return ()

    def reports(self) -> list[PolicyReport]:
        """Reports of the kind's policies, in the deployment's order."""
        raise NotImplementedError

    def samples(self) -> Iterable[Sample]:
        """What the kind measures (`kvplug.observe.catalogue`), beside what its reports say."""
        return ()

    def show(self, facts: Facts) -> None:
        """Add what the live page shows of the kind; called while somebody watches, once a second
        at most, in the scheduler's thread."""

    def stop(self) -> None:
        """Release what the kind holds, at the engine's end."""

    def _guarded(self, hook: str, instead: Any, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a part of the kind; if it fails, the engine goes on without, and ``instead``."""
        try:
            return call(*arguments)
        except Exception as error:
            self.errors += 1
            cause = f"{hook}: {type(error).__name__}: {error}"
            if self._failed is None:
                logger.error("%s failed in %s", self.kind, cause, exc_info=error)
            self._fall_back(cause)
            return instead

    def _fall_back(self, cause: str) -> None:
        """Tell observers, once, that vLLM's own way is taken from now on."""
        if self._failed is None:
            self._failed = cause
            self.context.events.add(EventType.FALLEN_BACK, self.kind, detail=cause)
