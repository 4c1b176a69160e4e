"""The scheduler half of a scoring policy: who is cut when, told to the workers step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger

from kvplug.contract import ScoringPolicy
from kvplug.hosts.vllm.messages import RowPlan
from kvplug.hosts.vllm.scheduler.lanes import Lanes
from kvplug.hosts.vllm.spec import PrunedManager

logger = init_logger("vllm.kvplug")

SIZES_TOLD = 64
"""Latest cuts of a request that its output lists."""


@dataclass
class CutRequest:
    """A running request that may be cut.

    Attributes:
        lane: Small number of its own, reused once it has ended.
        num_tokens: Tokens of its text scheduled so far.
        measured: Latest measurement per group, averaged over layers and ranks.
        sizes: Tokens kept at each of its latest cuts, by tokens computed.
        resized: Blocks decided at each cut so far, per group: a request that starts over after a
            preemption is cut as it was before.
    """

    lane: int
    num_tokens: int = 0
    measured: dict[int, list[float]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    resized: dict[int, list[int]] = field(default_factory=dict)


class CutScheduler:
    """Plans the cuts of running requests and follows what workers measured.

    Args:
        policy: The scoring policy.
        managers: The KV-cache groups it applies to.
        groups: Group number of each manager: the index of its share among the policy's.
    """

    def __init__(self, policy: ScoringPolicy, managers: list[PrunedManager], groups: list[int]):
        self.policy = policy
        self.managers = managers
        self.groups = groups
        self.resize_error: str | None = None
        self._prompts: dict[str, int] = {}
        self._requests: dict[str, CutRequest] = {}
        self._lanes: dict[int, str] = {}
        self._numbers = Lanes()
        for manager, group in zip(managers, groups, strict=True):
            manager.prompt_tokens = self._prompts
            if policy.resizes:
                manager.resize = self._resizer(manager.block_size, manager.limits.share, group)

    def add(self, request_id: str, num_prompt_tokens: int) -> None:
        """A request arrived that may be cut."""
        self._prompts[request_id] = num_prompt_tokens
        lane = self._numbers.take()
        self._requests[request_id] = CutRequest(lane)
        self._lanes[lane] = request_id

    def finish(self, request_id: str) -> list[tuple[int, int]]:
        """A request ended; returns ``(tokens computed, tokens kept)`` of its latest cuts."""
        self._prompts.pop(request_id, None)
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        del self._lanes[request.lane]
        self._numbers.give_back(request.lane)
        return list(request.sizes.items())

    def step(self, starts: dict[str, int], scheduled: dict[str, int]) -> dict[int, RowPlan]:
        """The plans of one step's rows, by the block each writes last.

        Args:
            starts: Tokens computed before the step, by request.
            scheduled: Tokens scheduled in it, by request.
        """
        plans: dict[int, RowPlan] = {}
        for request_id, start in starts.items():
            request = self._requests.get(request_id)
            if request is None:
                continue
            end = start + scheduled[request_id]
            request.num_tokens = end
            prompt = self._prompts[request_id]
            for nth, manager in enumerate(self.managers):
                plan = manager.plan(request_id)
                if plan is None:
                    continue
                state, cuts = plan.between(start, end)
                tail = manager.req_to_blocks[request_id][(end - 1) // manager.block_size]
                plans[tail.block_id] = RowPlan(request.lane, prompt, state, tuple(cuts))
                if cuts and nth == 0:
                    size = manager.block_size
                    # A request that starts over after a preemption comes to old cuts again.
                    sizes = request.sizes | {c.at: c.blocks * size for c in cuts}
                    request.sizes = dict(sorted(sizes.items())[-SIZES_TOLD:])
        return plans

    def take(self, measured: npt.NDArray[np.float64]) -> None:
        """Take in what workers measured: rows of lane, group, layers and sums."""
        for lane, group, layers, *sums in measured.tolist():
            request = self._requests.get(self._lanes.get(int(lane), ""))
            if request is not None and layers:
                request.measured[int(group)] = [total / layers for total in sums]

    def _resizer(self, block_size: int, share: float, group: int) -> Any:
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
        self, request: CutRequest, blocks: int, block_size: int, share: float, group: int
    ) -> int:
        measured = request.measured.get(group)
        if measured is None or self.resize_error is not None:
            return blocks
        budget = round(blocks * block_size / share)
        try:
            tokens = self.policy.resize(measured, budget, request.num_tokens)
            return -(-round(tokens * share) // block_size)
        except Exception as error:
            self.resize_error = f"{type(error).__name__}: {error}"
            logger.error(
                "sequence policy %r failed in resize(); budgets stay as they are: %s",
                self.policy.name,
                self.resize_error,
                exc_info=error,
            )
            return blocks
