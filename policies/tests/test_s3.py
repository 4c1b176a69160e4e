"""An S3 store: laws, and every way in which a store goes wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tier_servers import SECRET, SeaweedServer, answering, needs_module, proxy, seaweed_server

from kvplug.contract import EngineView, TierError, TierPlace
from kvplug.testing.tiers import IDENTITY, LAWS, Law, Opener, key, put, read
from kvplug_policies import bounded
from kvplug_policies.tiers.s3 import FULL, S3

MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[SeaweedServer]:
    with seaweed_server() as one:
        yield one


def built(server: SeaweedServer, **options: Any) -> S3:
    stated = {
        "bucket": server.bucket,
        "endpoint": server.endpoint(),
        "credentials": server.credentials(),
        "timeout": 60.0,
        **options,
    }
    return S3(S3.Options.model_validate(stated), EngineView(block_size=16))


def opened(server: SeaweedServer, **options: Any) -> S3:
    tier = built(server, **options)
    tier.open(TierPlace(IDENTITY, 0, 1))
    return tier


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law, server: SeaweedServer) -> None:
    law(Opener(lambda: built(server), many=500))


@pytest.mark.slow
def test_many_small_chunks(server: SeaweedServer) -> None:
    tier, names = opened(server), [key() for _ in range(10_000)]
    for at in range(0, len(names), 500):
        put(tier, *((name, name[:20]) for name in names[at : at + 500]))
    assert read(tier, *names[-500:]) == [name[:20] for name in names[-500:]]


# -- Options ---------------------------------------------------------------------------------------


def test_objects_are_named_by_identity_key_and_rank(server: SeaweedServer) -> None:
    tier, name = opened(server, prefix="/mine/"), key()
    put(tier, (name, b"x"))
    path = f"mine/{IDENTITY}/{name.hex()[:2]}/{name.hex()}.0-1"
    assert bytes(tier._store.get(path).bytes()) == b"x"


def test_wrong_credentials_are_refused_at_start(server: SeaweedServer) -> None:
    wrong = server.credentials("wrong")
    with pytest.raises(TierError, match=r"wrong credentials.*mend bucket, endpoint or cred"):
        opened(server, credentials=wrong)


def test_no_credentials_in_an_error(server: SeaweedServer, tmp_path: Path) -> None:
    path = tmp_path / "credentials"
    for text in (SECRET, f"[default]\n{SECRET}\n", f"[other]\naws_access_key_id = {SECRET}\n"):
        path.write_text(text)
        with pytest.raises(TierError, match="no credentials") as refused:
            opened(server, credentials=str(path))
        assert SECRET not in str(refused.value) and str(path) in str(refused.value)
    path.write_text(f"[default]\naws_access_key_id = {SECRET}\n")
    with pytest.raises(TierError, match="lacks aws_access_key_id or aws_secret_access_key"):
        opened(server, credentials=str(path))
    with pytest.raises(TierError, match="cannot be read: No such file"):
        opened(server, credentials=str(tmp_path / "none"))


def test_credentials_of_the_environment(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    tier, name = opened(server, credentials=""), key()
    put(tier, (name, b"x"))
    assert read(tier, name) == [b"x"]


def test_a_bucket_that_does_not_exist_is_refused_at_start(server: SeaweedServer) -> None:
    with pytest.raises(TierError, match=r"no bucket.*mend bucket"):
        opened(server, bucket="nothing-here")


def test_an_endpoint_that_is_no_url_is_refused(server: SeaweedServer) -> None:
    with pytest.raises(ValueError, match="endpoint must begin with http"):
        built(server, endpoint="127.0.0.1:8333")


def test_a_client_that_is_not_installed_is_refused_in_one_sentence(
    server: SeaweedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvplug\[s3\]'"):
        built(server)


def test_payloads_above_the_largest_are_not_stored(server: SeaweedServer) -> None:
    tier, small, large = opened(server, max_value="1MiB"), key(), key()
    assert tier.put([(large, bytes(MIB + 1)), (small, bytes(MIB))]) == ["too large", ""]
    assert read(tier, large, small) == [None, bytes(MIB)]
    put(opened(server), (large, bytes(MIB + 1)))
    assert read(tier, large) == [None]


# -- Faults ----------------------------------------------------------------------------------------


def test_a_slow_store_and_a_half_open_connection_are_given_up_in_time(
    server: SeaweedServer,
) -> None:
    with proxy(server.port) as between:
        tier, name = opened(server, endpoint=server.endpoint(between.port), timeout=0.5), key()
        put(opened(server), (name, b"x"))
        assert read(tier, name) == [b"x"]
        between.delay = 1.0
        start = time.monotonic()
        with pytest.raises(TierError, match="too slow"):
            tier.get([name])
        between.delay, between.silent = 0.0, True
        for call in (lambda: tier.put([(key(), b"y")]), lambda: tier.has([name])):
            with pytest.raises(TierError, match="too slow"):
                call()
        assert time.monotonic() - start < 30
        between.silent = False
        end = time.monotonic() + 60
        while True:
            try:
                assert read(tier, name) == [b"x"]
                break
            except TierError:
                assert time.monotonic() < end


def test_a_full_store_refuses_and_is_still_read() -> None:
    with seaweed_server(volumes=8, volume_mib=1) as small:
        tier, names = opened(small), [key() for _ in range(12)]
        answers = [tier.put([(name, bytes(MIB))])[0] for name in names]
        assert set(answers) == {"", FULL}
        stored = [name for name, answer in zip(names, answers, strict=True) if not answer]
        assert read(tier, *stored) == [bytes(MIB)] * len(stored)


@pytest.mark.parametrize(
    ("status", "cause"),
    [(b"507 Insufficient Storage", FULL), (b"400 Bad Request", "refused")],
)
def test_full_is_what_the_store_says_and_not_a_name_of_these_digits(
    status: bytes, cause: str
) -> None:
    needs_module("obstore")
    with answering(b"HTTP/1.1 %b\r\nContent-Length: 0\r\n\r\n" % status) as port:
        options = {"bucket": "b", "endpoint": f"http://127.0.0.1:{port}", "anonymous": True}
        tier = S3(S3.Options.model_validate({"prefix": "507", **options}), EngineView(16))
        tier.open(TierPlace(IDENTITY, 0, 1))
        with pytest.raises(TierError) as refused:
            tier.get([key()])
        assert refused.value.cause == cause
        tier.close()


def test_a_store_killed_and_restarted_in_the_middle(server: SeaweedServer) -> None:
    """Last of the module: the server's own restart takes a while."""
    tier, name = opened(server), key()
    put(tier, (name, os.urandom(1000)))
    server.process.kill()
    for call in (
        lambda: tier.get([name]),
        lambda: tier.has([name]),
        lambda: tier.put([(key(), b"x")]),
        lambda: tier.remove([name]),
    ):
        with pytest.raises(TierError, match="unreachable"):
            call()
    late = opened(server)
    assert "not reached at start" in late.described()["server"]
    server.start()
    put(tier, (key(), b"x"))
    other = key()
    put(late, (other, b"late"))
    assert read(tier, other) == [b"late"]
