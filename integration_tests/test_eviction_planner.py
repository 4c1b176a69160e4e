"""What the scheduler tells workers of the second model runner: no more than a step needs."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.hosts.pruning import FLUSH, EvictionPlan, Limits
from kvplug.hosts.vllm.messages import Plans
from kvplug.hosts.vllm.scheduler.evictions import EvictionPlanner

LIMITS = Limits(16, budget=48, share=1.0, always=12, interval=1, protected=1, prefill_limit=9)
PROMPTS = {"a": 3, "b": 100, "c": 400}
SLOTS = {name: i for i, name in enumerate(PROMPTS)}


class Manager:
    """Plans by request, forgotten with its blocks."""

    block_size, limits = 16, LIMITS

    def __init__(self) -> None:
        self.plans: dict[str, EvictionPlan] = {}

    def plan(self, name: str) -> EvictionPlan:
        return self.plans.setdefault(name, EvictionPlan(LIMITS, PROMPTS[name]))


def planner(cumulative: bool) -> EvictionPlanner:
    policy: Any = SimpleNamespace(resizes=False, wants_cumulative_attention=cumulative)
    manager: Any = Manager()
    slots: Any = None
    made = EvictionPlanner(policy, [manager], [0], slots)
    for name, prompt in PROMPTS.items():
        made.add(name, prompt)
    return made


def needed(
    plans: Plans, ends: dict[int, int], added: set[int], cumulative: bool, chunk: bool
) -> tuple[Plans, bool]:
    inside = any(e.at != ends[slot] for (_, slot), p in plans.items() for e in p.evictions)
    inside |= any(slot in added and p.state is not None for (_, slot), p in plans.items())
    if inside or (cumulative and chunk):
        return plans, True
    flushed = {key for key in plans if cumulative and ends[key[1]] % FLUSH == 0}
    return {k: p for k, p in plans.items() if p.evictions or k in flushed}, False


@pytest.mark.parametrize("cumulative", [False, True])
def test_a_step_carries_what_it_needs_whatever_came_before(cumulative: bool) -> None:
    for seed in range(20):
        choose = random.Random(seed)
        asked, whole = planner(cumulative), planner(cumulative)
        done = dict.fromkeys(PROMPTS, 0)
        for _ in range(400):
            if choose.random() < 0.02:
                preempted = choose.choice([*PROMPTS])
                done[preempted] = 0
                for one in (asked, whole):
                    one.managers[0].plans.pop(preempted, None)  # type: ignore[attr-defined]
            scheduled = {
                name: choose.choice([1, 1, 1, choose.randrange(1, 90)])
                for name in PROMPTS
                if choose.random() < 0.9
            }
            step: Any = SimpleNamespace(
                starts={name: done[name] for name in scheduled},
                scheduled=scheduled,
                slots=SLOTS,
                # Now and then one comes back where it was, as a request whose input goes on.
                added={name for name in scheduled if choose.random() < 0.05},
            )
            added = {SLOTS[name] for name in step.added}
            ends = {SLOTS[name]: done[name] + n for name, n in scheduled.items()}
            chunk = any(n > 1 for n in scheduled.values())
            assert asked.due(step) == needed(whole.step(step), ends, added, cumulative, chunk)
            for name, n in scheduled.items():
                done[name] += n
        assert all(asked.finish(name) == whole.finish(name) for name in PROMPTS)
