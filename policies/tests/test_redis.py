"""A Redis server: laws, and every way in which a server goes wrong."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tier_servers import SECRET, Proxy, RedisServer, answering, needs_module, proxy, redis_server

from kvplug.contract import EngineView, TierError, TierPlace
from kvplug.testing.tiers import IDENTITY, LAWS, Law, Opener, key, put, read
from kvplug_policies import bounded
from kvplug_policies.tiers.redis import Redis

MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as one:
        yield one


@pytest.fixture
def own() -> Iterator[RedisServer]:
    with redis_server() as one:
        yield one


@pytest.fixture
def between(server: RedisServer) -> Iterator[Proxy]:
    with proxy(server.port) as one:
        yield one


def built(server: RedisServer, **options: Any) -> Redis:
    stated = {"url": server.url(), "timeout": 20.0, **options}
    return Redis(Redis.Options.model_validate(stated), EngineView(block_size=16))


def opened(server: RedisServer, **options: Any) -> Redis:
    tier = built(server, **options)
    tier.open(TierPlace(IDENTITY, 0, 1))
    return tier


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, server: RedisServer) -> None:
    law(Opener(lambda: built(server)))


# -- Options ---------------------------------------------------------------------------------------


def test_the_url_is_never_shown(server: RedisServer) -> None:
    tier = built(server)
    assert SECRET not in repr(tier.options) and SECRET not in str(tier.options.model_dump())
    assert SECRET not in tier.options.model_dump_json()


def test_a_password_in_a_file(server: RedisServer, tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{SECRET}\n")
    url = server.url().replace(SECRET, "")
    put(opened(server, url=url, password_file=str(path)), (key(), b"x"))
    with pytest.raises(TierError, match=r"password_file /nowhere/password cannot be read"):
        opened(server, url=url, password_file="/nowhere/password")


def test_a_wrong_password_is_refused_at_start(server: RedisServer) -> None:
    with pytest.raises(TierError, match=r"wrong password.*mend url or password_file") as refused:
        opened(server, url=server.url(password="wrong"))
    assert "wrong@" not in str(refused.value)
    with pytest.raises(TierError, match="wrong password"):
        opened(server, url=f"redis://127.0.0.1:{server.port}/0")


def test_what_is_no_url_is_refused(server: RedisServer) -> None:
    with pytest.raises(ValueError, match="url must begin with redis://"):
        built(server, url="127.0.0.1:6379")
    with pytest.raises(ValueError, match="url is wrong: it must be redis://"):
        opened(server, url="redis://127.0.0.1:port")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("redis://:{}/x@127.0.0.1:6379", "url is wrong: .*%2F for /"),
        ("redis://:{}#x@127.0.0.1:6379", "url is wrong: .*%23 for #"),
        ("redis://:{}@[127.0.0.1:6379", "url is wrong"),
        ("redis://:{0}@127.0.0.1:6379/0?timeout={0}", "url sets timeout, which the tier sets"),
        ("redis://127.0.0.1:6379?decode_responses={}", "url sets decode_responses"),
    ],
)
def test_what_is_wrong_with_a_url_is_told_without_its_values(
    server: RedisServer, url: str, told: str
) -> None:
    with pytest.raises(ValueError, match=told) as refused:
        opened(server, url=url.format(SECRET))
    assert SECRET[:4] not in str(refused.value)


def test_a_password_has_one_place(server: RedisServer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="url has a password and password_file names another"):
        opened(server, password_file=str(tmp_path / "password"))


def test_a_client_that_is_not_installed_is_refused_in_one_sentence(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvplug\[redis\]'"):
        built(server)


def test_what_the_server_is_told(server: RedisServer) -> None:
    import redis

    tier, name = opened(server, ttl=100, prefix="mine"), key()
    put(tier, (name, b"x"))
    client = redis.Redis.from_url(server.url())
    assert 0 < client.ttl(f"mine:{IDENTITY}:{name.hex()}.0-1") <= 100
    assert tier.described()["server"].startswith(("redis ", "valkey "))
    assert "no limit" in tier.described()["memory"]


def test_payloads_above_the_largest_are_not_stored(server: RedisServer) -> None:
    tier, small, large = opened(server, max_value="1MiB"), key(), key()
    assert tier.put([(large, bytes(MIB + 1)), (small, bytes(MIB))]) == ["too large", ""]
    assert read(tier, large, small) == [None, bytes(MIB)]
    put(opened(server), (large, bytes(MIB + 1)))
    assert read(tier, large) == [None]


# -- Faults ----------------------------------------------------------------------------------------


def test_a_server_killed_and_restarted_in_the_middle(own: RedisServer) -> None:
    tier, name = opened(own), key()
    put(tier, *((key(), os.urandom(1000)) for _ in range(20)))
    own.process.kill()
    for call in (
        lambda: tier.get([name]),
        lambda: tier.has([name]),
        lambda: tier.put([(name, b"x")]),
        lambda: tier.remove([name]),
    ):
        with pytest.raises(TierError, match="unreachable"):
            call()
    own.start()
    put(tier, (name, b"x"))
    assert read(tier, name) == [b"x"]


def test_a_server_that_is_down_at_start_serves_later(own: RedisServer) -> None:
    own.process.kill()
    tier, name = opened(own), key()
    assert "not reached at start" in tier.described()["server"]
    own.start()
    put(tier, (name, b"x"))
    assert read(tier, name) == [b"x"]


def test_a_slow_server_is_given_up_in_time(between: Proxy, server: RedisServer) -> None:
    tier, name = opened(server, url=server.url(between.port), timeout=0.3), key()
    put(tier, (name, b"x"))
    between.delay = 1.0
    start = time.monotonic()
    with pytest.raises(TierError, match="too slow"):
        tier.get([name])
    assert time.monotonic() - start < 30
    between.delay = 0.0
    patient = opened(server, url=server.url(between.port))
    assert read(patient, name) == [b"x"]


def test_a_half_open_connection_is_given_up_in_time(between: Proxy, server: RedisServer) -> None:
    tier, name = opened(server, url=server.url(between.port), timeout=0.3), key()
    put(tier, (name, b"x"))
    between.silent = True
    for _ in range(6):  # more than there are connections
        with pytest.raises(TierError, match=r"too slow|unreachable"):
            tier.get([name])
    between.silent = False
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            assert read(tier, name) == [b"x"]
            break
        except TierError:
            time.sleep(0.1)
    else:
        pytest.fail("it did not recover")


def test_a_frozen_server_is_given_up_in_time(own: RedisServer) -> None:
    tier, name = opened(own, timeout=0.3), key()
    put(tier, (name, b"x"))
    with own.process.frozen(), pytest.raises(TierError, match=r"too slow|unreachable"):
        tier.get([name])
    end = time.monotonic() + 60
    while True:
        try:
            assert read(tier, name) == [b"x"]
            break
        except TierError:
            assert time.monotonic() < end


def test_a_trickle_is_given_up_in_time(between: Proxy, server: RedisServer) -> None:
    # Each piece arrives within a socket's time limit, the whole does not.
    tier, name = opened(server, url=server.url(between.port), timeout=0.5), key()
    put(opened(server), (name, bytes(4 * MIB)))
    between.delay = 0.2
    start = time.monotonic()
    with pytest.raises(TierError, match="too slow"):
        tier.get([name])
    assert time.monotonic() - start < 8


def test_a_full_server_is_named_and_still_read() -> None:
    with redis_server("--maxmemory", "8mb", "--maxmemory-policy", "noeviction") as full:
        tier, names = opened(full), [key() for _ in range(20)]
        answers = tier.put([(name, bytes(MIB)) for name in names])
        assert set(answers) == {"", "full"}
        assert "noeviction" in tier.described()["memory"]
        stored = [name for name, answer in zip(names, answers, strict=True) if not answer]
        assert read(tier, *stored) == [bytes(MIB)] * len(stored)
        tier.remove(stored)
        put(tier, (key(), bytes(MIB)))


def test_a_server_that_evicts_by_itself_is_a_miss() -> None:
    with redis_server("--maxmemory", "8mb", "--maxmemory-policy", "allkeys-lru") as small:
        tier, names = opened(small), [key() for _ in range(20)]
        for name in names:
            put(tier, (name, bytes(MIB)))
        found = tier.get(names)
        assert found[0] is None and found[-1] is not None


def test_a_hostile_value_is_no_other_chunks_trouble(server: RedisServer) -> None:
    """A list is a payload that nobody takes; it can be removed, as what is empty or too large."""
    import redis

    tier, names = opened(server, max_value=1024), [key() for _ in range(4)]
    client = redis.Redis.from_url(server.url())
    values = [f"kvplug:{IDENTITY}:{name.hex()}.0-1" for name in names]
    client.lpush(values[0], "x")
    client.set(values[1], b"")
    client.set(values[2], bytes(2000))
    put(tier, (names[3], b"x"))
    assert read(tier, *names) == [b"", b"", None, b"x"]
    assert tier.has(names) == [False, False, False, True]
    tier.remove(names)
    put(tier, *((name, b"y") for name in names))
    assert read(tier, *names) == [b"y"] * 4


OTHER = """
import sys
sys.path[:0] = {path!r}
from kvplug.contract import EngineView, TierPlace
from kvplug_policies.tiers.redis import Redis

tier = Redis(Redis.Options(url={url!r}), EngineView(block_size=16))
tier.open(TierPlace({identity!r}, 0, 1))
assert bytes(tier.get([bytes(32)])[0]) == b"from the first"
print(tier.put([(bytes([1]) * 32, b"from the second")]))
"""


NONSENSE = {
    "nothing": b"$-1\r\n" * 4,
    "numbers": b":5\r\n" * 4,
    "a list": b"*2\r\n:1\r\n:2\r\n" * 4,
    "a status": b"+\xff\xfe\r\n" * 4,
    "an error": b"-\xff\xfe\r\n" * 4,
    "facts of no form": b"$13\r\nmaxmemory:4gb\r\n" * 4,
    "no length": b"$abc\r\n",
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
}


@pytest.mark.parametrize("what", NONSENSE)
def test_what_no_redis_server_would_answer_costs_misses(what: str) -> None:
    needs_module("redis")
    with answering(NONSENSE[what]) as port:
        options = {"url": f"redis://127.0.0.1:{port}", "timeout": 20.0}
        tier = Redis(Redis.Options.model_validate(options), EngineView(block_size=16))
        tier.open(TierPlace(IDENTITY, 0, 1))
        keys = [key(), key()]
        with contextlib.suppress(TierError):
            assert all(one is None or isinstance(one, memoryview) for one in tier.get(keys))
        with contextlib.suppress(TierError):
            assert len(tier.has(keys)) == 2
        with contextlib.suppress(TierError):
            assert len(tier.put([(one, b"x") for one in keys])) == 2
        with contextlib.suppress(TierError):
            tier.remove(keys)
        tier.close()


def test_another_process_sees_what_is_stored(server: RedisServer) -> None:
    tier = opened(server)
    tier.remove([bytes(32), bytes([1]) * 32])
    put(tier, (bytes(32), b"from the first"))
    code = OTHER.format(path=sys.path, url=server.url(), identity=IDENTITY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['']\n", done.stderr
    assert read(tier, bytes([1]) * 32) == [b"from the second"]
