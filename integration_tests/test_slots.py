"""Slots: whose row is this, answered once a step."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np

from kvplug.hosts.vllm.scheduler.kind import SchedulerStep
from kvplug.hosts.vllm.scheduler.slots import Slots, row_slots

BLOCK = 32


class Manager:
    block_size = BLOCK

    def __init__(self, blocks: dict[str, list[int]]):
        self.req_to_blocks = {
            name: [SimpleNamespace(block_id=b, is_null=b == 0) for b in ids]
            for name, ids in blocks.items()
        }


def scheduled(slots: Slots, **spans: tuple[int, int]) -> SchedulerStep:
    """A step of some requests, ``name=(start, tokens)``; names in capitals are new ones."""
    new = {n: a for n, (a, _) in spans.items() if n.isupper()}
    cached = {n: a for n, (a, _) in spans.items() if not n.isupper()}
    output: Any = SimpleNamespace(
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=list(cached.values())
        ),
        scheduled_new_reqs=[
            SimpleNamespace(req_id=n, num_computed_tokens=a) for n, a in new.items()
        ],
        num_scheduled_tokens={n: tokens for n, (_, tokens) in spans.items()},
    )
    return SchedulerStep(output, 1, slots)


def test_the_smallest_free_slot_goes_first_and_a_request_keeps_its_own() -> None:
    slots = Slots()
    assert [slots.take(name) for name in "abc"] == [0, 1, 2]
    assert slots.take("b") == 1
    slots.release("b")
    slots.release("a")
    assert [slots.take(name) for name in "def"] == [0, 1, 3]
    assert [slots.request(slot) for slot in range(5)] == ["d", "e", "c", "f", None]
    slots.release("nobody")
    for name in "cdef":
        slots.release(name)
    assert slots.take("g") == 0


def test_slots_are_never_shared_and_never_more_than_requests() -> None:
    choose = random.Random(0)
    slots, running, most = Slots(), list[str](), 0
    for n in range(2000):
        if running and choose.random() < 0.5:
            slots.release(running.pop(choose.randrange(len(running))))
        else:
            running.append(str(n))
        taken = [slots.take(name) for name in running]
        most = max(most, len(running))
        assert len(set(taken)) == len(taken)
        assert max(taken, default=-1) < most
        assert [slots.request(slot) for slot in taken] == running


def test_rows_name_the_block_each_request_writes_last_in_each_group() -> None:
    slots = Slots()
    managers = [
        Manager({"a": [5, 6, 7], "B": [9], "c": [11, 12]}),
        Manager({"a": [25, 26, 27], "B": [29], "c": [31, 32]}),
    ]
    step = scheduled(slots, a=(64, 3), B=(0, 20))
    rows = row_slots(managers, step.starts, step.scheduled, step.slots)
    assert rows.dtype == np.int32
    assert sorted(rows.tolist()) == [[7, 0], [9, 1], [27, 0], [29, 1]]
    slots.release("a")
    step = scheduled(slots, c=(31, 1), B=(20, 1))
    rows = row_slots(managers[:1], step.starts, step.scheduled, step.slots)
    assert sorted(rows.tolist()) == [[9, 1], [11, 0]], "a slot is used again"


def test_a_block_that_is_not_the_requests_own_names_no_row() -> None:
    """Block 0 is the null block; a group may have no block yet."""
    step = scheduled(Slots(), a=(0, 40), b=(0, 40))
    rows = row_slots([Manager({"a": [5], "b": [6, 0]})], step.starts, step.scheduled, step.slots)
    assert rows.shape == (0, 2)


def test_drafts_that_may_be_rejected_name_earlier_blocks_too() -> None:
    """Async scheduling counts drafts as computed before they are."""
    step = scheduled(Slots(), a=(64, 1), b=(33, 3))
    managers = [Manager({"a": [5, 6, 7], "b": [8, 9]})]
    for drafts, rows in ((0, [[7, 0], [9, 1]]), (3, [[6, 0], [7, 0], [9, 1]])):
        found = row_slots(managers, step.starts, step.scheduled, step.slots, drafts)
        assert sorted(found.tolist()) == rows
    found = row_slots(managers, step.starts, step.scheduled, step.slots, 40)
    assert sorted(found.tolist()) == [[5, 0], [6, 0], [7, 0], [8, 1], [9, 1]], (
        "none before the text"
    )


def test_a_step_assigns_slots_only_if_a_kind_asks() -> None:
    slots = Slots()
    step = scheduled(slots, A=(0, 7), b=(32, 1))
    assert step.starts == {"A": 0, "b": 32}
    assert not step.names_slots
    assert slots.request(0) is None
    assert step.slots == {"b": 0, "A": 1}
    assert step.names_slots
