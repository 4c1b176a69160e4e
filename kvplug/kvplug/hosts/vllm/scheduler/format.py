"""The format kind in the scheduler process: which storage variant each request is assigned."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vllm.logger import init_logger

from kvplug.containment import ContainedPolicy, PolicyFailure
from kvplug.contract import EngineView, FormatPolicy, Kind, PolicyReport
from kvplug.hosts.vllm import compat, engine
from kvplug.hosts.vllm.messages import FormatDirectives, StepDirectives, StepReport
from kvplug.hosts.vllm.scheduler.kind import (
    Answer,
    KindScheduler,
    SchedulerContext,
    SchedulerStep,
)
from kvplug.observe.catalogue import COMPRESSION, FORMAT_TOKENS, SAVED_READS, TOKEN_BYTES
from kvplug.observe.events import EventType
from kvplug.observe.live import Facts
from kvplug.observe.metric import Sample
from kvplug.plain_text import CAUSE, one_line
from kvplug.request_options import RequestOptions

logger = init_logger("vllm.kvplug")


@dataclass
class FormatCounters:
    """Counters of a format.

    Attributes:
        tokens: Tokens written, once per layer.
        bytes_per_token: Bytes of one token in all layers.
        stock_bytes_per_token: The same in the model's own dtype.
    """

    tokens: int = 0
    bytes_per_token: int = 0
    stock_bytes_per_token: int = 0


@dataclass(frozen=True)
class Declared:
    """What a format declares, read once.

    Attributes:
        token_bytes: Bytes of one token, by layer.
        fingerprint: Its fingerprint.
        identities: Fingerprint of each assignment.
        keeps_recent: Whether a layer keeps recent tokens.
    """

    token_bytes: list[int]
    fingerprint: str
    identities: list[str]
    keeps_recent: bool

    @classmethod
    def of(cls, policy: FormatPolicy, view: EngineView) -> Declared:
        """Ask the policy."""
        return cls(
            [policy.layout(layer).token_bytes(layer) for layer in view.layers],
            policy.fingerprint(),
            list(policy.assignments()),
            any(policy.recent(layer) for layer in view.layers),
        )


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
        self.contained = ContainedPolicy(policy, log=logger)
        self.counters = FormatCounters()
        choice = context.deployment.choice(Kind.FORMAT)
        assert choice is not None
        declared = engine.at_start(context.deployment, choice, Declared.of, policy, context.engine)
        self.counters.bytes_per_token = sum(declared.token_bytes)
        for layer in context.engine.layers:
            element = 4 if layer.dtype == "float32" else 2
            self.counters.stock_bytes_per_token += (
                2 * layer.num_kv_heads * layer.head_size * element
            )
        self._saved = max(0, self.counters.stock_bytes_per_token - self.counters.bytes_per_token)
        self._unread = 0
        self._token_bytes = declared.token_bytes
        self._fingerprint = declared.fingerprint
        self._identities = declared.identities
        self.by_request = len(self._identities) > 1 or declared.keeps_recent
        self._second_runner = bool(context.vllm_config.use_v2_model_runner)
        self._assigned: dict[str, int] = {}
        self._pages: Any = None
        # vLLM computes what could not be stored again, but a step it has scheduled ahead goes on
        # without; with several groups nobody tells vLLM whose blocks they are.
        self._may_miss = int(context.vllm_config.max_concurrent_batches) > 1
        self._missed: dict[str, int] = {}
        self._worker_counters: dict[str, float] = {}

    def bind(self, manager: Any) -> None:
        """Bind to the manager whose prefix cache must not have what could not be stored."""
        self._pages = manager
        self._may_miss |= len(manager.coordinator.single_type_managers) > 1

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
        self._unread += self._saved * sum(step.output.scheduled_cached_reqs.num_computed_tokens)
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
        self.errors += part.errors
        self._worker_counters = part.counters or self._worker_counters
        if part.unwritten:
            # vLLM let them into the prefix cache when it allocated them.
            self._pages.evict_blocks(part.unwritten)
            if self._may_miss:
                self._note_missed(part.unwritten)
        if part.signals is not None:
            self._observe(part.signals)
        if part.failed is not None:
            self._fall_back(part.failed)

    def finished(self, request: Any, blocks: list[int], answer: Answer) -> None:
        """State the format that the request was stored in."""
        assigned = self._assigned.pop(request.request_id, None)
        identity = self._fingerprint if assigned is None else self._identities[assigned]
        answer.exact &= self.contained.exact
        answer.fields["format"] = identity
        if missed := self._missed.pop(request.request_id, 0):
            answer.exact = False
            answer.fields["blocks_not_stored"] = missed

    def reports(self) -> list[PolicyReport]:
        """The policy's report; tokens written count as decisions."""
        counters = asdict(self.counters)
        own = self.contained.counters()
        # Both processes count under the same names; what one does not do stays 0 there.
        merged = {n: max(v, own.get(n, v)) for n, v in self._worker_counters.items()}
        return [
            PolicyReport(
                str(self.kind),
                self.contained.policy_name,
                self.contained.exact,
                acted=self.counters.tokens,
                errors=self.errors,
                counters=counters | own | merged,
                own=own | merged,
                retired=self._failed is not None,
            )
        ]

    def samples(self) -> Iterator[Sample]:
        """What was written, and what that takes."""
        policy, kind = self.contained.policy_name, str(self.kind)
        own, stock = self.counters.bytes_per_token, self.counters.stock_bytes_per_token
        yield FORMAT_TOKENS.of(self.counters.tokens, policy)
        yield TOKEN_BYTES.of(own, policy, "format")
        yield TOKEN_BYTES.of(stock, policy, "stock")
        yield SAVED_READS.of(self._unread, kind, policy)
        yield COMPRESSION.of(stock / own if own else 1.0, kind, policy)

    def show(self, facts: Facts) -> None:
        """Bytes of a token by layer."""
        facts.token_bytes = self._token_bytes

    def _note_missed(self, unwritten: set[int]) -> None:
        """Take note of the requests that hold blocks whose tokens could not be stored."""
        for manager in self._pages.coordinator.single_type_managers:
            for request_id, blocks in manager.req_to_blocks.items():
                if count := sum(block.block_id in unwritten for block in blocks):
                    self._missed[request_id] = self._missed.get(request_id, 0) + count

    def _assign(self) -> int:
        if len(self._identities) == 1:
            return 0
        try:
            assigned: int = self.contained.run(self._asked_for_an_assignment)
        except PolicyFailure as failure:
            self._failure("assign", failure)
            return 0
        return assigned

    def _asked_for_an_assignment(self) -> int:
        assigned = self.policy.assign()
        number = int.__add__(operator.index(assigned), 0)
        if not 0 <= number < len(self._identities):
            raise ValueError(f"assignment {number} is not below {len(self._identities)}")
        return number

    def _observe(self, signals: list[float]) -> None:
        try:
            adjusted: str = self.contained.run(self._observed, list(signals))
        except PolicyFailure as failure:
            self._failure("observe", failure)
            return
        if adjusted:
            logger.info("kvplug: %s", adjusted)
            self.context.events.add(EventType.ADJUSTED, self.kind, detail=adjusted)

    def _observed(self, signals: list[float]) -> str:
        return one_line(self.policy.observe(signals) or "", CAUSE)

    def _failure(self, method: str, failure: PolicyFailure) -> None:
        self.errors += 1
        if self._failed is None:
            self.contained.log(f"failed in {method}", failure)
        self._fall_back(f"{method}: {failure.cause}")
