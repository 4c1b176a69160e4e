"""BlockTracker: owner, position and parent of blocks from what the scheduler sends each step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvplug.contract import RequestView
from kvplug.hosts.vllm.scheduler.blocks import BlockTracker, request_view
from kvplug.request_options import RequestOptions

Groups = tuple[list[int], ...]


def request(name: str, session_id: str | None = None, **more: Any) -> RequestView:
    stock = {"request_id": name, "num_prompt_tokens": 9, "priority": 0, "arrival_time": 0.0}
    options = RequestOptions(session_id=session_id)
    return request_view(SimpleNamespace(**stock | more), options)


def step(
    new: dict[str, Groups] | None = None,
    cached: dict[str, Groups | None] | None = None,
    resumed: tuple[str, ...] = (),
    finished: tuple[str, ...] = (),
) -> Any:
    new, cached = new or {}, cached or {}
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=n, block_ids=b) for n, b in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), new_block_ids=list(cached.values()), resumed_req_ids=set(resumed)
        ),
        finished_req_ids=set(finished),
    )


@pytest.fixture
def tracker() -> BlockTracker:
    made = BlockTracker(32)
    made.add(request("a", num_prompt_tokens=70, priority=3, arrival_time=2.5, session_id="chat"))
    made.add(request("b"))
    return made


def owner(tracker: BlockTracker, block: int) -> str | None:
    found = tracker.owner(block)
    return found.request_id if found is not None else None


def test_nothing_is_known_of_a_block_nobody_was_given(tracker: BlockTracker) -> None:
    assert tracker.positions([0, 31, 5]) == [-1, -1, -1]
    assert tracker.owner(5) is None
    assert tracker.positions([]) == []


def test_a_new_request_owns_its_blocks_in_order(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3, 20],)}))
    assert tracker.positions([3, 7, 20, 8]) == [1, 0, 2, -1]
    assert [owner(tracker, b) for b in (7, 3, 20, 8)] == ["a", "a", "a", None]
    assert all(isinstance(p, int) for p in tracker.positions([3, 7]))


def test_the_owner_is_described_as_the_request_was(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7],), "b": ([8],)}))
    view = tracker.owner(7)
    assert view is not None
    assert (view.num_prompt_tokens, view.priority, view.session_id) == (70, 3, "chat")
    assert view.arrival == 2.5
    other = tracker.owner(8)
    assert other is not None and other.session_id is None


def test_later_blocks_go_on_where_the_earlier_ended(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3],)}))
    tracker.update(step(cached={"a": ([9],)}))
    tracker.update(step(cached={"a": None}))
    tracker.update(step(cached={"a": ([4, 5],)}))
    assert tracker.positions([7, 3, 9, 4, 5]) == [0, 1, 2, 3, 4]


def test_groups_count_for_themselves(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3], [10])}))
    tracker.update(step(cached={"a": ([], [11, 12])}))
    tracker.update(step(cached={"a": ([8], [])}))
    assert tracker.positions([7, 3, 8]) == [0, 1, 2]
    assert tracker.positions([10, 11, 12]) == [0, 1, 2]


def test_a_resumed_request_starts_over(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3],)}))
    tracker.update(step(cached={"a": ([3, 15, 16],)}, resumed=("a",)))
    assert tracker.positions([3, 15, 16]) == [0, 1, 2]
    tracker.update(step(cached={"a": ([17],)}))
    assert tracker.positions([17]) == [3]


def test_a_shared_block_belongs_to_the_latest(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3],)}))
    tracker.update(step(new={"b": ([7, 9],)}))
    assert [owner(tracker, b) for b in (7, 3, 9)] == ["b", "a", "b"]


def test_a_finished_request_still_owns_what_it_left_behind(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3],)}))
    tracker.update(step(finished=("a",)))
    assert owner(tracker, 7) == "a"
    assert tracker.positions([7, 3]) == [0, 1]
    assert tracker._requests.keys() == {"b"}
    assert not tracker._lengths


def test_a_block_handed_on_changes_position_and_owner(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3, 5],)}))
    tracker.update(step(new={"b": ([1, 2, 4, 5],)}, finished=("a",)))
    assert tracker.positions([5]) == [3]
    assert owner(tracker, 5) == "b"


def test_blocks_of_a_request_never_seen_to_arrive_have_positions_and_no_owner() -> None:
    tracker = BlockTracker(8)
    tracker.update(step(new={"stranger": ([1, 2],)}))
    assert tracker.positions([1, 2]) == [0, 1]
    assert tracker.owner(1) is None


def test_blocks_of_a_request_that_was_never_new_are_ignored(tracker: BlockTracker) -> None:
    tracker.update(step(cached={"stranger": ([1, 2],)}))
    assert tracker.positions([1, 2]) == [-1, -1]


def test_finishing_twice_or_unknown_is_nothing(tracker: BlockTracker) -> None:
    tracker.update(step(finished=("a", "stranger")))
    tracker.update(step(finished=("a",)))
    assert tracker._requests.keys() == {"b"}


def test_the_parent_is_the_block_before_in_the_same_group(tracker: BlockTracker) -> None:
    tracker.update(step(new={"a": ([7, 3], [10])}))
    tracker.update(step(cached={"a": ([9], [])}))
    tracker.update(step(cached={"a": ([], [11, 12])}))
    assert tracker.parents([7, 3, 9]) == [-1, 7, 3]
    assert tracker.parents([10, 11, 12, 30]) == [-1, 10, 11, -1]
    assert tracker.parents([]) == []


def test_the_parent_follows_the_latest_request_and_a_resumed_one_starts_over(
    tracker: BlockTracker,
) -> None:
    tracker.update(step(new={"a": ([7, 3, 5],)}))
    tracker.update(step(new={"b": ([7, 9],)}))
    assert tracker.parents([7, 9, 5]) == [-1, 7, 3]
    tracker.update(step(cached={"a": ([5, 3],)}, resumed=("a",)))
    assert tracker.parents([5, 3]) == [-1, 5]
    tracker.update(step(finished=("a", "b")))
    assert tracker.parents([3]) == [5]
    assert not tracker._last
