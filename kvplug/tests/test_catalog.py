"""The scheduler's catalog: quotas, time to live, sessions, variants, tenants, files of before."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from numpy.typing import NDArray

from kvplug.contract.reuse import Fingerprint
from kvplug.errors import KVPlugError
from kvplug.reuse.catalog import Catalog, CatalogEntry, SegmentState, StoreCommands
from kvplug.reuse.file import (
    SegmentHeader,
    digest,
    file_name,
    parse_name,
    segment_id,
    write_segment,
)
from kvplug.reuse.settings import Store

Tokens = NDArray[np.int32]
LENGTH = 32
TOKEN = 8000
"""Bytes of a token with which four segments of `LENGTH`, or their files, fill a mebibyte."""


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def ids(number: int, length: int = LENGTH) -> Tokens:
    return np.random.default_rng(number).integers(0, 49152, length).astype(np.int32)


def facts(tokens: Tokens, context: Tokens | None = None, **changes: Any) -> Fingerprint:
    before = ids(0, 0) if context is None else context
    base = Fingerprint(
        model="m",
        tokenizer="t",
        lora="",
        dtype="bfloat16",
        format="",
        position="rope/neox/0",
        geometry=(1, 2, 4),
        tenant="",
        mask="causal",
        start=len(before),
        length=len(tokens),
        context=digest(before),
        tokens=digest(tokens),
        created=1_000_000.0,
        request_id="r",
    )
    return replace(base, **changes)


class Desk:
    """A catalog with a clock and workers that do at once what they are told."""

    def __init__(self, folder: str = "", token: int = TOKEN, **options: Any) -> None:
        self.clock = Clock()
        extra = {
            k: options.pop(k) for k in ("prefetch", "min_tokens", "hasher", "world") if k in options
        }
        options = {"memory": 1, "disk": 2, "directory": folder, **options}
        self.catalog = Catalog(Store.model_validate(options), token, clock=self.clock, **extra)
        self.memory: set[str] = set()
        self.disk: set[str] = set()

    def plan(
        self, number: int, context: Tokens | None = None, session: str = "", **changes: Any
    ) -> CatalogEntry | None:
        length = changes.pop("length", LENGTH)
        before = ids(0, 0) if context is None else context
        known = facts(ids(number, length), before, **changes)
        return self.catalog.plan_save(known, ids(number, length), before, session)

    def save(self, number: int, *arguments: Any, **changes: Any) -> str:
        self.clock.now += 1
        segment = self.plan(number, *arguments, **changes)
        assert segment is not None
        self.obey()
        self.memory.add(segment.id)
        self.catalog.saved(segment.id)
        if self.catalog.settings.directory:
            self.disk.add(segment.id)
            self.catalog.written(segment.id)
        return segment.id

    def obey(self) -> StoreCommands:
        orders = self.catalog.take_commands()
        self.memory -= set(orders.drop)
        self.disk -= set(orders.delete)
        for name in orders.fetch:
            assert name in self.disk
            self.memory.add(name)
            self.catalog.fetched(name)
        return orders

    def state(self, name: str) -> SegmentState | None:
        segment = self.catalog.get(name)
        return segment.state if segment else None

    def found(self, number: int, tenant: str = "") -> list[str]:
        return [segment.id for segment, _ in self.catalog.match(ids(number), tenant)]


# -- Saving ----------------------------------------------------------------------------------------


def test_a_segment_is_saving_then_in_memory_then_on_the_disk_too() -> None:
    desk = Desk("/somewhere")
    segment = desk.plan(1, context=ids(99, 5), session="s")
    assert segment is not None
    assert segment.id == segment_id(segment.fingerprint)
    assert (segment.state, segment.ready, segment.on_disk) == (SegmentState.SAVING, False, False)
    # Its text and the five tokens before it are kept by the scheduler and by the worker.
    assert segment.bytes == LENGTH * TOKEN + 2 * 4 * (LENGTH + 5)
    assert not desk.catalog.take_commands()
    desk.catalog.saved(segment.id, {"k_drift": 0.5})
    assert (segment.state, segment.ready, segment.on_disk) == (SegmentState.MEMORY, True, False)
    assert segment.fingerprint.measures == {"k_drift": 0.5}
    desk.catalog.written(segment.id)
    assert segment.on_disk
    assert [s.id for s in desk.catalog] == [segment.id] and len(desk.catalog) == 1
    assert np.array_equal(segment.context_ids, ids(99, 5))
    shown = segment.candidate
    assert (shown.fingerprint, shown.whole, shown.cause, shown.valid) == (
        segment.fingerprint,
        True,
        "",
        True,
    )


def test_what_is_there_is_not_saved_again_but_counts_as_used() -> None:
    desk = Desk()
    name = desk.save(1)
    desk.clock.now += 50
    assert desk.plan(1) is None
    segment = desk.catalog.get(name)
    assert segment is not None and segment.last_used == desk.clock.now
    assert desk.plan(1, ancestry=2) is None
    assert desk.plan(2) is not None
    assert desk.plan(2) is None
    assert desk.catalog.counters()["known"] == 3


def test_fewer_approximate_reuses_replace_more() -> None:
    desk = Desk("/somewhere")
    name = desk.save(1, ancestry=2)
    assert desk.plan(1, ancestry=3) is None
    segment = desk.plan(1, ancestry=1)
    assert segment is not None and segment.id == name and segment.state is SegmentState.SAVING
    # The bytes and the file are overwritten, so nobody is told to give them up.
    assert not desk.catalog.take_commands()
    assert desk.catalog.counters()["memory_bytes"] == segment.bytes
    # News of the earlier file does not make this one written.
    desk.catalog.written(name)
    assert not segment.on_disk
    # On its way it is let alone.
    assert desk.plan(1) is None
    desk.catalog.saved(name)
    assert segment.state is SegmentState.MEMORY and not segment.on_disk
    assert desk.plan(1) is not None


def test_a_text_has_so_many_variants_and_worse_ones_give_way() -> None:
    desk = Desk(memory=4, variants=2)
    first = desk.save(1, context=ids(10, 3), ancestry=1)
    second = desk.save(1, context=ids(11, 3), ancestry=4)
    assert desk.plan(1, context=ids(12, 3), ancestry=4) is None
    third = desk.save(1, context=ids(12, 3), ancestry=2)
    assert desk.catalog.get(second) is None and second not in desk.memory
    assert {s.id for s in desk.catalog} == {first, third}
    # Another tenant's and another model's copies are texts of their own.
    assert desk.plan(1, context=ids(13, 3), tenant="x") is not None
    assert desk.plan(1, context=ids(13, 3), model="x") is not None
    assert desk.plan(1, context=ids(13, 3), ancestry=2) is None
    desk.catalog.invalidate(ids=[first])
    assert desk.plan(1, context=ids(13, 3), ancestry=2) is not None


def test_a_fingerprint_of_other_tokens_is_an_error() -> None:
    catalog = Desk().catalog
    good = facts(ids(1))
    for known, tokens, context in (
        (good, ids(2), ids(0, 0)),
        (good, ids(1)[1:], ids(0, 0)),
        (good, ids(1), ids(2, 1)),
        (facts(ids(0, 0)), ids(0, 0), ids(0, 0)),
    ):
        with pytest.raises(ValueError):
            catalog.plan_save(known, tokens, context)
    assert len(catalog) == 0
    with pytest.raises(ValueError, match="token_bytes"):
        Catalog(Store(), 0)


def test_what_could_not_be_saved_is_gone() -> None:
    desk = Desk("/somewhere")
    segment = desk.plan(1)
    assert segment is not None
    desk.catalog.failed(segment.id, "could not be stored")
    assert len(desk.catalog) == 0 and desk.found(1) == []
    counters = desk.catalog.counters()
    assert counters["memory_bytes"] == counters["disk_bytes"] == 0
    assert counters["failed could not be stored"] == 1
    desk.catalog.saved(segment.id)
    assert len(desk.catalog) == 0


# -- Quotas ----------------------------------------------------------------------------------------


def test_the_least_recently_used_leaves_memory_first() -> None:
    desk = Desk()
    names = [desk.save(n) for n in range(4)]
    desk.catalog.touch([names[0]])
    fifth = desk.save(4)
    assert {s.id for s in desk.catalog} == {names[0], names[2], names[3], fifth} == desk.memory
    assert desk.found(1) == []
    assert desk.catalog.counters()["dropped"] == 1


def test_what_has_a_file_stays_known_and_comes_back() -> None:
    desk = Desk("/somewhere")
    names = [desk.save(n) for n in range(5)]
    assert desk.state(names[0]) is SegmentState.DISK and names[0] not in desk.memory
    assert desk.found(0) == [names[0]]
    assert desk.catalog.want(names[0])
    assert desk.state(names[0]) is SegmentState.FETCHING
    assert desk.catalog.want(names[0])
    orders = desk.obey()
    assert orders == StoreCommands(drop=[names[1]], fetch={names[0]: 0})
    assert desk.state(names[0]) is SegmentState.MEMORY
    assert desk.catalog.want(names[0]) and not desk.catalog.take_commands()
    assert not desk.catalog.want("0" * 32)


def test_what_has_no_file_yet_is_gone_with_its_bytes() -> None:
    desk = Desk("/somewhere", disk=1)
    for number in range(4):
        segment = desk.plan(number)
        assert segment is not None
        desk.catalog.saved(segment.id)
        desk.clock.now += 1
    oldest = segment_id(facts(ids(0)))
    assert desk.plan(9) is not None
    assert desk.catalog.get(oldest) is None
    orders = desk.catalog.take_commands()
    assert orders.drop == orders.delete == [oldest]
    # The thread was at it already: the file goes when that is known.
    desk.catalog.written(oldest)
    assert desk.catalog.take_commands() == StoreCommands(delete=[oldest])


def test_the_disk_has_a_quota_of_its_own() -> None:
    desk = Desk("/somewhere")
    names = [desk.save(n) for n in range(8)]
    assert desk.disk == set(names)
    ninth = desk.save(8)
    assert desk.disk == {*names[1:], ninth} and desk.catalog.get(names[0]) is None
    assert desk.catalog.counters()["disk_bytes"] == 2 << 20


def test_a_file_may_go_while_the_bytes_stay_in_memory() -> None:
    desk = Desk("/somewhere", memory=4, disk=1)
    names = [desk.save(n) for n in range(5)]
    assert desk.disk == set(names[1:]) and desk.memory == set(names)
    assert desk.state(names[0]) is SegmentState.MEMORY
    segment = desk.catalog.get(names[0])
    assert segment is not None and not segment.on_disk and segment.ready


def test_what_is_larger_than_a_quota_is_not_saved() -> None:
    desk = Desk()
    kept = [desk.save(n) for n in range(3)]
    most = (1 << 20) // (TOKEN + 2 * 4)
    assert desk.plan(9, length=most + 1) is None
    assert desk.memory == set(kept) and not desk.catalog.take_commands()
    assert desk.plan(9, length=most) is not None
    assert desk.catalog.take_commands().drop == kept
    assert Desk("/somewhere", memory=9, disk=1).plan(9, length=most + 1) is None


def test_what_is_on_its_way_counts_and_is_not_given_up() -> None:
    desk = Desk()
    for number in range(4):
        assert desk.plan(number) is not None
    assert desk.plan(4) is None
    assert desk.catalog.counters()["no_room"] == 1
    desk.catalog.saved(segment_id(facts(ids(2))))
    assert desk.plan(4) is not None
    assert desk.catalog.take_commands().drop == [segment_id(facts(ids(2)))]


def test_nothing_is_given_up_where_it_would_not_be_enough() -> None:
    desk = Desk()
    name = desk.save(0)
    for number in range(1, 4):
        assert desk.plan(number) is not None
    assert desk.plan(9, length=2 * LENGTH) is None
    assert desk.state(name) is SegmentState.MEMORY and not desk.catalog.take_commands()


def test_what_is_to_be_dropped_and_wanted_again_just_stays() -> None:
    desk = Desk("/somewhere")
    names = [desk.save(n) for n in range(4)]
    segment = desk.plan(9)
    assert segment is not None and desk.state(names[0]) is SegmentState.DISK
    desk.catalog.failed(segment.id, "could not be stored")
    assert desk.catalog.want(names[0])
    assert desk.state(names[0]) is SegmentState.MEMORY
    orders = desk.catalog.take_commands()
    assert names[0] not in orders.drop and not orders.fetch


def test_orders_are_given_once() -> None:
    desk = Desk()
    desk.save(0)
    desk.clock.now += 1e6
    desk.catalog.expire()
    assert desk.catalog.take_commands()
    assert not desk.catalog.take_commands()


# -- Time to live ----------------------------------------------------------------------------------


def test_what_nobody_uses_expires() -> None:
    desk = Desk("/somewhere", ttl=100.0)
    old, used = desk.save(0), desk.save(1)
    desk.clock.now += 90
    desk.catalog.touch([used])
    desk.clock.now += 20
    # It is not found any more, whether or not anybody has looked for what expired.
    assert desk.found(0) == [] and desk.found(1) == [used]
    assert desk.catalog.expire() == 1
    assert desk.obey() == StoreCommands(drop=[old], delete=[old])
    assert [s.id for s in desk.catalog] == [used]


def test_expired_segments_go_before_all_others() -> None:
    desk = Desk(ttl=100.0, session_ttl=1e6)
    kept = desk.save(0, session="s")
    desk.clock.now += 80
    others = [desk.save(n) for n in (1, 2, 3)]
    desk.clock.now += 30
    desk.save(4)
    assert kept not in desk.memory and set(others) <= desk.memory


def test_what_is_on_its_way_does_not_expire() -> None:
    desk = Desk(ttl=100.0)
    segment = desk.plan(0)
    desk.clock.now += 1000
    assert desk.catalog.expire() == 0 and segment is not None
    desk.catalog.saved(segment.id)
    assert desk.catalog.expire() == 1


# -- Sessions --------------------------------------------------------------------------------------


def test_a_live_session_is_spared() -> None:
    desk = Desk(session_ttl=100.0)
    chat = desk.save(0, session="chat")
    others = [desk.save(n) for n in (1, 2, 3)]
    desk.save(4)
    assert chat in desk.memory and others[0] not in desk.memory


def test_an_idle_session_is_not() -> None:
    desk = Desk(session_ttl=100.0)
    chat = desk.save(0, session="chat")
    desk.clock.now += 101
    others = [desk.save(n) for n in (1, 2, 3)]
    desk.save(4)
    assert chat not in desk.memory and set(others) <= desk.memory


def test_one_segment_in_use_keeps_all_of_its_session() -> None:
    desk = Desk(session_ttl=100.0)
    early, late = desk.save(0, session="chat"), desk.save(1, session="chat")
    for _ in range(5):
        desk.clock.now += 60
        desk.catalog.touch([late])
        # Somebody looks for victims, so idle sessions would end.
        desk.save(2)
        desk.catalog.invalidate(ids=[segment_id(facts(ids(2)))])
        desk.catalog.failed("0" * 32, "nothing")
    for n in (5, 6, 7):
        desk.save(n)
    assert {early, late} <= desk.memory


def test_a_session_used_again_is_alive_again() -> None:
    desk = Desk(session_ttl=100.0)
    early, late = desk.save(0, session="chat"), desk.save(1, session="chat")
    desk.clock.now += 200
    desk.save(2)
    assert desk.catalog.counters()["sessions"] == 0
    desk.catalog.touch([late])
    assert desk.catalog.counters()["sessions"] == 1
    for n in (3, 4, 5):
        desk.save(n)
    assert {early, late} <= desk.memory


def test_sessions_fill_memory_only_until_there_is_nothing_else() -> None:
    desk = Desk()
    names = [desk.save(n, session=f"s{n}") for n in range(4)]
    desk.save(9)
    assert names[0] not in desk.memory and set(names[1:]) <= desk.memory


def test_ending_a_session_spares_it_no_more() -> None:
    desk = Desk()
    chat = desk.save(0, session="chat")
    theirs = desk.save(1, session="chat", tenant="x")
    desk.save(2)
    desk.save(3)
    assert desk.catalog.end_session("chat", tenant="") == 1
    desk.save(4)
    assert chat not in desk.memory and theirs in desk.memory
    assert desk.catalog.end_session("chat") == 1
    assert desk.catalog.end_session("chat") == 0


def test_a_session_computing_what_is_there_keeps_it() -> None:
    desk = Desk()
    name = desk.save(0)
    desk.clock.now += 1
    assert desk.plan(0, session="chat") is None
    for n in range(1, 5):
        desk.save(n)
    assert name in desk.memory
    assert desk.catalog.end_session("chat") == 1


# -- Invalidation ----------------------------------------------------------------------------------


def test_what_is_invalid_goes_at_once_and_is_known_a_while() -> None:
    desk = Desk("/somewhere")
    name = desk.save(0)
    assert desk.catalog.invalidate(ids=[name, name, "0" * 32]) == 1
    assert desk.catalog.invalidate(ids=[name]) == 0
    assert desk.obey() == StoreCommands(drop=[name], delete=[name])
    ((segment, match),) = desk.catalog.match(ids(0), "")
    assert segment.id == name and match.length == LENGTH
    assert not segment.ready and not segment.candidate.valid
    assert not desk.catalog.want(name)
    counters = desk.catalog.counters()
    assert counters["memory_bytes"] == counters["disk_bytes"] == 0
    # Computed anew it is good again.
    again = desk.save(0)
    assert again == name and desk.found(0) == [name]
    renewed = desk.catalog.get(name)
    assert renewed is not None and renewed.ready and renewed is not segment
    assert desk.catalog._inventory.quota.on_disk_only == 0


def test_invalidation_by_tenant_and_model() -> None:
    desk = Desk(memory=8)
    for number, (tenant, model) in enumerate([("", "m"), ("a", "m"), ("a", "n"), ("b", "n")]):
        desk.save(number, tenant=tenant, model=model)
    assert desk.catalog.invalidate(tenant="a", model="m") == 1
    assert desk.catalog.invalidate(tenant="a") == 1
    assert desk.catalog.invalidate(model="n") == 1
    assert desk.catalog.invalidate() == 1
    assert desk.memory and not desk.memory - set(desk.catalog.take_commands().drop)


def test_what_is_invalidated_on_its_way_goes_when_it_arrives() -> None:
    desk = Desk("/somewhere")
    saving = desk.plan(0)
    assert saving is not None
    names = [desk.save(n) for n in (1, 2, 3, 4)]
    asleep = next(n for n in names if desk.state(n) is SegmentState.DISK)
    assert desk.catalog.want(asleep)
    desk.catalog.take_commands()
    assert desk.catalog.invalidate() == 5
    desk.catalog.take_commands()
    desk.catalog.saved(saving.id)
    desk.catalog.fetched(asleep)
    orders = desk.catalog.take_commands()
    assert set(orders.drop) == set(orders.delete) == {saving.id, asleep}
    assert desk.catalog.counters()["memory_bytes"] == 0


# -- Failures --------------------------------------------------------------------------------------


def test_a_bad_file_is_known_with_its_cause_until_it_is_computed_anew() -> None:
    desk = Desk("/somewhere")
    names = [desk.save(n) for n in range(5)]
    assert desk.catalog.want(names[0])
    desk.catalog.take_commands()
    desk.catalog.failed(names[0], "bad checksum")
    ((segment, _),) = desk.catalog.match(ids(0), "")
    assert (segment.candidate.whole, segment.candidate.cause) == (False, "bad checksum")
    assert not segment.ready and not desk.catalog.want(names[0])
    assert desk.catalog.take_commands().drop == [names[0]]
    assert desk.catalog.counters()["failed bad checksum"] == 1
    assert desk.save(0) == names[0]
    renewed = desk.catalog.get(names[0])
    assert renewed is not None and renewed.ready and renewed.on_disk


def test_a_failed_write_leaves_the_bytes_in_memory() -> None:
    desk = Desk("/somewhere")
    segment = desk.plan(0)
    assert segment is not None
    desk.catalog.saved(segment.id)
    assert desk.catalog.counters()["disk_bytes"] == segment.file_bytes
    desk.catalog.failed(segment.id, "no space left on device")
    assert segment.ready and not segment.on_disk
    assert desk.catalog.counters()["disk_bytes"] == 0
    # Other ranks may have written theirs.
    assert desk.catalog.take_commands() == StoreCommands(delete=[segment.id])
    desk.catalog.written(segment.id)
    assert not segment.on_disk


def test_bytes_a_worker_turned_out_not_to_have() -> None:
    desk = Desk("/somewhere")
    name = desk.save(0)
    desk.catalog.failed(name, "missing")
    assert desk.state(name) is SegmentState.DISK
    assert desk.catalog.want(name)
    assert desk.catalog.take_commands() == StoreCommands(fetch={name: 0})
    bare = Desk()
    name = bare.save(0)
    bare.catalog.failed(name, "missing")
    assert len(bare.catalog) == 0


# -- Tenants ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("collide", [False, True], ids=["hash", "collision"])
def test_two_tenants_with_equal_text_never_share(collide: bool) -> None:
    def zeros(tokens: Tokens, width: int) -> NDArray[np.uint64]:
        return np.zeros(max(len(tokens) - width + 1, 0), np.uint64)

    desk = Desk(hasher=zeros if collide else None, prefetch=True)
    mine, theirs = desk.save(0, tenant="a"), desk.save(0, tenant="b")
    assert mine != theirs
    desk.save(1, tenant="a")
    assert desk.found(0, "a") == [mine]
    assert desk.found(0, "b") == [theirs]
    assert desk.found(1, "b") == desk.found(0, "") == []


def test_prefetch_wakes_near_equal_text_of_the_tenant_alone() -> None:
    desk = Desk("/somewhere", prefetch=True, disk=64, session_ttl=1e6)
    names = {t: desk.save(0, tenant=t) for t in ("a", "b")}
    for n in range(1, 6):
        desk.save(n, tenant="a")
        desk.save(n, tenant="b")
    assert all(desk.state(name) is SegmentState.DISK for name in names.values())
    text = ids(0)
    text[7] += 1
    other = ids(77, 40)
    assert desk.catalog.prefetch(other, "a") == []
    assert desk.catalog.prefetch(text, "c") == []
    whole = np.concatenate([other, text])
    assert desk.catalog.prefetch(whole, "a", [(0, 40), (40, 72)]) == [names["a"]]
    assert desk.catalog.prefetch(whole, "a", [(40, 72)]) == []
    assert desk.state(names["b"]) is SegmentState.DISK
    assert desk.obey().fetch == {names["a"]: 0}
    assert desk.catalog.counters()["prefetched"] == 1


def test_nothing_is_prefetched_unless_asked_for() -> None:
    desk = Desk("/somewhere")
    for n in range(5):
        desk.save(n)
    assert desk.catalog.prefetch(ids(0), "") == []


# -- A folder of before ----------------------------------------------------------------------------


def put(folder: Path, number: int, rank: int = 0, world: int = 1, **options: Any) -> str:
    used, session = options.pop("used", None), options.pop("session", "")
    known = facts(ids(number), format="cells", **options)
    planes = {"cells": torch.zeros(1, LENGTH, 1, TOKEN // world, dtype=torch.uint8)}
    header = SegmentHeader.of(
        segment_id(known), known, ids(number), ids(0, 0), planes, rank, world, session
    )
    path = folder / file_name(header.id, rank, world)
    write_segment(path, header, planes)
    moment = known.created if used is None else used
    os.utime(path, (moment, moment))
    return header.id


def test_a_restart_finds_what_is_in_the_folder(tmp_path: Path) -> None:
    name = put(tmp_path, 1, session="chat", ancestry=2, measures={"k_drift": 0.25})
    desk = Desk(str(tmp_path))
    assert desk.catalog.scan(tmp_path) == {}
    segment = desk.catalog.get(name)
    assert segment is not None
    assert (segment.state, segment.on_disk, segment.session) == (SegmentState.DISK, True, "chat")
    expected = facts(ids(1), format="cells", ancestry=2, measures={"k_drift": 0.25})
    assert segment.fingerprint == expected
    assert np.array_equal(segment.token_ids, ids(1))
    assert desk.found(1) == [name] and desk.catalog.want(name)
    (file,) = tmp_path.iterdir()
    assert 0 <= desk.catalog.counters()["disk_bytes"] - file.stat().st_size < 4096
    assert desk.catalog.counters()["sessions"] == 1


def test_the_latest_used_are_kept_and_the_rest_is_deleted(tmp_path: Path) -> None:
    now = Clock().now
    names = [put(tmp_path, n, used=now - 100 + n, created=now - 500) for n in range(7)]
    stale = put(tmp_path, 90, used=now - 5000, created=now - 9000)
    future = put(tmp_path, 91, used=now + 1e6, created=now - 500)
    desk = Desk(str(tmp_path), disk=1, ttl=1000.0)
    assert desk.catalog.scan(str(tmp_path)) == {}
    kept = {s.id for s in desk.catalog}
    assert kept == {future, *names[4:]}
    latest = desk.catalog.get(future)
    assert latest is not None and latest.last_used == now
    assert set(desk.catalog.take_commands().delete) == {stale, *names[:4]}
    assert desk.catalog.counters()["disk_bytes"] <= 1 << 20


def test_all_ranks_must_have_their_part(tmp_path: Path) -> None:
    whole = [put(tmp_path, 1, rank, 2) for rank in (0, 1)]
    put(tmp_path, 2, 0, 2)
    put(tmp_path, 3, 0, 2)
    put(tmp_path, 3, 1, 2, ancestry=1)
    desk = Desk(str(tmp_path))
    assert desk.catalog.scan(tmp_path) == {"incomplete": 3}
    assert {s.id for s in desk.catalog} == set(whole)
    assert next(iter(desk.catalog)).bytes == LENGTH * TOKEN + 3 * 4 * LENGTH
    one = Desk(str(tmp_path), world=1)
    assert one.catalog.scan(tmp_path) == {"other rank": 5} and len(one.catalog) == 0


def test_files_that_cannot_be_used_stay_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = [put(tmp_path, n) for n in range(6)]
    paths = {parse_name(p.name)[0]: p for p in tmp_path.iterdir()}  # type: ignore[index]
    content = {name: path.read_bytes() for name, path in paths.items()}
    paths[good[0]].write_bytes(content[good[0]][:-100])
    paths[good[1]].write_bytes(b"\0" + content[good[1]][1:])
    paths[good[2]].write_bytes(content[good[2]][:8] + b"\2" + content[good[2]][9:])
    broken = bytearray(content[good[3]])
    broken[60] ^= 1
    paths[good[3]].write_bytes(broken)
    paths[good[4]].rename(tmp_path / file_name("0" * 32, 0, 1))
    (tmp_path / "readme.kvseg").write_text("no name of a segment")
    (tmp_path / "notes.txt").write_text("nobody looks")
    (tmp_path / f".{'0' * 32}.0-1.kvseg.ab.tmp").write_text("nobody looks")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    desk = Desk(str(tmp_path))
    assert desk.catalog.scan(tmp_path) == {
        "truncated": 1,
        "not a segment file": 2,
        "other version": 1,
        "bad checksum": 1,
        "bad header": 1,
    }
    assert {s.id for s in desk.catalog} == {good[5]}
    assert not desk.catalog.take_commands()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert "readme.kvseg" in caplog.text
    assert desk.catalog.counters()["refused truncated"] == 1


def test_no_folder_is_no_segments(tmp_path: Path) -> None:
    desk = Desk(str(tmp_path / "none"))
    assert desk.catalog.scan(tmp_path / "none") == {}
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(KVPlugError, match=r"reuse\.store\.directory: .*Not a directory.*Fix:"):
        desk.catalog.scan(file)


# -- Anything in any order -------------------------------------------------------------------------


class AnythingInAnyOrder(RuleBasedStateMachine):
    """Workers answer late and in any order; what the catalog believes must stay true."""

    @initialize(folder=st.booleans(), prefetch=st.booleans(), disk=st.integers(1, 2))
    def start(self, folder: bool, prefetch: bool, disk: int) -> None:
        self.desk = Desk(
            "/somewhere" if folder else "",
            prefetch=prefetch,
            min_tokens=8,
            disk=disk,
            ttl=60.0,
            session_ttl=25.0,
            variants=2,
        )
        self.catalog = self.desk.catalog
        # What each worker process has, as the orders say.
        self.memory: set[str] = set()
        self.files: set[str] = set()
        self.saving: list[str] = []
        self.writing: list[str] = []
        self.fetching: list[str] = []

    @rule(
        number=st.integers(0, 7),
        tenant=st.sampled_from(["", "x"]),
        before=st.integers(0, 2),
        ancestry=st.integers(0, 2),
        session=st.sampled_from(["", "", "s", "t"]),
        length=st.sampled_from([LENGTH, LENGTH, 3 * LENGTH]),
    )
    def plan(
        self, number: int, tenant: str, before: int, ancestry: int, session: str, length: int
    ) -> None:
        segment = self.desk.plan(
            number,
            ids(50 + before, 4 * before),
            session,
            tenant=tenant,
            ancestry=ancestry,
            length=length,
        )
        if segment is not None:
            assert segment.state is SegmentState.SAVING
            self.saving.append(segment.id)

    @rule()
    def step(self) -> None:
        """A step of the engine: orders go out, saves are done."""
        orders = self.catalog.take_commands()
        assert len(set(orders.drop)) == len(orders.drop)
        assert not set(orders.fetch) & {*orders.drop, *orders.delete}
        assert not set(self.saving) & {*orders.drop, *orders.delete, *orders.fetch}
        assert set(orders.fetch) <= self.files
        self.memory -= set(orders.drop)
        self.files -= set(orders.delete)
        self.writing = [name for name in self.writing if name not in orders.delete]
        self.fetching = [name for name in self.fetching if name not in orders.drop]
        self.fetching += orders.fetch
        saved, self.saving = self.saving, []
        for name in saved:
            self.memory.add(name)
            if self.catalog.settings.directory:
                self.writing = [n for n in self.writing if n != name] + [name]
            self.catalog.saved(name, {"k_drift": 0.0})

    @rule(name=st.integers(0, 7), cause=st.sampled_from(["could not be stored"]))
    def save_fails(self, name: int, cause: str) -> None:
        if self.saving:
            lost = self.saving.pop(name % len(self.saving))
            self.memory.discard(lost)
            self.catalog.failed(lost, cause)

    @rule(number=st.integers(0, 7), good=st.booleans())
    def write_ends(self, number: int, good: bool) -> None:
        if self.writing:
            name = self.writing.pop(number % len(self.writing))
            if good:
                self.files.add(name)
                self.catalog.written(name)
            else:
                self.catalog.failed(name, "no space left on device")

    @rule(number=st.integers(0, 7), good=st.booleans())
    def fetch_ends(self, number: int, good: bool) -> None:
        if self.fetching:
            name = self.fetching.pop(number % len(self.fetching))
            if good:
                self.memory.add(name)
                self.catalog.fetched(name)
            else:
                self.catalog.failed(name, "bad checksum")

    @rule(number=st.integers(0, 50))
    def want(self, number: int) -> None:
        names = sorted(s.id for s in self.catalog)
        if names:
            name = names[number % len(names)]
            if self.catalog.want(name):
                assert self.desk.state(name) in (SegmentState.FETCHING, SegmentState.MEMORY)

    @rule(number=st.integers(0, 50), seconds=st.integers(0, 20))
    def touch(self, number: int, seconds: int) -> None:
        self.desk.clock.now += seconds
        names = sorted(s.id for s in self.catalog)
        if names:
            self.catalog.touch([names[number % len(names)], "0" * 32])

    @rule()
    def expire(self) -> None:
        self.catalog.expire()
        oldest = self.desk.clock.now - 60.0
        assert all(s.last_used >= oldest or s.in_flight for s in self.catalog)

    @rule(session=st.sampled_from(["s", "t"]))
    def end_session(self, session: str) -> None:
        self.catalog.end_session(session)
        assert all(s.session != session for s in self.catalog)

    @rule(tenant=st.sampled_from(["", "x", None]), number=st.integers(0, 50))
    def invalidate(self, tenant: str | None, number: int) -> None:
        names = sorted(s.id for s in self.catalog)
        self.catalog.invalidate(tenant, ids=names[number % 5 :: 5])

    @rule()
    def clear(self) -> None:
        """What was not sent yet is not sent at all."""
        filed = set(self.catalog.clear())
        assert self.files | set(self.writing) <= filed | self.catalog._inventory._delete.keys()
        assert len(self.catalog) == 0 and self.catalog.counters()["memory_bytes"] == 0
        self.saving = []

    @rule(number=st.integers(0, 7), tenant=st.sampled_from(["", "x"]))
    def match(self, number: int, tenant: str) -> None:
        oldest = self.desk.clock.now - 60.0
        text = ids(number, 3 * LENGTH)
        expected = {
            s.id
            for s in self.catalog
            if s.fingerprint.tenant == tenant
            and s.last_used >= oldest
            and np.array_equal(s.token_ids, text[: len(s.token_ids)])
        }
        found = self.catalog.match(text, tenant)
        assert {s.id for s, m in found if m.length == len(s.token_ids)} == expected
        assert all(s.fingerprint.tenant == tenant for s, _ in found)

    @invariant()
    def the_quotas_hold_and_the_books_are_right(self) -> None:
        if not hasattr(self, "catalog"):
            return
        all_of_it = list(self.catalog)
        counters = self.catalog.counters()
        memory = sum(s.bytes for s in all_of_it if s.in_memory)
        disk = sum(s.file_bytes for s in all_of_it if self.on_disk(s))
        assert counters["memory_bytes"] == memory <= self.catalog.settings.memory << 20
        assert counters["disk_bytes"] == disk <= self.catalog.settings.disk << 20
        assert counters["segments"] == len(all_of_it) == len(self.catalog.index)
        asleep = sum(s.state is SegmentState.DISK and s.usable for s in all_of_it)
        assert self.catalog._inventory.quota.on_disk_only == asleep
        families: dict[Any, int] = {}
        for segment in all_of_it:
            known = segment.fingerprint
            family = known.tenant, known.tokens
            families[family] = families.get(family, 0) + 1
        assert all(count <= 2 for count in families.values())

    def on_disk(self, segment: CatalogEntry) -> bool:
        coming = segment.state is SegmentState.SAVING and bool(self.catalog.settings.directory)
        return segment.on_disk or segment.writing or coming

    @invariant()
    def what_it_believes_is_so(self) -> None:
        if not hasattr(self, "catalog"):
            return
        for segment in self.catalog:
            if segment.ready:
                assert segment.id in self.memory
            if segment.on_disk and segment.usable:
                assert segment.id in self.files
            if segment.state is SegmentState.SAVING:
                assert segment.id in self.saving

    def teardown(self) -> None:
        if not hasattr(self, "catalog"):
            return
        # When all has come to rest, workers have nothing that the catalog does not know of.
        for _ in range(2):
            self.step()
            while self.writing:
                self.write_ends(0, True)
            while self.fetching:
                self.fetch_ends(0, True)
        self.step()
        self.desk.clock.now += 1e6
        self.catalog.expire()
        self.step()
        assert len(self.catalog) == 0
        assert not self.memory and not self.files
        counters = self.catalog.counters()
        assert counters["memory_bytes"] == counters["disk_bytes"] == counters["sessions"] == 0


TestAnythingInAnyOrder = AnythingInAnyOrder.TestCase
TestAnythingInAnyOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
