"""Orders of K and V in a page, found through vLLM's own CPU op, and tokens moved by them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from kvplug.errors import KVPlugError
from kvplug.hosts.vllm.worker.pages import PageOrder, Pages, Write, order_of

CPU = torch.device("cpu")
BLOCKS, HEADS = 5, 2

OP = [
    pytest.param(dtype, head, block, id=f"{str(dtype).removeprefix('torch.')}-{head}-{block}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for head in (64, 80, 128)
    for block in (32, 64, 128)
]
SOME = [OP[0], OP[4], OP[12], OP[20], OP[26]]


def through_the_op(dtype: torch.dtype, block: int, head: int) -> Write:
    """Writing as vLLM's CPU backend does."""
    isa = _get_attn_isa(dtype, block, head, "auto")

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        blocks, heads, size, _ = cache.shape
        halves = cache.view(blocks, heads, size * 2, head).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key, value, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
        )

    return write


def plain_offsets(block: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys of all slots, then values, each slot contiguous."""
    key = torch.arange(block * head).view(block, head)
    return key, key + block * head


def paired_offsets(block: int, head: int) -> tuple[Tensor, Tensor]:
    """As matrix units want them: two elements of a key side by side for 16 slots, and the values
    of two slots element by element. Neither has strides."""
    slot = torch.arange(block)[:, None]
    element = torch.arange(head)[None, :]
    group = slot // 16 * 16 * head
    key = group + element // 2 * 32 + slot % 16 * 2 + element % 2
    value = block * head + slot // 2 * 2 * head + element * 2 + slot % 2
    return key, value


def in_order(key_at: Tensor, value_at: Tensor) -> Write:
    """A backend that stores elements at given offsets of a page."""
    block = key_at.shape[0]

    def write(key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        flat = cache.view(cache.shape[0], cache.shape[1], -1)
        for n, slot in enumerate(slots.tolist()):
            for h in range(cache.shape[1]):
                flat[slot // block, h, key_at[slot % block]] = key[n, h]
                flat[slot // block, h, value_at[slot % block]] = value[n, h]

    return write


def filled(
    write: Write, block: int, head: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A cache full of tokens written by a backend, and the keys and values that it holds, ``[blocks
    * block_size, kv_heads, head_size]``."""
    rng = torch.Generator().manual_seed(seed)
    key, value = (
        torch.randn(BLOCKS * block, HEADS, head, generator=rng).to(dtype) for _ in range(2)
    )
    cache = torch.zeros(BLOCKS, HEADS, block, 2 * head, dtype=dtype)
    write(key, value, cache, torch.arange(BLOCKS * block))
    return cache, key, value


def by_block(tokens: Tensor, block: int) -> Tensor:
    """``[blocks, kv_heads, block_size, head_size]``."""
    return tokens.view(-1, block, *tokens.shape[1:]).transpose(1, 2)


# -- probing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "head", "block"), OP)
def test_what_the_op_writes_is_where_the_probe_says(
    dtype: torch.dtype, head: int, block: int
) -> None:
    write = through_the_op(dtype, block, head)
    order = PageOrder.probe(write, block, head, dtype, CPU)
    every = torch.cat([order.key.flatten(), order.value.flatten()])
    assert torch.equal(every.sort().values, torch.arange(2 * block * head))
    cache, key, value = filled(write, block, head, dtype)
    flat = cache.view(BLOCKS, HEADS, -1)
    assert torch.equal(flat[:, :, order.key], by_block(key, block))
    assert torch.equal(flat[:, :, order.value], by_block(value, block))


@pytest.mark.parametrize("head", [16, 80, 256])
@pytest.mark.parametrize("block", [16, 256])
@pytest.mark.parametrize("offsets", [plain_offsets, paired_offsets])
def test_any_permutation_is_found(offsets: Any, block: int, head: int) -> None:
    """In the narrowest dtype that counts to 16 only."""
    key, value = offsets(block, head)
    order = PageOrder.probe(in_order(key, value), block, head, torch.bfloat16, CPU)
    assert torch.equal(order.key, key)
    assert torch.equal(order.value, value)


def test_keys_and_values_in_each_others_half_are_found() -> None:
    """As a page of slots that hold key and value side by side."""
    offset = torch.arange(32 * 16).view(32, 16)
    key, value = offset // 16 * 32 + offset % 16, offset // 16 * 32 + 16 + offset % 16
    order = PageOrder.probe(in_order(key, value), 32, 16, torch.float32, CPU)
    assert torch.equal(order.key, key)
    assert torch.equal(order.value, value)
    views = Pages(torch.zeros(BLOCKS, HEADS, 32, 32), order).views
    assert views is not None
    assert views[0].stride() == views[1].stride() == (HEADS * 1024, 1024, 32, 1)


def broken(what: str) -> Write:
    key, value = plain_offsets(32, 16)
    if what == "loses an element":
        key = key.clone()
        key[3, 5] = key[3, 4]
    elif what == "loses a value":
        value = value.clone()
        value[31, 15] = value[0, 0]
    stored = in_order(key, value)

    def write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        if what == "stores nothing":
            return
        stored(k, v, cache, slots)
        if what == "stores twice":
            cache[1, :, :, 16:] = cache[1, :, :, :16]
        elif what == "scales":
            cache *= 2
        elif what == "rounds":
            cache.copy_((cache / 4).round() * 4)

    return write


@pytest.mark.parametrize(
    "what",
    [
        "loses an element",
        "loses a value",
        "stores nothing",
        "stores twice",
        "scales",
        "rounds",
    ],
)
def test_a_backend_that_stores_no_permutation_is_refused(what: str) -> None:
    with pytest.raises(KVPlugError, match="does not store each key and value element once"):
        PageOrder.probe(broken(what), 32, 16, torch.float32, CPU)
    assert PageOrder.probe(broken(""), 32, 16, torch.float32, CPU)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_order_is_asked_of_the_layers_own_implementation(heads: int) -> None:
    """Through ``do_kv_cache_update``, and the layer's cache stays as it is."""
    dtype, block, head = torch.bfloat16, 32, 64
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    isa = _get_attn_isa(dtype, block, head, "auto")
    layer = SimpleNamespace(isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)
    cache = torch.randn(4, heads, block, 2 * head).to(dtype)
    before = cache.clone()
    order = order_of(impl, layer, cache)
    expected = PageOrder.probe(through_the_op(dtype, block, head), block, head, dtype, CPU)
    assert torch.equal(order.key, expected.key)
    assert torch.equal(order.value, expected.value)
    assert torch.equal(cache, before)


# -- reading and moving ----------------------------------------------------------------------------


def opened(
    dtype: torch.dtype, head: int, block: int, order: str
) -> tuple[Pages, Write, Tensor, Tensor, Tensor]:
    """Pages of a full cache, the backend they belong to, the cache, its keys and its values."""
    if order == "op":
        write = through_the_op(dtype, block, head)
    else:
        offsets = {"plain": plain_offsets, "paired": paired_offsets}[order]
        write = in_order(*offsets(block, head))
    cache, key, value = filled(write, block, head, dtype)
    pages = Pages(cache, PageOrder.probe(write, block, head, dtype, CPU))
    return pages, write, cache, key, value


CACHES = [
    *(pytest.param(*p.values, "op", id=f"op-{p.id}") for p in SOME),
    pytest.param(torch.bfloat16, 16, 32, "plain", id="plain"),
    pytest.param(torch.bfloat16, 16, 32, "paired", id="paired"),
]


def test_views_are_given_only_where_tokens_are_contiguous() -> None:
    plain = opened(torch.bfloat16, 16, 32, "plain")[0]
    assert plain.views is not None
    assert plain.views[0].shape == plain.views[1].shape == (BLOCKS, HEADS, 32, 16)
    assert opened(torch.bfloat16, 16, 32, "paired")[0].views is None
    key, value = plain_offsets(32, 16)
    turned = PageOrder(key.view(16, 32).T, value)
    assert Pages(torch.zeros(BLOCKS, HEADS, 32, 32), turned).views is None, "keys by element"


def test_views_hold_the_tokens() -> None:
    pages, _, _, key, value = opened(torch.bfloat16, 16, 32, "plain")
    assert pages.views is not None
    assert torch.equal(pages.views[0], by_block(key, 32))
    assert torch.equal(pages.views[1], by_block(value, 32))


@pytest.mark.parametrize(("dtype", "head", "block", "order"), CACHES)
def test_whole_blocks_are_gathered(dtype: torch.dtype, head: int, block: int, order: str) -> None:
    pages, _, cache, *content = opened(dtype, head, block, order)
    before = cache.clone()
    wanted = torch.tensor([[4, 0, 2], [1, 1, 3]])
    for which in (0, 1):
        found = pages.gather(which, wanted)
        assert found.is_contiguous()
        expected = by_block(content[which], block)[wanted].transpose(1, 2)
        assert torch.equal(found, expected.reshape(2, HEADS, 3 * block, head))
        found.zero_()
    assert torch.equal(cache, before), "what is gathered is a copy"


def some_moves(block: int) -> tuple[Tensor, Tensor, Tensor]:
    """KV head, source and destination of each move; slots counted through the cache."""
    rng = torch.Generator().manual_seed(1)
    slots = torch.stack([torch.randperm(BLOCKS * block, generator=rng) for _ in range(HEADS)])
    heads = torch.arange(HEADS).repeat_interleave(20)
    return heads, slots[:, :20].flatten(), slots[:, 20:40].flatten()


@pytest.mark.parametrize(("dtype", "head", "block", "order"), CACHES)
def test_moved_tokens_lie_as_if_the_backend_had_written_them_there(
    dtype: torch.dtype, head: int, block: int, order: str
) -> None:
    pages, write, cache, key, value = opened(dtype, head, block, order)
    heads, source, to = some_moves(block)
    pages.move(heads, source // block, source % block, to // block, to % block)
    expected = torch.zeros_like(cache)
    moved = key.clone(), value.clone()
    for own, original in zip(moved, (key, value), strict=True):
        own[to, heads] = original[source, heads]
    write(*moved, expected, torch.arange(BLOCKS * block))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize(("dtype", "head", "block", "order"), CACHES)
def test_written_tokens_lie_as_if_the_backend_had_written_them(
    dtype: torch.dtype, head: int, block: int, order: str
) -> None:
    pages, write, cache, key, value = opened(dtype, head, block, order)
    heads, _, to = some_moves(block)
    rng = torch.Generator().manual_seed(2)
    new = [torch.randn(len(to), head, generator=rng).to(dtype) for _ in range(2)]
    pages.write(heads, to // block, to % block, *new)
    expected = torch.zeros_like(cache)
    for own, what in zip((key, value), new, strict=True):
        own[to, heads] = what
    write(key, value, expected, torch.arange(BLOCKS * block))
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("order", ["plain", "paired"])
def test_a_layer_whose_pages_lie_between_others_is_read_in_place(order: str) -> None:
    """Layers may share one allocation, block by block."""
    block, head, dtype = 32, 16, torch.float32
    _, _, alone, key, value = opened(dtype, head, block, order)
    shared = torch.full((BLOCKS, 3, HEADS, block, 2 * head), 7.0)
    cache = shared[:, 1]
    cache.copy_(alone)
    offsets = {"plain": plain_offsets, "paired": paired_offsets}[order]
    pages = Pages(cache, PageOrder(*offsets(block, head)))
    wanted = torch.tensor([[3, 1]])
    expected = by_block(key, block)[wanted].transpose(1, 2).reshape(1, HEADS, -1, head)
    assert torch.equal(pages.gather(0, wanted), expected)
    heads, source, to = some_moves(block)
    pages.move(heads, source // block, source % block, to // block, to % block)
    value[to, heads] = value[source, heads]
    found = pages.gather(1, torch.arange(BLOCKS)[None])[0]
    assert torch.equal(found, value.transpose(0, 1))
    assert (shared[:, [0, 2]] == 7).all()


def slot_offsets(block: int, head: int) -> tuple[Tensor, Tensor]:
    """Each slot's key, then its value: what vLLM's attention on GPUs stores."""
    at = torch.arange(block)[:, None] * 2 * head + torch.arange(head)[None, :]
    return at, at + head


def with_tokens_before_heads(cache: Tensor) -> Tensor:
    """The same cache in vLLM's layout LBNHC."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def test_slots_that_are_no_neighbours_are_read_and_moved_by_the_strides_of_the_cache() -> None:
    block, head = 32, 16
    offsets = slot_offsets(block, head)
    cache, key, _ = filled(in_order(*offsets), block, head, torch.float32)
    apart = with_tokens_before_heads(cache)
    pages, plain = Pages(apart, PageOrder(*offsets)), Pages(cache, PageOrder(*offsets))
    wanted = torch.tensor([[3, 1], [0, 4]])
    for which in (0, 1):
        assert torch.equal(pages.gather(which, wanted), plain.gather(which, wanted))
    heads, source, to = some_moves(block)
    for one in (pages, plain):
        one.move(heads, source // block, source % block, to // block, to % block)
    assert torch.equal(apart, cache)
    keep = torch.stack([torch.arange(0, 64, 2)] * HEADS)[None].to(torch.int32)
    place = torch.arange(32)
    moves = torch.where(keep > 31, keep, place.to(torch.int32))
    for one in (pages, plain):
        one.relocate(torch.tensor([[2, 3]]), moves)
    assert torch.equal(apart, cache)
    assert not torch.equal(by_block(key, block)[2, 0], cache[2, 0, :, :head])


def test_pages_whose_slots_are_mixed_are_refused_where_slots_are_no_neighbours() -> None:
    cache, _, _ = filled(in_order(*plain_offsets(32, 16)), 32, 16, torch.float32)
    with pytest.raises(KVPlugError, match="VLLM_KV_CACHE_LAYOUT=LBHNC"):
        Pages(with_tokens_before_heads(cache), PageOrder(*plain_offsets(32, 16)))
