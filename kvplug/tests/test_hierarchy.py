"""The books of tiers: a model of what is where, driven by every call in any order."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvplug.contract import (
    Action,
    BlockFact,
    EngineView,
    Feature,
    Found,
    Kind,
    Leaving,
    LifecyclePolicy,
    Move,
    PolicyOptions,
    PrefixCachePolicy,
    Pressure,
    Released,
    RequestView,
    TierView,
)
from kvplug.registry import plugins
from kvplug.tiers.ghost import GhostList
from kvplug.tiers.hierarchy import Hierarchy, TierBook, order_engine

ENGINE = EngineView(16, 8, features=frozenset({Feature.PREFIX_CACHING}), host="test")
ORDERS = ["lru", "arc", "s3fifo", "tree", "gdsf", "lirs", "slru", "tinylfu", "foresight", "sieve"]
KEYS = [bytes([i]) * 32 for i in range(24)]
SIZE = 100


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Steered(LifecyclePolicy):
    """Does what a test says next, possible or not."""

    name = "steered"
    changes = "what the test says"

    def __init__(self) -> None:
        super().__init__(PolicyOptions(), ENGINE)
        self.tier: str | None = "fast"
        self.moves: list[Move] = []
        self.number: int | None = None
        self.seen: Pressure | None = None
        self.want = 0
        self.leaving: Sequence[Leaving] = []

    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        self.leaving = leaving
        return [self.tier] * len(leaving)

    def plan(self, pressure: Pressure) -> list[Move]:
        self.seen = pressure
        return self.moves

    def wants(self, tier: TierView) -> int:
        return self.want

    def load(self, found: Found, tiers: object) -> int:
        return len(found.tokens) if self.number is None else self.number


def order(name: str, capacity: int = 5 * SIZE) -> PrefixCachePolicy:
    policy = plugins().registry.get(Kind.PREFIX_CACHE, name)
    assert policy is not None and issubclass(policy, PrefixCachePolicy)
    return policy(policy.Options(), order_engine(ENGINE, capacity, SIZE))


def book(name: str, chunks: int, of: str = "lru", exact: bool = True) -> TierBook:
    return TierBook(name, chunks * SIZE, exact, False, name == "slow", order(of, chunks * SIZE))


def hierarchy(
    *books: TierBook, policy: LifecyclePolicy | None = None, clock: Clock | None = None
) -> Hierarchy:
    return Hierarchy(list(books), policy or Steered(), clock or Clock(), GhostList(64))


def leave(key: bytes, **more: object) -> Leaving:
    return Leaving(key, 0, 16, **more)  # type: ignore[arg-type]


def stored(books: Hierarchy, tier: str, keys: Sequence[bytes]) -> None:
    for key in keys:
        books.put(tier, key, SIZE)


POOL = TierView("pool", 50, 100)


class Books(RuleBasedStateMachine):
    """The hierarchy beside a worker that carries orders out and a model of what it holds."""

    @initialize(orders=st.lists(st.sampled_from(ORDERS), min_size=2, max_size=2))
    def start(self, orders: list[str]) -> None:
        self.clock = Clock()
        self.policy = Steered()
        self.capacity = {"fast": 4 * SIZE, "slow": 7 * SIZE}
        self.books = hierarchy(
            book("fast", 4, orders[0]),
            book("slow", 7, orders[1]),
            policy=self.policy,
            clock=self.clock,
        )
        self.there: dict[str, dict[bytes, int]] = {"fast": {}, "slow": {}}
        self.coming: dict[bytes, tuple[str, int]] = {}
        self.pins: dict[bytes, int] = {}
        self.was_full = False

    def taken(self, tier: str) -> int:
        """Bytes held, or on their way."""
        return sum(self.there[tier].values()) + sum(
            size for to, size in self.coming.values() if to == tier
        )

    def carry_out(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for key in move.keys:
                assert key in self.there[move.source], "only what is there moves"
                if move.action is Action.DROP:
                    assert not self.pins.get(key), "what is being loaded stays"
                    del self.there[move.source][key]
                else:
                    assert key not in self.coming, "one move a chunk"
                    assert move.target is not None and key not in self.there[move.target]
                    demoted = move.action is Action.DEMOTE
                    assert not (demoted and self.pins.get(key))
                    self.coming[key] = move.target, self.there[move.source][key]

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=6), tier=st.sampled_from(["fast", "slow"]))
    def leaving(self, keys: list[bytes], tier: str) -> None:
        self.clock.now += 1
        self.policy.tier = tier
        known = {k for k in KEYS if k in self.coming or any(k in t for t in self.there.values())}
        orders = self.books.leaving([leave(key) for key in keys], SIZE)
        full = self.taken("fast") + len(set(keys)) * SIZE > self.capacity["fast"] or self.was_full
        self.policy.moves = []
        self.policy.want = 0
        self.carry_out(self.books.plan(0, POOL))
        for key, name in orders:
            assert name == tier or (name == "slow" and full), "around a full tier only"
            assert key not in self.coming
            assert key not in known, "what a tier holds is not stored again"
            self.coming[key] = name, SIZE
        assert len(dict(orders)) == len(orders)

    @precondition(lambda self: self.coming)
    @rule(
        data=st.data(),
        size=st.sampled_from([SIZE, SIZE // 2]),
        works=st.booleans(),
        cause=st.sampled_from(["test", "full"]),
    )
    def arrives(self, data: st.DataObject, size: int, works: bool, cause: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.coming)))
        tier, _ = self.coming.pop(key)
        if works:
            self.there[tier][key] = size
            self.books.put(tier, key, size)
        else:
            self.was_full |= cause == "full"
            self.books.lost(tier, key, cause)
        self.policy.moves = []
        self.policy.want = 0
        self.carry_out(self.books.plan(0, POOL))

    @rule(
        action=st.sampled_from(list(Action)),
        keys=st.lists(st.sampled_from(KEYS), max_size=8),
        want=st.integers(0, 5 * SIZE),
    )
    def plan(self, action: Action, keys: list[bytes], want: int) -> None:
        self.clock.now += 1
        source, target = "fast", "slow"
        if action is Action.PROMOTE:
            source, target = target, source
        to = None if action is Action.DROP else target
        self.policy.moves = [Move(action, keys, source, to)]
        self.policy.want = want
        moves = self.books.plan(0, POOL)
        seen = self.policy.seen
        assert seen is not None
        for tier, shown in seen.candidates.items():
            assert all(
                self.there[tier][k] == n for k, n in zip(shown, seen.sizes[tier], strict=True)
            )
            assert not any(self.pins.get(k) or k in self.coming for k in shown)
            free = [
                n
                for k, n in self.there[tier].items()
                if not self.pins.get(k) and k not in self.coming
            ]
            assert sum(seen.sizes[tier]) >= min(want, sum(free))
        self.carry_out(moves)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=5, unique=True))
    def load(self, keys: list[bytes]) -> None:
        holders = self.books.holders(keys)
        for key, name in zip(keys, holders, strict=True):
            best = next((t for t in ("fast", "slow") if key in self.there[t]), None)
            assert name == best
        self.books.asked(keys, next((i for i, n in enumerate(holders) if n is None), len(keys)))
        found = [key for key, name in zip(keys, holders, strict=True) if name is not None]
        self.books.used(found)
        self.books.pin(found)
        for key in found:
            self.pins[key] = self.pins.get(key, 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def loaded(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(k for k, n in self.pins.items() if n)))
        self.pins[key] -= 1
        self.books.unpin([key])

    @rule(tier=st.sampled_from(["fast", "slow"]), key=st.sampled_from(KEYS))
    def torn(self, tier: str, key: bytes) -> None:
        if self.there[tier].pop(key, None) is not None:
            self.books.lost(tier, key, "checksum")

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "books"):
            return
        counters = self.books.counters()
        for tier, there in self.there.items():
            assert counters[f"{tier}_chunks"] == len(there)
            assert counters[f"{tier}_bytes"] == sum(there.values()) <= self.capacity[tier]
            assert self.taken(tier) <= self.capacity[tier]
            assert not counters.get(f"{tier}_order_errors")
        assert not counters.get("lifecycle_errors")


Books.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
TestBooks = Books.TestCase


@pytest.mark.parametrize("name", ORDERS)
def test_chunks_leave_in_the_order_of_their_tier(name: str) -> None:
    choose = random.Random(name)
    books, alone = hierarchy(book("fast", 8, name)), order(name, 8 * SIZE)
    slots: dict[bytes, int] = {}
    for i in range(300):
        key = bytes([choose.randrange(20)]) * 32
        if key in slots:
            books.used([key])
            alone.on_hit([slots[key]])
            alone.on_release(Released([slots[key]], [0], [key], None, [-1]))
            continue
        [(stored_key, tier)] = books.leaving([leave(key)], SIZE)
        expected = set(slots)
        free = next(n for n in range(9) if n not in slots.values())
        if len(slots) == 8:
            [victim] = alone.victims(1)
            alone.on_remove([victim])
            gone = next(k for k, slot in slots.items() if slot == victim)
            expected.remove(gone)
            free = slots.pop(gone)
        assert {k for k in map(bytes, KEYS) if books.holders([k]) == ["fast"]} == expected, i
        books.put(tier, stored_key, SIZE)
        slots[key] = free
        alone.on_release(Released([free], [0], [key], None, [-1]))
    assert not books.counters().get("fast_order_errors")


# -- one at a time ---------------------------------------------------------------------------------


def test_a_demoted_chunk_is_read_above_until_it_is_below() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 4), book("slow", 4), policy=policy)
    stored(books, "fast", KEYS[:2])
    policy.moves = [Move(Action.DEMOTE, KEYS[:1], "fast", "slow")]
    [move] = books.plan(0, POOL)
    assert (move.action, move.source, move.target) == (Action.DEMOTE, "fast", "slow")
    assert books.holders(KEYS[:1]) == ["fast"]
    # Its room is no longer counted as taken, and it does not leave a second time.
    assert books.views()["fast"].used == SIZE
    assert books.plan(1, POOL) == []
    policy.moves = []
    books.put("slow", KEYS[0], SIZE)
    assert books.holders(KEYS[:1]) == ["slow"]
    assert books.settle() == [Move(Action.DROP, [KEYS[0]], "fast")]


def test_a_demoted_chunk_that_is_being_loaded_stays() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 4), book("slow", 4), policy=policy)
    stored(books, "fast", KEYS[:1])
    policy.moves = [Move(Action.DEMOTE, KEYS[:1], "fast", "slow")]
    books.plan(0, POOL)
    books.pin(KEYS[:1])
    books.put("slow", KEYS[0], SIZE)
    assert books.settle() == [] and books.holders(KEYS[:1]) == ["fast"]


@pytest.mark.parametrize("action", [Action.DROP, Action.DEMOTE])
def test_what_is_being_loaded_does_not_go(action: Action) -> None:
    policy = Steered()
    books = hierarchy(book("fast", 4), book("slow", 4), policy=policy)
    stored(books, "fast", KEYS[:2])
    books.pin(KEYS[:1])
    target = None if action is Action.DROP else "slow"
    policy.moves = [Move(action, KEYS[:2], "fast", target)]
    assert [move.keys for move in books.plan(0, POOL)] == [[KEYS[1]]]
    books.unpin(KEYS[:1])
    assert [move.keys for move in books.plan(1, POOL)] == [[KEYS[0]]]


def test_a_move_that_fails_leaves_its_source_as_it_was() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 2), book("slow", 1), policy=policy)
    stored(books, "fast", KEYS[:2])
    policy.moves = [Move(Action.DEMOTE, KEYS[:1], "fast", "slow")]
    books.plan(0, POOL)
    books.lost("slow", KEYS[0], "full")
    policy.moves = []
    stored(books, "slow", KEYS[9:10])
    assert books.holders(KEYS[:1]) == ["fast"] and books.causes() == {"slow full": 1}
    # It is in the order again, as the last one to have come.
    books.leaving([leave(KEYS[2]), leave(KEYS[3])], SIZE)
    dropped = [key for move in books.plan(1, POOL) for key in move.keys]
    assert dropped == [KEYS[1], KEYS[0]]


def test_what_was_turned_away_is_asked_about_again_once_a_request_wants_it() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 4), policy=policy)
    policy.tier = None
    assert books.leaving([leave(KEYS[0])], SIZE) == []
    policy.tier, policy.leaving = "fast", []
    assert books.leaving([leave(KEYS[0])], SIZE) == [] and not policy.leaving
    books.asked([KEYS[0]], 0)
    assert books.leaving([leave(KEYS[0])], SIZE) == [(KEYS[0], "fast")]
    assert [chunk.misses for chunk in policy.leaving] == [1]


def test_only_new_chunks_are_asked_about() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 4), policy=policy)
    stored(books, "fast", KEYS[:1])
    assert books.leaving([leave(KEYS[0]), leave(KEYS[1]), leave(KEYS[1])], SIZE) == [
        (KEYS[1], "fast")
    ]
    assert [chunk.key for chunk in policy.leaving] == [KEYS[1]]
    assert not books.leaving([leave(KEYS[1])], SIZE), "it is on its way"


def test_uses_in_the_pool_count_once_a_chunk_leaves_it_again() -> None:
    clock = Clock()
    books = hierarchy(book("fast", 2), clock=clock)
    for key in KEYS[:2]:
        clock.now += 1
        books.put("fast", key, SIZE)
    clock.now += 10
    # The older one was used in the pool a second ago, the newer one not since it was stored.
    books.leaving([leave(KEYS[0], idle=1.0), leave(KEYS[1], idle=10.0)], SIZE)
    books.leaving([leave(KEYS[2])], SIZE)
    assert books.plan(0, POOL) == [Move(Action.DROP, [KEYS[1]], "fast")]


def test_a_tier_that_failed_is_left_alone_and_asked_again_later() -> None:
    clock, policy = Clock(), Steered()
    books = hierarchy(book("fast", 4), book("slow", 4), clock=clock, policy=policy)
    stored(books, "fast", KEYS[:1])
    stored(books, "slow", KEYS[:2])
    books.failed("fast", "no answer")
    assert books.holders(KEYS[:2]) == ["slow", "slow"]
    assert books.leaving([leave(KEYS[3])], SIZE) == [(KEYS[3], "slow")]
    policy.moves = [Move(Action.DEMOTE, KEYS[:1], "fast", "slow")]
    assert books.plan(0, POOL) == []
    clock.now += 1
    assert books.holders(KEYS[:2]) == ["fast", "slow"]
    books.failed("fast", "no answer")
    clock.now += 0.7
    assert books.holders(KEYS[:1]) == ["slow"], "the second pause is longer"


def test_what_a_codec_changed_never_enters_an_exact_tier() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 4, exact=False), book("slow", 4), policy=policy)
    stored(books, "fast", KEYS[:1])
    policy.moves = [Move(Action.DEMOTE, KEYS[:1], "fast", "slow")]
    assert books.plan(0, POOL) == []
    assert books.counters()["refused_inexact"] == 1
    assert books.holders(KEYS[:1]) == ["fast"]


def test_a_burst_goes_around_a_full_tier_before_anything_goes() -> None:
    books = hierarchy(book("fast", 2), book("slow", 2))
    orders = books.leaving([leave(key) for key in KEYS[:5]], SIZE)
    assert [tier for _, tier in orders] == ["fast", "fast", "slow", "slow"]
    for key, tier in orders:
        books.put(tier, key, SIZE)
    assert books.leaving([leave(KEYS[5])], SIZE) == [(KEYS[5], "fast")]
    assert books.settle() == [Move(Action.DROP, [KEYS[0]], "fast")]


def test_queued_requests_chunks_are_brought_up_as_far_as_there_is_room() -> None:
    books = hierarchy(book("fast", 2), book("slow", 8))
    stored(books, "slow", KEYS[:4])
    [move] = books.promote(KEYS[:4])
    assert move == Move(Action.PROMOTE, KEYS[:2], "slow", "fast")
    assert books.promote(KEYS[:2]) == [], "they are on their way"
    books.put("fast", KEYS[0], SIZE)
    assert books.holders(KEYS[:1]) == ["fast"]


def test_reset_forgets_everything() -> None:
    books = hierarchy(book("fast", 4), book("slow", 4))
    stored(books, "fast", KEYS[:2])
    books.leaving([leave(KEYS[3])], SIZE)
    books.reset()
    assert books.holders(KEYS[:4]) == [None] * 4
    assert books.views()["fast"].used == 0 and books.plan(0, POOL) == []
    # What was on its way arrives from before: nobody knows it.
    books.lost("fast", KEYS[3], "late")
    assert books.leaving([leave(KEYS[0])], SIZE) == [(KEYS[0], "fast")]


def test_useless_stores_are_those_that_went_unread() -> None:
    books = hierarchy(book("fast", 2))
    stored(books, "fast", KEYS[:2])
    books.used(KEYS[:1])
    books.leaving([leave(KEYS[2]), leave(KEYS[3])], SIZE)
    counters = books.counters()
    assert counters["fast_useful"] == 1 and counters["fast_useless"] == 1


def test_a_tier_found_above_its_quota_is_brought_below_it() -> None:
    books = hierarchy(book("slow", 3))
    stored(books, "slow", KEYS[:5])
    assert books.counters()["slow_chunks"] == 3
    assert books.settle() == [Move(Action.DROP, [key], "slow") for key in KEYS[:2]]


@pytest.mark.parametrize("lifecycle", ["watermarks", "ladder", "everything"])
def test_a_tier_that_is_full_before_its_books_are_gives_up_the_oldest(lifecycle: str) -> None:
    """As where one of two workers has more than half of the layers."""
    policy = plugins().registry.get(Kind.LIFECYCLE, lifecycle)
    assert policy is not None and issubclass(policy, LifecyclePolicy)
    books = hierarchy(book("fast", 20), policy=policy(policy.Options(), ENGINE))
    held: list[bytes] = []
    failed = []
    for key in [n.to_bytes(32, "big") for n in range(200)]:
        stored = books.leaving([leave(key)], SIZE)
        for move in books.plan(0, POOL):
            held = [one for one in held if one not in move.keys]
        if stored and len(held) < 12:
            held.append(key)
            books.put("fast", key, SIZE)
        elif stored:
            failed.append(key)
            books.lost("fast", key, "full")
    assert len(held) >= 11 and 1 <= len(failed) <= 20
    assert min(int.from_bytes(key, "big") for key in held) > 180


def test_a_tier_without_a_limit_is_known_as_far_as_the_book_goes() -> None:
    unlimited = TierBook("redis", 0, True, True, True, order("lru"), entries=10)
    books = hierarchy(unlimited)
    stored(books, "redis", KEYS[:20])
    assert books.counters()["redis_chunks"] == 10
    assert books.holders(KEYS[8:12]) == [None, None, "redis", "redis"]


class Wrong(PrefixCachePolicy):
    """An order that fails in one of its verbs, or names what it may not."""

    name = "wrong"
    changes = "nothing"

    def __init__(self, fails: str):
        super().__init__(PolicyOptions(), ENGINE)
        self.fails = fails

    def fail(self, verb: str) -> None:
        if self.fails == verb:
            raise RuntimeError("out of order")

    def on_release(self, released: Released) -> None:
        self.fail("on_release")

    def on_hit(self, ids: Sequence[int]) -> None:
        self.fail("on_hit")

    def on_remove(self, ids: Sequence[int]) -> None:
        self.fail("on_remove")

    def victims(self, n: int) -> Sequence[int]:
        self.fail("victims")
        wrong = {"unknown": [999] * n, "twice": [0] * n, "few": [], "text": ["a"] * n}
        return wrong.get(self.fails, [0])  # type: ignore[return-value]


@pytest.mark.parametrize(
    "fails", ["on_release", "on_hit", "on_remove", "victims", "unknown", "twice", "few", "text"]
)
def test_a_failing_order_is_retired_and_use_takes_its_place(fails: str) -> None:
    wrong = TierBook("fast", 3 * SIZE, True, False, False, Wrong(fails))
    books = hierarchy(wrong)
    stored(books, "fast", KEYS[:3])
    books.used(KEYS[:1])
    books.leaving([leave(KEYS[3])], SIZE)
    books.put("fast", KEYS[3], SIZE)
    books.leaving([leave(KEYS[4]), leave(KEYS[5])], SIZE)
    assert books.counters()["fast_order_errors"] == 1
    dropped = [key for move in books.plan(0, POOL) for key in move.keys]
    assert len(dropped) == 3
    # What it named before it failed is gone as it said.
    if fails not in ("on_remove", "twice"):
        assert dropped == [KEYS[1], KEYS[2], KEYS[0]]


class Broken(Steered):
    """A lifecycle policy that fails in one of its verbs."""

    def __init__(self, fails: str):
        super().__init__()
        self.fails = fails

    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        wrong: dict[str, list[str | None]] = {"few": [], "unknown tier": ["tape"] * len(leaving)}
        if self.fails == "store":
            raise RuntimeError("broken")
        return wrong.get(self.fails, ["fast"] * len(leaving))

    def plan(self, pressure: Pressure) -> list[Move]:
        wrong = {
            "upwards": Move(Action.DEMOTE, KEYS[:1], "slow", "fast"),
            "no target": Move(Action.COPY, KEYS[:1], "fast"),
            "no source": Move(Action.DROP, KEYS[:1], "tape"),
            "no action": Move("melt", KEYS[:1], "fast"),  # type: ignore[arg-type]
            "keys that change": Move(Action.DROP, [bytearray(KEYS[0])], "fast"),  # type: ignore[list-item]
        }
        if self.fails == "plan":
            raise RuntimeError("broken")
        return [wrong[self.fails]] if self.fails in wrong else []

    def load(self, found: Found, tiers: object) -> int:
        if self.fails == "load":
            raise RuntimeError("broken")
        return {"more than all": 99, "less than none": -1}.get(self.fails, 1)

    def on_used(self, keys: Sequence[bytes]) -> None:
        if self.fails == "on_used":
            raise SystemExit


FAILING = [
    *("store", "few", "unknown tier", "plan", "upwards", "no target", "no source", "no action"),
    *("load", "more than all", "less than none", "on_used", "keys that change"),
]


@pytest.mark.parametrize("fails", FAILING)
def test_a_failing_lifecycle_policy_is_retired_and_all_that_leaves_is_stored(fails: str) -> None:
    books = hierarchy(book("fast", 4), book("slow", 4), policy=Broken(fails))
    books.leaving([leave(KEYS[0])], SIZE)
    books.put("fast", KEYS[0], SIZE)
    books.plan(0, POOL)
    number = books.load(Found([16, 16], [SIZE, SIZE], ["fast", "fast"], 0, 64))
    books.used(KEYS[:1])
    assert books.counters()["lifecycle_errors"] == 1
    assert number == (2 if fails != "on_used" else 1)
    assert books.leaving([leave(KEYS[1])], SIZE) == [(KEYS[1], "fast")]
    assert books.plan(1, POOL) == []


def test_a_policy_that_wants_more_than_there_is_sees_all_there_is() -> None:
    policy = Steered()
    policy.want = 1 << 80
    books = hierarchy(book("fast", 4), book("slow", 4), policy=policy)
    stored(books, "fast", KEYS[:3])
    assert books.plan(0, POOL) == [] and not books.retired
    assert policy.seen is not None
    assert policy.seen.candidates == {"fast": KEYS[:3], "slow": []}


class Meddling(Steered):
    """Changes what it is shown, as far as that lets it, and answers for what is left."""

    def store(self, leaving: Sequence[Leaving], tiers: Sequence[TierView]) -> list[str | None]:
        _meddled(leaving)
        return ["fast"] * len(leaving)

    def load(self, found: Found, tiers: object) -> int:
        for one in (found.tokens, found.sizes, found.tiers, found.loading, found.computing):
            _meddled(one)
        return len(found.tokens)

    def on_used(self, keys: Sequence[bytes]) -> None:
        _meddled(keys)


class MeddlingOrder(Wrong):
    """An order that does so at the end of a request."""

    needs = frozenset({BlockFact.FINISHED})

    def __init__(self) -> None:
        super().__init__("")

    def on_finished(self, request: RequestView, keys: Sequence[bytes], tokens: int) -> None:
        _meddled(keys)


def _meddled(shown: Any) -> None:
    with contextlib.suppress(AttributeError):
        shown.extend([shown[0]] * 3)


def test_what_a_policy_does_to_what_it_is_shown_changes_nothing() -> None:
    fast = TierBook("fast", 4 * SIZE, True, False, False, MeddlingOrder())
    books = hierarchy(fast, book("slow", 4), policy=Meddling())
    assert books.leaving([leave(KEYS[0])], SIZE) == [(KEYS[0], "fast")]
    books.put("fast", KEYS[0], SIZE)
    books.measured("fast", "read", SIZE, 1.0)
    books.computed(16, 136.0, 1.0)
    assert books.load(Found([16], [SIZE], ["fast"], 0, 64)) == 1
    keys = KEYS[:1]
    books.used(keys)
    books.finished(RequestView("r", 64), keys, 1)
    assert keys == KEYS[:1]
    assert not books.retired and not books.order_retired("fast")


def test_the_end_of_a_request_reaches_the_orders_that_ask_for_it() -> None:
    books = hierarchy(book("fast", 4, "foresight"), book("slow", 4))
    stored(books, "fast", KEYS[:2])
    books.finished(RequestView("1", 32), KEYS[:2], 5)
    assert not books.counters().get("fast_order_errors")


def test_what_the_books_keep_is_bounded() -> None:
    policy = Steered()
    books = hierarchy(book("fast", 8), book("slow", 8), policy=policy)
    for i in range(3000):
        key = i.to_bytes(32, "little")
        policy.tier = [None, "fast", "slow"][i % 3]
        for stored_key, tier in books.leaving([leave(key)], SIZE):
            books.put(tier, stored_key, SIZE)
        books.plan(i, POOL)
    assert len(books._chunks) == 16
    assert len(books.ghosts) == 64
    assert all(len(shelf.of_slot) == 8 for shelf in books._shelves)
    assert max(max(shelf.of_slot) for shelf in books._shelves) <= 9, "numbers are used again"


def test_counters_are_numbers_and_tell_both_sides() -> None:
    books = hierarchy(book("fast", 4))
    stored(books, "fast", KEYS[:2])
    books.measured("fast", "read", 1 << 20, 0.001)
    books.computed(100, 5050.0, 0.01)
    number, found = books.decide(Found([16, 16], [SIZE, SIZE], ["fast", "fast"], 0, 64))
    assert number == 2 and len(found.loading) == 3 == len(found.computing)
    counters = books.counters()
    assert counters["loading_seconds"] == found.loading[2]
    assert counters["loading_saved_seconds"] == found.computing[0] - found.computing[2] > 0
    assert counters["fast_read_bandwidth"] > 0 and counters["prefill_tokens_per_second"] > 0
    assert all(value >= 0 for value in counters.values())
