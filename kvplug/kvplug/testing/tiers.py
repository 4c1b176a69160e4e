"""Laws of every tier: functions of an `Opener`, and a class that runs them as tests."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvplug.contract import EngineView, Tier, TierError, TierPlace
from kvplug.testing.laws import ENGINE, PolicyLaws, law

IDENTITY = "0123456789abcdef" * 4


@dataclass(frozen=True)
class Opener:
    """Opens a tier.

    Attributes:
        build: Makes a tier object; all of one opener share what is stored, if the tier does.
        many: Chunks of the laws that need many.
    """

    build: Callable[[], Tier]
    many: int = 10_000

    def __call__(self, rank: int = 0, world: int = 1, identity: str = IDENTITY) -> Tier:
        tier = self.build()
        tier.open(TierPlace(identity, rank, world))
        return tier


def key() -> bytes:
    """A key that nothing else has."""
    return os.urandom(32)


def put(tier: Tier, *items: tuple[bytes, object]) -> None:
    """Store payloads, all of them."""
    answers = tier.put(items)
    stored = answers == [""] * len(items)
    assert stored, f"put of {len(items)} payloads answered {answers[:9]}"


def read(tier: Tier, *keys: bytes) -> list[bytes | None]:
    """Payloads as bytes, None for a miss."""
    return [None if one is None else bytes(one) for one in tier.get(keys)]


def content(size: int) -> bytes:
    """Bytes of a size, the same each time."""
    return random.Random(size).randbytes(size)


def same(found: object, right: object, what: str) -> None:
    """Fail, with a few words on the case, where two answers differ."""
    # Compared apart: pytest would look for the differences of megabytes, line by line.
    alike = found == right
    assert alike, f"{what}: {_short(found)} in place of {_short(right)}"


def _short(answer: object) -> str:
    if isinstance(answer, bytes) and len(answer) > 40:
        return f"{len(answer)} bytes {answer[:8].hex()}..."
    if isinstance(answer, list):
        return f"[{', '.join(_short(one) for one in answer[:4])}{', ...' * (len(answer) > 4)}]"
    return repr(answer)


@law("Tier.put", "the empty string once `get` would find it")
def what_is_put_is_read_bit_for_bit(opened: Opener) -> None:
    tier = opened()
    payloads = [content(size) for size in (1, 63, 4096, 4097, 1 << 20, (3 << 20) + 1)]
    keys = [key() for _ in payloads]
    put(tier, *zip(keys, payloads, strict=True))
    for name, payload in zip(keys, payloads, strict=True):
        same(read(tier, name), [payload], f"a payload of {len(payload)} bytes")
    there = tier.has(keys)
    assert there == [True] * len(keys) or tier.usage().entries == len(keys), f"has: {there}"
    same(read(tier, *reversed(keys)), payloads[::-1], "all of them, the last one first")
    tier.close()


@law("Tier.put", "Keys of 32 bytes and payloads, bytes-like.")
def payloads_are_any_bytes_like(opened: Opener) -> None:
    tier = opened()
    raw = content(5000)
    kinds = [raw, bytearray(raw), memoryview(raw), memoryview(bytearray(raw))[:]]
    for kind in kinds:
        name = key()
        put(tier, (name, kind))
        same(read(tier, name), [raw], f"a {type(kind).__name__} of 5000 bytes")
    tier.close()


@law("Tier.put", "any other is copied")
def what_changes_after_put_is_not_stored_changed(opened: Opener) -> None:
    tier, name, payload = opened(), key(), bytearray(content(70_000))
    before = bytes(payload)
    put(tier, (name, payload))
    payload[:] = bytes(len(payload))
    same(read(tier, name), [before], "a bytearray of 70000 bytes that changed after put")
    tier.close()


@law("Tier.get", "None for what is not there")
def what_is_absent_is_a_miss(opened: Opener) -> None:
    tier, name = opened(), key()
    same(tier.get([name]), [None], "get of a key that was never put")
    same(tier.has([name]), [False], "has of a key that was never put")
    tier.remove([name])
    same([tier.put([]), tier.get([]), tier.has([])], [[], [], []], "put, get and has of nothing")
    tier.remove([])
    put(tier, (name, b"there"))
    same(read(tier, key(), name, key()), [None, b"there", None], "one of three keys is there")
    tier.close()


@law("Tier.put", "what is there already is left alone")
def what_is_there_is_left_alone(opened: Opener) -> None:
    tier, name = opened(), key()
    put(tier, (name, b"first"))
    put(tier, (name, b"other"))
    same(read(tier, name), [b"first"], "a key that is put twice")
    tier.close()


@law("Tier.remove", "Remove payloads, those that are there.")
def what_is_removed_is_gone_and_may_come_back(opened: Opener) -> None:
    tier, one, other = opened(), key(), key()
    put(tier, (one, b"one"), (other, b"other"))
    tier.remove([one, key()])
    same(read(tier, one, other), [None, b"other"], "the first of two keys was removed")
    same(tier.has([one]), [False], "has of a removed key")
    put(tier, (one, b"again"))
    same(read(tier, one), [b"again"], "a removed key that is put again")
    tier.close()


@law("TierPlace", "each stores its own layers and heads of a chunk")
def ranks_have_parts_of_their_own(opened: Opener) -> None:
    first, second, scheduler = opened(0, 2), opened(1, 2), opened(-1, 2)
    name = key()
    put(first, (name, b"part 0"))
    same(read(second, name), [None], "rank 1 of 2, where rank 0 alone put it")
    same(scheduler.has([name]), [False], "the scheduler, where one rank of 2 put it")
    put(second, (name, b"part 1"))
    same(read(first, name) + read(second, name), [b"part 0", b"part 1"], "ranks 0 and 1")
    if first.shared or first.durable:
        same(scheduler.has([name, key()]), [True, False], "the scheduler, where both ranks put it")
    for tier in (first, second, scheduler):
        tier.close()


@law("TierPlace", "Digest of everything that all KV of the engine depends on")
def another_identity_sees_nothing(opened: Opener) -> None:
    mine, other, name = opened(), opened(identity="f" * 64), key()
    put(mine, (name, b"mine"))
    same(read(other, name), [None], "get under another identity")
    same(other.has([name]), [False], "has under another identity")
    put(other, (name, b"theirs"))
    other.remove([name])
    same(read(mine, name), [b"mine"], "after the same key was removed under another identity")
    mine.close()
    other.close()


@law("Tier", "True if what is stored outlives the process.")
def what_is_durable_is_there_after_closing(opened: Opener) -> None:
    tier, names = opened(), [key(), key()]
    put(tier, *((name, name * 9) for name in names))
    tier.close()
    again = opened()
    durable = tier.durable
    right = [name * 9 if durable else None for name in names]
    same(read(again, *names), right, f"closed and opened again, durable={durable}")
    if durable and not tier.shared:
        found = {name: size for name, size, _ in again.stored()}
        same([found.get(name) for name in names], [9 * 32] * 2, "sizes that `stored` names")
    again.close()


@law("Tier.usage", "What it holds, of this place's rank")
def usage_counts_what_was_put(opened: Opener) -> None:
    tier = opened()
    before = tier.usage()
    put(tier, (key(), bytes(1000)), (key(), bytes(500)))
    after = tier.usage()
    same(after.entries - before.entries, 2, "entries after two puts")
    same(after.size - before.size, 1500, "bytes after puts of 1000 and 500")
    assert after.capacity == before.capacity >= 0, f"capacity was {before}, is {after}"
    counters = tier.counters()
    assert all(isinstance(value, int | float) for value in counters.values()), counters
    tier.close()


@law("Tier.close", "Idempotent.")
def closing_twice_is_closing_once(opened: Opener) -> None:
    tier = opened()
    tier.close()
    tier.close()
    try:
        answers = tier.put([(key(), b"late")])
        assert len(answers) == 1, f"put of one payload after closing answered {answers}"
    except TierError as error:
        assert error.cause, "a TierError without a cause"


@law("Tier", "may be called by several threads at once")
def threads_do_not_disturb_each_other(opened: Opener) -> None:
    tier, shared = opened(), [key() for _ in range(8)]

    def life(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(20):
            name = key()
            own = choose.randbytes(choose.randrange(1, 20_000))
            put(tier, (name, own))
            common = choose.choice(shared)
            put(tier, (common, common * 100))
            same(read(tier, name, common), [own, common * 100], f"thread {seed} of 8")
            tier.has([name])
            tier.usage()
            tier.remove([name])
            same(read(tier, name), [None], f"thread {seed} of 8, a key that it removed")

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(life, seed) for seed in range(8)]:
            done.result()
    tier.close()


@law("Tier", "may be called by several threads at once")
def two_writers_of_one_key_leave_one_whole_payload(opened: Opener) -> None:
    tier = opened()
    other = opened() if tier.shared or tier.durable else tier
    for _ in range(5):
        name, payload = key(), content(300_000)
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(one.put, [(name, payload)]) for one in (tier, other)]
            same([job.result() for job in jobs], [[""], [""]], "two puts of one key")
        for reader in (tier, other):
            same(read(reader, name), [payload], "one key that two threads put")
    tier.close()
    other.close()


@law("Tier.put", "the empty string once `get` would find it")
def many_small_chunks(opened: Opener) -> None:
    tier = opened()
    names = [key() for _ in range(opened.many)]
    for at in range(0, len(names), 500):
        put(tier, *((name, name[:20]) for name in names[at : at + 500]))
    for at in range(0, len(names), 500):
        some = names[at : at + 500]
        same(read(tier, *some), [n[:20] for n in some], f"{len(names)} chunks, those from {at} on")
        tier.remove(some)
    same(read(tier, *names[:100]), [None] * 100, "100 chunks that were removed")
    tier.close()


def resident() -> int:
    """Bytes of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


@law("Tier.remove", "Remove payloads, those that are there.")
def memory_does_not_grow_with_transfers(opened: Opener) -> None:
    tier, payload = opened(), content(16 << 10)

    def transfers(count: int) -> None:
        for _ in range(0, count, 20):
            names = [key() for _ in range(20)]
            put(tier, *((name, payload) for name in names))
            assert all(one is not None for one in tier.get(names)), "a miss right after put"
            tier.remove(names)

    transfers(max(200, opened.many // 10))
    gc.collect()
    before = resident()
    transfers(opened.many)
    gc.collect()
    # What went through is many times as much.
    grown = resident() - before
    assert grown < 48 << 20, f"{opened.many} puts and removes of 16 KiB left {grown >> 20} MiB"
    tier.close()


Law = Callable[[Opener], None]

LAWS: tuple[Law, ...] = (
    what_is_put_is_read_bit_for_bit,
    payloads_are_any_bytes_like,
    what_changes_after_put_is_not_stored_changed,
    what_is_absent_is_a_miss,
    what_is_there_is_left_alone,
    what_is_removed_is_gone_and_may_come_back,
    ranks_have_parts_of_their_own,
    another_identity_sees_nothing,
    what_is_durable_is_there_after_closing,
    usage_counts_what_was_put,
    closing_twice_is_closing_once,
    threads_do_not_disturb_each_other,
    two_writers_of_one_key_leave_one_whole_payload,
    many_small_chunks,
    memory_does_not_grow_with_transfers,
)


class TierLaws(PolicyLaws):
    """Laws of every tier.

    Attributes:
        many: Chunks of the laws that need many.
    """

    policy: ClassVar[type[Tier]]
    many: int = 1000

    def options_in(self, folder: Path) -> Mapping[str, Any]:
        """Return its options; override it for a tier that needs a folder or a server."""
        return self.options

    def build(self, engine: EngineView = ENGINE, **more: Any) -> Any:
        """Make the tier, not opened."""
        if self.options or not more:
            return super().build(engine, **more)
        return self.policy(self.policy.Options.model_validate(more), engine)

    def opener(self, folder: Path) -> Opener:
        """Open the tier of a test, with options of its own folder."""
        options = dict(self.options_in(folder))
        return Opener(lambda: self.build(**options), self.many)


def _test(of: Law) -> Callable[[TierLaws, Path], None]:
    def test(self: TierLaws, tmp_path: Path) -> None:
        of(self.opener(tmp_path))

    test.law = of.law  # type: ignore[attr-defined]
    return test


for _law in LAWS:
    setattr(TierLaws, f"test_{_law.__name__}", _test(_law))
