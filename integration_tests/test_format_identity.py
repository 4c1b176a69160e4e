"""Blocks of one format never match a request under another, whatever their tokens."""

from __future__ import annotations

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from kvplug.contract import EngineView, LayerView
from kvplug.hosts.vllm import compat
from kvplug_policies.format.int4 import Int4
from kvplug_policies.format.int8 import Int8

BLOCK = 32
VIEW = EngineView(
    block_size=BLOCK,
    layers=(LayerView(0, 1, num_kv_heads=2, num_heads=4, head_size=64, dtype="bfloat16"),),
)


@pytest.fixture(scope="module", autouse=True)
def _seeded() -> None:
    init_none_hash(sha256)


def request(salt: str | None = None, tenant: str | None = None) -> Request:
    made = Request(
        request_id="a",
        prompt_token_ids=list(range(100)),
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        cache_salt=tenant,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    if salt is not None:
        compat.salt_request(made, salt)
    return made


def test_every_block_of_another_format_has_another_hash() -> None:
    formats = [
        Int4(Int4.Options(), VIEW),
        Int4(Int4.Options(group=32), VIEW),
        Int8(Int8.Options(), VIEW),
    ]
    hashes = [request().block_hashes, *(request(f.fingerprint()).block_hashes for f in formats)]
    assert {len(own) for own in hashes} == {3}
    assert len({h for own in hashes for h in own}) == 4 * 3


def test_the_same_format_matches() -> None:
    one, other = Int4(Int4.Options(), VIEW), Int4(Int4.Options(), VIEW)
    assert request(one.fingerprint()).block_hashes == request(other.fingerprint()).block_hashes


def test_a_tenant_stays_apart_under_a_format() -> None:
    mine, yours = (request("int4", tenant).block_hashes for tenant in ("a", "b"))
    assert not set(mine) & set(yours)
    assert request("int4", "a").block_hashes == mine


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("b", "a|"), ("|b", "a")),
        (("b", "a"), ("a|b", None)),
        (("b|a", None), ("b", "a")),
        (("b", ""), ("b", "|")),
        (("4:in", "t4"), ("4:int4", None)),
        (("1", "0:x"), ("10:x", None)),
    ],
)
def test_no_salt_of_a_client_makes_it_another_format_or_tenant(
    one: tuple[str, str | None], other: tuple[str, str | None]
) -> None:
    mine, yours = request(*one), request(*other)
    assert not set(mine.block_hashes) & set(yours.block_hashes)


def test_what_is_appended_later_is_hashed_with_the_salt() -> None:
    made = request("int4")
    made.append_output_token_ids(list(range(100, 130)))
    longer = Request(
        request_id="b",
        prompt_token_ids=list(range(130)),
        sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    compat.salt_request(longer, "int4")
    assert made.block_hashes == longer.block_hashes and len(longer.block_hashes) == 4
