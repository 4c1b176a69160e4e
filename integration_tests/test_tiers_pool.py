"""What tiers know of the pool's blocks: nothing that may be another text's, or of other weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from kvplug.hosts.vllm.scheduler.tiers_pool import PoolWatch
from kvplug.hosts.vllm.scheduler.tiers_requests import TieredRequest
from kvplug.request_options import RequestOptions
from kvplug.tiers.keys import KeyChain

CHUNK = 16


def watch(*hashes: bytes) -> PoolWatch:
    blocks = [
        SimpleNamespace(
            block_id=i, block_hash=make_block_hash_with_group_id(BlockHash(one), 0), is_null=False
        )
        for i, one in enumerate(hashes)
    ]
    pool = SimpleNamespace(blocks=blocks, num_gpu_blocks=len(blocks))
    return PoolWatch(pool, None, CHUNK)


def request(
    hashes: list[bytes], keys: list[bytes], *, stores: bool = True, keeps: bool = True
) -> Any:
    return SimpleNamespace(
        stores=stores,
        keeps=keeps,
        session=None,
        request=SimpleNamespace(request_id="r", priority=0),
        extend=lambda: keys,
        hashes=lambda *_: hashes,
    )


def known(made: PoolWatch) -> list[bytes]:
    return [leaving.key for _, leaving in made.cached()]


def test_blocks_of_before_a_reset_are_not_known_until_the_pool_has_none() -> None:
    """Requests go on taking them from the pool, and what they compute after them is no better."""
    made = watch(b"1", b"2", b"3", b"9")
    made.learn(request([b"1", b"2"], [b"k1", b"k2"]), CHUNK, True)
    assert known(made) == [b"k1", b"k2"]
    made.pool.blocks, later = made.pool.blocks[:2], made.pool.blocks
    made.forget()
    made.pool.blocks = later
    made.learn(request([b"1", b"2", b"3"], [b"n1", b"n2", b"n3"]), CHUNK, True)
    made.learn(request([b"9"], [b"n9"]), CHUNK, True)
    assert known(made) == [b"n9"]
    made.pool.blocks = []
    made.reset()
    made.pool.blocks = later
    made.learn(request([b"1", b"2", b"3"], [b"n1", b"n2", b"n3"]), CHUNK, True)
    assert known(made) == [b"n1", b"n2", b"n3"]


def test_a_hash_of_two_texts_is_stored_as_neither() -> None:
    """The engine tells adapters apart by their names, and keys by what is in them."""
    made = watch(b"1", b"2")
    made.learn(request([b"1", b"2"], [b"a1", b"a2"]), CHUNK, True)
    made.learn(request([b"1", b"2"], [b"b1", b"b2"]), CHUNK, True)
    assert known(made) == []
    made.learn(request([b"1", b"2"], [b"a1", b"a2"]), CHUNK, True)
    assert known(made) == []


def test_what_is_not_to_be_stored_is_not_taken_for_what_was() -> None:
    """Its blocks have the hashes of a text that is known, and other KV."""
    made = watch(b"1", b"2")
    made.learn(request([b"1"], [b"a1"]), CHUNK, True)
    made.learn(request([b"1", b"2"], [b"a1", b"a2"], stores=False), CHUNK, True)
    assert known(made) == [b"a1"]
    made.learn(request([b"1", b"2"], [b"a1", b"a2"], keeps=False), CHUNK, True)
    assert known(made) == []


def test_a_session_that_gets_its_text_in_parts_takes_no_part() -> None:
    stock = {"pooling_params": None, "prompt_embeds": None, "mm_features": ()}
    one = SimpleNamespace(**stock, request_id="r", prompt_token_ids=[1], resumable=False)
    options, chain = RequestOptions(), KeyChain("ab", CHUNK)
    assert TieredRequest.of(one, options, chain, "") is not None
    one.resumable = True
    assert TieredRequest.of(one, options, chain, "") is None


def test_blocks_that_a_preempted_request_was_to_fill_are_given_up() -> None:
    """vLLM hashed them as it scheduled them; another block of the same text may be in the pool."""
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=CHUNK)
    made = PoolWatch(pool, None, CHUNK)
    pool.metrics_collector = made
    keys = [make_block_hash_with_group_id(BlockHash(one), 0) for one in (b"1", b"2", b"2")]
    blocks = pool.get_new_blocks(3)
    for block, key in zip(blocks, keys, strict=True):
        block.set_block_hash(key, CHUNK)
        pool.cached_block_hash_to_block.insert(key, block)
    made.learn(request([b"1", b"2"], [b"k1", b"k2"]), CHUNK, True)
    pool.free_blocks(reversed(blocks))
    pool.get_new_blocks(5)
    made.forget_uncomputed([b"2"])
    leaving, late = made.leaving(8)
    assert [one.key for _, one in leaving] == [b"k1"] and late == 0
    assert known(made) == [b"k1"]
    assert pool.get_cached_block(BlockHash(b"2"), [0]) is None
    assert pool.get_cached_block(BlockHash(b"1"), [0]) is not None
