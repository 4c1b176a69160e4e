"""The tier in the accelerator's memory, as a worker uses it: in the order of its steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_failing_policy import environment
from test_tier_copy import copied, copier, noise, plain
from torch import Tensor

from kvplug.contract import EngineView, TierError, TierPlace, TransferCodec
from kvplug.hosts.vllm.worker.device_shelf import DeviceShelf
from kvplug.parser import load_deployment
from kvplug.tiers.queued import Carried, ChunkRef, Fetched, Stored
from kvplug.tiers.wire import ChunkHeader, pack
from kvplug_lab.engine.trial import TrialRequest, TrialResult

CPU = torch.device("cpu")


class Shelf:
    """A shelf of a codec, over pages like those of a GPU."""

    def __init__(self, codec: str = "raw", size: str = "4MiB"):
        self.layers = plain()
        self.copy = copier(self.layers)
        deployment = load_deployment({"tiers": [{"device": {"size": size, "transfer": codec}}]})
        (one,) = deployment.tiers
        tier: Any = one.tier.build(EngineView(block_size=32))
        tier.open(TierPlace("0" * 64, 0, 1))
        codec_: Any = one.codec.build(EngineView(block_size=32))
        self.codec: TransferCodec = codec_
        self.logged: list[str] = []
        self.shelf = DeviceShelf(
            "device", tier, self.codec, self.header, CPU, log=self.logged.append
        )

    def header(self, chunk: ChunkRef) -> ChunkHeader:
        return ChunkHeader(
            chunk.key,
            "0" * 64,
            self.codec.name,
            1,
            "",
            self.codec.exact,
            chunk.start,
            chunk.tokens,
            0,
            1,
            self.copy.shapes(chunk.tokens),
        )

    def store(self, blocks: list[list[int]]) -> tuple[list[ChunkRef], list[dict[str, Tensor]]]:
        chunks = [ChunkRef(bytes([i] * 32), 64 * i, 64) for i in range(len(blocks))]
        planes = copied(self.copy.read([(torch.tensor(own), 64) for own in blocks]))
        assert self.shelf.store(chunks, lambda: planes, 0, "mine") == ""
        return chunks, planes


def test_what_is_stored_returns_when_outcomes_are_asked_for() -> None:
    made = Shelf()
    chunks, planes = made.store([[7, 2], [4, 9]])
    made.shelf.fetch(chunks[::-1], 5)
    stored, fetched = made.shelf.outcomes()
    assert isinstance(stored, Stored) and isinstance(fetched, Fetched)
    assert stored.sizes == {c.key: 64 * made.copy.bytes_per_token for c in chunks}
    assert (stored.token, stored.failed, fetched.token, fetched.failed) == ("mine", {}, 5, {})
    noise(made.layers)
    made.copy.write([(torch.tensor([1, 3]), 64)], [fetched.planes[1]])  # type: ignore[list-item]
    again = made.copy.read([(torch.tensor([1, 3]), 64)])[0]
    assert all(torch.equal(again[name], planes[0][name]) for name in again)
    made.shelf.taken(fetched)
    made.shelf.remove([chunks[0].key])
    made.shelf.fetch(chunks, 6)
    made.shelf.fetch(chunks, 7, lambda: False)
    (fetched,) = made.shelf.outcomes()
    assert isinstance(fetched, Fetched)
    assert fetched.failed == {chunks[0].key: "not there"} and fetched.planes[0] is None
    made.shelf.close()


def test_a_codec_makes_it_smaller() -> None:
    made = Shelf("int8")
    chunks, planes = made.store([[7, 2]])
    made.shelf.fetch(chunks)
    stored, fetched = made.shelf.outcomes()
    assert isinstance(stored, Stored) and isinstance(fetched, Fetched)
    assert 1.8 < 64 * made.copy.bytes_per_token / stored.size < 2.1
    found = fetched.planes[0]
    assert found is not None
    torch.testing.assert_close(found["key"], planes[0]["key"], rtol=0, atol=0.05)


class Below:
    """Takes what is carried to it."""

    name = "below"

    def __init__(self, codec: Any, answer: str = ""):
        self.codec, self.answer = codec, answer
        self.got: list[Any] = []

    def store(self, chunks: Any, planes: Callable[[], Any], size: int) -> str:
        self.got.append((list(chunks), planes, size))
        return self.answer


@pytest.mark.parametrize("answer", ["", "queue full"])
def test_chunks_are_carried_to_a_tier_below(answer: str) -> None:
    made = Shelf()
    chunks, planes = made.store([[7, 2], [4, 9]])
    below: Any = Below(made.codec, answer)
    nowhere = bytes([9] * 32)
    made.shelf.carry([chunks[1].key, nowhere], below)
    made.shelf.remove([chunks[1].key])
    outcomes = made.shelf.outcomes()
    # Its slot is another chunk's before the tier below comes to store it.
    noise(made.layers)
    other = copied(made.copy.read([(torch.tensor([7, 2]), 64)]))
    made.shelf.store([ChunkRef(bytes([8] * 32), 0, 64)], lambda: other, 0)
    made.shelf.outcomes()
    ((refs, give, size),) = below.got
    moved = give()
    assert refs == [chunks[1]] and size == 64 * made.copy.bytes_per_token
    assert torch.equal(moved[0]["key"], planes[1]["key"])
    carried = outcomes[-1]
    assert isinstance(carried, Carried) and carried.gone == {nowhere: "not there"}
    assert carried.failed == carried.gone | ({chunks[1].key: answer} if answer else {})


def test_what_is_not_exact_moves_to_no_tier_of_another_codec() -> None:
    made = Shelf("int8")
    chunks, _ = made.store([[7, 2]])
    (raw,) = load_deployment({"tiers": [{"host": {"size": "1MiB"}}]}).tiers
    below: Any = Below(raw.codec.build(EngineView(block_size=32)))
    made.shelf.carry([chunks[0].key], below)
    carried = made.shelf.outcomes()[-1]
    assert isinstance(carried, Carried) and carried.failed == {chunks[0].key: "not exact"}
    assert not below.got


def test_chunks_come_up_from_a_tier_in_its_wire_format() -> None:
    made = Shelf()
    (chunk,), planes = made.store([[7, 2]])
    made.shelf.outcomes()
    other = ChunkRef(bytes([5] * 32), chunk.start, chunk.tokens)
    good = pack(made.header(other), planes[0])
    bad = bytearray(good)
    bad[-1] ^= 1
    made.shelf.forward([other], [bytes(bad)])
    made.shelf.forward([other], [good])
    made.shelf.fetch([other])
    refused, stored, fetched = made.shelf.outcomes()
    assert isinstance(refused, Stored) and list(refused.failed) == [other.key]
    assert isinstance(stored, Stored) and list(stored.sizes) == [other.key]
    assert isinstance(fetched, Fetched) and fetched.planes[0] is not None
    assert torch.equal(fetched.planes[0]["value"], planes[0]["value"])


def test_a_tier_or_a_codec_that_fails_costs_misses() -> None:
    made = Shelf()

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no")

    made.codec.encode = fail  # type: ignore[method-assign]
    chunks, _ = made.store([[7, 2]])
    held: Any = made.shelf.tier
    held.get = fail
    made.shelf.fetch(chunks)
    stored, fetched = made.shelf.outcomes()
    assert isinstance(stored, Stored) and stored.failed == {chunks[0].key: "RuntimeError"}
    assert isinstance(fetched, Fetched) and fetched.planes == [None]
    assert len(made.logged) == 1


PAGES = [(torch.tensor([4, 9]), 64)]


class Unreadable(RuntimeError):
    """Cannot be shown."""

    def __str__(self) -> str:
        raise Unreadable


@pytest.mark.parametrize(
    "change",
    [
        lambda plane: plane[:, :, :1],
        lambda plane: torch.cat([plane, plane], 1),
        lambda plane: plane.double(),
        lambda plane: None,
    ],
    ids=["one head for all", "more tokens", "other type", "nothing"],
)
def test_planes_of_another_form_never_reach_the_pages(change: Any) -> None:
    """What is on the device has no checksum that would tell."""
    made = Shelf()
    chunks, _ = made.store([[7, 2]])
    made.shelf.outcomes()
    decode = made.codec.decode
    made.codec.decode = lambda *given: {  # type: ignore[method-assign]
        name: change(plane) for name, plane in decode(*given).items()
    }
    made.shelf.fetch(chunks)
    (fetched,) = made.shelf.outcomes()
    assert isinstance(fetched, Fetched) and fetched.planes == [None]
    assert list(fetched.failed) == [chunks[0].key] and not fetched.refused
    # It is removed: its slot would be lost to others.
    assert made.shelf.tier.usage().entries == 0


@pytest.mark.parametrize("error", [SystemExit(1), Unreadable(), TierError("torn"), None])
@pytest.mark.parametrize("what", ["encode", "put", "get", "decode", "remove", "close"])
def test_whatever_a_tier_or_its_codec_does_each_order_gets_its_outcome(
    error: BaseException | None, what: str
) -> None:
    def fail(*arguments: Any) -> Any:
        if error is not None:
            raise error
        return [1, 2, 3]

    made, new = Shelf(), ChunkRef(bytes([8] * 32), 0, 64)
    chunks, _ = made.store([[7, 2]])
    made.shelf.outcomes()
    setattr(made.codec if what in ("encode", "decode") else made.shelf.tier, what, fail)
    below: Any = Below(made.codec)
    found: list[Any] = []
    for order in (
        lambda: made.shelf.remove([bytes([9] * 32)]),
        lambda: made.shelf.store([new], lambda: made.copy.read(PAGES), 0),
        lambda: made.shelf.carry([chunks[0].key], below),
        lambda: made.shelf.fetch(chunks),
    ):
        made.shelf._pause_until = 0.0
        order()
        found += made.shelf.outcomes()
    made.shelf.close()
    stored, *carried, fetched = found
    assert isinstance(stored, Stored) and isinstance(fetched, Fetched)
    assert list(stored.failed or stored.sizes) == [new.key]
    assert bool(stored.failed) == bool(stored.refused) == (what in ("encode", "put"))
    assert bool(fetched.failed) == (what in ("get", "decode"))
    assert bool(carried) == bool(fetched.failed) == (not below.got)


def test_a_codec_that_does_not_return_is_interrupted_and_left_alone() -> None:
    made = Shelf()
    chunks, _ = made.store([[7, 2], [4, 9]])
    made.shelf.outcomes()

    def hang(*arguments: Any) -> Any:
        while True:
            pass

    made.codec.decode = hang  # type: ignore[method-assign]
    made.shelf._contained.deadline = 0.5
    made.shelf.fetch(chunks)
    made.shelf.fetch(chunks)
    made.shelf._failures = 16
    for fetched, cause in zip(
        made.shelf.outcomes(), ("too slow", "left alone after failures"), strict=True
    ):
        assert isinstance(fetched, Fetched) and fetched.planes == [None, None]
        assert fetched.failed == {chunk.key: cause for chunk in chunks}


def test_an_engine_finds_what_left_its_pool_beside_it(
    run: Callable[..., TrialResult], tiny: Path
) -> None:
    """With the answers of an engine that computes everything; the slab counts as held."""
    choose = random.Random(7)
    texts = [[choose.randrange(10, 300) for _ in range(n)] for n in (500, 700, 960, 640)]
    work = [TrialRequest(text, 8, 4 * wave + i) for wave in (0, 1) for i, text in enumerate(texts)]
    engine = {"max_model_len": 1024, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 34}
    stock = run(tiny, work, None, **engine)
    section = {"tiers": [{"device": {"size": "64MiB"}}], "lifecycle": "loads"}
    ours = run(tiny, work, section, env=environment(), **engine)
    assert [a.token_ids for a in ours.answers] == [a.token_ids for a in stock.answers]
    assert sum(a.cached_tokens for a in stock.answers) == 0
    assert sum(a.cached_tokens for a in ours.answers[4:]) > 2000
    assert ours.held_bytes >= 64 << 20
