"""A tier behind its queues: what it does wrong costs misses, and nothing waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from kvplug.contract import (
    EngineView,
    PlaneShape,
    PolicyOptions,
    Tier,
    TierError,
    TierPlace,
    TierUsage,
    TransferCodec,
)
from kvplug.tiers import queued
from kvplug.tiers.queued import Carried, ChunkRef, Fetched, QueuedTier, Stored
from kvplug.tiers.wire import ChunkHeader

ENGINE = EngineView(16)
SHAPES = {"key": PlaneShape("float32", (2, 4, 1, 8)), "value": PlaneShape("float32", (2, 4, 1, 8))}


class Memory(Tier):
    """A tier that does what a test says."""

    name = "memory"
    changes = "nothing"

    def __init__(self) -> None:
        super().__init__(self.Options(), ENGINE)
        self.held: dict[bytes, Any] = {}
        self.fails: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False

    def open(self, place: TierPlace) -> None:
        pass

    def _asked(self) -> None:
        self.gate.wait(20)
        if self.fails is not None:
            raise self.fails

    def put(self, items: Sequence[tuple[bytes, Any]]) -> list[str]:
        self._asked()
        for key, payload in items:
            self.held.setdefault(key, payload)
        return [""] * len(items)

    def get(self, keys: Sequence[bytes]) -> list[Any]:
        self._asked()
        return [self.held.get(key) for key in keys]

    def has(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.held for key in keys]

    def remove(self, keys: Sequence[bytes]) -> None:
        self._asked()
        for key in keys:
            self.held.pop(key, None)

    def usage(self) -> TierUsage:
        return TierUsage(len(self.held), 0, 0)

    def close(self) -> None:
        self.closed = True


class Plain(TransferCodec):
    """Stores planes as they are; or twice, under another name."""

    name = "plain"
    changes = "nothing"
    exact = True

    def __init__(self) -> None:
        super().__init__(PolicyOptions(), ENGINE)

    def encode(self, planes: Any, start: int) -> dict[str, torch.Tensor]:
        return dict(planes)

    def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, torch.Tensor]:
        return dict(coded)


class Halved(Plain):
    name = "halved"
    exact = False

    def encode(self, planes: Any, start: int) -> dict[str, torch.Tensor]:
        return {name: one.half() for name, one in planes.items()}

    def decode(self, coded: Any, shapes: Any, start: int) -> dict[str, torch.Tensor]:
        return {name: one.float() for name, one in coded.items()}


def describe(codec: TransferCodec) -> Callable[[ChunkRef], ChunkHeader]:
    return lambda c: ChunkHeader(
        c.key, "ab", codec.name, 1, "", type(codec).exact, c.start, c.tokens, 0, 1, SHAPES
    )


class Kit:
    """A tier behind queues, and what was said of it."""

    def __init__(self, codec: TransferCodec | None = None, **options: Any) -> None:
        codec = codec or Plain()
        self.tier, self.said = Memory(), []
        self.queued = QueuedTier(
            codec.name, self.tier, codec, describe(codec), log=self.said.append, **options
        )

    def outcomes(self, n: int = 1) -> list[Any]:
        found: list[Any] = []
        until = time.monotonic() + 20
        while len(found) < n and time.monotonic() < until:
            found += self.queued.outcomes()
            time.sleep(0.001)
        assert len(found) == n
        return found


@pytest.fixture
def kit() -> Iterator[Kit]:
    made = Kit()
    yield made
    made.tier.gate.set()
    made.queued.close()


def chunk(n: int) -> ChunkRef:
    return ChunkRef(bytes([n]) * 32, 4 * n, 4)


def planes(n: int) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape.shape, float(n)) for name, shape in SHAPES.items()}


def store(kit: Kit, *ns: int, size: int = 512, **more: Any) -> str:
    return kit.queued.store([chunk(n) for n in ns], lambda: [planes(n) for n in ns], size, **more)


def test_what_is_stored_is_read_back(kit: Kit) -> None:
    encoded: list[int] = []
    assert store(kit, 1, 2, token="t", encoded=lambda: encoded.append(1)) == ""
    (stored,) = kit.outcomes()
    assert isinstance(stored, Stored) and stored.token == "t" and encoded == [1]
    assert set(stored.sizes) == {chunk(1).key, chunk(2).key} and not stored.failed
    assert stored.size == sum(stored.sizes.values()) and stored.seconds > 0
    assert kit.queued.waiting == 0
    kit.queued.fetch([chunk(1), chunk(2), chunk(3)], token=7)
    (read,) = kit.outcomes()
    assert isinstance(read, Fetched) and read.token == 7
    assert torch.equal(read.planes[1]["key"], planes(2)["key"])
    assert read.planes[2] is None and read.failed == {chunk(3).key: "not there"}
    assert not read.refused


@pytest.mark.parametrize(
    ("error", "cause"),
    [(TierError("full", "disk"), "full"), (RuntimeError("x"), "RuntimeError"), (SystemExit(), "")],
)
def test_a_tier_that_raises_is_left_alone_for_a_while(
    kit: Kit, error: BaseException, cause: str
) -> None:
    kit.tier.fails = error
    store(kit, 1)
    (stored,) = kit.outcomes()
    cause = cause or "SystemExit"
    assert stored.refused == cause and stored.failed == {chunk(1).key: cause}
    assert kit.queued.paused and len(kit.said) == 1 and "requests compute" in kit.said[0]
    assert store(kit, 2) == "left alone after failures"
    kit.queued.fetch([chunk(1)])
    (read,) = kit.outcomes()
    assert read.failed == {chunk(1).key: "left alone after failures"}
    kit.tier.fails = None
    kit.queued._pause_until = 0.0
    assert store(kit, 2) == ""
    assert kit.outcomes()[0].sizes
    assert len(kit.said) == 1


class Unreadable(RuntimeError):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise Unreadable


class Causeless(TierError):
    """Cannot say its cause."""

    def __init__(self) -> None:
        OSError.__init__(self)

    @property
    def cause(self) -> str:  # type: ignore[override]
        raise Unreadable


@pytest.mark.parametrize("error", [Unreadable(), Causeless(), SystemExit(1), TierError("")])
def test_whatever_is_raised_each_order_gets_its_outcome(kit: Kit, error: BaseException) -> None:
    def fails(*_: Any) -> Any:
        raise error

    other, name = Kit(), type(error).__name__
    store(kit, 1)
    kit.outcomes()
    kit.tier.fails = error
    kit.queued.remove([chunk(9).key])
    until = time.monotonic() + 20
    while not kit.queued._pause_until and time.monotonic() < until:
        time.sleep(0.001)
    kit.queued._pause_until = 0.0
    kit.queued.carry([chunk(1).key], other.queued)
    (moved,) = kit.outcomes()
    assert isinstance(moved, Carried) and moved.failed == {chunk(1).key: name}
    kit.queued._pause_until = 0.0
    store(kit, 2)
    (stored,) = kit.outcomes()
    assert stored.failed == {chunk(2).key: name} and stored.refused == name
    kit.queued._pause_until = 0.0
    kit.queued.fetch([chunk(1)])
    (read,) = kit.outcomes()
    assert read.failed == {chunk(1).key: name} and read.refused == name
    kit.tier.fails, kit.queued._pause_until = None, 0.0
    decode = kit.queued.codec.decode
    kit.queued.codec.decode = fails  # type: ignore[method-assign]
    kit.queued.fetch([chunk(1)])
    (read,) = kit.outcomes()
    assert read.failed == {chunk(1).key: name} and not read.refused
    # Its threads go on.
    kit.queued.codec.decode = decode  # type: ignore[method-assign]
    store(kit, 1)
    kit.outcomes()
    kit.queued.fetch([chunk(1)])
    (read,) = kit.outcomes()
    assert not read.failed
    other.queued.close()


def test_what_a_server_says_is_one_line_of_the_log(kit: Kit) -> None:
    kit.tier.fails = TierError("refused", "no\nERROR 01-01 engine: all is lost" + "x" * 10000)
    store(kit, 1)
    kit.outcomes()
    assert len(kit.said) == 1 and "\n" not in kit.said[0] and len(kit.said[0]) < 1000


def test_what_does_not_fit_into_the_queue_is_not_stored() -> None:
    kit = Kit(room=1000)
    kit.tier.gate.clear()
    assert store(kit, 1, size=600) == ""
    assert store(kit, 2, size=600) == "queue full"
    assert kit.queued.waiting == 600
    kit.tier.gate.set()
    kit.outcomes()
    assert store(kit, 2, size=6000) == "", "one is always let through"
    kit.outcomes()
    kit.queued.close()
    assert kit.tier.closed


def test_a_reader_waits_until_what_it_read_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "BATCH_CHUNKS", 1)
    kit = Kit(room=700)
    for n in (1, 2, 3):
        store(kit, n, size=1)
    kit.outcomes(3)
    kit.queued.fetch([chunk(n) for n in (1, 2, 3)])
    first, second = kit.outcomes(2)
    time.sleep(0.05)
    assert kit.queued.outcomes() == []
    kit.queued.taken(first)
    kit.queued.taken(second)
    (third,) = kit.outcomes()
    assert third.chunks == [chunk(3)]
    kit.queued.close()


def test_a_read_that_nobody_waits_for_ends(kit: Kit) -> None:
    kit.queued.fetch([chunk(1)], wanted=lambda: False)
    kit.queued.fetch([chunk(2)], token="next")
    assert kit.outcomes()[0].token == "next"


@pytest.mark.parametrize("damage", ["flip", "cut", "other", "garbage"])
def test_damage_is_a_miss_and_not_the_tiers_failure(kit: Kit, damage: str) -> None:
    store(kit, 1, 2)
    kit.outcomes()
    payload = bytearray(kit.tier.held[chunk(1).key])
    if damage == "flip":
        payload[-9] ^= 1
    changed: Any = bytes(payload[:-3]) if damage == "cut" else bytes(payload)
    changed = {"other": kit.tier.held[chunk(2).key], "garbage": b"x" * 9}.get(damage, changed)
    kit.tier.held[chunk(1).key] = changed
    kit.queued.fetch([chunk(1), chunk(2)])
    (read,) = kit.outcomes()
    assert read.planes[0] is None and set(read.failed) == {chunk(1).key}
    assert read.planes[1] is not None and not read.refused and not kit.queued.paused


def test_a_damaged_chunk_can_be_stored_again(kit: Kit) -> None:
    """Tiers leave alone what is there; damage would stay, and fail every load to come."""
    below = Kit()
    store(kit, 1, 2)
    kit.outcomes()
    for n in (1, 2):
        kit.tier.held[chunk(n).key] = b"damaged"
    kit.queued.fetch([chunk(1)])
    kit.queued.carry([chunk(2).key], below.queued)
    kit.outcomes(2)
    store(kit, 1, 2)
    kit.outcomes()
    kit.queued.fetch([chunk(1), chunk(2)])
    (read,) = kit.outcomes()
    assert not read.failed and torch.equal(read.planes[0]["key"], planes(1)["key"])
    below.queued.close()


def test_a_codec_that_returns_other_planes_is_not_believed(kit: Kit) -> None:
    store(kit, 1)
    kit.outcomes()
    kit.queued.codec.decode = lambda *_: {"key": torch.zeros(1)}  # type: ignore[method-assign]
    kit.queued.fetch([chunk(1)])
    assert kit.outcomes()[0].planes == [None]


@pytest.mark.parametrize("answer", [[], ["", ""], None])
def test_wrong_answers_are_failures(kit: Kit, answer: Any) -> None:
    kit.tier.put = lambda _: answer  # type: ignore[method-assign]
    store(kit, 1)
    assert kit.outcomes()[0].refused == "TypeError"


def test_an_answer_of_another_length_is_not_taken_for_the_chunks(kit: Kit) -> None:
    kit.tier.get = lambda _: [None]  # type: ignore[method-assign]
    kit.queued.fetch([chunk(1), chunk(2)], "r", lambda: True)
    (read,) = kit.outcomes()
    assert read.refused == "TypeError" and read.planes == [None, None]


def test_chunks_move_as_they_are_between_tiers_of_one_codec(kit: Kit) -> None:
    below = Kit()
    store(kit, 1)
    kit.outcomes()
    kit.queued.carry([chunk(1).key, chunk(2).key], below.queued)
    assert below.outcomes()[0].sizes
    assert bytes(below.tier.held[chunk(1).key]) == bytes(kit.tier.held[chunk(1).key])
    (moved,) = kit.outcomes()
    assert isinstance(moved, Carried) and moved.gone == {chunk(2).key: "not there"}
    assert moved.failed == moved.gone and moved.target == "plain"
    below.queued.close()


def test_chunks_are_coded_anew_for_another_codec_unless_they_lost_something(kit: Kit) -> None:
    halved = Kit(Halved())
    store(kit, 1)
    kit.outcomes()
    kit.queued.carry([chunk(1).key], halved.queued)
    assert halved.outcomes()[0].sizes
    halved.queued.carry([chunk(1).key], kit.queued)
    (refused,) = halved.outcomes()
    assert refused.failed == {chunk(1).key: "not exact"} and not refused.refused
    halved.queued.close()


def test_removal_follows_what_was_stored_before_it(kit: Kit) -> None:
    store(kit, 1)
    kit.queued.remove([chunk(1).key])
    store(kit, 2)
    kit.outcomes(2)
    assert set(kit.tier.held) == {chunk(2).key}


def test_a_tier_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "CLOSING", 0.05)
    kit = Kit()
    kit.tier.gate.clear()
    store(kit, 1)
    kit.queued.close()
    assert not kit.tier.closed and "does not answer" in kit.said[-1]
    kit.tier.gate.set()
