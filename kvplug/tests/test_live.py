"""Snapshots of the live page: what they hold, what is refused of them, and how they travel."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_page import engine, made, wait_for

from kvplug.observe import live_socket
from kvplug.observe.live import (
    MAX_RUNS,
    BlockState,
    LiveState,
    Rates,
    Snapshot,
    Totals,
    UnreadableSnapshot,
    decode_map,
    encode_map,
    plain,
    runs,
    state_bytes,
)
from kvplug.observe.live_socket import Publisher, follow


@given(st.lists(st.sampled_from(list(BlockState)), max_size=300))
def test_a_map_comes_back_as_it_was(states: list[BlockState]) -> None:
    packed = encode_map(np.array(states, np.uint8))
    assert decode_map(packed, len(states)).tolist() == [int(state) for state in states]


@given(st.lists(st.booleans(), max_size=300))
def test_runs_cover_what_is_held(held: list[bool]) -> None:
    found = runs(np.array(held, np.bool_))
    covered = {i for first, end in found for i in range(first, end)}
    assert covered >= {i for i, one in enumerate(held) if one}
    if len(found) < MAX_RUNS:
        assert len(covered) == sum(held)


def test_many_runs_end_in_one_that_takes_in_the_rest() -> None:
    held = np.zeros(1000, np.bool_)
    held[::2] = True
    found = runs(held)
    assert len(found) == MAX_RUNS
    assert found[:2] == ((0, 1), (2, 3)) and found[-1] == (2 * (MAX_RUNS - 1), 999)


def packed(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("%%%", "is not deflated bytes as base64"),
        (packed(b"no zlib"), "is not deflated bytes as base64"),
        (packed(zlib.compress(bytes(9))), "does not have the states of 10 blocks"),
        (packed(zlib.compress(bytes(11))), "does not have the states of 10 blocks"),
        (packed(zlib.compress(bytes(1 << 28))), "does not have the states of 10 blocks"),
        (packed(zlib.compress(bytes(10))[:-6]), "does not have the states of 10 blocks"),
        (packed(zlib.compress(bytes([7] * 10))), "state 7 is not known"),
    ],
)
def test_a_map_that_is_none_is_refused(given: str, said: str) -> None:
    with pytest.raises(UnreadableSnapshot, match=said):
        decode_map(given, 10)


def test_a_snapshot_comes_back_as_it_was() -> None:
    snapshot = made(3)
    assert Snapshot.parse(snapshot.json_bytes()) == snapshot
    state = LiveState.parse(state_bytes([snapshot.json_bytes(), made(4).json_bytes()], 3, "why"))
    assert state.engines[0] == snapshot
    assert (len(state.engines), state.expected, state.problem) == (2, 3, "why")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version: "),
        ({"blocks": -1}, "blocks: "),
        ({"blocks": 1 << 40}, "blocks: "),
        ({"blocks": 4095}, "map: does not have the states of 4,095 blocks"),
        ({"block_size": 0}, "block_size: "),
        ({"states": [0, 0, 0, 0, 0, 0, 4096]}, "states: are not those of the map"),
        ({"at": float("nan")}, "at: "),
        ({"model": "x" * 200}, "model: "),
        ({"more": "1"}, "more: "),
        ({"unknown": 1}, "unknown: "),
        ({"requests": [{"id": "a"}]}, "requests.0.status: "),
        ({"tiers": [{"name": "a", "used": -1}]}, "tiers.0.used: "),
    ],
)
def test_a_snapshot_that_is_none_is_refused_by_its_field(change: Any, said: str) -> None:
    fields = json.loads(made(0).json_bytes()) | change
    with pytest.raises(UnreadableSnapshot, match=said):
        Snapshot.parse(json.dumps(fields).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{", b"[" * 100_000])
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableSnapshot):
        Snapshot.parse(data)
    with pytest.raises(UnreadableSnapshot):
        LiveState.parse(data)


def test_rates_are_what_two_snapshots_differ_by() -> None:
    before = made(0, clock=10.0, totals=Totals(steps=5, scheduled=100, generated=10, finished=1))
    after = made(1, clock=12.0, totals=Totals(steps=9, scheduled=500, generated=14, finished=1))
    assert Rates.between(before, after) == Rates(200.0, 2.0, 2.0, 0.0)
    assert Rates.between(None, after) is None
    assert Rates.between(after, after) is None
    # The engine was started again.
    assert Rates.between(after, made(2, clock=13.0, totals=Totals())) is None
    assert Rates.between(before, made(1, clock=12.0, engine=1)) is None


def test_names_are_one_short_line() -> None:
    assert plain("a\x1b[31m\nb") == "a [31m b"
    assert len(plain("x" * 1000)) == 160


# -- the socket ------------------------------------------------------------------------------------


async def first(engine_id: str, rank: int = 0) -> bytes:
    async for taken in follow(engine_id, rank):
        return taken
    raise AssertionError


def is_ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:  # it was closed before it had read everything
        return True


def test_snapshots_reach_who_knows_the_engines_id() -> None:
    with engine("here") as one, engine("here_dp1", rank=1):
        assert not one.publisher.watched
        assert Snapshot.parse(asyncio.run(first("here"))).engine == 0
        # The rank that vLLM adds to the id of each engine is not the server's.
        assert Snapshot.parse(asyncio.run(first("here", 1))).engine == 1
        assert Snapshot.parse(asyncio.run(first("here_dp0", 1))).engine == 1
        with pytest.raises(OSError):
            asyncio.run(first("elsewhere"))
        with pytest.raises(OSError):
            asyncio.run(first("here", 2))
    with pytest.raises(OSError):
        asyncio.run(first("here"))


def test_the_loop_of_vllms_server_reads_them_as_well() -> None:
    uvloop = pytest.importorskip("uvloop")
    with engine("on uvloop"):
        assert Snapshot.parse(uvloop.run(first("on uvloop"))).engine == 0
    with pytest.raises(OSError):
        uvloop.run(first("on uvloop"))


def test_nothing_is_taken_while_nobody_watches() -> None:
    with engine("unwatched", interval=0.01) as one:
        time.sleep(0.2)
        assert one.step == 0
        asyncio.run(first("unwatched"))
        wait_for(lambda: not one.publisher.watched, "the reader's end")
        steps = one.step
        time.sleep(0.2)
        assert one.step == steps


def test_several_read_at_once_and_each_gets_every_one() -> None:
    async def read(count: int) -> list[float]:
        found = []
        async for taken in follow("several", 0):
            found.append(Snapshot.parse(taken).clock)
            if len(found) == count:
                return found
        raise AssertionError

    async def both() -> list[list[float]]:
        return await asyncio.gather(read(4), read(4))

    with engine("several", interval=0.05):
        one, two = asyncio.run(both())
    assert len(set(one) & set(two)) >= 3 and one == sorted(one)


@pytest.mark.parametrize("password", [b"", b"x" * 32, b"short"])
def test_a_wrong_password_is_shown_nothing(
    password: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_socket, "PATIENCE", 0.2)
    with engine("guarded", interval=0.01) as one, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(live_socket._address("guarded", 0))
        client.sendall(password)
        assert is_ended(client)
        assert one.step == 0
        # The next one is not kept from it.
        asyncio.run(first("guarded"))


def test_another_users_process_is_shown_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine("foreign", interval=0.01) as one:
        monkeypatch.setattr(live_socket, "_is_own", lambda connection: False)
        with pytest.raises(PermissionError):
            asyncio.run(first("foreign"))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            client.connect(live_socket._address("foreign", 0))
            with contextlib.suppress(BrokenPipeError):
                client.sendall(live_socket._password("foreign"))
            assert is_ended(client)
        assert one.step == 0


def test_a_reader_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_socket, "PATIENCE", 0.2)
    with (
        engine("stalled", interval=0.01, blocks=200_000) as one,
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.connect(live_socket._address("stalled", 0))
        client.sendall(live_socket._password("stalled"))
        wait_for(lambda: one.publisher.watched, "a reader")
        wait_for(lambda: not one.publisher.watched, "its end")
        asyncio.run(first("stalled"))


def test_one_id_is_one_engines(caplog: pytest.LogCaptureFixture) -> None:
    with engine("taken"), pytest.raises(OSError):
        Publisher("taken", 0, lambda: None)


def test_a_snapshot_that_failed_is_left_out() -> None:
    answers: list[bytes | None] = [None, None, made(0).json_bytes()]
    publisher = Publisher("failing", 0, lambda: answers.pop(0) if answers else None, 0.01)
    publisher.start()
    try:
        assert Snapshot.parse(asyncio.run(first("failing"))).blocks == 4096
    finally:
        publisher.close()
        publisher.close()
