"""The attention kind in the scheduler process: which requests the policy may serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np

from kvplug.containment import ContainedPolicy
from kvplug.contract import Kind, PolicyReport
from kvplug.hosts.vllm import engine
from kvplug.hosts.vllm.messages import AttentionDirectives, StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.hosts.vllm.spec import ApproximateManager
from kvplug.observe.catalogue import ATTENTION_REQUESTS, ATTENTION_ROWS
from kvplug.observe.metric import Sample
from kvplug.request_options import RequestOptions


@dataclass
class ServedRequest:
    """A request under way that the policy may serve.

    Attributes:
        num_prompt_tokens: Tokens of its prompt.
        owner: Number that workers know it by in its slot; another one once it starts over.
        start: Tokens computed before its latest step.
    """

    num_prompt_tokens: int
    owner: int
    start: int = 0


class AttentionScheduler(KindScheduler):
    """Names the requests that the policy serves, and keeps their output out of the prefix cache.

    Attributes:
        policy: The attention policy; here it only states what it is.
        requests: Requests served so far.
        rows: Decode rows the policy attended, once per layer.
    """

    kind = Kind.ATTENTION

    def __init__(self, context: SchedulerContext):
        super().__init__(context)
        policy = engine.attention_policy(context.deployment, context.vllm_config)
        assert policy is not None
        self.policy = policy
        self.contained = ContainedPolicy(policy)
        self.requests = 0
        self.rows = 0
        self._managers: list[ApproximateManager] = []
        self._served: dict[str, ServedRequest] = {}
        self._numbers = count()
        self._worker_counters: dict[str, float] = {}

    def bind(self, manager: Any) -> None:
        """Bind to the managers of groups whose requests may hold approximate KV."""
        managers = manager.coordinator.single_type_managers
        self._managers = [m for m in managers if isinstance(m, ApproximateManager)]

    def on_new_request(self, request: Any, options: RequestOptions) -> None:
        """Take in a request that asks for approximate attention."""
        if options.attention != "approximate" or request.pooling_params is not None:
            return
        self.requests += 1
        self._served[request.request_id] = ServedRequest(
            request.num_prompt_tokens, next(self._numbers)
        )
        for manager in self._managers:
            manager.set_approximate(self.kind, request.request_id, request.num_prompt_tokens)

    def step(self, step: SchedulerStep, into: StepDirectives) -> None:
        """Send slot and owner of each request that generates."""
        if not self._served:
            return
        served = []
        for request_id, start in step.starts.items():
            request = self._served.get(request_id)
            if request is None:
                continue
            if start < request.start:
                # It starts over: workers remember it with blocks or tokens it no longer has.
                request.owner = next(self._numbers)
            request.start = start
            # The prompt is exact to its last token, which may come as a row of one.
            if start >= request.num_prompt_tokens:
                served.append((step.slots[request_id], request.owner))
                into.names[request_id] = step.slots[request_id]
        if served:
            into.attention = AttentionDirectives(np.array(served, dtype=np.int32))
            # The second runner builds without them, and again once it knows their rows.
            into.before_forward |= bool(self.context.vllm_config.use_v2_model_runner)

    def on_report(self, report: StepReport) -> None:
        """Count the rows that workers attended."""
        part = report.attention
        if part is None:
            return
        self.rows += part.rows
        self._worker_counters = part.counters or self._worker_counters
        if part.failed is not None:
            self._fall_back(part.failed)

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """State that the request was served approximately."""
        for manager in self._managers:
            manager.set_approximate(self.kind, request.request_id, None)
        if self._served.pop(request.request_id, None) is not None:
            answer.exact = False
            answer.fields["attention"] = self.contained.policy_name

    def reports(self) -> list[PolicyReport]:
        """The policy's report; rows attended count as decisions."""
        counters = {"requests": self.requests, "rows": self.rows} | self._worker_counters
        return [
            PolicyReport(
                str(self.kind),
                self.contained.policy_name,
                self.contained.exact,
                acted=self.rows,
                errors=int(self._failed is not None),
                counters=counters,
                own=dict(self._worker_counters),
                retired=self._failed is not None,
            )
        ]

    def samples(self) -> Iterator[Sample]:
        """Requests and rows."""
        yield ATTENTION_REQUESTS.of(self.requests, self.contained.policy_name)
        yield ATTENTION_ROWS.of(self.rows, self.contained.policy_name)
