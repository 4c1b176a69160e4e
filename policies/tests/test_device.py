"""The slab of the tier in the accelerator's memory."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from kvplug.contract import EngineView, TierError, TierPlace
from kvplug_policies.tiers.device import DeviceMemory

CAPACITY = 1 << 20


def opened(rank: int = 0, world: int = 1, memory: Tensor | None = None) -> DeviceMemory:
    tier = DeviceMemory(DeviceMemory.Options(size=CAPACITY), EngineView(block_size=16))
    if memory is not None:
        tier.hold(memory)
    tier.open(TierPlace("0" * 64, rank, world))
    return tier


def coded(seed: int, codes: int = 60_000) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {
        "codes": torch.randint(0, 256, (3, codes // 3), generator=rng, dtype=torch.uint8),
        "scale": torch.randn(7, generator=rng).half(),
    }


def key() -> bytes:
    return os.urandom(32)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_chunks_are_found_as_they_were_given_in_the_slab_that_was_held() -> None:
    memory = torch.full((CAPACITY,), 7, dtype=torch.uint8)
    tier = opened(memory=memory)
    keys = [key() for _ in range(5)]
    assert tier.put([(k, coded(i)) for i, k in enumerate(keys)]) == [""] * 5
    begin, end = memory.data_ptr(), memory.data_ptr() + CAPACITY
    for i, found in enumerate(tier.get(keys)):
        assert same(found, coded(i))
        assert all(begin <= t.data_ptr() < end for t in found.values())
    assert tier.has([keys[0], key()]) == [True, False]
    assert tier.get([key()]) == [None]
    # What is there is left alone.
    assert tier.put([(keys[0], coded(9))]) == [""]
    assert same(tier.get(keys)[0], coded(0))


def test_it_is_full_when_no_slot_is_left_and_takes_what_others_gave_up() -> None:
    tier = opened()
    keys = [key() for _ in range(18)]
    answers = tier.put([(k, coded(i)) for i, k in enumerate(keys)])
    # A slot of 60,000 and 14 bytes, each rounded up to 16.
    held = CAPACITY // 60_016
    assert answers == [""] * held + ["full"] * (18 - held)
    assert tier.usage().entries == held and tier.usage().size == held * 60_016
    tier.remove([keys[3], key()])
    assert tier.put([(keys[17], coded(17))]) == [""]
    assert same(tier.get([keys[17]])[0], coded(17))
    assert all(same(found, coded(i)) for i, found in enumerate(tier.get(keys[:held])) if i != 3)
    assert tier.get([keys[3]]) == [None]


def test_a_chunk_larger_than_the_first_has_no_slot_and_a_smaller_one_has() -> None:
    tier = opened()
    assert tier.put([(key(), coded(0))]) == [""]
    assert tier.put([(key(), coded(1, 60_003)), (key(), coded(2, 300))]) == [
        "larger than a slot",
        "",
    ]


def test_bytes_are_kept_too() -> None:
    tier = opened()
    one, payload = key(), os.urandom(1234)
    assert tier.put([(one, memoryview(payload))]) == [""]
    assert tier.get([one]) == [payload]


def test_workers_share_the_size_and_a_scheduler_takes_no_memory() -> None:
    assert opened(rank=1, world=4).usage().capacity == CAPACITY // 4
    asked = opened(rank=-1, world=4)
    assert asked.usage().capacity == CAPACITY and asked._memory is None
    assert asked.has([key()]) == [False]


def test_closed_it_stores_nothing_and_holds_nothing() -> None:
    tier = opened()
    one = key()
    tier.put([(one, coded(0))])
    tier.close()
    tier.close()
    assert tier.has([one]) == [False]
    with pytest.raises(TierError, match="closed"):
        tier.put([(one, coded(0))])
