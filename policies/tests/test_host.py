"""Host memory: its limit, and whose bytes it keeps."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from kvplug.contract import EngineView, TierPlace
from kvplug.testing.tiers import LAWS, Law, Opener
from kvplug_policies.tiers.host import HostMemory

MIB = 1 << 20


def opened(size: object, rank: int = 0, world: int = 1) -> HostMemory:
    options = HostMemory.Options.model_validate({"size": size})
    tier = HostMemory(options, EngineView(block_size=16))
    tier.open(TierPlace("ab" * 32, rank, world))
    return tier


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Law) -> None:
    options = HostMemory.Options.model_validate({"size": "64MiB"})
    law(Opener(lambda: HostMemory(options, EngineView(block_size=16))))


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def test_it_holds_its_size_and_no_more() -> None:
    tier = opened("2MiB")
    payload = bytes(MIB // 2)
    assert tier.put([(key(i), payload) for i in range(5)]) == ["", "", "", "", "full"]
    assert (tier.usage().entries, tier.usage().size, tier.usage().capacity) == (4, 2 * MIB, 2 * MIB)
    assert tier.has([key(3), key(4)]) == [True, False]
    tier.remove([key(0), key(7)])
    assert tier.put([(key(4), payload)]) == [""]
    assert tier.usage().size == 2 * MIB


def test_workers_share_the_size() -> None:
    assert [opened("4MiB", rank, 2).usage().capacity for rank in (0, 1, -1)] == [
        2 * MIB,
        2 * MIB,
        4 * MIB,
    ]


def test_a_payload_that_may_change_is_copied_and_another_is_not() -> None:
    tier = opened(MIB)
    changing, fixed = bytearray(b"before"), memoryview(b"fixed")
    tier.put([(key(1), changing), (key(2), fixed)])
    changing[:] = b"after!"
    assert [bytes(found) for found in tier.get([key(1), key(2)])] == [b"before", b"fixed"]
    assert tier.get([key(2)])[0].obj is fixed.obj


def test_what_is_there_already_is_left_alone() -> None:
    tier = opened(MIB)
    assert tier.put([(key(1), b"first"), (key(1), b"second")]) == ["", ""]
    assert bytes(tier.get([key(1)])[0]) == b"first"
    assert tier.usage().size == 5


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (MIB, MIB),
        ("1048576", MIB),
        ("8GiB", 8 << 30),
        ("8 GiB", 8 << 30),
        ("1.5GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("2Ti", 2 << 40),
        ("2000kB", 2_000_000),
    ],
)
def test_sizes_are_written_with_units(written: object, size: int) -> None:
    assert HostMemory.Options.model_validate({"size": written}).size == size


@pytest.mark.parametrize(
    "written", ["8gb", "GiB", "-1GiB", "1e9", "8 G B", "1KiB", 2.5e9, True, None, "9" * 40]
)
def test_what_is_no_size_is_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        HostMemory.Options.model_validate({"size": written})
