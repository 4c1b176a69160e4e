"""The format kind in the scheduler process: which storage variant each request is assigned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug.contract import Kind, PolicyReport
from kvplug.hosts.vllm import compat, engine
from kvplug.hosts.vllm.messages import FormatDirectives, StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.observe.events import EventType
from kvplug.request_options import RequestOptions

logger = init_logger("vllm.kvplug")


@dataclass
class FormatCounters:
    """Counters of a format.

    Attributes:
        tokens: Tokens written, once per layer.
        bytes_per_token: Bytes of one token in all layers.
        stock_bytes_per_token: The same in the model's own dtype.
        errors: Failures of the policy to write, attend, read, assign or observe.
    """

    tokens: int = 0
    bytes_per_token: int = 0
    stock_bytes_per_token: int = 0
    errors: int = 0


class FormatScheduler(KindScheduler):
    """Assigns requests and keeps those of different assignments apart in the prefix cache.

    Attributes:
        policy: The format policy.
        counters: Its counters.
        by_request: True where the first runner's workers treat requests apart, so that they must
            know whose a row is. The second's know by themselves.
    """

    kind = Kind.FORMAT

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        policy = engine.format_policy(context.deployment, context.vllm_config)
        assert policy is not None
        self.policy = policy
        self.counters = FormatCounters()
        for layer in context.engine.layers:
            self.counters.bytes_per_token += policy.layout(layer).token_bytes(layer)
            element = 4 if layer.dtype == "float32" else 2
            self.counters.stock_bytes_per_token += (
                2 * layer.num_kv_heads * layer.head_size * element
            )
        self._identities = list(policy.assignments())
        self.by_request = len(self._identities) > 1 or any(
            policy.recent(layer) for layer in context.engine.layers
        )
        self._second_runner = bool(context.vllm_config.use_v2_model_runner)
        self._assigned: dict[str, int] = {}
        self._failed: str | None = None
        self._worker_counters: dict[str, float] = {}

    def started(self) -> list[str]:
        """Bytes per token."""
        own, stock = self.counters.bytes_per_token, self.counters.stock_bytes_per_token
        return [
            f"a token takes {own:,} bytes of KV in all layers instead of {stock:,} "
            f"({stock / own:.2f}x)"
        ]

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Assign the request, and make its block hashes depend on that.

        It keeps its assignment when it starts over after a preemption.
        """
        assigned = self._assign()
        self._assigned[request.request_id] = assigned
        compat.salt_request(request, f"kvplug-format:{self._identities[assigned]}")

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Send the assignment of each scheduled request.

        The second runner's workers keep it by the slot that a request is given when it starts, or
        starts over after a preemption; they must have it before its first tokens are stored.
        """
        names: Iterable[str] = step.starts
        if self._second_runner:
            several = len(self._identities) > 1
            names = [r.req_id for r in step.output.scheduled_new_reqs] if several else []
        elif not self.by_request:
            return
        rows = [(step.slots[name], self._assigned.get(name, 0)) for name in names]
        if not rows:
            return
        into.format = FormatDirectives(np.array(rows, dtype=np.int32))
        if self._second_runner:
            into.names |= {name: step.slots[name] for name in names}
            into.before_forward = True

    def on_report(self, report: StepReport) -> None:
        """Count what workers wrote, and let the policy observe its signals."""
        part = report.format
        if part is None:
            return
        self.counters.tokens += part.tokens
        self.counters.errors += part.errors
        self._worker_counters = part.counters or self._worker_counters
        if part.signals is not None:
            self._observe(part.signals)
        if part.failed is not None:
            self._fall_back(part.failed)

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """State the format that the request was stored in."""
        assigned = self._assigned.pop(request.request_id, None)
        identity = self.policy.fingerprint() if assigned is None else self._identities[assigned]
        answer.exact &= self.policy.exact
        answer.fields["format"] = identity

    def reports(self) -> list[PolicyReport]:
        """The policy's report; tokens written count as decisions."""
        counters = asdict(self.counters)
        errors = int(counters.pop("errors"))
        own = self.own_counters(self.policy)
        # Both processes count under the same names; what one does not do stays 0 there.
        merged = {n: max(v, own.get(n, v)) for n, v in self._worker_counters.items()}
        return [
            PolicyReport(
                str(self.kind),
                self.policy.name,
                self.policy.exact,
                acted=self.counters.tokens,
                errors=errors,
                counters=counters | own | merged,
            )
        ]

    def mark(self) -> object:
        """Tokens written."""
        return self.counters.tokens

    def _assign(self) -> int:
        if len(self._identities) == 1:
            return 0
        try:
            assigned = self.policy.assign()
            if 0 <= assigned < len(self._identities):
                return assigned
            raise ValueError(f"assignment {assigned} is not below {len(self._identities)}")
        except Exception as error:
            self._failure("assign", error)
            return 0

    def _observe(self, signals: list[float]) -> None:
        try:
            adjusted = self.policy.observe(signals)
        except Exception as error:
            self._failure("observe", error)
            return
        if adjusted:
            logger.info("kvplug: %s", adjusted)
            self.context.events.add(EventType.ADJUSTED, self.kind, detail=adjusted)

    def _failure(self, method: str, error: Exception) -> None:
        self.counters.errors += 1
        cause = f"{method}: {type(error).__name__}: {error}"
        if self._failed is None:
            logger.error("format policy failed in %s", cause, exc_info=error)
        self._fall_back(cause)

    def _fall_back(self, cause: str) -> None:
        if self._failed is None:
            self._failed = cause
            self.context.events.add(EventType.FALLEN_BACK, self.kind, detail=cause)
