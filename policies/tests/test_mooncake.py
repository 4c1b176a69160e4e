"""A Mooncake store: laws, two nodes, and every way in which it goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from tier_servers import MooncakeServers, mooncake_servers

from kvplug.contract import EngineView, TierError, TierPlace
from kvplug.testing.tiers import IDENTITY, LAWS, Law, Opener, key, put, read
from kvplug_policies import bounded
from kvplug_policies.tiers import mooncake as module
from kvplug_policies.tiers.mooncake import Mooncake

MIB = 1 << 20


@pytest.fixture(scope="module")
def servers() -> Iterator[MooncakeServers]:
    with mooncake_servers() as both:
        yield both


@pytest.fixture
def own() -> Iterator[MooncakeServers]:
    with mooncake_servers() as both:
        yield both


def built(servers: MooncakeServers, **options: Any) -> Mooncake:
    stated = {
        "master": f"127.0.0.1:{servers.port}",
        "metadata": servers.metadata,
        "address": "127.0.0.1",
        "segment": "64MiB",
        "buffer": "16MiB",
        "timeout": 60.0,
        **options,
    }
    return Mooncake(Mooncake.Options.model_validate(stated), EngineView(block_size=16))


def opened(servers: MooncakeServers, rank: int = 0, **options: Any) -> Mooncake:
    tier = built(servers, **options)
    tier.open(TierPlace(IDENTITY, rank, 1))
    return tier


@pytest.fixture(scope="module")
def store(servers: MooncakeServers) -> Iterator[Mooncake]:
    """A node that stays, so that what the laws' own nodes leave is kept somewhere."""
    tier = opened(servers)
    yield tier
    tier.close()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, servers: MooncakeServers, store: Mooncake) -> None:
    # What a node holds goes with it, so these hold nothing.
    law(Opener(lambda: built(servers, segment=0), many=2000))


def test_a_chunk_that_several_put_at_once_is_there_for_each_of_them(
    servers: MooncakeServers, store: Mooncake
) -> None:
    """The store takes a put of what another client is still writing for done."""
    writers = [opened(servers, segment=0, connections=8) for _ in range(2)]
    start = threading.Barrier(8)
    payload = os.urandom(3000)

    def put_and_get(writer: Mooncake, name: bytes) -> tuple[list[str], bool]:
        start.wait()
        answers = writer.put([(name, payload)])
        return answers, bytes(writer.get([name])[0] or b"") == payload

    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            name = key()
            jobs = [pool.submit(put_and_get, writers[i % 2], name) for i in range(8)]
            assert [job.result() for job in jobs] == [([""], True)] * 8
    for writer in writers:
        writer.close()


def test_a_chunk_that_another_never_finishes_is_not_called_stored(
    servers: MooncakeServers, store: Mooncake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WRITING", 0.05)
    asked = SimpleNamespace(put=lambda *_: 0, is_exist=lambda _: 0, close=lambda: None)
    tier = opened(servers, segment=0)
    joined, tier._store = tier._store, asked
    try:
        assert tier.put([(key(), b"x")]) == ["being written"]
        assert tier.usage().entries == 0
    finally:
        tier._store = joined
        tier.close()


# -- Options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"master": "localhost"}], ids=str)
def test_options_that_cannot_work_are_refused(
    options: dict[str, Any], servers: MooncakeServers
) -> None:
    with pytest.raises(ValueError, match="master must be host:port"):
        built(servers, **options)


def test_a_client_that_is_not_installed_is_refused_in_one_sentence(
    servers: MooncakeServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvplug\[mooncake\]'"):
        built(servers)


def test_a_client_that_does_not_load_names_the_packages(
    servers: MooncakeServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.store", None)
    with pytest.raises(TierError, match="apt-get install libibverbs1"):
        opened(servers)


def test_the_scheduler_joins_without_memory(servers: MooncakeServers, store: Mooncake) -> None:
    scheduler, name = opened(servers, rank=-1), key()
    assert "with 0 bytes" in scheduler.described()["store"]
    put(store, (name, b"x"))
    assert scheduler.has([name, key()]) == [True, False]
    scheduler.close()


# -- Two nodes -------------------------------------------------------------------------------------

NODE = """
import sys
sys.path[:0] = {path!r}
from kvplug.contract import EngineView, TierPlace
from kvplug_policies.tiers.mooncake import Mooncake

tier = Mooncake(Mooncake.Options.model_validate({options!r}), EngineView(block_size=16))
tier.open(TierPlace({identity!r}, 0, 1))
found = bytes(tier.get([bytes(32)])[0])
answer = tier.put([(bytes([1]) * 32, found[::-1])])
print("answer", answer, len(found), flush=True)
sys.stdin.readline()
tier.close()
"""


def test_two_nodes_in_two_processes_share_their_memory(own: MooncakeServers) -> None:
    tier, payload = opened(own), os.urandom(3 * MIB + 7)
    put(tier, (bytes(32), payload))
    options = tier.options.model_dump()
    code = NODE.format(path=sys.path, options=options, identity=IDENTITY)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as node:
        assert node.stdin is not None and node.stdout is not None
        said = next(line for line in node.stdout if line.startswith("answer"))
        assert said == f"answer [''] {len(payload)}\n"
        assert read(tier, bytes([1]) * 32) == [payload[::-1]]
        # A node that dies takes what it held along, and nothing else.
        node.kill()
    stored_again(tier)
    assert read(tier, bytes(32)) == [payload]
    tier.close()


def stored_again(tier: Mooncake) -> bytes:
    """Store until it works: a master needs seconds to notice that a node is gone."""
    end = time.monotonic() + 120
    while True:
        name = key()
        try:
            if tier.put([(name, b"again")]) == [""]:
                return name
        except TierError:
            pass
        assert time.monotonic() < end
        time.sleep(0.2)


# -- Faults ----------------------------------------------------------------------------------------


def test_a_master_killed_and_restarted_in_the_middle(own: MooncakeServers) -> None:
    tier, name = opened(own), key()
    put(tier, (name, b"x"))
    own.master.kill()
    assert read(tier, name) == [None]
    for call in (lambda: tier.has([name]), lambda: tier.put([(key(), b"x")])):
        with pytest.raises(TierError, match="unreachable"):
            call()
    own.start()
    name = stored_again(tier)
    assert read(tier, name) == [b"again"]
    tier.close()


def test_a_master_that_is_down_at_start_serves_later(
    own: MooncakeServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY", 0.0)
    own.master.kill()
    tier, name = opened(own), key()
    assert "not joined at start" in tier.described()["store"]
    with pytest.raises(TierError, match="unreachable"):
        tier.put([(name, b"x")])
    own.start()
    put(tier, (name, b"x"))
    assert read(tier, name) == [b"x"]
    tier.close()


def test_a_half_open_master_is_given_up_in_time(own: MooncakeServers) -> None:
    tier, name = opened(own, timeout=1.0), key()
    put(tier, (name, b"x"))
    with own.master.frozen():
        start = time.monotonic()
        with pytest.raises(TierError, match="too slow"):
            tier.put([(key(), b"y")])
        assert time.monotonic() - start < 30
    end = time.monotonic() + 120
    while True:
        try:
            if read(tier, name) == [b"x"]:
                break
        except TierError:
            pass
        assert time.monotonic() < end
        time.sleep(0.2)
    tier.close()


def test_a_full_store_gives_way_or_says_so(own: MooncakeServers) -> None:
    tier = opened(own, segment="16MiB")
    answers = [tier.put([(key(), bytes(MIB))])[0] for _ in range(40)]
    assert set(answers) <= {"", "full"} and answers.count("") >= 8
    tier.close()


def test_payloads_above_the_largest_are_not_stored(
    servers: MooncakeServers, store: Mooncake
) -> None:
    tier, small, large = opened(servers, segment=0, max_value="1MiB"), key(), key()
    assert tier.put([(large, bytes(MIB + 1)), (small, b"x")]) == ["too large", ""]
    tier.close()
