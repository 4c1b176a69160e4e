"""Plans the evictions of a scoring policy, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from kvplug.containment import ContainedPolicy, PolicyFailure
from kvplug.contract import ScoringPolicy
from kvplug.hosts.pruning import FLUSH, SETTLED_TOKENS
from kvplug.hosts.vllm.messages import Plans, RowPlan
from kvplug.hosts.vllm.scheduler.kind import SchedulerStep
from kvplug.hosts.vllm.scheduler.slots import Slots
from kvplug.hosts.vllm.spec import PrunedManager

MEASUREMENTS_KEPT = 4
"""Latest measurements of a request and group: the last may be too young to decide a size."""

SIZES_REPORTED = 64
"""Latest evictions of a request that its output lists."""


@dataclass
class PlannedRequest:
    """A request under way that may be evicted from.

    Attributes:
        num_prompt_tokens: Tokens of its prompt.
        num_tokens: Tokens of its text scheduled so far.
        due: Tokens of its text before which nothing is to be done.
        measured: Latest measurements per group, by tokens computed, averaged over layers and ranks.
        sizes: Tokens kept at each of its latest evictions, by tokens computed.
        resized: Blocks decided at each eviction so far, per group: a request that starts over
            after a preemption is evicted from as it was before.
    """

    num_prompt_tokens: int
    num_tokens: int = 0
    due: int = 0
    measured: dict[int, dict[int, list[float]]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    resized: dict[int, list[int]] = field(default_factory=dict)


class EvictionPlanner:
    """Plans evictions of running requests and follows what workers measured.

    Args:
        policy: The scoring policy, contained by the caller or here.
        managers: The KV-cache groups it applies to.
        groups: Group number of each manager: the index of its share among the policy's.
        slots: Slots of requests.

    Attributes:
        policy: The policy.
        contained: The same, as it is called.
        cumulative: Whether it wants cumulative attention.
        resize_error: Cause the policy's ``resize`` is not called any more for, or None.
    """

    def __init__(
        self,
        policy: ScoringPolicy | ContainedPolicy,
        managers: list[PrunedManager],
        groups: list[int],
        slots: Slots,
    ):
        contained = policy if isinstance(policy, ContainedPolicy) else ContainedPolicy(policy)
        self.policy: ScoringPolicy = cast(ScoringPolicy, contained.target)
        self.contained = contained
        self.cumulative = bool(self.policy.wants_cumulative_attention)
        self.managers = managers
        self.groups = groups
        self.resize_error: str | None = None
        self._slots = slots
        self._prompts: dict[str, int] = {}
        self._requests: dict[str, PlannedRequest] = {}
        for manager, group in zip(managers, groups, strict=True):
            manager.prompt_tokens = self._prompts
            if self.policy.resizes:
                manager.resize = self._resizer(manager.block_size, manager.limits.share, group)

    def add(self, request_id: str, num_prompt_tokens: int) -> None:
        """Add a request that may be evicted from."""
        self._prompts[request_id] = num_prompt_tokens
        self._requests[request_id] = PlannedRequest(num_prompt_tokens)

    def finish(self, request_id: str) -> list[tuple[int, int]]:
        """Forget a request; returns ``(tokens computed, tokens kept)`` of its latest evictions."""
        self._prompts.pop(request_id, None)
        request = self._requests.pop(request_id, None)
        return list(request.sizes.items()) if request is not None else []

    def step(self, step: SchedulerStep) -> Plans:
        """Return the plans of all requests of one step."""
        plans: Plans = {}
        for request_id in step.starts:
            plans |= self._plan(step, request_id)
        return plans

    def due(self, step: SchedulerStep) -> tuple[Plans, bool]:
        """Return what the second runner needs of one step.

        Returns:
            The plans of requests that have something done after the step, and False; or those of
            all requests, and True where something falls inside the step.
        """
        plans: Plans = {}
        cumulative = self.cumulative
        for request_id, start in step.starts.items():
            request = self._requests.get(request_id)
            if request is None:
                continue
            count = step.scheduled[request_id]
            added = request_id in step.added
            goes_on = count == 1 and start == request.num_tokens and not added
            # Most requests, most steps.
            if goes_on and start + 1 < request.due:
                request.num_tokens = start + 1
                continue
            own = self._plan(step, request_id)
            end = start + count
            inside = any(e.at != end for p in own.values() for e in p.evictions)
            # The place a request takes knows nothing of an eviction before it.
            inside |= added and any(p.state is not None for p in own.values())
            # Only the latest queries outlive a step.
            inside |= bool(own) and cumulative and count > 1
            if inside:
                return self.step(step), True
            flushes = cumulative and end % FLUSH == 0
            plans |= {key: p for key, p in own.items() if p.evictions or flushes}
        return plans, False

    def _plan(self, step: SchedulerStep, request_id: str) -> Plans:
        plans: Plans = {}
        request = self._requests.get(request_id)
        if request is None:
            return plans
        start = step.starts[request_id]
        end = start + step.scheduled[request_id]
        request.num_tokens = end
        due = []
        for nth, (manager, group) in enumerate(zip(self.managers, self.groups, strict=True)):
            plan = manager.plan(request_id)
            if plan is None:
                continue
            state, evictions = plan.between(start, end)
            due.append(plan.next_at)
            plans[group, step.slots[request_id]] = RowPlan(
                request.num_prompt_tokens, state, tuple(evictions)
            )
            if evictions and nth == 0:
                size = manager.block_size
                # A request that starts over after a preemption comes to old ones again.
                sizes = request.sizes | {e.at: e.blocks * size for e in evictions}
                request.sizes = dict(sorted(sizes.items())[-SIZES_REPORTED:])
        if self.cumulative:
            due.append((end // FLUSH + 1) * FLUSH)
        request.due = min(due, default=0)
        return plans

    def take(self, measured: npt.NDArray[np.float64]) -> None:
        """Take in measurements: rows of slot, group, tokens computed, layers, sums over layers."""
        for slot, group, at, layers, *sums in measured.tolist():
            request = self._requests.get(self._slots.request(int(slot)) or "")
            # One may come after its request has ended and another has its slot.
            if request is not None and layers and at <= request.num_tokens:
                own = request.measured.setdefault(int(group), {})
                own[int(at)] = [total / layers for total in sums]
                for old in sorted(own)[:-MEASUREMENTS_KEPT]:
                    del own[old]

    def _resizer(self, block_size: int, share: float, group: int) -> Callable[[str, int, int], int]:
        def resize(request_id: str, nth: int, blocks: int) -> int:
            request = self._requests.get(request_id)
            if request is None:
                return blocks
            decided = request.resized.setdefault(group, [])
            if nth == len(decided):
                decided.append(self._ask(request, blocks, block_size, share, group))
            return decided[nth]

        return resize

    def _ask(
        self, request: PlannedRequest, blocks: int, block_size: int, share: float, group: int
    ) -> int:
        measured = request.measured.get(group, {})
        settled = [at for at in measured if at + SETTLED_TOKENS <= request.num_tokens]
        if not settled or self.resize_error is not None:
            return blocks
        budget = round(blocks * block_size / share)
        own = list(measured[max(settled)])
        try:
            tokens: int = self.contained.run(self._resize, own, budget, request.num_tokens)
        except PolicyFailure as failure:
            self.resize_error = failure.cause
            self.contained.log("failed in resize(); budgets stay as they are", failure)
            return blocks
        return -(-round(tokens * share) // block_size)

    def _resize(self, measured: list[float], budget: int, num_tokens: int) -> int:
        tokens = self.policy.resize(measured, budget, num_tokens)
        if isinstance(tokens, bool | str | bytes):
            raise TypeError(f"resize returned {type(tokens).__name__}, expected a number")
        # What is possible lies between; it is clipped further on.
        return max(0, min(int(tokens), 2 * num_tokens + budget))
