"""Bytes of stored segments, and which of them leave first."""

from __future__ import annotations

import numpy as np
import pytest

from kvplug.contract import Fingerprint
from kvplug.reuse.entry import CatalogEntry, SegmentState
from kvplug.reuse.quota import EvictionOrder, Quota

TTL = 100.0
NOW = 1000.0


def entry(
    name: str,
    used: float = NOW,
    size: int = 10,
    state: SegmentState = SegmentState.MEMORY,
    on_disk: bool = False,
    tenant: str = "",
) -> CatalogEntry:
    tokens = np.zeros(4, np.int32)
    fingerprint = Fingerprint(
        model="m",
        tokenizer="t",
        lora="",
        dtype="float32",
        format="",
        position="rope",
        geometry=(1, 1, 1),
        tenant=tenant,
        mask="causal",
        start=0,
        length=4,
        context=b"",
        tokens=b"",
        created=0.0,
        request_id="r",
    )
    return CatalogEntry(
        name,
        fingerprint,
        tokens,
        tokens[:0],
        size,
        state,
        on_disk=on_disk,
        last_used=used,
        file_bytes=size,
    )


def quota(memory: int = 30, disk: int = 30, *, writes: bool = True) -> Quota:
    return Quota(memory, disk, TTL, writes=writes)


def names(entries: list[CatalogEntry]) -> list[str]:
    return [one.id for one in entries]


def test_the_least_recently_used_leaves_first_and_the_spared_last() -> None:
    order = EvictionOrder()
    for name, used, spared in (("b", 2, False), ("a", 3, False), ("s", 1, True), ("c", 1, False)):
        order.put(entry(name, used), spared)
    assert names(list(order)) == ["c", "b", "a", "s"]
    assert names(list(order.unused_since(2.5))) == ["c", "b", "s"]


def test_a_use_moves_a_segment_and_removal_forgets_it() -> None:
    order = EvictionOrder()
    one, other = entry("a", 1), entry("b", 2)
    order.put(one, False)
    order.put(other, False)
    one.last_used = 3
    order.put(one, False)
    assert names(list(order)) == ["b", "a"]
    order.discard(other)
    order.discard(other)
    assert names(list(order)) == ["a"]


@pytest.mark.parametrize(
    ("state", "on_disk", "writing", "writes", "memory", "disk", "fetchable"),
    [
        (SegmentState.SAVING, False, False, True, 10, 10, 0),
        (SegmentState.SAVING, False, False, False, 10, 0, 0),
        (SegmentState.MEMORY, False, True, True, 10, 10, 0),
        (SegmentState.MEMORY, False, False, True, 10, 0, 0),
        (SegmentState.MEMORY, True, False, True, 10, 10, 0),
        (SegmentState.FETCHING, True, False, True, 10, 10, 0),
        (SegmentState.DISK, True, False, True, 0, 10, 1),
        (SegmentState.DISK, False, False, True, 0, 0, 0),
    ],
)
def test_bytes_count_where_they_are_or_will_be(
    state: SegmentState,
    on_disk: bool,
    writing: bool,
    writes: bool,
    memory: int,
    disk: int,
    fetchable: int,
) -> None:
    made = quota(writes=writes)
    one = entry("a", state=state, on_disk=on_disk)
    one.writing = writing
    made.charge(one, False)
    assert (made.memory_bytes, made.disk_bytes, made.on_disk_only) == (memory, disk, fetchable)
    made.remove(one)
    assert (made.memory_bytes, made.disk_bytes, made.on_disk_only) == (0, 0, 0)


def test_a_file_that_turned_out_bad_cannot_be_fetched() -> None:
    made, one = quota(), entry("a", state=SegmentState.DISK, on_disk=True)
    one.cause = "bad checksum"
    made.charge(one, False)
    assert (made.disk_bytes, made.on_disk_only) == (10, 0)


def test_room_is_what_is_free() -> None:
    made = quota()
    made.charge(entry("a"), False)
    assert made.room("", 20, 0, NOW) == ([], [])
    assert made.room("", 31, 0, NOW) is None and made.room("", 0, 31, NOW) is None


def test_memory_drops_the_oldest_and_nothing_changes_yet() -> None:
    made = quota()
    for name, used in (("a", NOW - 1), ("b", NOW - 3), ("c", NOW - 2)):
        made.charge(entry(name, used), False)
    found = made.room("", 15, 0, NOW)
    assert found is not None and names(found[0]) == ["b", "c"] and found[1] == []
    assert made.memory_bytes == 30


def test_what_is_in_flight_is_not_evicted() -> None:
    made = quota()
    for name, state in (("a", SegmentState.SAVING), ("b", SegmentState.FETCHING)):
        made.charge(entry(name, NOW - 1, 15, state, on_disk=True), False)
    assert made.room("", 1, 0, NOW) is None and made.room("", 0, 1, NOW) is None


def test_expired_segments_leave_before_older_ones_of_no_session() -> None:
    made = quota()
    made.charge(entry("spared", NOW - TTL - 1), True)
    made.charge(entry("old", NOW - TTL + 1), False)
    made.charge(entry("new", NOW), False)
    found = made.room("", 10, 0, NOW)
    assert found is not None and names(found[0]) == ["spared"]
    assert names(list(made.expired(NOW))) == ["spared"]


def test_a_segment_without_a_file_frees_its_disk_space_when_dropped() -> None:
    made = quota(disk=10)
    one = entry("a", size=10)
    one.writing = True
    made.charge(one, False)
    found = made.room("", 25, 10, NOW)
    assert found is not None and (names(found[0]), found[1]) == (["a"], [])


def test_the_disk_deletes_the_oldest_files() -> None:
    made = quota()
    for name, used in (("a", NOW - 1), ("b", NOW - 2)):
        made.charge(entry(name, used, 15, SegmentState.DISK, on_disk=True), False)
    found = made.room("", 0, 10, NOW)
    assert found is not None and (found[0], names(found[1])) == ([], ["b"])
    assert made.fits_on_disk("", 0) and not made.fits_on_disk("", 1)


def test_what_leaves_anyway_is_counted_out_and_not_chosen() -> None:
    made = quota()
    leaving = entry("a", NOW - 5, 20)
    made.charge(leaving, False)
    made.charge(entry("b", NOW, 10), False)
    assert made.room("", 20, 0, NOW, leaving) == ([], [])
    found = made.room("", 25, 0, NOW, leaving)
    assert found is not None and names(found[0]) == ["b"]


def test_one_tenant_does_not_push_out_another() -> None:
    made = quota(memory=100)
    for n in range(3):
        made.charge(entry(f"a{n}", NOW - 50 + n, tenant="a"), False)
    for n in range(7):
        made.charge(entry(f"b{n}", NOW - 10 + n, tenant="b"), False)
    # The older segments are those of the one who has less.
    found = made.room("b", 40, 0, NOW)
    assert found is not None and names(found[0]) == ["b0", "b1", "b2", "b3"]
    # Within its half, a tenant takes from whoever has more than half.
    found = made.room("a", 20, 0, NOW)
    assert found is not None and names(found[0]) == ["b0", "b1"]
    found = made.room("a", 50, 0, NOW)
    assert found is not None and sorted(names(found[0])) == ["a0", "a1", "a2", "b0", "b1"]
    # A third one may have a third, and the largest gives it up.
    found = made.room("c", 30, 0, NOW)
    assert found is not None and names(found[0]) == ["b0", "b1", "b2"]
    assert made.room("c", 70, 0, NOW) is None


def test_expired_segments_leave_whosever_they_are() -> None:
    made = quota(memory=100)
    made.charge(entry("old", NOW - TTL - 1, tenant="a"), False)
    for n in range(9):
        made.charge(entry(f"b{n}", NOW - 10 + n, tenant="b"), False)
    found = made.room("b", 20, 0, NOW)
    assert found is not None and names(found[0]) == ["old", "b0"]


def test_a_tenant_keeps_to_its_largest_share_though_there_is_room() -> None:
    made = Quota(100, 100, TTL, writes=True, tenant_share=0.3)
    for n in range(2):
        made.charge(entry(f"a{n}", NOW + n, tenant="a", on_disk=True), False)
    assert made.room("a", 10, 10, NOW) == ([], [])
    found = made.room("a", 20, 20, NOW)
    assert found is not None and [names(one) for one in found] == [["a0"], ["a0"]]
    assert made.room("a", 31, 0, NOW) is None
    assert made.room("b", 30, 30, NOW) == ([], [])
    assert made.fits_on_disk("a", 10) and not made.fits_on_disk("a", 11)
