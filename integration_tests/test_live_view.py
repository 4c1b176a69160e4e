"""What the live page is told of a scheduler is what its pool and its requests are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scheduler_fuzz import MODES, SchedulerFuzz
from vllm.v1.request import RequestStatus

from kvplug.hosts.vllm.scheduler import live
from kvplug.hosts.vllm.spec import ApproximateManager, ShorteningManager
from kvplug.observe.live import BlockState, Snapshot, decode_map

PAGE = {"observe": {"page": True}}
WATCHED = {f"{mode} watched": MODES[mode] | PAGE for mode in MODES} | {"stock watched": PAGE}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    for mode, section in WATCHED.items():
        monkeypatch.setitem(MODES, mode, section)
    # Nobody steps while the test looks.
    monkeypatch.setattr(live, "PATIENCE", 0.0)
    yield
    logging.disable(logging.NOTSET)


def expected(fuzz: SchedulerFuzz) -> list[int]:
    """State of each block, by its definition, one block at a time."""
    manager = fuzz.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    pool = manager.block_pool
    states = [
        BlockState.HELD
        if block.ref_cnt
        else BlockState.EMPTY
        if block.block_hash is None
        else BlockState.CACHED
        for block in pool.blocks
    ]
    # In the order of arrival: of two requests that share a block, the later one's view counts.
    for request_id in fuzz._half._live._requests:
        table = manager.req_to_blocks.get(request_id, [])
        status = fuzz.scheduler.requests[request_id].status
        kept = [i for i, block in enumerate(table) if not block.is_null]
        state, first = None, 0
        if status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            state = BlockState.LOADING
        elif isinstance(manager, ApproximateManager):
            found = manager.approximate_from(request_id)
            if found is not None:
                state, first = BlockState.APPROXIMATE, found // manager.block_size
        elif isinstance(manager, ShorteningManager) and len(kept) < len(table):
            state = BlockState.PARTLY_EVICTED
        for i in kept:
            if state is not None and i >= first:
                states[table[i].block_id] = state
    states[pool.null_block.block_id] = BlockState.RESERVED
    return [int(state) for state in states]


def taken(fuzz: SchedulerFuzz) -> Snapshot:
    data = fuzz._half._live.take()
    assert data is not None
    return Snapshot.parse(data)


def check(fuzz: SchedulerFuzz, seen: Counter[str]) -> None:
    snapshot = taken(fuzz)
    assert decode_map(snapshot.map, snapshot.blocks).tolist() == expected(fuzz)
    requests = fuzz.scheduler.requests
    assert {one.id for one in snapshot.requests} == set(requests)
    tables = fuzz.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks
    for one in snapshot.requests:
        request, table = requests[one.id], tables.get(one.id, [])
        assert (one.prompt, one.output) == (request.num_prompt_tokens, request.num_output_tokens)
        held = [i for i, block in enumerate(table) if not block.is_null]
        resident = [i for first, end in one.resident for i in range(first, end)]
        assert (resident, one.table, one.held) == (held, len(table), len(held))
        seen[one.status] += 1
    for layer in snapshot.layers:
        assert layer.table == sum(one.table for one in snapshot.requests)
        assert layer.held == sum(one.held for one in snapshot.requests)
    for state in BlockState:
        seen[state.name] += snapshot.states[state]


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
@pytest.mark.parametrize(
    ("mode", "states"),
    [
        ("stock", {"HELD", "CACHED", "EMPTY"}),
        ("prefix", {"HELD", "CACHED"}),
        ("windowed", {"PARTLY_EVICTED", "HELD", "CACHED"}),
        ("scoring", {"PARTLY_EVICTED"}),
        ("reuse", {"APPROXIMATE", "HELD"}),
        ("tiers", {"LOADING", "CACHED"}),
    ],
)
def test_a_snapshot_is_what_the_scheduler_has(
    mode: str, states: set[str], ahead: bool, tiny: Path
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(3, 13):
        fuzz = SchedulerFuzz(f"{mode} watched", seed, ahead, tiny)
        for _ in range(300):
            fuzz._act()
            if fuzz._half._live.steps % 4 == 0:
                check(fuzz, seen)
        if all(seen[name] for name in states):
            break
        fuzz._half.stop()
    assert {name for name in states if not seen[name]} == set()
    assert seen["running"] and seen["waiting"]
    fuzz._drain()
    check(fuzz, seen)
    at_rest = taken(fuzz)
    assert not at_rest.requests and at_rest.totals.steps == fuzz._half.steps
    assert at_rest.totals.finished == fuzz._arrived
    by_name = {policy.name: policy for policy in at_rest.policies}
    for report in fuzz._half.reports():
        assert by_name[report.name].acted == report.acted
    fuzz._half.stop()


def test_blocks_are_gone_through_in_slices_and_no_step_takes_more(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "SLICE", 10)
    fuzz = SchedulerFuzz("windowed watched", 5, False, tiny)
    view = fuzz._half._live
    view._sweep, view._due = view._go_through(), True
    steps = 0
    while view._due:
        view.step(1)
        steps += 1
    blocks = len(fuzz.scheduler.kv_cache_manager.block_pool.blocks)
    # One more finds that there is nothing left.
    assert steps == -(-blocks // 10) + 1
    assert view._taken is not None and len(view._taken.states) == blocks
    fuzz._half.stop()


def test_hits_and_computed_tokens_are_those_of_first_lookups(tiny: Path) -> None:
    fuzz = SchedulerFuzz("prefix watched", 1, False, tiny)
    first: dict[str, tuple[int, int]] = {}
    matched = fuzz._half.matched

    def noted(request: Any, num_local: int) -> int | None:
        if not request.num_preemptions:
            first[request.request_id] = num_local, request.num_prompt_tokens
        return matched(request, num_local)

    fuzz._half.matched = noted
    fuzz.run(300)
    prefix = [one for one in taken(fuzz).outcomes if one.level == "prefix cache"]
    found = {one.cause: one.count for one in prefix if one.unit == "tokens"}
    missed = {one.cause: one.count for one in prefix if one.unit == "missed blocks"}
    assert missed == {str(c): n for c, n in fuzz._half.misses.misses.causes.items() if n} != {}
    assert found["hit"] == sum(hit for hit, _ in first.values()) > 0
    assert found["computed"] == sum(prompt - hit for hit, prompt in first.values())
    fuzz._half.stop()


def test_what_fails_is_logged_once_and_the_engine_goes_on(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(live.logger, "error", lambda text, *values, **_: said.append(text % values))
    fuzz = SchedulerFuzz("prefix watched", 2, False, tiny)
    view = fuzz._half._live

    def broken(self: Any) -> Any:
        raise RuntimeError("broken on purpose")
        yield

    with monkeypatch.context() as patched:
        patched.setattr(live.LiveView, "_go_through", broken)
        assert view.take() is None and view.take() is None
        # In a step as well.
        view._sweep, view._due = broken(view), True
        fuzz.run(50)
    assert len(said) == 1 and "broken on purpose" in said[0]
    assert taken(fuzz).totals.steps == fuzz._half.steps
    fuzz._half.stop()


def test_nothing_is_looked_at_unless_the_deployment_asks(tiny: Path) -> None:
    fuzz = SchedulerFuzz("prefix", 0, False, tiny)
    assert fuzz._half._live is None


def test_a_second_engine_of_one_id_goes_on_without_the_page(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uuid.uuid4", lambda: "11111111-2222-3333-4444-555555555555")
    one = SchedulerFuzz("prefix watched", 0, False, tiny)
    two = SchedulerFuzz("prefix watched", 0, False, tiny)
    assert one._half._live._publisher is not None
    assert two._half._live._publisher is None
    two.run(20)
    one._half.stop()
    two._half.stop()
